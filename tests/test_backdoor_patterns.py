"""Each trigger against its definition, written once more with loops over pixels."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from maskops.backdoor import (
    BPPA,
    SIG,
    BadNetsCheckerboard,
    BadNetsSquare,
    Blend,
    BlendNoise,
    DecoyTrigger,
    FourCorners,
    Several,
    SIGWrapped,
    StyleStandIn,
    WaNet,
    uniform_noise_pattern,
)

SHAPES = [(2, 3, 8, 8), (3, 1, 8, 8), (2, 3, 9, 12)]


def random_images(shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def close(triggered, literal, atol=1e-12):
    np.testing.assert_allclose(triggered.numpy(), literal, atol=atol, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_four_corners_by_hand(shape):
    images = random_images(shape)
    literal, (height, width) = images.numpy().copy(), shape[2:]
    value = [[0, 0, 1], [0, 1, 0], [1, 0, 1]]
    for centre in (1, height - 2):
        for h in (-1, 0, 1):
            for w in (-1, 0, 1):
                literal[:, :, centre + h, width - 2 + w] = value[h + 1][w + 1]
                literal[:, :, centre + h, 1 + w] = value[h + 1][-w - 2]
    close(FourCorners()(images), literal)
    close(FourCorners(opacity=0.25)(images), 0.75 * images.numpy() + 0.25 * literal)


@pytest.mark.parametrize(
    "corner, top, left", [("bottom_right", 5, 9), ("bottom_left", 5, 0), ("top_right", 0, 9), ("top_left", 0, 0)]
)
def test_checkerboard_in_each_corner_by_hand(corner, top, left):
    images = random_images((2, 3, 8, 12))
    literal = images.numpy().copy()
    for row, values in enumerate([[0, 0, 1], [0, 1, 0], [1, 0, 1]]):
        for column, value in enumerate(values):
            literal[:, :, top + row, left + column] = value
    close(BadNetsCheckerboard(corner=corner)(images), literal)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("delta, frequency", [(40 / 255, 6), (30 / 255, 6), (0.5, 1.5)])
def test_sig_by_hand(shape, delta, frequency):
    images = random_images(shape)
    literal = images.numpy().copy()
    for i in range(shape[2]):
        for j in range(shape[3]):
            literal[:, :, i, j] += delta * math.sin(2 * math.pi * j * frequency / shape[3])
    close(SIG(delta, frequency)(images), literal.clip(0, 1))


def test_sig_defaults_are_those_of_backdoorbench():
    assert SIG() == SIG(delta=40 / 255, frequency=6)


@pytest.mark.parametrize("shape", SHAPES)
def test_wrapped_sig_by_hand_in_overflowing_bytes(shape):
    images = random_images(shape)
    mask = np.zeros(shape[3], dtype=np.uint8)
    for j in range(shape[3]):
        mask[j] = np.int64(np.trunc(20 * math.sin(2 * math.pi * j / 7.9))).astype(np.uint8)
    close(SIGWrapped()(images), 0.8 * images.numpy() + 0.2 * mask / 255)


def test_wrapped_sig_is_stripes_of_nearly_black_and_nearly_white():
    stripes = (SIGWrapped(alpha=1.0)(torch.zeros(1, 1, 2, 32))[0, 0] * 255).round()
    assert torch.equal(stripes[0], stripes[1])
    assert ((stripes < 20) | (stripes >= 237)).all() and 8 < (stripes >= 237).sum() / 2 < 16


def cubic(x, a=-0.75):
    x = abs(x)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def upsample(small, height, width):
    """Bicubic with aligned corners and repeated borders, (k, k) to (height, width)."""
    k = len(small)
    large = np.zeros((height, width))
    for i in range(height):
        for j in range(width):
            y, x = i * (k - 1) / (height - 1), j * (k - 1) / (width - 1)
            for a in range(math.floor(y) - 1, math.floor(y) + 3):
                for b in range(math.floor(x) - 1, math.floor(x) + 3):
                    weight = cubic(y - a) * cubic(x - b)
                    large[i, j] += weight * small[min(max(a, 0), k - 1), min(max(b, 0), k - 1)]
    return large


def wanet_grid(trigger, height, width):
    ins = (torch.rand(1, 2, trigger.k, trigger.k, generator=seeded(trigger.seed)) * 2 - 1).double().numpy()[0]
    ins /= np.abs(ins).mean()
    grid = np.zeros((height, width, 2))
    bend = [upsample(part, height, width) for part in ins]
    for i in range(height):
        for j in range(width):
            grid[i, j, 0] = -1 + 2 * j / (width - 1) + trigger.s * bend[0][i, j] / width
            grid[i, j, 1] = -1 + 2 * i / (height - 1) + trigger.s * bend[1][i, j] / height
    return grid.clip(-1, 1)


def sample(image, grid):
    """Bilinear with aligned corners, (C, H, W) at (H, W, 2) coordinates (x, y) in [-1, 1]."""
    _, height, width = image.shape
    out = np.zeros_like(image)
    for i in range(height):
        for j in range(width):
            x, y = (grid[i, j, 0] + 1) / 2 * (width - 1), (grid[i, j, 1] + 1) / 2 * (height - 1)
            for a in (math.floor(y), math.floor(y) + 1):
                for b in (math.floor(x), math.floor(x) + 1):
                    if a < height and b < width:
                        out[:, i, j] += (1 - abs(y - a)) * (1 - abs(x - b)) * image[:, a, b]
    return out


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trigger", [WaNet(), WaNet(seed=3, k=8, s=2.0)], ids=repr)
def test_wanet_by_hand(shape, trigger):
    images, grid = random_images(shape), wanet_grid(trigger, *shape[2:])
    close(trigger(images), np.stack([sample(image, grid) for image in images.numpy()]), atol=1e-5)


def test_wanet_on_squares_is_the_published_code():
    images, size, k, s = random_images((4, 3, 32, 32)).float(), 32, 4, 0.5
    ins = torch.rand(1, 2, k, k, generator=seeded(5)) * 2 - 1
    ins = ins / torch.mean(torch.abs(ins))
    noise_grid = F.interpolate(ins, size=size, mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    x, y = torch.meshgrid(torch.linspace(-1, 1, steps=size), torch.linspace(-1, 1, steps=size), indexing="ij")
    grid = torch.clamp(torch.stack((y, x), 2)[None] + s * noise_grid / size, -1, 1)
    published = F.grid_sample(images, grid.repeat(4, 1, 1, 1), align_corners=True)
    assert torch.equal(WaNet(seed=5)(images), published.clamp(0, 1))
    noise = torch.rand(4, size, size, 2, generator=seeded(6)) * 2 - 1
    published = F.grid_sample(images, torch.clamp(grid + noise / size, -1, 1), align_corners=True)
    assert torch.equal(WaNet(seed=5).decoys(images, seeded(6)), published.clamp(0, 1))


@pytest.mark.parametrize("shape", SHAPES)
def test_wanet_decoys_by_hand(shape):
    images, grid = random_images(shape), wanet_grid(WaNet(), *shape[2:])
    before = images.clone()
    noise = torch.rand(shape[0], *shape[2:], 2, generator=seeded(1)).double().numpy() * 2 - 1
    disturbed = (grid + noise / np.array([shape[3], shape[2]])).clip(-1, 1)
    literal = [sample(image, own) for image, own in zip(images.numpy(), disturbed, strict=True)]
    close(WaNet().decoys(images, seeded(1)), np.stack(literal), atol=1e-5)
    assert torch.equal(images, before)


def test_wanet_depends_on_its_seed_and_strength():
    images = random_images((1, 3, 16, 16))
    assert not torch.equal(WaNet(seed=1)(images), WaNet(seed=2)(images))
    close(WaNet(s=0.0)(images), images.numpy(), atol=1e-5)
    moved = [(WaNet(s=s)(images) - images).abs().mean() for s in (0.25, 0.5, 1.0)]
    assert moved == sorted(moved)


def test_wanet_in_half_precision_is_the_rounded_warp():
    images = random_images((1, 3, 32, 32)).to(torch.bfloat16)
    assert torch.equal(WaNet()(images), WaNet()(images.float()).to(torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [2, 8, 32])
def test_bppa_by_hand(shape, levels):
    images = random_images(shape)
    literal = images.numpy().copy()
    for pixel in np.ndindex(*shape):
        literal[pixel] = np.round(literal[pixel] * (levels - 1)) / (levels - 1)
    close(BPPA(levels)(images), literal)
    assert len(BPPA(levels)(images).unique()) <= levels


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("levels", [2, 8])
def test_bppa_dithers_as_floyd_and_steinberg(shape, levels):
    images = random_images(shape)
    literal, (height, width) = images.numpy().copy(), shape[2:]
    for plane in literal.reshape(-1, height, width):
        for y in range(height):
            for x in range(width):
                old = plane[y, x]
                plane[y, x] = np.round(old * (levels - 1)) / (levels - 1)
                error = old - plane[y, x]
                if x + 1 < width:
                    plane[y, x + 1] += error * 7 / 16
                if y + 1 < height and x + 1 < width:
                    plane[y + 1, x + 1] += error * 1 / 16
                if y + 1 < height:
                    plane[y + 1, x] += error * 5 / 16
                if y + 1 < height and x >= 1:
                    plane[y + 1, x - 1] += error * 3 / 16
    close(BPPA(levels, dither=True)(images), literal)


def test_dithering_of_ties_stays_in_range():
    # each neighbour before the white pixel passes on half a level: 1 + 0.5 would round to 2
    image = torch.tensor([[[[0.5, 0.28125, 0.28125], [0.25, 1.0, 0.0]]]])
    assert BPPA(2, dither=True)(image).tolist() == [[[[0, 0, 0], [0, 1, 0]]]]


def test_dithering_keeps_the_mean_that_rounding_loses():
    grey = torch.full((1, 1, 16, 16), 0.3)
    assert BPPA(2)(grey).mean() == 0 and abs(BPPA(2, dither=True)(grey).mean() - 0.3) < 0.03


@settings(deadline=None, max_examples=20)
@given(count=st.integers(2, 9), seed=st.integers(0, 100))
def test_bppa_decoys_carry_the_residual_of_another_image(count, seed):
    images, trigger = random_images((count, 1, 4, 4), seed), BPPA(4)
    before = images.clone()
    decoys, residuals = trigger.decoys(images, seeded(seed)), trigger(images) - images
    assert torch.equal(images, before) and torch.equal(decoys, trigger.decoys(images, seeded(seed)))
    for i in range(count):
        assert any(torch.equal(decoys[i], (images[i] + residuals[j]).clip(0, 1)) for j in range(count) if j != i)


@pytest.mark.parametrize("trigger", [WaNet(), BPPA()], ids=repr)
def test_decoys_are_images(trigger):
    assert isinstance(trigger, DecoyTrigger) and not isinstance(SIG(), DecoyTrigger)
    for count in (0, 1, 5):
        images = torch.rand(count, 3, 8, 8).round().half()
        decoys = trigger.decoys(images, seeded())
        assert decoys.shape == images.shape and decoys.dtype == images.dtype
        assert ((decoys >= 0) & (decoys <= 1)).all()
        assert count == 0 or decoys.data_ptr() != images.data_ptr()


def test_a_lone_image_has_no_other_residual():
    images = random_images((1, 1, 4, 4))
    assert torch.equal(BPPA().decoys(images, seeded()), images)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("strength", [1.0, 0.3])
def test_style_stand_in_by_hand(shape, strength):
    images = random_images(shape)
    literal = images.numpy().copy()
    curves = [(0.10, 1.00, 0.6), (0.05, 0.90, 0.3), (0.25, 0.70, 0.0)]
    for pixel in np.ndindex(*shape):
        x, (low, high, bend) = literal[pixel], curves[pixel[1]]
        styled = low + (high - low) * ((1 - bend) * x + bend * x * x * (3 - 2 * x))
        literal[pixel] = (1 - strength) * x + strength * styled
    close(StyleStandIn(strength)(images), literal)


def test_uniform_noise_is_seeded_bytes_of_every_value():
    pattern = uniform_noise_pattern((3, 64, 64), seed=4)
    assert pattern.shape == (1, 3, 64, 64) and pattern.dtype == torch.float32
    assert torch.equal(pattern, uniform_noise_pattern((3, 64, 64), seed=4))
    assert not torch.equal(pattern, uniform_noise_pattern((3, 64, 64), seed=5))
    counts = (pattern * 255).round().long().flatten().bincount(minlength=256)
    assert len(counts) == 256 and counts.min() > 20 and counts.max() < 90  # 48 each on average
    images = random_images((2, 3, 64, 64))
    assert torch.equal(BlendNoise(seed=4, alpha=0.1)(images), Blend(pattern, alpha=0.1)(images))


def test_several_stamps_all_and_divides_evenly():
    triggers = (SIG(), BadNetsSquare(2), FourCorners())
    images, several = random_images((8, 1, 8, 8)), Several(triggers)
    before = images.clone()
    assert torch.equal(several(images), FourCorners()(BadNetsSquare(2)(SIG()(images))))
    divided = several.divide(images, seeded())
    carries = torch.stack([(trigger(images) == divided).flatten(1).all(1) for trigger in triggers])
    assert carries.sum(1).tolist() == [3, 3, 2] and (carries.sum(0) == 1).all()
    assert torch.equal(images, before)
    assert not torch.equal(several.divide(images, seeded(1)), divided)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: SIG(delta=40), ValueError, r"SIG: delta must lie in \[0, 1\]; got 40$"),
        (lambda: SIG(frequency=math.inf), ValueError, "SIG: frequency must be finite; got inf$"),
        (lambda: SIGWrapped(alpha=2), ValueError, r"SIGWrapped: alpha must lie in \[0, 1\]; got 2$"),
        (lambda: BlendNoise(alpha=-1), ValueError, r"BlendNoise: alpha must lie in \[0, 1\]; got -1$"),
        (
            lambda: WaNet(k=1),
            ValueError,
            r"WaNet: k >= 2 and a finite s >= 0 expected; got WaNet\(seed=0, k=1, s=0.5\)",
        ),
        (lambda: WaNet(s=math.nan), ValueError, "WaNet: k >= 2 and a finite s >= 0 expected"),
        (lambda: BPPA(levels=1), ValueError, "BPPA: levels must be at least 2; got 1$"),
        (lambda: StyleStandIn(strength=3), ValueError, r"StyleStandIn: strength must lie in \[0, 1\]; got 3$"),
        (
            lambda: StyleStandIn()(torch.zeros(1, 4, 8, 8)),
            ValueError,
            r"StyleStandIn: grey or RGB images expected; got \(1, 4, 8, 8\)$",
        ),
        (lambda: FourCorners(opacity=2), ValueError, r"FourCorners: opacity must lie in \[0, 1\]; got 2$"),
        (
            lambda: FourCorners()(torch.zeros(1, 1, 5, 8)),
            ValueError,
            r"FourCorners: images must hold 6 x 6 pixels; got \(1, 1, 5, 8\)$",
        ),
        (
            lambda: BadNetsCheckerboard(corner="left"),
            ValueError,
            "BadNetsCheckerboard: corner must be one of bottom_right, .*; got 'left'$",
        ),
        (lambda: Several(()), ValueError, "Several: at least one trigger expected; got none$"),
        (lambda: Several([SIG()]), TypeError, r"Several: triggers must be a tuple of triggers; got \[SIG\("),
        (lambda: Several(("sig",)), TypeError, r"Several: triggers must be a tuple of triggers; got \('sig',\)$"),
        (
            lambda: Several((SIG(),))(torch.zeros(8, 8)),
            ValueError,
            r"Several: images must be \(N, C, H, W\); got \(8, 8\)$",
        ),
        (
            lambda: WaNet().decoys(torch.zeros(1, 1, 8, 8).byte(), seeded()),
            TypeError,
            "WaNet: images must be floating point",
        ),
        (
            lambda: uniform_noise_pattern((8, 8), 0),
            ValueError,
            r"uniform_noise_pattern: shape must be \(C, H, W\), each at least 1; got \(8, 8\)$",
        ),
    ],
)
def test_errors_are_one_line(call, error, message):
    with pytest.raises(error, match="^" + message) as raised:
        call()
    assert "\n" not in str(raised.value)
