"""Masked depthwise convolution of the CUDA backend: each of its kernels, in every layout and dtype."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import check, outputs_and_gradients, plain_dual, plain_layer, poisoned, rand

from maskops import _dispatch
from maskops.functional import dual_masked_conv2d, masked_conv2d

_NO_BACKEND = _dispatch._load("cuda")
pytestmark = pytest.mark.skipif(isinstance(_NO_BACKEND, str), reason=str(_NO_BACKEND))

# (N, C, H, W), (R, S), stride, padding, dilation
CASES = {
    "3x3": ((2, 8, 3, 2), (3, 3), 1, 1, 1),
    "3x3 of odd channels": ((2, 7, 3, 5), (3, 3), 1, 1, 1),
    "3x3 of two blocks of channels": ((1, 132, 2, 5), (3, 3), 1, 1, 1),
    "3x3 of more images than lanes": ((12, 132, 2, 9), (3, 3), 1, 1, 1),
    "3x3 of many rows": ((2, 4, 23, 9), (3, 3), 1, 1, 1),
    "3x3 of whole vectors": ((2, 4, 4, 8), (3, 3), 1, 1, 1),
    "3x3 without padding": ((1, 4, 4, 12), (3, 3), 1, 0, 1),
    "3x3 large padding": ((1, 4, 3, 2), (3, 3), 1, (5, 4), 1),
    "3x3 stride 2": ((2, 8, 8, 16), (3, 3), 2, 1, 1),
    "3x3 stride 2 of odd size": ((2, 3, 7, 9), (3, 3), 2, 1, 1),
    "3x3 stride 2 without padding": ((1, 8, 23, 4), (3, 3), 2, 0, 1),
    "3x3 stride 2 large padding": ((1, 4, 3, 2), (3, 3), 2, (5, 3), 1),
    "3x3 stride pair": ((1, 4, 3, 4), (3, 3), (2, 1), (1, 0), 1),
    "3x3 dilation": ((1, 4, 8, 7), (3, 3), 1, (2, 3), (2, 3)),
    "3x3 stride and dilation": ((1, 3, 9, 9), (3, 3), (2, 3), (2, 1), (3, 2)),
    "5x5": ((1, 6, 4, 9), (5, 5), 1, 2, 1),
    "5x5 stride 2": ((2, 6, 9, 16), (5, 5), 2, 2, 1),
    "5x5 stride 2 of odd size": ((1, 5, 24, 7), (5, 5), 2, 2, 1),
    "5x5 stride 2 padding 0": ((1, 4, 9, 8), (5, 5), 2, 0, 1),
    "7x7": ((1, 4, 15, 9), (7, 7), 1, 3, 1),
    "7x7 of one pixel": ((1, 2, 1, 1), (7, 7), 1, 3, 1),
    "7x7 stride 2": ((1, 4, 9, 8), (7, 7), 2, 3, 1),
    "3x1": ((1, 5, 3, 2), (3, 1), 1, (1, 0), 1),
    "2x4": ((2, 5, 3, 4), (2, 4), 1, (1, 2), 1),
    "one channel": ((1, 1, 5, 5), (3, 3), 1, 1, 1),
    "no image": ((0, 4, 5, 5), (3, 3), 1, 1, 1),
}
MASKS = {"channel": (5, 1, 1, 1), "number": (), "pixel": (3, 1), "row": (5, 1, 3, 1)}


def laid_out(tensor, layout):
    """The tensor's values in memory of this layout; strided is every second image and column of a larger one."""
    if layout == "strided":
        N, C, H, W = tensor.shape
        larger = torch.full((2 * N, H, 2 * W, C), torch.nan, dtype=tensor.dtype, device=tensor.device)
        return larger[::2, :, ::2].permute(0, 3, 1, 2).copy_(tensor)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return tensor.contiguous(memory_format=formats[layout])


def tensors(case, layout="contiguous", dtype=torch.float32):
    """The tensors and the options of a call."""
    size, kernel, stride, padding, dilation = CASES[case]
    channels = size[1]
    made = {
        "input": laid_out(rand(*size, dtype=dtype), layout),
        "weight": rand(channels, 1, *kernel, dtype=dtype),
        "mask": rand(channels, 1, *kernel, dtype=dtype),
        "noise": rand(channels, 1, 1, 1, dtype=dtype),
        "bias": rand(channels, dtype=dtype),
    }
    return made, {"stride": stride, "padding": padding, "dilation": dilation, "groups": channels}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
@pytest.mark.parametrize("case", CASES)
def test_depthwise_is_the_convolution_with_the_effective_weight(case, layout, dtype):
    made, options = tensors(case, layout, dtype)
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), made, "cuda")


@pytest.mark.parametrize("mask, noise", [("channel", "pixel"), ("number", "row"), ("row", None)])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.uint8], ids=str)
def test_depthwise_takes_every_mask_that_broadcasts(mask, noise, mask_dtype):
    input, weight, bytes_ = rand(2, 5, 4, 6), rand(5, 1, 3, 1), (50 * rand(*MASKS[mask]).abs()).to(mask_dtype)
    noise = None if noise is None else rand(*MASKS[noise])
    value = bytes_ / 255 if mask_dtype == torch.uint8 else bytes_
    output = masked_conv2d(input, weight, bytes_, noise=noise, groups=5, backend="cuda")
    expected = plain_layer(F.conv2d, input.double(), weight.double(), value, noise, groups=5)
    torch.testing.assert_close(output, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("two_inputs", [False, True], ids=["one input", "two inputs"])
@pytest.mark.parametrize("case", ["3x3", "3x3 stride 2"])
def test_depthwise_of_two_branches_is_two_convolutions(case, two_inputs):
    made, options = tensors(case, "channels_last")
    if two_inputs:
        made["perturbed_input"] = torch.randn_like(made["input"])
    check(partial(dual_masked_conv2d, **options), partial(plain_dual, F.conv2d, **options), made, "cuda")


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("case", ["3x3 of many rows", "3x3 stride 2", "3x3 dilation", "7x7"])
def test_depthwise_repeats_itself(case, layout):
    made, options = tensors(case, layout)
    with poisoned():
        first, second = (
            outputs_and_gradients(partial(masked_conv2d, **options, backend="cuda"), made) for _ in range(2)
        )
    assert all(value.isfinite().all() and torch.equal(value, second[name]) for name, value in first.items())


def test_depthwise_layers_alone_are_not_left_to_triton(monkeypatch):
    from maskops.backends.cuda import serving

    triton = SimpleNamespace(why_not=lambda op, *tensors: None)
    monkeypatch.setattr(serving, "EMULATED", False)
    monkeypatch.setattr(serving, "_triton", lambda: triton)
    x, depthwise, dense, mask = rand(2, 4, 5, 5), rand(4, 1, 3, 3), rand(4, 4, 3, 3), rand(4, 1, 1, 1)
    assert serving.unless_asked("masked_conv", x, depthwise, mask) is None
    assert serving.unless_asked("masked_conv_backward", x, depthwise, mask) is None
    assert serving.unless_asked("dual_masked_conv_backward", x, x, x, depthwise, mask, mask) is None
    reason = "Triton's backend chooses between fused and materialised"
    assert serving.unless_asked("masked_conv", x, dense, mask) == reason
    assert serving.unless_asked("masked_conv_backward", x, x, dense, mask) == reason
    assert serving.unless_asked("masked_linear", rand(2, 4), rand(3, 4), rand(3, 4)) == reason
    assert serving.unless_asked("effective_weight", dense, mask) is None
    monkeypatch.setattr(serving, "_triton", lambda: None)
    assert serving.unless_asked("masked_conv", x, dense, mask) is None


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "size, kernel, stride",
    [
        ((4, 144, 112, 112), 3, 1),
        ((4, 144, 112, 112), 3, 2),
        ((32, 58, 28, 28), 3, 1),
        ((8, 240, 28, 28), 5, 1),
        ((8, 240, 28, 28), 5, 2),
        ((8, 192, 56, 56), 7, 1),
        ((16, 1536, 7, 7), 7, 1),
    ],
    ids=str,
)
def test_depthwise_computes_images_of_any_size(size, kernel, stride, dtype, layout):
    options = {"stride": stride, "padding": kernel // 2, "groups": size[1]}
    weight = size[1], 1, kernel, kernel
    made = {"input": laid_out(rand(*size, dtype=dtype), layout), "weight": rand(*weight, dtype=dtype)}
    made |= {"mask": rand(*weight, dtype=dtype), "bias": rand(size[1], dtype=dtype)}
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), made, "cuda")


def test_every_kernel_of_depthwise_layers_is_on_the_list():
    import maskops._C as _C

    names = [name for name in _C.kernel_names() if name.startswith("depthwise_")]
    assert len(names) == len(set(names))
    assert {name.split("<")[0] for name in names} == {
        *("depthwise_walk", "depthwise_spread", "depthwise_gather"),
        *("depthwise_weight_walk", "depthwise_weight_gather", "depthwise_sum_parts"),
    }
