"""Images and labels that mean harm, or are of no use: one line, nothing run, nothing large allocated or changed."""

import copy
import gc
import io
import os
import pickle
import struct
import zipfile
import zlib

import numpy as np
import pytest
import torch
from helpers_hostile import line_of, nothing_but, tree
from PIL import Image
from torch import nn

from maskops.checkpoint import save_state_dict
from maskops.cli import main
from maskops.data import as_tensors, load_images, one_shot
from maskops.purify import awm
from maskops.purify.baselines import ft


@pytest.fixture(autouse=True, scope="module")
def _garbage_of_other_tests_is_gone():
    gc.collect()  # which may warn, of files that nobody closed


IMAGES, LABELS = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
PIXELS = np.zeros((2, 3, 4, 4), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (IMAGES, torch.tensor([0, 1, 2, -(2**62)])),
        (IMAGES, torch.tensor([0, 1, torch.nan, 0])),
        (IMAGES, torch.tensor([0, 1, 2, 0], dtype=torch.complex64)),
        (IMAGES, np.array([0, 1, 2, 0], dtype=object)),
        (IMAGES, np.array([0, 1, 2, 2**64 - 1], dtype=np.uint64)),
        (IMAGES, np.array(["0", "1", "2", "0"])),
        (IMAGES, np.array([0, 1, 2, 0], dtype="datetime64[s]")),
        (IMAGES, torch.zeros(4, dtype=torch.int64).to_sparse()),
        (IMAGES, torch.zeros(4, dtype=torch.int64, device="meta")),
        (IMAGES, torch.tensor(0)),
        (IMAGES.bool(), LABELS),
        (IMAGES.to(torch.complex64), LABELS),
        (IMAGES.to(torch.float8_e4m3fn), LABELS),
        (IMAGES.to_sparse(), LABELS),
        (IMAGES.to("meta"), LABELS),
        (IMAGES.numpy().astype(object), LABELS),
        (IMAGES.numpy().astype(np.longdouble), LABELS),
        (np.zeros((4, 3, 8, 8), dtype=[("a", "f4")]), LABELS),
        (IMAGES.index_fill(2, torch.tensor(7), -torch.inf), LABELS),
        (IMAGES + 1, LABELS),
        (IMAGES[:, :0], LABELS),
        (IMAGES[..., :0], LABELS),
        (np.zeros((0, 3, 8, 8)), np.zeros(0, int)),
    ],
    ids=range(23),
)
def test_arrays_of_no_use_are_one_line(images, labels):
    with pytest.raises((ValueError, TypeError), match=r"^as_tensors: ") as caught:
        as_tensors((images, labels))
    assert str(caught.value).isprintable()


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("method", [awm, ft], ids=lambda method: method.__name__)
@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES[:, :1], LABELS, r"the model can't compute on images \(1, 8, 8\): .*"),
        (IMAGES.repeat(1, 2, 1, 1), LABELS, r"the model can't compute on images \(6, 8, 8\): .*"),
        (IMAGES[..., :2], LABELS, r"the model can't compute on images \(3, 8, 2\): .*"),
        (IMAGES, LABELS + 1, "labels must be below the model's 3 classes; got 3"),
        (IMAGES, LABELS + 2**61, r"labels must be below the model's 3 classes; got \d+"),
    ],
)
def test_images_that_do_not_fit_the_model_are_one_line(method, images, labels, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"^{method.__name__}: {message}$") as caught:
        method(model, (images, labels), progress=False)
    assert str(caught.value).isprintable()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("method", [awm, ft], ids=lambda method: method.__name__)
@pytest.mark.parametrize("labels", [torch.tensor([1]), torch.tensor([1, 1, 1])], ids=["one image", "one class"])
def test_little_data_is_data(method, labels):
    result = method(network(), (IMAGES[: len(labels)], labels), epochs=1, progress=False)
    assert all(np.isfinite(values).all() for values in result.history.values())


def test_one_shot_of_one_class_is_one_image_of_it():
    images, labels = one_shot(IMAGES, LABELS * 0, 8, torch.Generator().manual_seed(0), copies=1)
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 0]


def npy(shape, dtype="|u1", content=b"", version=b"\x01\x00"):
    described = dtype if dtype.startswith("[") else repr(dtype)
    header = f"{{'descr': {described}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return b"\x93NUMPY" + version + length + header + content


def npz(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def array(values):
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


HEADERS = {
    "10^15 images": npy((10**15, 3, 4, 4)),
    "a product that overflows": npy((2**40, 2**40, 4, 4)),
    "a negative size": npy((-1, 3, 4, 4)),
    "an infinite size": npy("(1e999,)"),
    "more than there is": npy((3, 3, 4, 4), content=b"\0" * 96),
    "objects": npy((2,), "|O", pickle.dumps([1, 2])),
    "fields of objects": npy((2,), "[('a', 'O')]"),
    "a dtype that is none": npy((2,), "<q9"),
    "a nested dtype": npy((2,), "[('a', '<i4', " * 200 + "3" + ")]" * 200),
    "a long header": npy("(" + "1," * 200_000 + ")", version=b"\x02\x00"),
    "a call": npy("__import__('os').system('touch ran')"),
    "version 9": npy((2,), version=b"\x09\x00"),
    "no header": b"\x93NUMPY",
    "nothing": b"",
    "a pickle": pickle.dumps([1]),
    "text": array(np.array(["a", "b"])),
    "complex": array(PIXELS.astype(complex)),
}


@pytest.mark.parametrize("place", ["x", "y"])
@pytest.mark.parametrize("name", HEADERS)
def test_an_array_that_is_none_is_one_line(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    members = {"x": array(PIXELS), "y": array(np.arange(2)), place: HEADERS[name]}
    with nothing_but("data.npz"):
        line_of(npz(tmp_path / "data.npz", **members))


def test_an_array_alone_is_not_read_before_it_is_refused(tmp_path):
    (tmp_path / "data.npz").write_bytes(npy((10**15,)))
    assert "it holds one array, as np.save writes it" in line_of(tmp_path / "data.npz")


def test_an_archive_that_unpacks_to_gigabytes_is_one_line(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy((2**31 // 400, 1, 20, 20)) + bytes(1 << 20))
        archive.writestr("y.npy", array(np.zeros(4, int)))
        archive.filelist[0].file_size = 2**31 - 1  # what its directory says
    assert "unpacks from" in line_of(path)


def test_an_archive_whose_directory_lies_about_what_is_packed_is_one_line(tmp_path):
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy((2**32, 1, 20, 20)) + bytes(1 << 20))
        archive.writestr("y.npy", array(np.zeros(4, int)))
        archive.filelist[0].file_size = archive.filelist[0].compress_size = 2**42  # sizes of 64 bits
    assert "in a file of" in line_of(path)


def test_images_that_pack_well_are_images(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=np.zeros((2000, 3, 32, 32), np.uint8), y=np.zeros(2000, int))
    assert path.stat().st_size < 20_000
    assert load_images(path)[0].shape == (2000, 3, 32, 32)


def test_a_second_array_of_a_name_is_looked_at_too(tmp_path):
    path = npz(tmp_path / "data.npz", x=array(PIXELS), y=array(np.arange(2)))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("x", npy((10**12, 3, 4, 4)))
    assert "claims shape" in line_of(path)


def test_an_archive_cut_anywhere_is_one_line(tmp_path):
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=PIXELS, y=np.arange(2))
    content = path.read_bytes()
    for length in range(0, len(content), 17):
        path.write_bytes(content[:length])
        line_of(path)


def test_names_in_an_archive_do_not_reach_the_terminal(tmp_path):
    path = npz(tmp_path / "data.npz", **{"x\x1b[2J\nfoo": array(PIXELS), "y" * 9999: array(PIXELS)})
    assert len(line_of(path)) < 600
    assert tree(tmp_path).keys() == {"data.npz"}


def test_what_is_no_archive_is_one_line(tmp_path):
    path = tmp_path / "data.npz"
    os.mkfifo(path)
    assert "it is no file" in line_of(path)  # reading one would wait for ever
    line_of(tmp_path / ("n" * 300))
    line_of(tmp_path / ("n" * 300 + ".npz"))
    (tmp_path / "loop.npz").symlink_to(tmp_path / "loop.npz")
    line_of(tmp_path / "loop.npz")


def png(width, height, rows=b"", *extra):
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(extra) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def saved(form, mode="RGB", size=(4, 4), **options):
    file = io.BytesIO()
    Image.new(mode, size, 1).save(file, form, **options)
    return file.getvalue()


BAD_IMAGES = {
    "a bomb that Pillow refuses": png(40_000, 40_000),
    "a bomb that Pillow warns of": png(10_000, 10_000, zlib.compress(bytes(10_000))),
    "no size": png(0, 0),
    "no pixels": png(4, 4),
    "text": b"this is no image\n",
    "nothing": b"",
    "a web page": b"<html><svg/></html>",
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n(ran) (w) file\n%%EOF\n",
    "16 bits": saved("PNG", "I;16"),
    "32 bits": saved("TIFF", "F"),
    "cut": saved("PNG", size=(40, 40))[:60],
    "a huge TIFF": saved("TIFF")[:8] + b"\xff" * 64,
    "a huge PPM": b"P6\n99999999 99999999\n255\n",
    "a PPM of no size": b"P6\n0 0\n255\n",
    "a BMP of a negative size": saved("BMP")[:18] + b"\xff\xff\xff\xff" + saved("BMP")[22:],
}


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_an_image_that_is_none_is_one_line(tmp_path, recwarn, name):
    file = tmp_path / "0" / "a.png"
    file.parent.mkdir()
    file.write_bytes(BAD_IMAGES[name])
    with nothing_but("0/a.png", folder=tmp_path):
        assert str(file) in line_of(tmp_path)
    assert [str(warning.message) for warning in recwarn] == []


GOOD_IMAGES = {
    "CMYK": saved("JPEG", "CMYK"),
    "animated": saved("GIF", save_all=True, append_images=[Image.new("RGB", (4, 4), 9)]),
    "another format than its name's": saved("BMP"),
    "transparent": saved("PNG", "RGBA"),
    "more than its pixels": saved("PNG") + b"trailing",
}


@pytest.mark.parametrize("name", GOOD_IMAGES)
def test_other_kinds_of_images_are_images(tmp_path, recwarn, name):
    file = tmp_path / "0" / "a.png"
    file.parent.mkdir()
    file.write_bytes(GOOD_IMAGES[name])
    assert load_images(tmp_path)[0].shape == (1, 3, 4, 4)
    assert [str(warning.message) for warning in recwarn] == []


def test_things_with_the_names_of_images_are_one_line(tmp_path):
    folder = tmp_path / "0"
    folder.mkdir()
    (folder / "loop.png").symlink_to(folder / "loop.png")
    assert "it is no file" in line_of(tmp_path)
    (folder / "loop.png").unlink()
    os.mkfifo(folder / "pipe.png")
    assert "it is no file" in line_of(tmp_path)
    (folder / "pipe.png").unlink()
    (folder / "folder.png").mkdir()
    assert "it is no file" in line_of(tmp_path)
    (folder / "folder.png").rmdir()
    (folder / "evil\x1b[2J\n.png").write_bytes(b"none")
    line_of(tmp_path)


def test_a_folder_that_is_in_itself_comes_to_an_end(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "a.png").write_bytes(saved("PNG"))
    (tmp_path / "0" / "self").symlink_to(tmp_path / "0")
    (tmp_path / "self").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert len(load_images(tmp_path)[1]) == 1


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "0").mkdir()
    monkeypatch.setattr(
        type(tmp_path), "iterdir", lambda self: (_ for _ in ()).throw(PermissionError(13, "Permission denied"))
    )
    assert "Permission denied" in line_of(tmp_path)


@pytest.fixture
def files(tmp_path):
    """A good model and good images, and results of an earlier run and of one that was stopped."""
    torch.manual_seed(0)
    save_state_dict(tmp_path / "model.pth", network().state_dict())
    np.savez(tmp_path / "clean.npz", x=IMAGES.numpy(), y=LABELS.numpy())
    np.savez(tmp_path / "eval.npz", x=1 - IMAGES.numpy(), y=LABELS.numpy())
    (tmp_path / "out").mkdir()
    for name in ("masks.safetensors", "result.json", "unfinished.safetensors"):
        (tmp_path / "out" / name).write_text("precious")
    return tmp_path


def purify(files, **changes):
    options = {"weights": "model.pth", "clean": "clean.npz", "eval": "eval.npz", **changes}
    given = [text for name, value in options.items() for text in (f"--{name}", str(files / value))]
    given += ["--arch", f"{__name__}:network", "--out", str(files / "out"), "--overwrite", "--epochs", "1"]
    return main(["purify", *given, "--no-progress", "--device", "cpu"])


def bad_inputs(folder):
    """Files that can't be used, by the option that they are given to."""
    np.savez(folder / "labels.npz", x=IMAGES.numpy(), y=LABELS.numpy() + 5)
    np.savez(folder / "grey.npz", x=IMAGES.numpy()[:, :1], y=LABELS.numpy())
    np.savez(folder / "nan.npz", x=IMAGES.numpy() * np.nan, y=LABELS.numpy())
    np.savez(folder / "empty.npz", x=IMAGES.numpy()[:0], y=LABELS.numpy()[:0])
    npz(folder / "huge.npz", x=npy((10**15, 3, 8, 8)), y=array(LABELS.numpy()))
    npz(folder / "codes.npz", **{"\x1b[2J\n": b""})
    (folder / "bomb" / "0").mkdir(parents=True)
    (folder / "bomb" / "0" / "a.png").write_bytes(png(20_000, 20_000))
    state = network().state_dict()
    save_state_dict(folder / "nan.pth", {**state, "0.weight": state["0.weight"] * np.nan})
    save_state_dict(folder / "name.pth", {**state, "evil\x1b[2J\n": state["0.weight"]})
    torch.save({**state, "0.weight": os.system}, folder / "code.pth")
    torch.save({**state, "0.weight": state["0.weight"].to_sparse()}, folder / "sparse.pth")
    clean = ("labels.npz", "grey.npz", "nan.npz", "empty.npz", "huge.npz", "codes.npz", "bomb")
    return [
        *(("clean", name) for name in clean),
        *(("weights", f"{name}.pth") for name in ("nan", "name", "code", "sparse")),
    ]


def test_the_command_line_refuses_in_one_line_and_changes_nothing(files, capsys):
    for option, name in bad_inputs(files):
        before = tree(files)
        assert purify(files, **{option: name}) == 2, name
        printed = capsys.readouterr()
        assert printed.out == "" and printed.err.endswith("\n") and printed.err[:-1].isprintable(), printed.err
        assert tree(files) == before, name


def test_the_command_line_replaces_when_all_is_well(files):
    assert purify(files) == 0
    assert not (files / "out" / "unfinished.safetensors").exists()
    assert (files / "out" / "result.json").read_text() != "precious"
