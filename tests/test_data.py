"""Clean data from tensors, arrays, data sets, archives and folders, and parts of it."""

import sys

import numpy as np
import pytest
import torch
from helpers import seeded
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset

from maskops.data import as_tensors, load_images, split, take_per_class

image_module = pytest.importorskip("PIL.Image", reason="folders of images need Pillow")


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


class Samples(Dataset):
    """Map-style and, as many are, without an end for iteration."""

    def __init__(self, *samples):
        self.samples = samples

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        return self.samples[index % len(self.samples)]


def write_image(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image_module.fromarray(array).save(path)


def test_as_tensors_scales_bytes_to_the_unit_interval():
    array = pixels(5, 3, 8, 8)
    for images, labels in ((array, np.arange(5)), (torch.from_numpy(array), torch.arange(5, dtype=torch.int32))):
        found, found_labels = as_tensors((images, labels))
        assert found.dtype == torch.float32 and torch.equal(found, torch.from_numpy(array).float() / 255)
        assert found_labels.dtype == torch.int64 and found_labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("channels", [1, 3])
def test_as_tensors_permutes_bytes_with_channels_last(channels):
    array = pixels(4, 8, 9, channels)
    images, _ = as_tensors([array, np.zeros(4, dtype=np.uint8)])
    assert torch.equal(images, torch.from_numpy(array).permute(0, 3, 1, 2).float() / 255)
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_as_tensors_leaves_channels_first_alone_where_the_width_looks_like_channels():
    assert as_tensors((pixels(2, 3, 8, 3), np.zeros(2, dtype=int)))[0].shape == (2, 3, 8, 3)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ">f4"])
def test_as_tensors_takes_floats_as_they_are(dtype):
    array = (pixels(3, 3, 4, 4) / 255).astype(dtype)
    images, _ = as_tensors((array, np.zeros(3, dtype=int)))
    assert images.dtype == torch.float32 and np.array_equal(images.numpy(), array.astype(np.float32))


def test_as_tensors_takes_flipped_and_read_only_arrays(recwarn):
    array = pixels(3, 3, 4, 4)
    array.flags.writeable = False
    images, _ = as_tensors((array[:, :, ::-1], np.zeros(3, dtype=np.uint16)))
    assert torch.equal(images.flip(2), torch.from_numpy(array.copy()).float() / 255)
    assert len(recwarn) == 0


def test_as_tensors_detaches():
    assert not as_tensors((torch.rand(1, 3, 4, 4, requires_grad=True), torch.zeros(1, dtype=int)))[0].requires_grad


def test_as_tensors_reads_datasets():
    expected = torch.rand(4, 3, 8, 8), torch.tensor([3, 1, 0, 2])
    dataset = TensorDataset(*expected)
    samples = Samples(*((image, label.item()) for image, label in zip(*expected, strict=True)))
    arrays = [(image.numpy(), np.int64(label)) for image, label in zip(*expected, strict=True)]
    for clean_data in (dataset, Subset(dataset, range(4)), samples, arrays):
        images, labels = as_tensors(clean_data)
        assert torch.equal(images, expected[0]) and torch.equal(labels, expected[1])


def test_as_tensors_takes_two_samples_for_a_dataset_not_a_pair():
    images, labels = as_tensors([(torch.rand(3, 4, 4), 1), (torch.rand(3, 4, 4), 0)])
    assert images.shape == (2, 3, 4, 4) and labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("mode", "channels"), [("RGB", 3), ("L", 1), ("1", 1), ("LA", 1), ("P", 3), ("RGBA", 3), ("CMYK", 3)]
)
def test_as_tensors_reads_pil_images_of_any_mode(mode, channels):
    image = image_module.fromarray(pixels(6, 8, 3)).convert(mode)
    images, _ = as_tensors(Samples((image, 0), (image, 1)))
    assert images.shape == (2, channels, 6, 8)
    if mode == "RGB":
        assert torch.equal(images[0], torch.from_numpy(pixels(6, 8, 3)).permute(2, 0, 1).float() / 255)


LABELS = torch.zeros(2, dtype=torch.int64)
IMAGES = torch.rand(2, 3, 4, 4)
NAN = IMAGES.clone().index_fill_(0, torch.tensor([1]), float("nan"))


@pytest.mark.parametrize(
    ("clean_data", "error", "message"),
    [
        ((IMAGES[0], LABELS), ValueError, r"images must have shape \(N, C, H, W\); got \(3, 4, 4\)"),
        ((IMAGES[:0], LABELS[:0]), ValueError, r"expected at least one image; got shape \(0, 3, 4, 4\)"),
        ((IMAGES, LABELS[:1]), ValueError, r"labels must have shape \(2,\), one for each image; got \(1,\)"),
        ((IMAGES, LABELS[:, None]), ValueError, r"labels must have shape \(2,\), one for each image; got \(2, 1\)"),
        ((IMAGES, LABELS.float()), TypeError, "labels must be integers; got torch.float32"),
        ((IMAGES, LABELS.bool()), TypeError, "labels must be integers; got torch.bool"),
        ((IMAGES, LABELS - 1), ValueError, "labels must be at least 0; got -1"),
        ((IMAGES, np.array(["a", "b"])), TypeError, "arrays must hold numbers; got <U1"),
        ((IMAGES.long(), LABELS), TypeError, "images must be uint8 or floating point; got torch.int64"),
        ((NAN, LABELS), ValueError, "images must be finite; got NaN or infinite pixels"),
        ((IMAGES / 0, LABELS), ValueError, "images must be finite; got NaN or infinite pixels"),
        (
            (torch.tensor([-0.5, 2.25]).view(2, 1, 1, 1), LABELS),
            ValueError,
            r"images must be in pixel space \[0, 1\], normalisation belongs to the model \(mean, std\); "
            "got values from -0.5 to 2.25",
        ),
        ((IMAGES * 255 + 1, LABELS), ValueError, r"images must be in pixel space \[0, 1\], .*"),
        (Samples(), ValueError, "expected at least one image; got an empty dataset"),
        (Samples(IMAGES[0]), TypeError, r"a dataset must give \(image, label\); got Tensor at 0"),
        (TensorDataset(IMAGES, LABELS, LABELS), TypeError, r"a dataset must give \(image, label\); got tuple at 0"),
        (Samples(("path.png", 0)), TypeError, "an image must be a tensor, an array or a PIL image; got str"),
        (
            Samples((IMAGES[0], 0), (IMAGES[0, :, 1:], 0)),
            ValueError,
            r"all images must have one shape and dtype; got \(3, 4, 4\) torch.float32 and, at 1, \(3, 3, 4\) torch.f.*",
        ),
        (Samples((IMAGES[0], 0.5)), TypeError, "labels must be integers; got torch.float64"),
        (Samples((IMAGES[0], "cat")), TypeError, "arrays must hold numbers; got <U3"),
        (
            Samples((image_module.fromarray(np.zeros((4, 4), dtype=np.uint16)), 0)),
            ValueError,
            "images must have 8 bits per channel; got PIL mode I;16",
        ),
        ({"images": IMAGES}, TypeError, r"expected a pair \(images, labels\) of .*; got dict"),
        (
            DataLoader(TensorDataset(IMAGES, LABELS)),
            TypeError,
            r"expected a pair .* or a map-style dataset .*; got DataLoader",
        ),
        (iter([]), TypeError, "expected a pair .* or a map-style dataset .*; got list_iterator"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_as_tensors_says_what_is_wrong_in_one_line(clean_data, error, message):
    with pytest.raises(error, match=f"^as_tensors: {message}$"):
        as_tensors(clean_data)


@pytest.mark.parametrize(
    "names",
    [("images", "labels"), ("x", "y"), ("x_test", "y_test"), ("x_train", "y_train")],
    ids=lambda names: names[0],
)
def test_load_images_finds_the_one_pair_in_an_archive(tmp_path, names):
    array = pixels(3, 3, 4, 4)
    np.savez(tmp_path / "data.npz", **dict(zip(names, (array, np.arange(3)), strict=True)), extra=np.ones(2))
    images, labels = load_images(tmp_path / "data.npz")
    assert torch.equal(images, torch.from_numpy(array).float() / 255) and labels.tolist() == [0, 1, 2]


def test_load_images_picks_a_split(tmp_path):
    path = tmp_path / "data.npz"
    counts = {"train": 4, "test": 3, "images": 2, "x": 1}
    names = {
        "train": ("x_train", "y_train"),
        "test": ("x_test", "y_test"),
        "images": ("images", "labels"),
        "x": ("x", "y"),
    }
    arrays = {}
    for choice, (images, labels) in names.items():
        arrays |= {images: pixels(counts[choice], 3, 4, 4), labels: np.zeros(counts[choice], dtype=int)}
    np.savez(path, **arrays)
    for choice, count in counts.items():
        assert len(load_images(f"{path}:{choice}")[0]) == count
    with pytest.raises(
        ValueError, match=rf"^load_images: {path} holds several sets of images; choose {path}:images or .*:train$"
    ):
        load_images(path)
    with pytest.raises(ValueError, match=rf"^load_images: {path} holds no 'val'; choose {path}:images or {path}:x or "):
        load_images(f"{path}:val")


def test_load_images_names_the_archive_in_every_error(tmp_path):
    path = tmp_path / "data.npz"
    with pytest.raises(ValueError, match=rf"^load_images: cannot read {path} \(FileNotFoundError: .*\)$"):
        load_images(path)
    path.write_bytes(b"PK\x03\x04 truncated")
    with pytest.raises(ValueError, match=rf"^load_images: cannot read {path} \(BadZipFile: .*\)$"):
        load_images(path)
    with open(path, "wb") as file:
        np.save(file, pixels(2, 3, 4, 4))
    with pytest.raises(ValueError, match=rf"^load_images: {path} must hold named arrays; it holds one array, "):
        load_images(path)
    np.savez(path, data=pixels(2, 3, 4, 4), x=pixels(2, 3, 4, 4))
    with pytest.raises(
        ValueError, match=rf"^load_images: {path} must hold images/labels or x/y or .*; it holds data, x$"
    ):
        load_images(path)
    with pytest.raises(ValueError, match=rf"^load_images: {path} holds no 'test'; choose another file$"):
        load_images(f"{path}:test")
    np.savez(path, x=pixels(2, 3, 4, 4), y=np.array([-1, 0]))
    with pytest.raises(ValueError, match=rf"^load_images: {path}: labels must be at least 0; got -1$"):
        load_images(path)


def test_load_images_resizes_arrays_on_request(tmp_path):
    array = np.repeat(np.repeat(pixels(3, 3, 4, 4), 2, axis=2), 2, axis=3)
    np.savez(tmp_path / "data.npz", x=array, y=np.arange(3))
    images, _ = load_images(tmp_path / "data.npz", size=4)
    # half the size: a weighted mean of the nearest four in each direction, 1:3:3:1
    assert images.shape == (3, 3, 4, 4) and images.min() >= 0 and images.max() <= 1
    assert load_images(tmp_path / "data.npz", size=16)[0].shape == (3, 3, 16, 16)
    np.savez(tmp_path / "data.npz", x=np.full((2, 1, 9, 7), 51, np.uint8), y=np.arange(2))
    assert torch.allclose(load_images(tmp_path / "data.npz", size=5)[0], torch.tensor(0.2))


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (self.target, "w")


def test_load_images_unpickles_nothing(tmp_path):
    path, target = tmp_path / "data.npz", tmp_path / "ran"
    np.savez(path, x=np.array([Bomb(str(target))], dtype=object), y=np.zeros(1, dtype=int))
    with pytest.raises(
        ValueError, match=rf"^load_images: cannot read {path} \(ValueError: Object arrays cannot be loaded"
    ):
        load_images(path)
    assert not target.exists()


def test_load_images_reads_class_folders_in_sorted_order(tmp_path):
    arrays = {name: pixels(4, 6, 3) // (number + 1) for number, name in enumerate(("dog/2", "dog/1", "cat/1", "ant/1"))}
    for name, array in arrays.items():
        write_image(tmp_path / f"{name}.png", array)
    (tmp_path / "bee").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "README.txt").write_text("no class")
    (tmp_path / "dog" / "notes.csv").write_text("no image")
    images, labels = load_images(tmp_path)
    assert labels.tolist() == [0, 2, 3, 3]
    for image, name in zip(images, ("ant/1", "cat/1", "dog/1", "dog/2"), strict=True):
        assert torch.equal(image, torch.from_numpy(arrays[name]).permute(2, 0, 1).float() / 255)


def test_load_images_keeps_grey_folders_grey_and_colours_mixed_ones(tmp_path):
    write_image(tmp_path / "0" / "a.png", pixels(4, 4))
    assert load_images(str(tmp_path))[0].shape == (1, 1, 4, 4)
    write_image(tmp_path / "1" / "b.PNG", pixels(4, 4, 3))
    images, _ = load_images(str(tmp_path))
    assert torch.equal(images[0], torch.from_numpy(pixels(4, 4)).expand(3, 4, 4).float() / 255)


def test_load_images_resizes_on_request(tmp_path):
    write_image(tmp_path / "0" / "a.png", np.full((4, 6, 3), 51, dtype=np.uint8))
    write_image(tmp_path / "1" / "b.png", np.full((9, 5, 3), 102, dtype=np.uint8))
    found = r"a\.png is \(4, 6\), .*b\.png is \(9, 5\)"
    with pytest.raises(ValueError, match=rf"^load_images: images must have one size, or give size=; .*{found}$"):
        load_images(tmp_path)
    images, labels = load_images(tmp_path, size=8)
    assert images.shape == (2, 3, 8, 8) and labels.tolist() == [0, 1]
    assert torch.equal(images[:, 0, 0, 0], torch.tensor([0.2, 0.4]))


def test_load_images_names_the_folder_or_file_in_every_error(tmp_path):
    with pytest.raises(
        ValueError, match=r"^load_images: expected a .npz file or a folder of class folders; got .*nowhere$"
    ):
        load_images(tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=rf"^load_images: {tmp_path} must hold class folders with images in them; it holds none$"
    ):
        load_images(tmp_path)
    with pytest.raises(ValueError, match=r"^load_images: size must be at least 1; got 0$"):
        load_images(tmp_path, size=0)
    broken = tmp_path / "0" / "a.png"
    write_image(broken, pixels(40, 40, 3))
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError, match=rf"^load_images: cannot read {broken} \(.*\)$"):
        load_images(tmp_path)
    write_image(broken, np.zeros((4, 4), dtype=np.uint16))
    with pytest.raises(
        ValueError, match=rf"^load_images: {broken}: images must have 8 bits per channel; got PIL mode I;16$"
    ):
        load_images(tmp_path)


def test_load_images_says_that_pillow_is_missing(tmp_path, monkeypatch):
    write_image(tmp_path / "0" / "a.png", pixels(4, 4))
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"^load_images: folders of images need Pillow: pip install pillow$"):
        load_images(tmp_path)


def test_split_parts_are_disjoint_complete_and_seeded():
    images, labels = torch.arange(20.0).view(20, 1, 1, 1) / 20, torch.arange(20)
    (picked, picked_labels), (rest, rest_labels) = split(images, labels, 7, seeded(3))
    assert len(picked) == 7 and sorted(picked_labels.tolist() + rest_labels.tolist()) == list(range(20))
    assert torch.equal(picked, images[picked_labels]) and torch.equal(rest, images[rest_labels])
    assert torch.equal(split(images, labels, 7, seeded(3))[0][1], picked_labels)
    assert not torch.equal(split(images, labels, 7, seeded(4))[0][1], picked_labels)
    assert len(split(images, labels, 20, seeded())[1][0]) == 0


@pytest.mark.parametrize("n", [0, -1, 3])
def test_split_refuses_more_images_than_there_are(n):
    with pytest.raises(ValueError, match=rf"^split: n must lie in \[1, 2\], the number of images; got {n}$"):
        split(IMAGES, LABELS, n, seeded())


def test_take_per_class_is_balanced_and_seeded():
    labels = torch.tensor([5] * 10 + [0] * 4 + [2] * 6)[torch.randperm(20, generator=seeded(9))]
    images = torch.arange(20.0).view(20, 1, 1, 1) / 20
    picked, picked_labels = take_per_class(images, labels, 3, seeded())
    assert picked_labels.tolist() == [0, 0, 0, 2, 2, 2, 5, 5, 5]
    index = (picked.flatten() * 20).round().long()
    assert len(index.unique()) == 9 and torch.equal(labels[index], picked_labels)
    assert torch.equal(take_per_class(images, labels, 3, seeded())[0], picked)
    assert not torch.equal(take_per_class(images, labels, 3, seeded(1))[0], picked)


def test_choices_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"^take_per_class: expected 2 images of class 1; got 1$"):
        take_per_class(torch.rand(3, 1, 2, 2), torch.tensor([0, 0, 1]), 2, seeded())
    with pytest.raises(ValueError, match=r"^take_per_class: count must be at least 1; got 0$"):
        take_per_class(IMAGES, LABELS, 0, seeded())
    for name, choose in (("take_per_class", take_per_class), ("split", split)):
        with pytest.raises(
            ValueError, match=rf"^{name}: labels must have shape \(2,\), one for each image; got \(1,\)$"
        ):
            choose(IMAGES, LABELS[:1], 1, seeded())
