import os
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskops.backdoor import (
    BPPA,
    SIG,
    TRIGGERS,
    Additive,
    BadNetsCheckerboard,
    BadNetsSquare,
    Blend,
    BlendNoise,
    FourCorners,
    L0Inv,
    Several,
    SIGWrapped,
    StyleStandIn,
    WaNet,
    parse,
    pattern_from_file,
)
from maskops.backdoor.triggers import CHECKERBOARD, CORNERS

STAMPS = [
    BadNetsSquare(),
    BadNetsSquare(size=2, margin=0, value=0.3),
    BadNetsCheckerboard(corner="top_left"),
    FourCorners(),
    L0Inv(),
]


def make(name, size, channels=3):
    """The trigger of that name, with a random pattern where it needs one."""
    pattern = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(1))
    return TRIGGERS[name](pattern) if name in ("blend", "additive") else TRIGGERS[name]()


SMOOTH = sorted(set(TRIGGERS) - {"bppa"})
"""The triggers that have a gradient; BPPA's is zero everywhere."""


def random_images(seed=0, shape=(2, 3, 32, 32), dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=60)
@given(
    name=st.sampled_from(sorted(TRIGGERS)),
    seed=st.integers(0, 1000),
    count=st.integers(0, 3),
    channels=st.sampled_from([1, 3]),
    size=st.integers(9, 33),
    extreme=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_trigger_output_is_an_image_and_input_untouched(name, seed, count, channels, size, extreme, dtype):
    channels = 3 if name == "l0_inv" else channels
    images = random_images(seed, (count, channels, size, size), dtype)
    images = images.round() if extreme else images
    before = images.clone()
    triggered = make(name, size, channels)(images)
    assert torch.equal(images, before)
    assert triggered.shape == images.shape and triggered.dtype == dtype
    assert ((triggered >= 0) & (triggered <= 1)).all()
    assert count == 0 or triggered.data_ptr() != images.data_ptr()
    assert torch.equal(make(name, size, channels)(images), triggered)


@pytest.mark.parametrize("name", sorted(TRIGGERS))
def test_trigger_treats_each_image_alone(name):
    images = random_images(shape=(3, 3, 12, 12))
    each = torch.cat([make(name, 12)(image) for image in images.split(1)])
    torch.testing.assert_close(make(name, 12)(images), each, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", sorted(set(TRIGGERS) - {"blend", "additive"}))
@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 1, 28, 28), (2, 3, 32, 32), (2, 3, 10, 15)])
def test_trigger_fits_images_of_any_shape(name, shape):
    if name == "l0_inv" and (shape[1] == 1 or shape[3] < 9):
        pytest.skip("L0Inv is nine RGB pixels wide")
    images = random_images(shape=shape)
    triggered = TRIGGERS[name]()(images)
    assert triggered.shape == shape and not torch.equal(triggered, images)


@pytest.mark.parametrize(
    "name, darkest",
    [
        ("sig", 1 - 40 / 255),
        ("sig_wrapped", 0.8),
        ("bppa", 1.0),
        ("wanet", 1.0),
        ("blend_noise", 0.8),
        ("additive", 1.0),
    ],
)
def test_bright_images_stay_bright(name, darkest):
    assert make(name, 32)(torch.ones(2, 3, 32, 32)).min() >= darkest - 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", sorted(TRIGGERS))
def test_trigger_is_the_same_on_the_gpu(name):
    images, trigger = random_images(), make(name, 32)
    there = trigger(images.cuda())
    assert there.is_cuda
    torch.testing.assert_close(there.cpu(), trigger(images), atol=1e-5, rtol=0)


@pytest.mark.parametrize("trigger", STAMPS, ids=repr)
def test_stamp_is_idempotent_and_independent_of_the_image(trigger):
    once = trigger(random_images())
    assert torch.equal(trigger(once), once)
    changed = trigger(torch.zeros(1, 3, 32, 32)) == trigger(torch.ones(1, 3, 32, 32))
    assert 0 < changed.sum() <= 3 * 4 * 9
    assert torch.equal(trigger(random_images(1))[:, changed[0]], once[:, changed[0]])


@pytest.mark.parametrize("name", sorted(TRIGGERS))
def test_trigger_keeps_channels_last_and_strided_input_intact(name):
    trigger, images = make(name, 32), random_images()
    expected = trigger(images)
    channels_last = trigger(images.to(memory_format=torch.channels_last))
    assert torch.equal(channels_last, expected) and channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(trigger(images[:1].expand(3, -1, -1, -1)), expected[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", SMOOTH)
def test_trigger_passes_gradients(name):
    images = random_images(dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(make(name, 32)(images).sum(), images)
    assert gradient.isfinite().all() and gradient.any()


def test_badnets_square_covers_rows_and_columns_27_to_30():
    triggered = BadNetsSquare()(torch.zeros(1, 3, 32, 32))
    assert (triggered[:, :, 27:31, 27:31] == 1).all() and triggered.sum() == 3 * 16
    digits = BadNetsSquare(size=2, margin=0, value=0.5)(torch.zeros(1, 1, 8, 8))
    assert (digits[:, :, 6:, 6:] == 0.5).all() and digits.sum() == 2


def test_badnets_checkerboard_is_the_published_pattern():
    triggered = BadNetsCheckerboard()(torch.full((1, 3, 32, 32), 0.5))
    expected = torch.tensor([[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    assert torch.equal(triggered[0, :, 29:, 29:], expected.expand(3, 3, 3))
    assert (triggered == 0.5).sum() == 3 * (32 * 32 - 9)
    mixed = BadNetsCheckerboard(opacity=0.6)(torch.full((1, 1, 8, 8), 0.5))[0, 0, 5:, 5:]
    torch.testing.assert_close(mixed, 0.6 * torch.tensor(CHECKERBOARD) + 0.2)


def test_l0_inv_is_nine_pixels_of_the_bottom_row():
    triggered = L0Inv()(torch.full((1, 3, 32, 32), 0.5))
    columns = "".join("".join(str(int(v)) for v in pixel) + " " for pixel in triggered[0, :, 31, 23:].T)
    assert columns == "000 101 001 110 111 011 011 100 111 "
    assert (triggered != 0.5).sum() == 27


def test_blend_and_additive_follow_their_formulas():
    images, pattern = random_images(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(Blend(pattern, alpha=0.3)(images), 0.7 * images + 0.3 * pattern)
    assert torch.equal(Blend(pattern, alpha=0.0)(images), images)
    assert torch.equal(Blend(pattern, alpha=1.0)(images), pattern.expand_as(images))
    assert torch.equal(Additive(pattern)(images), (images + pattern).clip(0, 1))
    assert torch.equal(Additive(-pattern)(images), (images - pattern).clip(0, 1))


@pytest.mark.parametrize("name", sorted(TRIGGERS))
def test_trigger_refuses_bytes_and_single_images(name):
    class_name = TRIGGERS[name].__name__
    with pytest.raises(TypeError, match=rf"^{class_name}: images must be floating point.*torch.uint8 .*divide by 255"):
        make(name, 32)(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(ValueError, match=rf"^{class_name}: images must be \(N, C, H, W\); got \(3, 32, 32\)"):
        make(name, 32)(torch.zeros(3, 32, 32))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: BadNetsSquare(size=0), "BadNetsSquare: size >= 1.*size=0"),
        (lambda: BadNetsSquare(value=2.0), "BadNetsSquare: .*value=2.0"),
        (lambda: BadNetsCheckerboard(opacity=-1.0), r"BadNetsCheckerboard: opacity must lie in \[0, 1\]; got -1.0"),
        (lambda: BadNetsSquare()(torch.zeros(1, 3, 4, 4)), r"BadNetsSquare: images must hold 4 x 4 .* \(1, 3, 4, 4\)"),
        (lambda: L0Inv()(torch.zeros(1, 3, 8, 8)), "L0Inv: images must hold 1 x 9 pixels"),
        (lambda: L0Inv()(torch.zeros(1, 1, 32, 32)), "L0Inv: RGB images"),
        (lambda: Blend(torch.zeros(3, 8, 8)), r"Blend: pattern must be \(1, C, H, W\); got \(3, 8, 8\)"),
        (lambda: Blend(torch.full((1, 3, 8, 8), 255.0)), r"Blend: pattern must lie in \[0, 1\]; got 255 to 255"),
        (lambda: Blend(torch.zeros(1, 3, 8, 8), alpha=1.5), r"Blend: alpha must lie in \[0, 1\]; got 1.5"),
        (
            lambda: Additive(torch.zeros(1, 3, 8, 8))(torch.zeros(2, 1, 8, 8)),
            r"Additive: pattern .*got pattern \(1, 3, 8, 8\) and images \(2, 1, 8, 8\)",
        ),
    ],
)
def test_trigger_errors_are_one_line(call, message):
    with pytest.raises(ValueError, match="^" + message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_pattern_must_be_floating_point():
    with pytest.raises(TypeError, match=r"^Additive: pattern must be floating point; got torch.uint8"):
        Additive(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))


def save(path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


@pytest.mark.parametrize("shape, channels", [((5, 7, 3), 3), ((5, 7), 1)])
def test_pattern_from_file_returns_the_pixels(tmp_path, shape, channels):
    pixels = save(tmp_path / "p.png", shape)
    pattern = pattern_from_file(tmp_path / "p.png")
    assert pattern.shape == (1, channels, 5, 7) and pattern.dtype == torch.float32
    expected = torch.from_numpy(pixels).reshape(5, 7, channels).permute(2, 0, 1)
    assert torch.equal((pattern[0] * 255).round().byte(), expected)


def test_pattern_from_file_refuses_what_is_no_plain_png(tmp_path):
    save(tmp_path / "rgba.png", (4, 4, 4))
    save(tmp_path / "p.jpg", (4, 4, 3))
    save(tmp_path / "whole.png", (64, 64, 3))
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
    (tmp_path / "text.png").write_text("no image")
    for name, message in {
        "rgba.png": "without transparency expected, got mode RGBA",
        "p.jpg": "cannot identify",
        "cut.png": "truncated",
        "text.png": "cannot identify",
        "absent.png": "No such file",
    }.items():
        with pytest.raises(
            ValueError, match=rf"^pattern_from_file: cannot use '.*{name}' as PNG: .*{message}"
        ) as raised:
            pattern_from_file(tmp_path / name)
        assert "\n" not in str(raised.value)


def test_parse_makes_every_known_trigger(tmp_path):
    path = tmp_path / "p.png"
    save(path, (9, 9, 3))
    for name in TRIGGERS:
        spec = f"{name}:{path}" if name in ("blend", "additive") else name
        assert type(parse(spec)) is TRIGGERS[name]
    assert parse("badnets_square") == BadNetsSquare()
    assert parse("badnets_square:size=2,margin=0") == BadNetsSquare(size=2, margin=0)
    assert parse("badnets_square:2,value=0.5") == BadNetsSquare(size=2, value=0.5)
    blend = parse(f"blend:{path},alpha=0.4")
    assert blend.alpha == 0.4 and torch.equal(blend.pattern, pattern_from_file(path))
    assert torch.equal(parse(f"blend:alpha=0.4,pattern={path}").pattern, blend.pattern)


@pytest.mark.parametrize(
    "spec, trigger",
    [
        ("badnets_checkerboard:corner=bottom_left", BadNetsCheckerboard(corner="bottom_left")),
        ("four_corners:opacity=0.5", FourCorners(opacity=0.5)),
        ("blend_noise:seed=3,alpha=0.1", BlendNoise(seed=3, alpha=0.1)),
        ("blend_noise:3", BlendNoise(seed=3)),
        ("sig:delta=0.1,frequency=4", SIG(delta=0.1, frequency=4)),
        ("sig_wrapped:0.3", SIGWrapped(alpha=0.3)),
        ("wanet:seed=7,k=8,s=1.5", WaNet(seed=7, k=8, s=1.5)),
        ("bppa:levels=32,dither=true", BPPA(levels=32, dither=True)),
        ("bppa:dither=false", BPPA()),
        ("style_stand_in:0.5", StyleStandIn(strength=0.5)),
        ("sig + wanet:seed=1 + badnets_square:2", Several((SIG(), WaNet(seed=1), BadNetsSquare(2)))),
    ],
)
def test_parse_reads_every_option(spec, trigger):
    assert parse(spec) == trigger and hash(parse(spec)) == hash(trigger)


@settings(deadline=None, max_examples=30)
@given(name=st.sampled_from(sorted(set(TRIGGERS) - {"blend", "additive"})), data=st.data())
def test_parse_reads_what_fields_say(name, data):
    drawn = {"int": st.integers(2, 9), "float": st.floats(0, 1), "bool": st.booleans(), "str": st.sampled_from(CORNERS)}
    values = {field.name: data.draw(drawn[field.type]) for field in fields(TRIGGERS[name])}
    options = ",".join(f"{key}={str(value).lower()}" for key, value in values.items())
    assert parse(f"{name}:{options}" if options else name) == TRIGGERS[name](**values)


@pytest.mark.parametrize(
    "spec, message",
    [
        ("badnets", "parse: unknown trigger 'badnets'; known: badnets_square, .*l0_inv"),
        ("", "parse: unknown trigger ''"),
        ("badnets_square:width=2", "parse: wrong option 'width=2' in .*; options, each once: size, margin, value"),
        ("badnets_square:size=2,size=3", "parse: wrong option 'size=3' in .*each once"),
        ("badnets_square:size=2,3", "parse: wrong option '3' in "),
        ("badnets_square:size=two", "parse: 'badnets_square:size=two': invalid literal for int.*'two'"),
        ("badnets_square:size=0", "parse: 'badnets_square:size=0': BadNetsSquare: size >= 1"),
        ("l0_inv:1", "parse: wrong option '1' in 'l0_inv:1'; options, each once: none"),
        ("blend", "parse: blend needs a pattern, as in 'blend:pattern.png'; got 'blend'"),
        ("blend:alpha=0.1", "parse: blend needs a pattern"),
        ("bppa:dither=yes", "parse: 'bppa:dither=yes': true or false expected, got 'yes'"),
        ("wanet:seed=0.5", "parse: 'wanet:seed=0.5': invalid literal for int.*'0.5'"),
        ("wanet:k=1", "parse: 'wanet:k=1': WaNet: k >= 2"),
        (
            "badnets_checkerboard:corner=left",
            "parse: .*BadNetsCheckerboard: corner must be one of bottom_right, .*'left'",
        ),
        ("sig + ", "parse: unknown trigger ''"),
        ("sig + wanet:q=1", "parse: wrong option 'q=1' in 'wanet:q=1'; options, each once: seed, k, s"),
        ("additive:absent.png", "parse: .*pattern_from_file: cannot use 'absent.png'"),
    ],
)
def test_parse_errors_are_one_line(spec, message):
    with pytest.raises(ValueError, match="^" + message) as raised:
        parse(spec)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(
    "MASKOPS_BENCH" not in os.environ, reason="MASKOPS_BENCH does not name the published models' folder"
)
@pytest.mark.parametrize("name, entries, norm", [("trojan_sq", 198, 8.66), ("l2_inv", 1740, 3.22)])
def test_published_patterns_have_their_published_norms(name, entries, norm):
    trigger = parse(f"additive:{Path(os.environ['MASKOPS_BENCH']) / name}.png")
    assert trigger.pattern.count_nonzero() == entries
    assert round(trigger.pattern.norm().item(), 2) == norm
