"""Frozen batch norm, residual and ReLU in one pass over the activations, which leaves one bit per element behind."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, check, rand, saved_for_backward

from maskops import why_not
from maskops.backends import reference
from maskops.functional import affine_relu_

ops = torch.ops.maskops
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
}
SIZES = [
    (2, 64, 3, 5),
    (2, 40, 3, 4),
    (3, 6, 7, 7),
    (3, 8, 1, 2),
    (5, 3, 2, 2),
    (4, 1, 8, 8),
    (2, 2048, 2, 1),
    (5, 12, 9, 9),
]


def plain(input, scale=None, shift=None, residual=None, upper=math.inf):
    per_channel = (-1, *[1] * (input.dim() - 2))
    for factor, join in ((scale, torch.mul), (shift, torch.add)):
        if factor is not None:
            input = join(input, factor.view(per_channel).to(input.dtype))
    if residual is not None:
        input = input + residual
    return F.hardtanh(input, 0, upper)


def out_of_place(input, residual=None, *, backend, **others):
    return affine_relu_(input * 1, residual=residual, backend=backend, **others)


def unpacked(bits, output):
    """The bits as booleans at their elements' places; the output has no gaps in memory."""
    every = (bits.unsqueeze(1) >> torch.arange(8, device=bits.device) & 1).bool().view(-1)
    assert not every[output.numel() :].any(), "the last byte is filled up with zeros"
    return every[: output.numel()].as_strided(output.shape, output.stride())


@pytest.mark.parametrize("upper", [math.inf, 1.5])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_is_its_parts(dtype, layout, size, upper, backend):
    made = {name: LAYOUTS[layout](rand(*size, dtype=dtype)) for name in ("input", "residual")}
    channels = made["input"].shape[1]
    frozen = {"scale": rand(channels), "shift": rand(channels), "upper": upper}
    check(partial(out_of_place, **frozen), partial(plain, **frozen), made, backend)


@pytest.mark.parametrize("parts", [(), ("scale",), ("shift",), ("residual",), ("scale", "residual")], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_part_may_be_left_out(dtype, parts, backend):
    made = {"input": rand(2, 16, 3, 3, dtype=dtype)}
    made |= {"residual": rand(2, 16, 3, 3, dtype=dtype)} if "residual" in parts else {}
    frozen = {name: rand(16, dtype=dtype) for name in ("scale", "shift") if name in parts}
    check(partial(out_of_place, **frozen), partial(plain, **frozen), made, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bits_say_where_the_rounded_output_lets_the_gradient_pass(layout, dtype, backend):
    x = LAYOUTS[layout](rand(6, 24, 5, 8, dtype=dtype))
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    residual = LAYOUTS[layout](rand(6, 24, 5, 8, dtype=dtype))
    for factor in (1.0, 1e-8):  # which float16 rounds to 0
        output = x.clone()
        scale, shift = factor * rand(x.shape[1]), factor * rand(x.shape[1])
        bits = ops.affine_relu_bits_(output, scale, shift, residual * factor, 2.0, backend=backend)
        assert torch.equal(unpacked(bits, output), (output > 0) & (output < 2))
        assert 0 < unpacked(bits, output).sum() < x.numel() or factor < 1


def test_a_residual_of_another_layout_and_dtype(backend):
    x, scale, shift = rand(3, 16, 4, 5), rand(32)[::2], rand(16, dtype=torch.float16)
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    for residual in (
        rand(3, 16, 4, 5).contiguous(memory_format=torch.channels_last),
        rand(3, 16, 4, 5).half(),
        rand(3, 1, 1, 5).expand(3, 16, 4, 5),
        rand(3, 16, 4, 10)[..., ::2],
        rand(961)[1:].view(3, 16, 4, 5),
    ):
        output = affine_relu_(x.clone(), scale, shift, residual, backend=backend)
        torch.testing.assert_close(output, plain(x, scale, shift, residual.float()))


@pytest.mark.parametrize("size", [(0, 3, 4, 4), (1, 1), (7, 3), (33, 5), (2, 3, 5), (2, 3, 2, 3, 2), (1, 96, 20, 20)])
def test_of_any_size(size, backend):
    x, scale, shift = rand(*size), rand(size[1]), rand(size[1])
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    expected = plain(x, scale, shift)
    torch.testing.assert_close(affine_relu_(x, scale, shift, backend=backend), expected)


def test_memory_that_begins_anywhere(backend):
    x = rand(2 * 16 * 9 + 3)[3:].view(2, 16, 9)
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    scale, shift = rand(19)[3:], rand(16)
    expected = plain(x, scale, shift)
    bits = ops.affine_relu_bits_(x, scale, shift, None, math.inf, backend=backend)
    torch.testing.assert_close(x, expected)
    assert torch.equal(unpacked(bits, x), x > 0)


def test_it_is_relu_bits_after_batch_norm(backend):
    x = rand(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    mean, var, weight, bias = rand(8), rand(8).abs() + 0.5, rand(8), rand(8)
    scale = weight / (var + 1e-5).sqrt()
    expected = F.batch_norm(x, mean, var, weight, bias).relu()
    torch.testing.assert_close(affine_relu_(x, scale, bias - mean * scale, backend=backend), expected)


def test_nan_stays_and_lets_the_gradient_pass(backend):
    x = torch.full((2, 8, 2, 2), math.nan, device=DEVICE)
    if reason := why_not(backend, "affine_relu_bits_", x):
        pytest.skip(reason)
    bits = ops.affine_relu_bits_(x, None, rand(8), None, 6.0, backend=backend)
    assert x.isnan().all() and (bits == 255).all()


def test_it_overwrites_its_input():
    x = rand(2, 4, 3, 3).requires_grad_()
    before = x * 1
    assert affine_relu_(before, rand(4)) is before
    data = rand(2, 4, 3, 3)
    assert affine_relu_(data, rand(4)) is data
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        affine_relu_(x, rand(4))
    base = x * 1
    view, expected = base[:, :, 1:], (x * 1)[:, :, 1:].relu()
    assert affine_relu_(view) is view
    assert torch.equal(base[:, :, 1:], expected)
    (gradient,) = torch.autograd.grad(base.sum(), x)
    assert torch.equal(gradient[:, :, 1:], (x[:, :, 1:] > 0).float()) and (gradient[:, :, 0] == 1).all()


def test_bits_and_the_scale_are_all_that_is_kept():
    x, scale, residual = rand(2, 16, 4, 4).requires_grad_(), rand(16), rand(2, 16, 4, 4).requires_grad_()
    saved = saved_for_backward(lambda: affine_relu_(x * 1.0, scale, rand(16), residual))
    kept = [tensor for tensor in saved if tensor.data_ptr() != scale.data_ptr()]
    assert [(tensor.dtype, tensor.numel()) for tensor in kept] == [(torch.uint8, x.numel() // 8)]


def test_what_was_overwritten_and_is_needed_raises_autograd_s_error():
    x = rand(2, 4).requires_grad_()
    saved = x.exp()
    output = affine_relu_(saved, rand(4))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_reference_rounds_once():
    x = rand(4, 8, 5, dtype=torch.bfloat16)
    scale, shift, residual = rand(8), rand(8), rand(4, 8, 5, dtype=torch.bfloat16)
    expected = plain(x.float(), scale, shift, residual.float()).bfloat16()
    reference.affine_relu_bits_(x, scale, shift, residual, math.inf)
    assert torch.equal(x, expected)


OF_INPUT = r"for input \(2, 6, 3\); got"
UPPER = "upper must be inf or a positive number that is exact in torch.float32; got"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"scale": torch.ones(5)}, ValueError, rf"scale must have shape \(6,\) {OF_INPUT} \(5,\)"),
        ({"shift": torch.ones(6, 1)}, ValueError, rf"shift must have shape \(6,\) {OF_INPUT} \(6, 1\)"),
        ({"scale": torch.ones(6, requires_grad=True)}, ValueError, "scale must be frozen; got one that requires grad"),
        ({"residual": torch.ones(2, 6)}, ValueError, rf"residual must have shape \(2, 6, 3\) {OF_INPUT} \(2, 6\)"),
        ({"residual": torch.ones(2, 6, 3).int()}, TypeError, "residual must be a floating dtype; got torch.int32"),
        ({"input": torch.ones(6)}, ValueError, r"input must have at least 2 dimensions, \(N, C, \*\); got \(6,\)"),
        ({"upper": 0.0}, ValueError, f"{UPPER} 0.0"),
        ({"upper": 0.1}, ValueError, f"{UPPER} 0.1"),
        ({"upper": math.nan}, ValueError, f"{UPPER} nan"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, error, message):
    arguments = {"input": rand(2, 6, 3), "scale": rand(6), "shift": rand(6), "residual": rand(2, 6, 3)} | changes
    arguments = {name: v.to(DEVICE) if isinstance(v, torch.Tensor) else v for name, v in arguments.items()}
    with pytest.raises(error, match=f"^affine_relu_: {message}"):
        affine_relu_(**arguments)
