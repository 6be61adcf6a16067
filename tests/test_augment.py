"""What holds for every augmentation, and what each refuses."""

import functools

import pytest
import torch
from helpers import seeded
from helpers_augment import LABELS, Mean, random_images
from hypothesis import given, settings
from hypothesis import strategies as st

from maskops.augment import adversarial, augmix, cutmix, cutout, mixup, randaugment, random_crop, random_flip


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
