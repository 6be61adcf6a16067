"""Data sets as others leave them on the disk: splits of class folders, MNIST's files, Parquet of the hub."""

import gzip
import io
import struct
import sys

import numpy as np
import pytest
import torch
from helpers_hostile import line_of

from maskops.data import holds_pictures, load_images

image_module = pytest.importorskip("PIL.Image", reason="pictures need Pillow")


def pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    file = io.BytesIO()
    image_module.fromarray(array).save(file, format="PNG")
    return file.getvalue()


def write_folder(folder, count, size=4):
    for index in range(count):
        file = folder / "ab"[index % 2] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(pixels(size, size, 3, seed=index)))


def test_a_split_of_an_imagefolder_is_named(tmp_path):
    write_folder(tmp_path / "train", 4)
    write_folder(tmp_path / "test", 2)
    assert load_images(f"{tmp_path}:train")[1].tolist() == [0, 0, 1, 1]
    images, labels = load_images(f"{tmp_path}:test")
    assert labels.tolist() == [0, 1] and torch.equal(images, load_images(tmp_path / "test")[0])
    assert f"choose one of its folders, such as {tmp_path}:test" in line_of(tmp_path)
    assert "/valid" in line_of(f"{tmp_path}:valid")
    write_folder(tmp_path / "odd:train", 2)
    assert len(load_images(tmp_path / "odd:train")[1]) == 2


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, prefix="train", packed=False, dot="-", images=None, labels=None):
    folder.mkdir(parents=True, exist_ok=True)
    images = pixels(5, 6, 7) if images is None else images
    for name, array in (("images", images), ("labels", np.arange(5, dtype=np.uint8) if labels is None else labels)):
        content = array if isinstance(array, bytes) else idx(array)
        file = folder / f"{prefix}-{name}{dot}idx{3 if name == 'images' else 1}-ubyte{'.gz' * packed}"
        file.write_bytes(gzip.compress(content, 1, mtime=0) if packed else content)


@pytest.mark.parametrize(("packed", "dot"), [(False, "-"), (True, "-"), (False, "."), (True, ".")])
def test_mnist_is_read_as_torchvision_leaves_it(tmp_path, packed, dot):
    write_mnist(tmp_path / "MNIST" / "raw", "train", packed, dot)
    write_mnist(tmp_path / "MNIST" / "raw", "t10k", packed, dot, images=pixels(5, 6, 7, seed=1))
    for folder in (tmp_path / "MNIST", tmp_path / "MNIST" / "raw"):
        for part, seed in (("train", 0), ("test", 1)):
            images, labels = load_images(f"{folder}:{part}")
            assert torch.equal(images, torch.from_numpy(pixels(5, 6, 7, seed=seed))[:, None] / 255)
            assert labels.tolist() == list(range(5)) and not holds_pictures(f"{folder}:{part}")
        assert f"choose {folder}:train or {folder}:test" in line_of(folder)
    assert load_images(f"{tmp_path}/MNIST:test", size=4)[0].shape == (5, 1, 4, 4)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"images": b""}, "it ends 16 bytes too soon"),
        ({"images": struct.pack(">4I", 0x801, 5, 6, 7) + bytes(210)}, "it begins with 0x801, not 0x803"),
        ({"images": struct.pack(">4I", 0x803, 5, 6, 7) + bytes(300)}, "it has more than shape [5, 6, 7] takes"),
        ({"images": struct.pack(">4I", 0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(300)}, "it claims shape"),
        ({"images": struct.pack(">4I", 0x803, 0, 6, 7)}, "expected at least one image"),
        ({"labels": idx(np.arange(4, dtype=np.uint8))}, "labels must have shape (5,), one for each image"),
    ],
)
def test_files_that_are_not_mnist_s_are_one_line(tmp_path, packed, files, words):
    write_mnist(tmp_path, packed=packed, **files)
    assert words.replace("[5, 6, 7]", "(5, 6, 7)") in line_of(f"{tmp_path}:train")


def test_packed_files_take_no_more_than_they_have(tmp_path):
    claimed = struct.pack(">4I", 0x803, 1000, 1000, 1000) + bytes(1000)
    write_mnist(tmp_path, packed=True, images=claimed)
    assert "bytes too soon" in line_of(f"{tmp_path}:train")
    file = tmp_path / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-12])
    assert "cannot read" in line_of(f"{tmp_path}:train")
    assert "holds no t10k-images-idx3-ubyte" in line_of(f"{tmp_path}:test")
    (tmp_path / "train-labels-idx1-ubyte.gz").unlink()
    assert "holds no train-labels-idx1-ubyte" in line_of(f"{tmp_path}:train")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "train-0.parquet").touch()
    with pytest.raises(ImportError, match=r"^load_images: Parquet files need pyarrow: pip install maskops\[parquet\]$"):
        load_images(tmp_path)


@pytest.fixture
def write_parquet():
    """Writes rows as a Parquet file; a test that asks for it is skipped without pyarrow."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet files need pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")

    def write(file, columns, **how):
        file.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.table(columns), file, **how)

    return write


def rows(count, size=4, start=0):
    arrays = [pixels(size, size, 3, seed=index + start) for index in range(count)]
    return [{"bytes": png(array), "path": f"{index}.png"} for index, array in enumerate(arrays)]


def test_parquet_of_the_hub_is_read(tmp_path, write_parquet):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": rows(2), "label": [1, 0]})
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": rows(1, start=2), "label": [2]})
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", {"image": rows(1, start=3), "label": [3]})
    images, labels = load_images(f"{tmp_path}:train")
    expected = np.stack([pixels(4, 4, 3, seed=index) for index in range(3)])
    assert torch.equal(images, torch.from_numpy(expected).permute(0, 3, 1, 2) / 255) and labels.tolist() == [1, 0, 2]
    assert load_images(f"{tmp_path}/data:test")[1].tolist() == [3] and holds_pictures(f"{tmp_path}:test")
    assert f"choose {tmp_path}:test or {tmp_path}:train" in line_of(tmp_path)
    assert "holds no 'valid'" in line_of(f"{tmp_path}:valid")
    file = tmp_path / "data" / "test-00000-of-00001.parquet"
    assert load_images(file, size=8)[0].shape == (1, 3, 8, 8)
    assert "is one set of images; it has no 'test'" in line_of(f"{file}:test")
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    assert len(load_images(tmp_path)[1]) == 3


def test_columns_go_by_kind_where_they_have_other_names(tmp_path, write_parquet):
    plain = [row["bytes"] for row in rows(2)]
    write_parquet(tmp_path / "a.parquet", {"id": ["a", "b"], "jpg": plain, "coarse": [9, 9], "fine_label": [1, 0]})
    assert load_images(tmp_path / "a.parquet")[1].tolist() == [1, 0]
    write_parquet(tmp_path / "b.parquet", {"jpg": plain, "class": [1, 0]})
    assert load_images(tmp_path / "b.parquet")[1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"image": rows(1)}, "one of whole numbers, such as label; it has image"),
        ({"label": [1]}, "a column of encoded images, such as image"),
        ({"image": ["a.png"], "label": [1]}, "a column of encoded images, such as image"),
        ({"image": rows(1), "label": ["cat"]}, "one of whole numbers, such as label"),
        ({"image": rows(1), "a": [1], "b": [1]}, "one of whole numbers, such as label"),
        ({"image": [b"\x89PNG broken"], "label": [1]}, "row 0 ("),
        ({"image": [b"%!PS-Adobe-3.0 EPSF-3.0\n"], "label": [1]}, "row 0 (UnidentifiedImageError"),
        ({"image": [*rows(1), None], "label": [1, 1]}, "a row lacks its picture or its label"),
        ({"image": rows(2), "label": [1, None]}, "a row lacks its picture or its label"),
        ({"image": rows(1), "label": [-1]}, "labels must be at least 0; got -1"),
        ({"image": [*rows(1), *rows(1, 5)], "label": [1, 0]}, "row 0 is (4, 4), "),
        ({"image": [{"bytes": b"", "path": "a"}][:0], "label": []}, "it must have"),
    ],
)
def test_parquet_of_no_use_is_one_line(tmp_path, write_parquet, columns, words):
    write_parquet(tmp_path / "x.parquet", columns)
    assert words in line_of(tmp_path / "x.parquet")


def test_parquet_that_means_harm_is_one_line(tmp_path, write_parquet, monkeypatch):
    file = tmp_path / "x.parquet"
    file.write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    assert "cannot read" in line_of(file)
    large = [png(np.zeros((200, 200, 3), np.uint8))] * 2000
    write_parquet(file, {"image": large, "label": [0] * len(large)}, compression="zstd")
    monkeypatch.setattr("maskops.parquet._LARGE", 1 << 20)
    assert "so many pixels in a file of" in line_of(file)
    write_parquet(file, {"image": [bytes(3 << 20)], "label": [0]}, compression="zstd")
    assert "its rows unpack from" in line_of(file)
    monkeypatch.setattr("maskops.parquet._MOST_ROWS", 10)
    write_parquet(file, {"image": rows(1) * 11, "label": [0] * 11})
    assert "it has 11 rows, more than 10" in line_of(file)


def test_a_pyarrow_that_could_run_code_is_refused(tmp_path, write_parquet, monkeypatch):
    write_parquet(tmp_path / "x.parquet", {"image": rows(1), "label": [0]})
    monkeypatch.setattr("pyarrow.__version__", "14.0.0")
    with pytest.raises(ImportError, match=r"^load_images: Parquet files need pyarrow of at least 15; got 14.0.0$"):
        load_images(tmp_path)
