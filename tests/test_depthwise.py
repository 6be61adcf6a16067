import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, largest, poisoned, rand

pytest.importorskip("triton")

from maskops.backends.triton import depthwise
from maskops.backends.triton._launch import INTERPRETED

pytestmark = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="needs Triton's interpreter or CUDA")


# (N, C, H, W), (R, S), stride, padding, dilation
CASES = {
    "3x3": ((2, 5, 3, 2), (3, 3), (1, 1), (1, 1), (1, 1)),
    "3x3 of some strips": ((1, 1, 2, 9), (3, 3), (1, 1), (1, 0), (1, 1)),
    "3x3 without padding": ((1, 33, 4, 3), (3, 3), (1, 1), (0, 0), (1, 1)),
    "3x3 stride": ((2, 5, 5, 4), (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 stride pair": ((1, 33, 3, 4), (3, 3), (2, 1), (1, 0), (1, 1)),
    "3x3 dilation": ((1, 2, 8, 7), (3, 3), (1, 1), (2, 3), (2, 3)),
    "3x3 stride and dilation": ((1, 3, 9, 9), (3, 3), (2, 3), (2, 1), (3, 2)),
    "3x3 large padding": ((1, 2, 3, 2), (3, 3), (1, 1), (5, 4), (1, 1)),
    "3x3 large padding and stride": ((1, 2, 3, 2), (3, 3), (3, 2), (5, 4), (1, 1)),
    "3x3 of many rows": ((1, 1, 12, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
    "5x5": ((1, 64, 2, 1), (5, 5), (1, 1), (2, 2), (1, 1)),
    "5x5 stride": ((1, 5, 3, 4), (5, 5), (2, 2), (2, 2), (1, 1)),
    "7x7": ((1, 2, 1, 2), (7, 7), (1, 1), (3, 3), (1, 1)),
    "1x3": ((2, 3, 2, 5), (1, 3), (1, 1), (0, 1), (1, 1)),
    "3x1": ((1, 5, 3, 2), (3, 1), (1, 1), (1, 0), (1, 1)),
    "2x4": ((2, 5, 3, 4), (2, 4), (1, 1), (1, 2), (1, 1)),
    "10x5": ((1, 3, 3, 2), (10, 5), (1, 1), (4, 2), (1, 1)),
    "one pixel": ((1, 1, 1, 1), (3, 3), (1, 1), (1, 1), (1, 1)),
}
# many programs, which Triton's interpreter takes long for
LARGE_CASES = {
    "3x3 of many rows": ((2, 7, 61, 20), (3, 3), (1, 1), (1, 1), (1, 1)),
    "5x5": ((2, 33, 15, 21), (5, 5), (1, 1), (2, 2), (1, 1)),
    "7x7": ((3, 33, 9, 13), (7, 7), (1, 1), (3, 3), (1, 1)),
    "7x7 of few rows": ((5, 64, 3, 8), (7, 7), (1, 1), (3, 3), (1, 1)),
    "7x7 stride": ((1, 5, 19, 18), (7, 7), (2, 1), (3, 3), (1, 1)),
    "9x7": ((1, 3, 15, 16), (9, 7), (1, 1), (4, 3), (1, 1)),
    "3x3 dilation": ((2, 96, 28, 27), (3, 3), (1, 1), (2, 3), (2, 3)),
    "3x3 stride of 112": ((4, 144, 112, 112), (3, 3), (2, 2), (1, 1), (1, 1)),
    "3x3 of 112": ((4, 144, 112, 112), (3, 3), (1, 1), (1, 1), (1, 1)),
    "7x7 of 56": ((8, 192, 56, 56), (7, 7), (1, 1), (3, 3), (1, 1)),
    "7x7 of 14": ((32, 384, 14, 14), (7, 7), (1, 1), (3, 3), (1, 1)),
    "7x7 of 7": ((16, 1536, 7, 7), (7, 7), (1, 1), (3, 3), (1, 1)),
}
LAYOUTS = ("contiguous", "channels_last", "strided")
MASKS = {"channel": (5, 1, 1, 1), "number": (), "pixel": (3, 1), "row": (5, 1, 3, 1)}


@pytest.fixture(autouse=True)
def many_processors(monkeypatch):
    """A device so wide that rows are split and gradients come in several slices."""
    if DEVICE == "cpu":
        monkeypatch.setattr(depthwise, "processors", lambda device: 132)


def laid_out(tensor, layout):
    """The tensor's values in memory of this layout; strided is every second image and column of a larger one."""
    if layout == "strided":
        N, C, H, W = tensor.shape
        larger = torch.full((2 * N, H, 2 * W, C), torch.nan, dtype=tensor.dtype, device=tensor.device)
        view = larger[::2, :, ::2].permute(0, 3, 1, 2)
        return view.copy_(tensor)
    formats = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
    return tensor.contiguous(memory_format=formats[layout])


def plain(inputs, weights, bias, grads, geometry):
    """What torch's convolution with each of the weights gives: outputs, gradients of the inputs, of the weights."""
    inputs = [input.detach().requires_grad_() for input in inputs]
    leaves = [weight.detach().requires_grad_() for weight in weights]
    outputs = [F.conv2d(x, w, bias, *geometry, groups=len(w)) for x, w in zip(inputs, leaves, strict=True)]
    grad_inputs = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    return [y.detach() for y in outputs], grad_inputs, torch.autograd.grad(outputs, leaves, grads)


def assert_close(name, actual, expected, truth):
    """The rule of helpers.check."""
    assert actual.shape == truth.shape, name
    slack = 4 * torch.finfo(actual.dtype).eps * largest(truth)
    error, allowed = largest(actual - truth), 2 * largest(expected - truth) + slack
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check(
    case, layout="channels_last", dtype=torch.float32, branches=1, one_input=False, noisy=True, mask=None, noise=None,
    bias=True, mask_dtype=torch.float32, weight_dtype=None,
):  # fmt: skip
    """Outputs and gradients of the kernels against those of torch in float64, under poisoned memory."""
    size, kernel, *geometry = CASES[case] if isinstance(case, str) else case
    channels = size[1]
    weight = rand(channels, 1, *kernel, dtype=weight_dtype or dtype)
    mask = (rand(*(weight.shape if mask is None else mask)) * 100).to(mask_dtype)
    noise = rand(*(weight.shape if noise is None else noise)) if noisy else None
    bias = rand(channels, dtype=dtype) if bias else None
    inputs = [laid_out(rand(*size, dtype=dtype), layout) for _ in range(branches)]
    inputs = inputs[:1] * branches if one_input else inputs
    factor = mask.double() / 255 if mask_dtype == torch.uint8 else mask.double()
    weights = [weight.double() * (factor if noise is None else factor + noise)]
    weights = [weight.double() * factor.expand(weight.shape), *weights] if branches == 2 else weights
    output_size = F.conv2d(inputs[0].float(), weight.float(), None, *geometry, groups=channels).shape
    grads = [laid_out(rand(*output_size, dtype=dtype), layout) for _ in range(branches)]

    def doubled(tensors):
        return [tensor.double() for tensor in tensors]

    truth = plain(doubled(inputs), weights, None if bias is None else bias.double(), doubled(grads), geometry)
    expected = plain(inputs, [w.to(dtype) for w in weights], bias, grads, geometry)

    with poisoned():
        outputs = [torch.empty_like(grad) for grad in grads]
        depthwise.forward(outputs, inputs, weight, mask, noise, bias, *geometry)
        grad_inputs = [torch.empty_like(input) for input in (inputs[:1] if one_input else inputs)]
        depthwise.input_grad(grad_inputs, grads, weight, mask, noise, *geometry)
        total, second = depthwise.weight_grad(grads, inputs, weight.shape, *geometry, branches == 2)
        totals = [total]
        if one_input:
            again, alone = depthwise.weight_grad(grads, inputs, weight.shape, *geometry, False)
            totals.append(again)
            assert alone is None

    for branch, output in enumerate(outputs):
        assert_close(f"output {branch}", output, expected[0][branch], truth[0][branch])
    if one_input:
        assert_close("grad_input", grad_inputs[0], sum(expected[1]), sum(truth[1]))
    else:
        for branch, grad_input in enumerate(grad_inputs):
            assert_close(f"grad_input {branch}", grad_input, expected[1][branch], truth[1][branch])
    for parts in totals:
        assert parts.dtype == torch.float32
        assert_close("total", parts.sum(0), sum(expected[2]), sum(truth[2]))
    if branches == 2:
        assert_close("second", second.sum(0), expected[2][1], truth[2][1])
    else:
        assert second is None


@pytest.mark.parametrize("case", CASES)
def test_depthwise_is_the_convolution_with_the_effective_weight(case):
    check(case)


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
@pytest.mark.parametrize("case", ["3x3 of some strips", "3x3 dilation", "1x3"])
def test_depthwise_takes_every_layout(case, layout):
    check(case, layout)


@pytest.mark.parametrize("one_input", [False, True], ids=["two inputs", "one input"])
@pytest.mark.parametrize("case", ["3x3", "3x3 stride", "1x3"])
def test_depthwise_of_two_branches_is_two_convolutions(case, one_input):
    check(case, branches=2, one_input=one_input)


@pytest.mark.parametrize("weight_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", ["3x3", "3x3 stride"])
def test_depthwise_takes_float16(case, weight_dtype):
    check(case, dtype=torch.float16, weight_dtype=weight_dtype)


@pytest.mark.parametrize("mask, noise", [("channel", "pixel"), ("number", "row")])
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.uint8], ids=str)
def test_depthwise_takes_every_mask_that_broadcasts(mask, noise, mask_dtype):
    check("3x1", mask=MASKS[mask], noise=MASKS[noise], mask_dtype=mask_dtype, bias=False)


@pytest.mark.parametrize("branches", [1, 2])
def test_depthwise_takes_a_mask_without_noise(branches):
    check("1x3", noisy=False, branches=branches, one_input=branches == 2)


@pytest.mark.gpu
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("branches, one_input", [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*LARGE_CASES])
def test_depthwise_computes_images_of_any_size(case, dtype, branches, one_input, layout):
    check(LARGE_CASES[case], layout, dtype, branches=branches, one_input=one_input)


@pytest.mark.parametrize("which", ["inputs", "grads"])
def test_depthwise_takes_branches_of_different_layouts(which):
    weight, mask, noise = rand(5, 1, 3, 3), rand(5, 1, 1, 1), rand(5, 1, 3, 3)
    geometry = (1, 1), (1, 1), (1, 1)
    tensors = [laid_out(rand(2, 5, 4, 6), layout) for layout in ("contiguous", "channels_last")]
    weights = [(weight * factor).double() for factor in (mask, mask + noise)]
    expected = plain([t.double() for t in tensors], weights, None, [t.double() for t in tensors], geometry)
    outputs = [torch.empty_like(tensor) for tensor in tensors]
    if which == "inputs":
        depthwise.forward(outputs, tensors, weight, mask, noise, None, *geometry)
        torch.testing.assert_close(outputs, expected[0], check_dtype=False)
        total, second = depthwise.weight_grad(tensors, tensors, weight.shape, *geometry, True)
        torch.testing.assert_close(total.sum(0), sum(expected[2]), check_dtype=False)
        torch.testing.assert_close(second.sum(0), expected[2][1], check_dtype=False)
    else:
        depthwise.input_grad(outputs[:1], tensors, weight, mask, noise, *geometry)
        torch.testing.assert_close(outputs[0], sum(expected[1]), check_dtype=False)


def test_depthwise_without_images_launches_nothing(monkeypatch):
    monkeypatch.setattr(depthwise, "run", None)
    weight, geometry = rand(3, 1, 3, 3), ((1, 1), (1, 1), (1, 1))
    empty = rand(0, 3, 4, 4)
    depthwise.forward([empty], [empty], weight, weight, None, None, *geometry)
    depthwise.input_grad([empty], [empty], weight, weight, None, *geometry)
    total, second = depthwise.weight_grad([empty, empty], [empty, empty], weight.shape, *geometry, True)
    assert total.shape == second.shape == (1, 3, 1, 3, 3)
    assert not total.any() and not second.any()


@pytest.mark.parametrize("one_input", [False, True], ids=["two inputs", "one input"])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise_of_two_branches_is_one_launch(monkeypatch, stride, one_input):
    launches = []
    monkeypatch.setattr(depthwise, "run", lambda kernel, *_, **__: launches.append(kernel.__name__))
    weight, geometry = rand(3, 1, 3, 3), ((stride, stride), (1, 1), (1, 1))
    inputs = [rand(2, 3, 4, 4), rand(2, 3, 4, 4)]
    inputs = inputs[:1] * 2 if one_input else inputs
    grads = [rand(2, 3, 4 // stride, 4 // stride) for _ in range(2)]
    depthwise.forward(grads, inputs, weight, weight, weight, None, *geometry)
    depthwise.input_grad(inputs[: 2 - one_input], grads, weight, weight, weight, *geometry)
    depthwise.weight_grad(grads, inputs, weight.shape, *geometry, True)
    depthwise.weight_grad(grads, inputs, weight.shape, *geometry, False)
    name = "walk" if stride == 1 else "gather"
    assert launches == [name, name, *[f"{name}_weight_grad", "_sum_parts"] * 2]


def test_depthwise_serves_one_output_channel_per_input_channel_of_images():
    assert depthwise.serves(torch.empty(3, 1, 5, 5), 3, transposed=False)
    assert depthwise.serves(torch.empty(1, 1, 5, 5), 1, transposed=False)
    assert not depthwise.serves(torch.empty(3, 1, 5, 5), 3, transposed=True)
    assert not depthwise.serves(torch.empty(6, 1, 5, 5), 3, transposed=False)
    assert not depthwise.serves(torch.empty(4, 2, 5, 5), 2, transposed=False)
    assert not depthwise.serves(torch.empty(3, 1, 5), 3, transposed=False)
    assert not depthwise.serves(torch.empty(3, 1, 5, 5, 5), 3, transposed=False)
