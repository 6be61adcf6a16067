import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torch import nn

from maskops.augment import adversarial, augmix, cutmix, cutout, mixup, randaugment, random_crop, random_flip
from maskops.augment import operations as op
from maskops.augment.chains import AUGMIX, RANDAUGMENT

LABELS = torch.arange(6)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_images(shape=(6, 3, 12, 10), seed=0, dtype=torch.float32):
    """Random images of 8-bit levels whose contrast and brightness differ."""
    images = torch.rand(shape, generator=seeded(seed))
    low, high = torch.rand(2, shape[0], 1, 1, 1, generator=seeded(seed + 1)).sort(0).values
    return ((low + (high - low) * images) * 255).round().div(255).to(dtype)


class Mean(nn.Module):
    """Logits that are linear in the mean of each channel."""

    def __init__(self, channels=3):
        super().__init__()
        self.linear = nn.Linear(channels, 6)

    def forward(self, images):
        return self.linear(images.mean((2, 3)).float())


def attack(images, generator):
    """The adversary with a model for this number of channels."""
    torch.manual_seed(0)
    model = Mean(images.shape[1]).to(images.device)
    # a single short step: a longer way ends in the same corner of the ball from any start
    return adversarial(model, images, labels_of(images), generator, epsilon=0.1, steps=1, step_size=0.02)


def labels_of(images):
    return torch.arange(len(images), device=images.device) % 6


AUGMENTATIONS = {
    "random_crop": lambda images, generator: random_crop(images, 2, generator),
    "random_flip": random_flip,
    "cutout": cutout,
    "mixup": lambda images, generator: mixup(images, labels_of(images), generator).images,
    "cutmix": lambda images, generator: cutmix(images, labels_of(images), generator).images,
    "randaugment": randaugment,
    "augmix": augmix,
    "adversarial": attack,
}
ALONE = [name for name in AUGMENTATIONS if name not in ("mixup", "cutmix")]
"""Those in which an image doesn't depend on the others of its batch."""
every = pytest.mark.parametrize("name", AUGMENTATIONS)


@settings(max_examples=40)
@given(
    name=st.sampled_from(sorted(AUGMENTATIONS)),
    seed=st.integers(0, 1000),
    count=st.integers(1, 5),
    channels=st.sampled_from([1, 3]),
    height=st.integers(4, 12),
    width=st.integers(4, 12),
    extreme=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_output_is_an_image_and_input_untouched(name, seed, count, channels, height, width, extreme, dtype):
    images = random_images((count, channels, height, width), seed, dtype)
    images = images.round() if extreme else images
    before = images.clone()
    result = AUGMENTATIONS[name](images, seeded(seed))
    assert torch.equal(images, before)
    assert result.shape == images.shape and result.dtype == dtype and not result.requires_grad
    assert ((result >= 0) & (result <= 1)).all()
    assert result.data_ptr() != images.data_ptr()


@every
def test_same_seed_same_augmentation_and_the_generator_moves_on(name):
    images, generator = random_images(), seeded()
    first, second = (AUGMENTATIONS[name](images, generator) for _ in range(2))
    assert torch.equal(first, AUGMENTATIONS[name](images, seeded()))
    assert not torch.equal(first, second)
    assert not torch.equal(first, images)


@every
def test_memory_layout_is_kept_and_changes_nothing(name):
    images = random_images()
    plain = AUGMENTATIONS[name](images, seeded())
    channels_last = AUGMENTATIONS[name](images.to(memory_format=torch.channels_last), seeded())
    strided = torch.zeros(6, 3, 12, 20)
    strided[..., ::2] = images
    assert channels_last.is_contiguous(memory_format=torch.channels_last)
    assert plain.is_contiguous()
    torch.testing.assert_close(channels_last, plain, rtol=0, atol=1e-6)
    torch.testing.assert_close(AUGMENTATIONS[name](strided[..., ::2], seeded()), plain, rtol=0, atol=1e-6)


@every
def test_expanded_images_and_images_with_gradients_are_taken(name):
    images = random_images()[:1].expand(6, -1, -1, -1)
    assert AUGMENTATIONS[name](images, seeded()).shape == images.shape
    assert not AUGMENTATIONS[name](random_images().requires_grad_(), seeded()).requires_grad


@every
def test_empty_batch_stays_empty(name):
    assert AUGMENTATIONS[name](torch.zeros(0, 3, 8, 8), seeded()).shape == (0, 3, 8, 8)


@pytest.mark.gpu
@every
def test_augmentation_is_the_same_on_the_gpu(name):
    images = random_images((16, 3, 32, 32))
    on_gpu = AUGMENTATIONS[name](images.cuda(), seeded())
    assert on_gpu.device.type == "cuda"
    differ = (on_gpu.cpu() - AUGMENTATIONS[name](images, seeded())).abs() > 1e-4
    assert differ.float().mean() < 1e-3  # a pixel on the edge of a level or of a neighbour


@pytest.mark.parametrize("name", ALONE)
def test_images_of_a_batch_do_not_mix(name):
    images = random_images()
    others = images.clone()
    others[1:] = random_images(seed=7)[1:]
    once, again = (AUGMENTATIONS[name](batch, seeded()) for batch in (images, others))
    assert torch.equal(once[0], again[0])
    assert not torch.equal(once[1:], again[1:])


def test_random_crop_takes_each_window_of_the_padded_image():
    image = torch.arange(1, 17.0).view(1, 1, 4, 4) / 16
    windows = F.pad(image, (1, 1, 1, 1)).unfold(2, 4, 1).unfold(3, 4, 1).reshape(9, 1, 4, 4)
    crops = random_crop(image.expand(200, -1, -1, -1), 1, seeded())
    taken = [[torch.equal(crop, window) for window in windows] for crop in crops]
    assert all(sum(row) == 1 for row in taken)
    assert all(map(any, zip(*taken, strict=True)))


def test_random_crop_without_padding_is_the_identity():
    images = random_images()
    assert torch.equal(random_crop(images, 0, seeded()), images)


def test_random_flip_mirrors_about_half():
    images = torch.rand(400, 1, 4, 4, generator=seeded())
    flipped = random_flip(images, seeded())
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    same = (flipped == images).flatten(1).all(1)
    assert (mirrored ^ same).all()
    assert 150 < mirrored.sum() < 250


@pytest.mark.parametrize("length", [1, 3, 4])
def test_cutout_is_one_square_cut_off_at_the_border(length):
    hole = cutout(torch.ones(300, 1, 8, 6), seeded(), length)[:, 0] == 0
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    for side in (rows, columns):
        assert (side.int().diff(dim=1).abs().sum(1) <= 2).all()  # one run
        assert side.sum(1).max() == length and side.sum(1).min() == (length + 1) // 2
        assert side.any(0).all()


def test_cutout_takes_half_the_height_and_nothing_for_no_length():
    images = random_images((20, 3, 8, 16)).clamp(min=0.1)
    assert (cutout(images, seeded()) == 0).all(1).sum((1, 2)).max() == 16
    assert torch.equal(cutout(images, seeded(), 0), images)


def test_mixup_is_the_blend_that_its_labels_say():
    images = random_images()
    mixed = mixup(images, LABELS, seeded())
    expected = mixed.weight * images + (1 - mixed.weight) * images[mixed.other_labels]
    assert 0 < mixed.weight < 1
    assert torch.equal(mixed.labels, LABELS) and sorted(mixed.other_labels.tolist()) == LABELS.tolist()
    torch.testing.assert_close(mixed.images, expected)


def test_mixup_weight_follows_beta():
    images, generator = random_images((2, 1, 4, 4)), seeded()
    weights = {a: np.array([mixup(images, LABELS[:2], generator, a).weight for _ in range(400)]) for a in (0.2, 1, 5)}
    for alpha, drawn in weights.items():
        assert drawn.mean() == pytest.approx(0.5, abs=0.06)
        assert drawn.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.2)


@pytest.mark.parametrize("seed", range(10))
def test_cutmix_is_one_box_whose_share_is_the_weight(seed):
    images = LABELS.view(6, 1, 1, 1).expand(6, 3, 8, 12) / 5.0
    mixed = cutmix(images, LABELS, seeded(seed))
    moved = mixed.other_labels != LABELS
    foreign = (mixed.images != images)[moved]
    assert foreign.float().mean().item() == pytest.approx(1 - mixed.weight) or not moved.any()
    for image in range(6):
        box = mixed.images[image] != images[image]
        assert torch.equal(box, box.any(2, keepdim=True) & box.any(1, keepdim=True))
        assert torch.equal(mixed.images[image][box], images[mixed.other_labels[image]][box])


def test_cutmix_box_follows_lambda():
    generator, images = seeded(), random_images((2, 1, 32, 32))
    weights = [cutmix(images, LABELS[:2], generator).weight for _ in range(400)]
    # a box with its centre uniform over the image loses a good part of its area: E[λ] = 1/2 becomes about 0.7
    assert 0.65 < np.mean(weights) < 0.78


@pytest.mark.parametrize("kind", [mixup, cutmix])
def test_alpha_zero_leaves_the_images(kind):
    images = random_images()
    mixed = kind(images, LABELS, seeded(), alpha=0)
    assert mixed.weight == 1 and torch.equal(mixed.images, images)


def test_cutmix_probability_leaves_whole_batches():
    images, generator = random_images(), seeded()
    untouched = cutmix(images, LABELS, generator, probability=0)
    assert untouched.weight == 1 and torch.equal(untouched.images, images)
    assert torch.equal(untouched.other_labels, LABELS)
    mixed = [not torch.equal(cutmix(images, LABELS, generator, 1, 0.5).images, images) for _ in range(100)]
    assert 30 < sum(mixed) < 65


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


def test_chains_draw_from_the_papers_operations():
    assert len(RANDAUGMENT) == 14 and len(AUGMIX) == 10
    assert set(AUGMIX) == set(RANDAUGMENT) - {"color", "contrast", "brightness", "sharpness"}
    assert next(iter(RANDAUGMENT)) == next(iter(AUGMIX)) == "identity"


@pytest.mark.parametrize("table", [RANDAUGMENT, AUGMIX], ids=["randaugment", "augmix"])
def test_level_zero_moves_and_inverts_nothing(table):
    images = random_images()
    zero, sign = torch.zeros(6), torch.ones(6)
    kept = ["identity", "rotate", "shear-x", "shear-y", "translate-x", "translate-y"]
    kept += ["solarize"] if table is AUGMIX else []
    for name in kept:
        torch.testing.assert_close(table[name](images, zero, sign), images, rtol=0, atol=2e-6)


def test_randaugment_magnitudes_are_those_of_its_docstring():
    images = random_images((1, 3, 30, 20))
    level, minus = torch.tensor([1 / 3]), torch.tensor([-1.0])
    value = functools.partial(torch.full, (1,))
    expected = {
        "rotate": op.rotate(images, value(-10.0)),
        "solarize": op.solarize(images, value(85.33)),
        "posterize": op.posterize(images, value(1.0)),
        "color": op.color(images, value(0.7)),
        "shear-x": op.shear_x(images, value(-0.1)),
        "translate-x": op.translate_x(images, value(-2.2)),
        "translate-y": op.translate_y(images, value(-3.3)),
    }
    for name, result in expected.items():
        torch.testing.assert_close(RANDAUGMENT[name](images, level, minus), result, rtol=0, atol=1e-6)


def test_randaugment_of_one_operation_is_one_of_the_fourteen():
    image = random_images((1, 3, 12, 12))
    results = randaugment(image.expand(300, -1, -1, -1), seeded(), count=1, magnitude=12)
    level = torch.tensor([12 / 30])
    candidates = [f(image, level, torch.tensor([s])) for f in RANDAUGMENT.values() for s in (-1.0, 1.0)]
    taken = (results[:, None] - torch.stack(candidates, dim=1)).abs().amax((2, 3, 4)) < 1e-5
    assert taken.any(1).all()
    assert taken.any(0).all()


def test_randaugment_of_no_operation_is_the_identity():
    images = random_images()
    assert torch.equal(randaugment(images, seeded(), count=0), images)


def test_augmix_stays_between_the_image_and_its_chains():
    # white images in which every operation leaves white or brings in zeros or inverts: the mean falls, never rises
    images = torch.ones(50, 1, 8, 8)
    mixed = augmix(images, seeded())
    assert (mixed <= 1).all() and (mixed.mean((1, 2, 3)) < 1).float().mean() > 0.5


def test_augmix_is_the_mixture_of_its_chains(monkeypatch):
    def add(amount):
        return lambda images, level, sign: images + amount

    # nine operations that add 1/8, so that a chain adds its depth in eighths
    names = list(AUGMIX)
    for name in names[1:]:
        monkeypatch.setitem(AUGMIX, name, add(1 / 8))
    images = torch.zeros(400, 1, 4, 4)
    fixed = augmix(images, seeded(), depth=2)[:, 0, 0, 0] / (2 / 8)
    assert fixed.mean() == pytest.approx(0.5, abs=0.05)  # E[m]; weights sum to 1
    assert fixed.var() == pytest.approx(1 / 12, rel=0.2)
    stochastic = augmix(images, seeded(), depth=-1, width=1)[:, 0, 0, 0] * 8
    assert stochastic.max() > 2 and stochastic.mean() == pytest.approx(1, abs=0.1)
    assert augmix(images, seeded(), depth=-1, width=4).max() <= 3 / 8


def test_augmix_magnitudes_are_those_of_its_docstring():
    images = random_images((1, 3, 30, 20))
    level, minus = torch.tensor([0.55]), torch.tensor([-1.0])
    value = functools.partial(torch.full, (1,))
    expected = {
        "rotate": op.rotate(images, value(-16.0), "bilinear"),
        "solarize": op.solarize(images, value(256 - 140.0)),
        "posterize": op.posterize(images, value(2.0)),
        "shear-x": op.shear_x(images, value(-0.165), "bilinear"),
        "shear-y": op.shear_y(images, value(-0.165), "bilinear"),
        "translate-x": op.translate_x(images, value(-3.0), "bilinear"),
        "translate-y": op.translate_y(images, value(-5.0), "bilinear"),
    }
    for name, result in expected.items():
        torch.testing.assert_close(AUGMIX[name](images, level, minus), result, rtol=0, atol=1e-5)


def test_augmix_levels_are_uniform_up_to_severity(monkeypatch):
    levels = []

    def record(images, level, sign):
        levels.append(level * sign)
        return images

    for name in list(AUGMIX)[1:]:
        monkeypatch.setitem(AUGMIX, name, record)
    augmix(random_images((500, 1, 4, 4)), seeded(), severity=4, depth=1)
    signed = torch.cat(levels)
    assert len(signed) == 1500 and signed.abs().min() >= 0.01 and signed.abs().max() <= 0.4
    assert signed.abs().mean() == pytest.approx(0.205, abs=0.01) and (signed < 0).float().mean() == pytest.approx(
        0.5, abs=0.05
    )


def test_adversarial_raises_the_loss_and_stays_in_the_ball():
    model, images = Mean(), random_images()
    perturbed = adversarial(model, images, LABELS, seeded(), epsilon=16 / 255, steps=4)
    assert ((perturbed - images).abs() <= 16 / 255 + 1e-6).all()
    clean, attacked = (F.cross_entropy(model(x), LABELS, reduction="none") for x in (images, perturbed))
    assert (attacked > clean).all()


def test_adversarial_of_a_linear_model_is_the_corner_of_the_ball():
    model, images = Mean(1), torch.full((2, 1, 4, 4), 0.5)
    with torch.no_grad():
        model.linear.weight.copy_(torch.tensor([[1.0], [-1.0], [0.0], [0.0], [0.0], [0.0]]))
        model.linear.bias.zero_()
    perturbed = adversarial(model, images, torch.tensor([0, 1]), seeded(), epsilon=0.25, steps=2)
    torch.testing.assert_close(perturbed, torch.tensor([0.25, 0.75]).view(2, 1, 1, 1).expand(2, 1, 4, 4))


def test_adversarial_step_is_the_formula():
    model, images = Mean(), random_images().clamp(0.2, 0.8)
    start = adversarial(model, images, LABELS, seeded(), epsilon=0.1, steps=0)
    point = start.clone().requires_grad_()
    F.cross_entropy(model(point), LABELS).backward()
    expected = torch.minimum(torch.maximum(start + 0.03 * point.grad.sign(), images - 0.1), images + 0.1)
    stepped = adversarial(model, images, LABELS, seeded(), epsilon=0.1, steps=1, step_size=0.03)
    torch.testing.assert_close(stepped, expected, rtol=0, atol=1e-6)
    assert (start - images).abs().max() > 0.09 and abs((start - images).mean()) < 0.01


@pytest.mark.parametrize("training", [True, False])
def test_adversarial_leaves_the_model_and_works_without_gradients(training):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Mean(4)).train(training)
    with torch.no_grad():
        perturbed = adversarial(model, random_images(), LABELS, seeded(), epsilon=0.1)
        assert not torch.is_grad_enabled()
    assert all(module.training is training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not torch.equal(perturbed, random_images())


def test_adversarial_of_radius_zero_is_the_identity():
    assert torch.equal(adversarial(Mean(), random_images(), LABELS, seeded(), epsilon=0), random_images())


@every
def test_wrong_images_and_generators_are_refused(name):
    augment, images = AUGMENTATIONS[name], random_images()
    with pytest.raises(TypeError, match=rf"^{name}: images must be floating point in \[0, 1\]; got torch.uint8"):
        augment(images.byte(), seeded())
    with pytest.raises(ValueError, match=rf"^{name}: images must be \(N, C, H, W\); got \(3, 12, 10\)$"):
        augment_one = AUGMENTATIONS[name] if name != "adversarial" else one_of_three_dimensions
        augment_one(images[0], seeded())
    with pytest.raises(TypeError, match=f"^{name}: generator must be a torch.Generator; got int$"):
        augment(images, 0)


def one_of_three_dimensions(images, generator):
    return adversarial(Mean(), images, LABELS, generator)


@pytest.mark.parametrize("chain", [randaugment, augmix])
def test_chains_refuse_other_channels_and_tiny_images(chain):
    for shape in ((2, 4, 8, 8), (2, 3, 3, 8)):
        with pytest.raises(ValueError, match=rf"{chain.__name__}: images must be \(N, 1 or 3, H >= 4, W >= 4\); got"):
            chain(torch.rand(shape), seeded())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, g: random_crop(x, -1, g), "random_crop: padding must be finite and at least 0; got -1"),
        (lambda x, g: cutout(x, g, -2), "cutout: length must be finite and at least 0; got -2"),
        (lambda x, g: mixup(x, LABELS, g, -1), "mixup: alpha must be finite and at least 0; got -1"),
        (lambda x, g: cutmix(x, LABELS, g, float("nan")), "cutmix: alpha must be finite and at least 0; got nan"),
        (lambda x, g: cutmix(x, LABELS, g, 1, 1.5), r"cutmix: probability must be in \[0, 1\]; got 1.5"),
        (lambda x, g: randaugment(x, g, -1), "randaugment: count must be finite and at least 0; got -1"),
        (lambda x, g: randaugment(x, g, 2, 31), r"randaugment: magnitude must be in \[0, 30\]; got 31"),
        (lambda x, g: augmix(x, g, 0), r"augmix: severity must be in \[1, 10\]; got 0"),
        (lambda x, g: augmix(x, g, width=0), "augmix: width must be finite and at least 1; got 0"),
        (lambda x, g: augmix(x, g, depth=0), "augmix: depth must be at least 1, or -1 for 1 to 3 at random; got 0"),
        (lambda x, g: augmix(x, g, alpha=0), "augmix: alpha must be finite and above 0; got 0"),
        (lambda x, g: adversarial(Mean(), x, LABELS, g, -1), "adversarial: epsilon must be finite and at least 0"),
        (lambda x, g: adversarial(Mean(), x, LABELS, g, 1, -1), "adversarial: steps must be finite and at least 0"),
    ],
)
def test_values_out_of_range_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        call(random_images(), seeded())


@pytest.mark.parametrize("call", [mixup, cutmix, functools.partial(adversarial, Mean())])
def test_wrong_labels_are_refused(call):
    with pytest.raises(TypeError, match=r": labels must be integers; got torch.float32$"):
        call(random_images(), LABELS.float(), seeded())
    with pytest.raises(ValueError, match=r": labels must be \(N,\) for images \(N, C, H, W\); got \(5,\) and"):
        call(random_images(), LABELS[:5], seeded())
