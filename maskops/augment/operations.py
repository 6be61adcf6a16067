"""The operations of RandAugment and AugMix: Pillow's formulas on batches, without rounding to 8 bits.

images are (N, C, H, W) float32 or float64 in [0, 1], with C of 1 or 3; the second argument has one number for each
image, shape (N,), on their device. Results are in [0, 1] and may be the images themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LUMA = (0.299, 0.587, 0.114)


def autocontrast(images: Tensor) -> Tensor:
    """Each channel stretched to [0, 1]; a channel of one value stays as it is.

    >>> autocontrast(torch.tensor([0.25, 0.5, 0.75]).expand(1, 1, 1, 3)).flatten()
    tensor([0.0000, 0.5000, 1.0000])
    """
    low, high = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    stretched = (images - low) / torch.where(high > low, high - low, 1)
    return torch.where(high > low, stretched, images)


def equalize(images: Tensor) -> Tensor:
    """Each channel's histogram of 256 levels made flat.

    Level k becomes ``(pixels below level k + step // 2) // step``, at most 255, where step is a 255th of the pixels
    below the highest level, rounded down; a channel in which step is 0 stays as it is.

    >>> images = torch.tensor([0.5, 0.6]).repeat(1, 1, 16, 16)
    >>> equalize(images).unique()
    tensor([0., 1.])
    """
    count, channels, height, width = images.shape
    level = _levels(images).long().reshape(count * channels, -1)
    rows = torch.arange(len(level), device=images.device)[:, None]
    bins = (256 * rows + level).flatten()
    histogram = torch.zeros(256 * len(level), dtype=torch.long, device=images.device)
    histogram = histogram.scatter_add_(0, bins, torch.ones_like(bins)).view(-1, 256)
    below = histogram.cumsum(1) - histogram
    step = below.gather(1, level.amax(1, keepdim=True)) // 255
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    flat = table.gather(1, level).view(count, channels, height, width).to(images.dtype) / 255
    return torch.where(step.view(count, channels, 1, 1) > 0, flat, images)


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """The highest ``bits`` of each pixel's 8; 0 gives black (new Pillows refuse it), 8 rounds to whole levels.

    >>> posterize(torch.full((1, 1, 1, 1), 200 / 255), torch.tensor([1])) * 255
    tensor([[[[128.]]]])
    """
    quantum = 2 ** (8 - _per_image(bits, images))
    return (_levels(images) / quantum).floor() * quantum / 255


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Pixels of a level of 0 to 255 not below the threshold inverted; 256 changes nothing.

    >>> solarize(torch.tensor([0.25, 1.0]).expand(1, 1, 1, 2), torch.tensor([128])).flatten()
    tensor([0.2500, 0.0000])
    """
    return torch.where(_levels(images) < _per_image(threshold, images), images, 1 - images)


def color(images: Tensor, factor: Tensor) -> Tensor:
    """0: grey; 1: as it is; above 1: more colour. Grey images have no colour and stay as they are.

    >>> color(torch.tensor([1.0, 0.0, 0.0]).view(1, 3, 1, 1), torch.tensor([0.0])).flatten()
    tensor([0.2990, 0.2990, 0.2990])
    """
    return _blend(_grey(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """0: the mean grey of the image; 1: as it is; above 1: more contrast.

    >>> contrast(torch.tensor([0.25, 0.75]).expand(1, 1, 1, 2), torch.tensor([0.5])).flatten()
    tensor([0.3750, 0.6250])
    """
    return _blend(_grey(images).mean((2, 3), keepdim=True), images, factor)


def brightness(images: Tensor, factor: Tensor) -> Tensor:
    """0: black; 1: as it is; above 1: brighter.

    >>> brightness(torch.tensor([0.25, 0.75]).expand(1, 1, 1, 2), torch.tensor([2.0])).flatten()
    tensor([0.5000, 1.0000])
    """
    return _blend(torch.zeros_like(images), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """0: smoothed by [[1, 1, 1], [1, 5, 1], [1, 1, 1]] / 13; 1: as it is; above 1: sharper. The outermost pixels stay.

    >>> image = torch.zeros(1, 1, 3, 3)
    >>> image[..., 1, 1] = 1
    >>> sharpness(image, torch.tensor([0.0]))[..., 1, 1] * 13
    tensor([[5.]])
    """
    smooth = images.clone()
    inside = smooth[:, :, 1:-1, 1:-1]
    # sum of 9 and the centre 4 times more: pooling, since a convolution may run in TF32
    inside.copy_((9 * F.avg_pool2d(images, 3, stride=1) + 4 * inside) / 13)
    return _blend(smooth, images, factor)


def rotate(images: Tensor, degrees: Tensor, mode: str = "nearest") -> Tensor:
    """Turned counterclockwise about the centre.

    >>> rotate(torch.arange(4.0).view(1, 1, 2, 2) / 4, torch.tensor([90.0])).flatten() * 4
    tensor([1., 3., 0., 2.])
    """
    turn = torch.deg2rad(degrees)
    x, y = _pixel_centres(images)
    x, y = x - images.shape[3] / 2, y - images.shape[2] / 2
    cos, sin = turn.cos()[:, None, None], turn.sin()[:, None, None]
    return _sample(images, cos * x - sin * y + images.shape[3] / 2, sin * x + cos * y + images.shape[2] / 2, mode)


def shear_x(images: Tensor, slope: Tensor, mode: str = "nearest") -> Tensor:
    """Rows moved to the left by ``slope`` times their distance from the top.

    >>> shear_x(torch.eye(3).view(1, 1, 3, 3), torch.tensor([0.6])).squeeze()[1]
    tensor([1., 0., 0.])
    """
    x, y = _pixel_centres(images)
    return _sample(images, x + slope[:, None, None] * y, y, mode)


def shear_y(images: Tensor, slope: Tensor, mode: str = "nearest") -> Tensor:
    """Columns moved up by ``slope`` times their distance from the left.

    >>> shear_y(torch.eye(3).view(1, 1, 3, 3), torch.tensor([0.6])).squeeze()[:, 1]
    tensor([1., 0., 0.])
    """
    x, y = _pixel_centres(images)
    return _sample(images, x, y + slope[:, None, None] * x, mode)


def translate_x(images: Tensor, pixels: Tensor, mode: str = "nearest") -> Tensor:
    """Moved to the left, zeros coming in.

    >>> translate_x(torch.tensor([0.1, 0.2, 0.3]).expand(1, 1, 1, 3), torch.tensor([1.0])).flatten()
    tensor([0.2000, 0.3000, 0.0000])
    """
    x, y = _pixel_centres(images)
    return _sample(images, x + pixels[:, None, None], y, mode)


def translate_y(images: Tensor, pixels: Tensor, mode: str = "nearest") -> Tensor:
    """Moved up, zeros coming in.

    >>> translate_y(torch.tensor([0.1, 0.2, 0.3]).view(1, 1, 3, 1), torch.tensor([-1.0])).flatten()
    tensor([0.0000, 0.1000, 0.2000])
    """
    x, y = _pixel_centres(images)
    return _sample(images, x, y + pixels[:, None, None], mode)


def _levels(images: Tensor) -> Tensor:
    """Each pixel's nearest of the levels 0 to 255."""
    return (images * 255).round()


def _per_image(value: Tensor, images: Tensor) -> Tensor:
    return value.to(images.dtype)[:, None, None, None]


def _grey(images: Tensor) -> Tensor:
    """(N, 1, H, W) luma of ITU-R 601."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.unbind(1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue)[:, None]


def _blend(start: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``start`` at factor 0, the images at 1, and beyond them above 1."""
    return torch.lerp(start.expand_as(images), images, _per_image(factor, images)).clamp(0, 1)


def _pixel_centres(images: Tensor) -> tuple[Tensor, Tensor]:
    """x (1, W) and y (H, 1) in pixels from the upper left corner."""
    height, width = images.shape[2:]
    x = torch.arange(width, dtype=images.dtype, device=images.device) + 0.5
    y = torch.arange(height, dtype=images.dtype, device=images.device) + 0.5
    return x[None, :], y[:, None]


def _sample(images: Tensor, x: Tensor, y: Tensor, mode: str) -> Tensor:
    """The images at the points (x, y) in pixels, each broadcast to (N, H, W); 0 outside.

    mode: ``nearest`` or ``bilinear``, which repeats the outermost pixels up to the border as Pillow does
    """
    count, _, height, width = images.shape
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = (2 * x / width - 1).expand(count, height, width), (2 * y / height - 1).expand(count, height, width)
    grid = torch.stack((x, y), dim=3).to(images.dtype)
    sampled = F.grid_sample(images, grid, mode=mode, padding_mode="border", align_corners=False)
    return (sampled * inside.expand(count, height, width)[:, None]).clamp_(0, 1)
