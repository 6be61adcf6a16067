import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from maskops.backdoor import (
    TRIGGERS,
    Additive,
    BadNetsCheckerboard,
    BadNetsSquare,
    Blend,
    L0Inv,
    parse,
    pattern_from_file,
    poison,
    target_labels,
)
from maskops.backdoor.triggers import CHECKERBOARD

STAMPS = [BadNetsSquare(), BadNetsSquare(size=2, margin=0, value=0.3), BadNetsCheckerboard(), L0Inv()]


def make(name, size):
    """The trigger of that name, with a random pattern where it needs one."""
    pattern = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))
    return TRIGGERS[name](pattern) if name in ("blend", "additive") else TRIGGERS[name]()


def random_images(seed=0, shape=(2, 3, 32, 32), dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=20)
@given(
    name=st.sampled_from(sorted(TRIGGERS)),
    seed=st.integers(0, 1000),
    count=st.integers(0, 3),
    size=st.integers(9, 33),
    extreme=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_trigger_output_is_an_image_and_input_untouched(name, seed, count, size, extreme, dtype):
    images = random_images(seed, (count, 3, size, size), dtype)
    images = images.round() if extreme else images
    before = images.clone()
    triggered = make(name, size)(images)
    assert torch.equal(images, before)
    assert triggered.shape == images.shape and triggered.dtype == dtype
    assert ((triggered >= 0) & (triggered <= 1)).all()
    assert count == 0 or triggered.data_ptr() != images.data_ptr()


@pytest.mark.parametrize("trigger", STAMPS, ids=repr)
def test_stamp_is_idempotent_and_independent_of_the_image(trigger):
    once = trigger(random_images())
    assert torch.equal(trigger(once), once)
    changed = trigger(torch.zeros(1, 3, 32, 32)) == trigger(torch.ones(1, 3, 32, 32))
    assert 0 < changed.sum() < 100
    assert torch.equal(trigger(random_images(1))[:, changed[0]], once[:, changed[0]])


@pytest.mark.parametrize("name", sorted(TRIGGERS))
def test_trigger_keeps_channels_last_and_strided_input_intact(name):
    trigger, images = make(name, 32), random_images()
    expected = trigger(images)
    channels_last = trigger(images.to(memory_format=torch.channels_last))
    assert torch.equal(channels_last, expected) and channels_last.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(trigger(images[:1].expand(3, -1, -1, -1)), expected[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("name", sorted(TRIGGERS))
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
        ("additive:absent.png", "parse: .*pattern_from_file: cannot use 'absent.png'"),
    ],
)
def test_parse_errors_are_one_line(spec, message):
    with pytest.raises(ValueError, match="^" + message) as raised:
        parse(spec)
    assert "\n" not in str(raised.value)


def test_target_labels_of_both_rules():
    labels = torch.tensor([0, 1, 2, 3, 255], dtype=torch.uint8)
    assert target_labels(labels, 3).tolist() == [3] * 5
    assert target_labels(labels, None, "all_to_all", 256).tolist() == [1, 2, 3, 4, 0]
    assert target_labels(labels, 3).dtype == torch.int64


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((None,), "all_to_one needs a target class; got None"),
        ((10, "all_to_one", 10), "all_to_one needs a target class below 10; got 10"),
        ((None, "all_to_all"), "all_to_all needs num_classes >= 2 and no target; got num_classes=None and target=None"),
        ((3, "all_to_all", 10), "all_to_all needs num_classes >= 2 and no target; got num_classes=10 and target=3"),
        ((0, "all_to_one", 1), "labels must be below num_classes 1; got 1"),
        ((3, "one_to_one"), "rule must be one of all_to_one, all_to_all; got 'one_to_one'"),
    ],
)
def test_target_labels_errors(arguments, message):
    with pytest.raises(ValueError, match=f"^target_labels: {message}$"):
        target_labels(torch.tensor([0, 1]), *arguments)


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(0, 60),
    rate=st.floats(0, 0.5),
    rule=st.sampled_from(["all_to_one", "all_to_all"]),
)
def test_poison_changes_exactly_the_drawn_images(seed, count, rate, rule):
    images, labels = random_images(seed, (count, 1, 4, 4)) * 0.9, torch.arange(count) % 4
    before = images.clone(), labels.clone()
    target, classes = (2, None) if rule == "all_to_one" else (None, 4)
    draw = torch.Generator().manual_seed(seed)
    trigger = BadNetsSquare(size=1, margin=0)
    poisoned = poison(images, labels, trigger, target, rate, draw, rule=rule, num_classes=classes)
    assert torch.equal(images, before[0]) and torch.equal(labels, before[1])
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[poisoned.indices] = True
    assert chosen.sum() == len(poisoned.indices) == round(rate * count)
    assert torch.equal(chosen, poisoned.labels != labels)
    assert torch.equal(poisoned.images[chosen], trigger(images[chosen]))
    assert torch.equal(poisoned.images[~chosen], images[~chosen])
    assert torch.equal(poisoned.labels[chosen], target_labels(labels, target, rule, classes)[chosen])
    again = poison(images, labels, trigger, target, rate, draw.manual_seed(seed), rule=rule, num_classes=classes)
    assert torch.equal(again.indices, poisoned.indices)


def test_poison_draws_every_candidate_at_the_highest_rate():
    images, labels = torch.zeros(8, 1, 4, 4), torch.arange(8) % 4
    draw = torch.Generator().manual_seed(0)
    every = poison(images, labels, BadNetsSquare(1), None, 1.0, draw, rule="all_to_all", num_classes=4)
    assert every.indices.tolist() == list(range(8))
    assert poison(images, labels, BadNetsSquare(1), 0, 0.75, draw).indices.tolist() == [1, 2, 3, 5, 6, 7]
    with pytest.raises(ValueError, match=r"^poison: rate 0.9 asks for 7 images; only 6 are not of class 0$"):
        poison(images, labels, BadNetsSquare(1), 0, 0.9, draw)


@pytest.mark.parametrize(
    "images, labels, rate, error, message",
    [
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1], 0.5, TypeError, "images must be floating point"),
        (torch.full((2, 1, 4, 4), 255.0), [0, 1], 0.5, ValueError, r"images must lie in \[0, 1\].*got 255 to 255"),
        (torch.full((2, 1, 4, 4), torch.nan), [0, 1], 0.5, ValueError, r"images must lie in \[0, 1\].*got nan to nan"),
        (torch.zeros(2, 1, 4, 4), [0.0, 1.0], 0.5, TypeError, "labels must be integers; got torch.float32"),
        (torch.zeros(2, 1, 4, 4), [0, 1, 2], 0.5, ValueError, r"labels must be \(N,\).* got \(3,\) and \(2, 1, 4, 4\)"),
        (torch.zeros(2, 1, 4, 4), [0, -1], 0.5, ValueError, "labels must not be negative; got -1"),
        (torch.zeros(2, 1, 4, 4), [0, 1], 5, ValueError, r"rate must lie in \[0, 1\]; got 5"),
    ],
)
def test_poison_errors(images, labels, rate, error, message):
    with pytest.raises(error, match=f"^poison: {message}"):
        poison(images, torch.tensor(labels), BadNetsSquare(1), 0, rate, torch.Generator())


@pytest.mark.skipif(
    "MASKOPS_BENCH" not in os.environ, reason="MASKOPS_BENCH does not name the published models' folder"
)
@pytest.mark.parametrize("name, entries, norm", [("trojan_sq", 198, 8.66), ("l2_inv", 1740, 3.22)])
def test_published_patterns_have_their_published_norms(name, entries, norm):
    trigger = parse(f"additive:{Path(os.environ['MASKOPS_BENCH']) / name}.png")
    assert trigger.pattern.count_nonzero() == entries
    assert round(trigger.pattern.norm().item(), 2) == norm
