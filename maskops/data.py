"""Clean images from arrays, datasets, .npz files and class folders; random, few-shot and one-shot choices of them.

Always two tensors in pixel space: images (N, C, H, W) float32 in [0, 1] and labels (N,) int64. Normalisation by mean
and std belongs to the model.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.utils.data import Dataset, TensorDataset

from maskops._text import one_line, readable
from maskops.cifar import is_cifar, read_cifar
from maskops.idx import is_idx, read_idx
from maskops.npz import read_npz
from maskops.parquet import is_parquet, read_parquet
from maskops.pictures import grey_or_rgb, pixels, read_folder

Pair: TypeAlias = tuple[Tensor, Tensor]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def as_tensors(clean_data: Sequence | Dataset) -> Pair:
    """Images and labels as two checked tensors.

    clean_data: a pair (images, labels) of tensors or numpy arrays, a TensorDataset of two tensors, or a map-style
                dataset of (image, label), images as tensors, arrays or PIL images, which is read once
    images:     (N, C, H, W), uint8 (divided by 255) or float in [0, 1]; uint8 (N, H, W, C) with C of 1 or 3 is permuted
    labels:     (N,) integer, at least 0
    returns:    images (N, C, H, W) float32 in [0, 1] and labels (N,) int64, on the device where they were
    errors:     ValueError for shapes, counts and ranges, TypeError for dtypes and types

    >>> images, labels = as_tensors((np.full((2, 32, 32, 3), 255, dtype=np.uint8), np.array([3, 8])))
    >>> images.shape, images.max(), labels
    (torch.Size([2, 3, 32, 32]), tensor(1.), tensor([3, 8]))
    """
    if isinstance(clean_data, TensorDataset) and len(clean_data.tensors) == 2:
        clean_data = clean_data.tensors
    if _is_pair_of_arrays(clean_data):
        return _checked("as_tensors", *clean_data)
    if not (hasattr(clean_data, "__getitem__") and hasattr(clean_data, "__len__")) or isinstance(clean_data, dict):
        expected = "a pair (images, labels) of tensors or arrays, or a map-style dataset of (image, label)"
        raise TypeError(f"as_tensors: expected {expected}; got {type(clean_data).__name__}")
    return _checked("as_tensors", *_read_dataset(clean_data))


def load_images(path: str | os.PathLike, size: int | None = None) -> Pair:
    """Images and labels from a file or a folder, in one of the layouts that data sets come in.

    path:    - ``file.npz`` with ``images``/``labels``, ``x``/``y``, ``x_test``/``y_test`` or ``x_train``/``y_train``;
               where it holds several, ``file.npz:test``, ``:train``, ``:x`` or ``:images`` says which
             - a folder: its folders, sorted as text, are the classes 0, 1, …, empty ones too; files that are no images
               are ignored. ``folder:train`` is its folder ``train``
             - ``file.parquet`` with a column of encoded images and one of labels, or a folder of such files as
               Hugging Face's hub has them, ``folder:train``
             - CIFAR's own folder, as torchvision leaves it: ``cifar-10-batches-py:train``, ``cifar-100-binary:test``, …
             - MNIST's, and of others in its format: ``MNIST/raw:train``, ``FashionMNIST/raw:test``, …
    size:    images are resized to size x size (bilinear, antialiased); None: they must all have one size
    returns: as as_tensors
    errors:  ValueError, one line that names the file, ImportError where pictures are read without Pillow, or Parquet
             without pyarrow

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     np.savez(f"{folder}/clean.npz", x_test=np.zeros((2, 3, 8, 8), np.uint8), y_test=np.array([1, 0]))
    ...     images, labels = load_images(f"{folder}/clean.npz:test")
    >>> images.shape, labels
    (torch.Size([2, 3, 8, 8]), tensor([1, 0]))
    """
    if size is not None and size < 1:
        raise ValueError(f"load_images: size must be at least 1; got {size}")
    file, part, read = _find(path)
    if read in _PICTURES:
        return _checked(f"load_images: {file}", *read(file, part, size))
    images, labels = _checked(f"load_images: {file}", *read(file, part))
    if size is not None and images.shape[2:] != (size, size):
        # bilinear weights sum to 1 up to rounding
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True).clamp_(0, 1)
    return images, labels


def holds_pictures(path: str | os.PathLike) -> bool:
    """Whether :func:`load_images` would read pictures, each with a size of its own, from there, and not an array."""
    return _find(path)[2] in _PICTURES


def split(images: Tensor, labels: Tensor, n: int, generator: Generator) -> tuple[Pair, Pair]:
    """n random images, without replacement, and the rest: no image is in both.

    returns: ((images, labels) of the n picked, (images, labels) of the others)

    >>> images, labels = torch.rand(10, 3, 8, 8), torch.arange(10)
    >>> picked, rest = split(images, labels, 4, torch.Generator().manual_seed(0))
    >>> len(picked[0]), sorted(torch.cat((picked[1], rest[1])).tolist())
    (4, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9])
    """
    _check_counts("split", images, labels)
    if not 1 <= n <= len(labels):
        raise ValueError(f"split: n must lie in [1, {len(labels)}], the number of images; got {n}")
    order = torch.randperm(len(labels), generator=generator).to(labels.device)
    picked, rest = order[:n], order[n:]
    return (images[picked], labels[picked]), (images[rest], labels[rest])


def take_per_class(images: Tensor, labels: Tensor, count: int, generator: Generator) -> Pair:
    """count random images of each class that occurs, without replacement, ordered by class.

    >>> images, labels = torch.rand(6, 3, 8, 8), torch.tensor([0, 1, 0, 1, 0, 1])
    >>> take_per_class(images, labels, 2, torch.Generator().manual_seed(0))[1]
    tensor([0, 0, 1, 1])
    """
    _check_counts("take_per_class", images, labels)
    if count < 1:
        raise ValueError(f"take_per_class: count must be at least 1; got {count}")
    picked = []
    for label in labels.unique().tolist():
        of_class = (labels == label).nonzero().flatten()
        if len(of_class) < count:
            raise ValueError(f"take_per_class: expected {count} images of class {label}; got {len(of_class)}")
        picked.append(of_class[torch.randperm(len(of_class), generator=generator)[:count].to(labels.device)])
    index = torch.cat(picked)
    return images[index], labels[index]


def one_shot(
    images: Tensor, labels: Tensor, image_size: int, generator: Generator, copies: int = 9, flip: bool = True
) -> Pair:
    """The AWM paper's one-shot set: one random image per class, and static augmentations of each.

    An augmented copy is a centre crop to image_size, a random resized crop (area 8 % to 100 %, aspect ratio 3/4 to 4/3,
    bilinear) back to image_size and, with probability 1/2, a horizontal flip.

    images:  (N, C, H, W) float32 in [0, 1]; centre-cropped, or padded with 0, to image_size
    copies:  augmented copies of each image; AWM uses 9 on CIFAR-10 and 0 on GTSRB
    flip:    False where a mirrored image means something else (digits, traffic signs)
    returns: K * (1 + copies) images, one per class, then the copies of the first, of the second, …; and their labels
    source:  AWM Table 2; the official code takes the second image of each class and rounds the copies to 8 bits

    >>> images, labels = torch.rand(20, 3, 32, 32), torch.arange(20) % 2
    >>> one_shot(images, labels, 32, torch.Generator().manual_seed(0), copies=2)[1]
    tensor([0, 1, 0, 0, 1, 1])
    """
    if copies < 0 or image_size < 1:
        raise ValueError(f"one_shot: expected image_size >= 1 and copies >= 0; got {image_size} and {copies}")
    images, labels = _checked("one_shot", images, labels)
    images, labels = take_per_class(images, labels, 1, generator)
    images = _centre_crop(images, image_size)
    augmented = [_augment(image, generator, flip) for image in images for _ in range(copies)]
    images = torch.cat((images, torch.stack(augmented))) if augmented else images
    return images, torch.cat((labels, labels.repeat_interleave(copies)))


def _is_pair_of_arrays(clean_data: object) -> bool:
    is_pair = isinstance(clean_data, (tuple, list)) and len(clean_data) == 2
    return is_pair and all(isinstance(array, (Tensor, np.ndarray)) for array in clean_data)


def _checked(function: str, images: Tensor | np.ndarray, labels: Tensor | np.ndarray) -> Pair:
    images, labels = _tensor(function, images), _tensor(function, labels)
    if images.ndim != 4:
        raise ValueError(f"{function}: images must have shape (N, C, H, W); got {tuple(images.shape)}")
    if images.numel() == 0:
        raise ValueError(f"{function}: expected at least one image; got shape {tuple(images.shape)}")
    _check_counts(function, images, labels)
    return _checked_pixels(function, images), _checked_labels(function, labels)


def _tensor(function: str, array: Tensor | np.ndarray) -> Tensor:
    if isinstance(array, Tensor):
        if array.layout is not torch.strided or array.is_quantized or array.is_nested or array.is_meta:
            kind = "nested" if array.is_nested else "meta" if array.is_meta else array.dtype
            found = kind if array.layout is torch.strided else array.layout
            raise TypeError(f"{function}: tensors must be dense numbers; got {found}")
        return array.detach()
    # torch has no longer numbers than of 8 bytes
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{function}: arrays must hold numbers; got {one_line(str(array.dtype))}")
    # torch takes no read-only, flipped or byte-swapped array; all others are shared, not copied
    return torch.from_numpy(np.require(array, array.dtype.newbyteorder("="), ("C", "W")))


def _checked_pixels(function: str, images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        if images.shape[3] in (1, 3) and images.shape[1] not in (1, 3):
            images = images.permute(0, 3, 1, 2)
        return images.float().div_(255)
    if images.dtype not in _DTYPES:
        raise TypeError(f"{function}: images must be uint8 or floating point; got {images.dtype}")
    low, high = (bound.item() for bound in images.aminmax())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError(f"{function}: images must be finite; got NaN or infinite pixels")
    if low < 0 or high > 1:
        wanted = "images must be in pixel space [0, 1], normalisation belongs to the model (mean, std)"
        raise ValueError(f"{function}: {wanted}; got values from {low:.4g} to {high:.4g}")
    return images.float()


def _checked_labels(function: str, labels: Tensor) -> Tensor:
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"{function}: labels must be integers; got {labels.dtype}")
    labels = labels.long()
    if labels.min() < 0:
        raise ValueError(f"{function}: labels must be at least 0; got {labels.min().item()}")
    return labels


def _check_counts(function: str, images: Tensor, labels: Tensor) -> None:
    if labels.ndim != 1 or len(labels) != len(images):
        wanted = f"labels must have shape ({len(images)},), one for each image"
        raise ValueError(f"{function}: {wanted}; got {tuple(labels.shape)}")


def _read_dataset(dataset: Sequence | Dataset) -> tuple[Tensor, np.ndarray]:
    if len(dataset) == 0:
        raise ValueError("as_tensors: expected at least one image; got an empty dataset")
    images, labels = [], []
    for index in range(len(dataset)):  # a map-style dataset need not end an iteration with IndexError
        sample = dataset[index]
        if not isinstance(sample, (tuple, list)) or len(sample) != 2:
            raise TypeError(f"as_tensors: a dataset must give (image, label); got {type(sample).__name__} at {index}")
        image = _sample_image(sample[0])
        if images and (image.shape, image.dtype) != (images[0].shape, images[0].dtype):
            found = f"{tuple(images[0].shape)} {images[0].dtype} and, at {index}, {tuple(image.shape)} {image.dtype}"
            raise ValueError(f"as_tensors: all images must have one shape and dtype; got {found}")
        images.append(image)
        labels.append(sample[1])
    return torch.stack(images), np.asarray(labels)


def _sample_image(image: object) -> Tensor:
    if isinstance(image, (Tensor, np.ndarray)):
        return _tensor("as_tensors", image)
    if hasattr(image, "getbands"):
        return pixels(grey_or_rgb("as_tensors", image))
    raise TypeError(f"as_tensors: an image must be a tensor, an array or a PIL image; got {type(image).__name__}")


def _find(path: str | os.PathLike) -> tuple[Path, str | None, Callable]:
    """The file or folder, the part of it that is asked for, and what reads it."""
    whole = Path(path)
    file, part = re.fullmatch(r"(.*?)(?::(\w+))?", os.fspath(path), re.DOTALL).groups()
    file = Path(file)
    with readable(file):
        if whole.is_dir():  # whose name may have a colon
            file, part = whole, None
        if file.suffix == ".npz" and not file.is_dir():
            return file, part, read_npz
        for is_here, read in ((is_cifar, _read_cifar), (is_idx, _read_idx), (is_parquet, read_parquet)):
            if is_here(file):
                return file, part, read
    return file, part, _read_folder


def _read_cifar(folder: Path, part: str | None) -> tuple[np.ndarray, np.ndarray]:
    return read_cifar(folder, _half(folder, part))


def _read_idx(folder: Path, part: str | None) -> tuple[np.ndarray, np.ndarray]:
    return read_idx(folder, _half(folder, part))


def _half(folder: Path, part: str | None) -> str:
    if part in ("train", "test"):
        return part
    found = "holds several sets of images" if part is None else f"holds no {part!r}"
    raise ValueError(f"load_images: {folder} {found}; choose {folder}:train or {folder}:test")


def _read_folder(folder: Path, part: str | None, size: int | None) -> Pair:
    return read_folder(folder if part is None else folder / part, size)


_PICTURES = (_read_folder, read_parquet)
"""What reads files of pictures, which may have any size, and not an array."""


def _centre_crop(images: Tensor, size: int) -> Tensor:
    """The middle size x size of each image; where it is smaller, zeros around it."""

    def margins(length: int) -> tuple[int, int]:
        return (size - length) // 2, size - length - (size - length) // 2

    height, width = images.shape[2:]
    return F.pad(images, (*margins(width), *margins(height)))  # a negative margin crops


def _augment(image: Tensor, generator: Generator, flip: bool) -> Tensor:
    """Random resized crop, and a horizontal flip with probability 1/2; image: (C, size, size)."""
    image = _random_resized_crop(image, generator)
    if flip and torch.rand((), generator=generator) < 0.5:
        image = image.flip(-1)
    return image


def _random_resized_crop(image: Tensor, generator: Generator) -> Tensor:
    size = image.shape[-1]
    for _ in range(10):  # a crop that does not fit is drawn again; the whole image in the end
        scale, ratio, top, left = torch.rand(4, generator=generator).tolist()
        area = size**2 * (0.08 + 0.92 * scale)
        aspect = 3 / 4 * (16 / 9) ** ratio  # width / height, log-uniform in [3/4, 4/3]
        height, width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < height <= size and 0 < width <= size:
            top, left = int(top * (size - height + 1)), int(left * (size - width + 1))
            crop = image[None, :, top : top + height, left : left + width]
            # bilinear weights sum to 1 up to rounding
            return F.interpolate(crop, (size, size), mode="bilinear").squeeze(0).clamp_(0, 1)
    return image
