"""The operations of the chains against Pillow's."""

import numpy as np
import pytest
import torch
from helpers_augment import random_images
from PIL import Image, ImageEnhance, ImageOps

from maskops.augment import operations as op


def to_pil(image):
    pixels = (image * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])


def levels_of_pil(image):
    pixels = torch.from_numpy(np.array(image))
    return (pixels[None] if pixels.dim() == 2 else pixels.permute(2, 0, 1)).float()


def affine(image, *matrix, resample=Image.Resampling.NEAREST):
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample)


COLOURS = {
    "autocontrast": (lambda images, _: op.autocontrast(images), lambda image, _: ImageOps.autocontrast(image), [0], 1),
    "equalize": (lambda images, _: op.equalize(images), lambda image, _: ImageOps.equalize(image), [0], 0),
    "posterize": (op.posterize, ImageOps.posterize, [1, 2, 4, 8], 0),
    "solarize": (op.solarize, ImageOps.solarize, [0, 85, 256], 0),
    "color": (op.color, lambda image, v: ImageEnhance.Color(image).enhance(v), [0.1, 1, 1.9], 2),
    "contrast": (op.contrast, lambda image, v: ImageEnhance.Contrast(image).enhance(v), [0.1, 1, 1.9], 2),
    "brightness": (op.brightness, lambda image, v: ImageEnhance.Brightness(image).enhance(v), [0.1, 1, 1.9], 1),
    "sharpness": (op.sharpness, lambda image, v: ImageEnhance.Sharpness(image).enhance(v), [0.1, 1, 1.9], 2),
}


@pytest.mark.parametrize("shape", [(5, 3, 32, 32), (5, 1, 16, 9), (2, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("name", COLOURS)
def test_colour_operation_agrees_with_pillow(name, shape):
    ours, pillow, values, tolerance = COLOURS[name]
    images = random_images(shape)
    images[0] = images[0, 0, 0, 0]  # of one value
    images[1] = images[1].round()  # black and white
    for value in values:
        result = ours(images, torch.full((len(images),), float(value))) * 255
        for image, levels in zip(images, result, strict=True):
            error = (levels - levels_of_pil(pillow(to_pil(image), value))).abs().max()
            assert error <= tolerance + 1e-3, f"{name} {value}: {error}"


GEOMETRY = {
    "rotate": (op.rotate, lambda image, v, resample: image.rotate(v, resample), [10, -30, 0]),
    "shear_x": (op.shear_x, lambda image, v, resample: affine(image, 1, v, 0, 0, 1, 0, resample=resample), [0.1, -0.3]),
    "shear_y": (op.shear_y, lambda image, v, resample: affine(image, 1, 0, 0, v, 1, 0, resample=resample), [0.1, -0.3]),
    "translate_x": (
        op.translate_x,
        lambda image, v, resample: affine(image, 1, 0, v, 0, 1, 0, resample=resample),
        [3, -2.3, 0],
    ),
    "translate_y": (
        op.translate_y,
        lambda image, v, resample: affine(image, 1, 0, 0, 0, 1, v, resample=resample),
        [3, -2.3, 0],
    ),
}


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (3, 1, 16, 9)], ids=str)
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometric_operation_agrees_with_pillow(name, shape, mode):
    ours, pillow, values = GEOMETRY[name]
    images = random_images(shape)
    for value in values:
        result = ours(images, torch.full((len(images),), float(value)), mode) * 255
        for image, levels in zip(images, result, strict=True):
            theirs = levels_of_pil(pillow(to_pil(image), value, Image.Resampling[mode.upper()]))
            wrong = ((levels - theirs).abs() > 1.001).float().mean()
            assert wrong <= 0.01, f"{name} {value}: {wrong:.3f} of the pixels"  # those between two neighbours


def test_posterize_to_no_bits_is_black():
    assert not op.posterize(random_images(), torch.zeros(6)).any()


def test_operations_take_one_value_per_image():
    images = random_images((3, 3, 8, 8))
    for name in ("posterize", "solarize", "color", "contrast", "brightness", "sharpness", *GEOMETRY):
        values = torch.tensor([0.0, 1.0, 2.0])
        operation = getattr(op, name)
        alone = torch.cat([operation(images[i : i + 1], values[i : i + 1]) for i in range(3)])
        torch.testing.assert_close(operation(images, values), alone, rtol=0, atol=1e-6)
