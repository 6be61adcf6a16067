"""CIFAR as its author distributes it: read without running what a file may hold."""

import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from maskops.data import load_images


def content(count, start=0):
    generator = np.random.default_rng(start)
    return generator.integers(0, 256, (count, 3072), dtype=np.uint8), (np.arange(count) + start) % 10


def write_python(folder, files, labels_key=b"labels", protocol=2):
    folder.mkdir()
    for index, name in enumerate(files):
        data, labels = content(3, index)
        (folder / name).write_bytes(pickle.dumps({b"data": data, labels_key: labels.tolist(), b"x": b"y"}, protocol))


TRAIN = [f"data_batch_{index}" for index in range(1, 6)]


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_the_python_version_of_cifar10_is_read(tmp_path, protocol):
    folder = tmp_path / "cifar-10-batches-py"
    write_python(folder, [*TRAIN, "test_batch"], protocol=protocol)
    images, labels = load_images(f"{folder}:train")
    assert images.shape == (15, 3, 32, 32) and labels.dtype == torch.int64
    data, answers = content(3, 1)
    expected = torch.from_numpy(data).view(3, 3, 32, 32) / 255
    assert torch.equal(images[3:6], expected) and labels[3:6].tolist() == answers.tolist()
    assert load_images(f"{folder}:test")[0].shape[0] == 3


def test_cifar100_has_its_fine_labels(tmp_path):
    write_python(tmp_path / "cifar-100-python", ["train", "test"], b"fine_labels")
    assert load_images(f"{tmp_path}/cifar-100-python:test")[1].tolist() == content(3, 1)[1].tolist()


@pytest.mark.parametrize(("names", "labels"), [([f"{name}.bin" for name in TRAIN], 1), (["train.bin"], 2)])
def test_the_binary_versions_are_read(tmp_path, names, labels):
    test = "test_batch.bin" if labels == 1 else "test.bin"
    for index, name in enumerate([*names, test]):
        data, answers = content(2, index)
        columns = [answers[:, None].astype(np.uint8)] * labels
        np.concatenate([*columns, data], axis=1).tofile(tmp_path / name)
    images, found = load_images(f"{tmp_path}:train")
    assert images.shape == (2 * len(names), 3, 32, 32) and found[:2].tolist() == [0, 1]
    assert torch.equal(images[:2], torch.from_numpy(content(2)[0]).view(2, 3, 32, 32) / 255)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch bomb-went-off",)


def test_a_file_that_would_run_code_is_refused_and_nothing_in_it_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "cifar"
    folder.mkdir()
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": Bomb(), b"labels": [0]}))
    with pytest.raises(ValueError, match=r"^read_cifar: cannot read .*test_batch \(.*system, which is no array\)$"):
        load_images(f"{folder}:test")
    assert not (tmp_path / "bomb-went-off").exists()


class Call:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    "hostile",
    [
        Call(np.ndarray, (4, 3072), "O", b"A" * (4 * 3072 * 8)),  # bytes taken for pointers
        np.array([[print] * 3072], dtype=object),
        np.zeros((1, 3072), dtype=np.int64),
        [[0] * 3072],
    ],
    ids=["objects from bytes", "objects", "other numbers", "a list"],
)
def test_arrays_of_anything_but_bytes_are_refused(tmp_path, hostile):
    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": hostile, b"labels": [0]}, 2))
    script = f"from maskops.data import load_images; load_images({str(tmp_path)!r} + ':test')"
    # in a process of its own: what goes wrong may be a crash
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and "ValueError: read_cifar: cannot read" in ended.stderr, ended.stderr


def test_what_is_not_there_is_one_line(tmp_path):
    folder = tmp_path / "cifar"
    write_python(folder, ["test_batch"])
    other = tmp_path / "other"
    write_python(other, ["data_batch_1", "data_batch_3", "data_batch_5", "test_batch"])
    for path, message in [
        (f"{folder}", f"load_images: {folder} holds several sets of images; choose {folder}:train or {folder}:test"),
        (f"{folder}:valid", f"load_images: {folder} holds no 'valid'; choose {folder}:train or {folder}:test"),
        (f"{folder}:train", f"read_cifar: {folder} holds no train images of CIFAR"),
        (f"{other}:train", f"read_cifar: {other} lacks data_batch_2, data_batch_4"),
    ]:
        with pytest.raises(ValueError) as error:
            load_images(path)
        assert str(error.value) == message
    write_python(tmp_path / "100", ["test"], b"fine_labels")
    assert load_images(f"{tmp_path / '100'}:test", size=8)[0].shape == (3, 3, 8, 8)
    (folder / "test_batch.bin").write_bytes(b"123")
    (folder / "test_batch").unlink()
    with pytest.raises(ValueError, match="is no whole number of images of 3073 bytes"):
        load_images(f"{folder}:test")
    (folder / "test_batch.bin").unlink()
    (folder / "test_batch").write_bytes(pickle.dumps({b"data": np.zeros((2, 5), np.uint8), b"labels": [0, 1]}))
    with pytest.raises(ValueError, match=r"must hold \(N, 3072\) bytes and N labels; got \(2, 5\)"):
        load_images(f"{folder}:test")
