"""Frozen layers: a convolution with its residual and ReLU, and backwards with the ReLU before it, on every backend."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, largest, poisoned, rand

from maskops import _dispatch, explain

ops = torch.ops.maskops

# input, weight, options
LAYERS = {
    "3x3": ((2, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "packed bytes": ((2, 16, 5, 5), (8, 16, 3, 3), {"padding": 1}),
    "packed bytes, stride 2": ((2, 24, 6, 5), (16, 24, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((2, 16, 3, 3), (24, 16, 1, 1), {}),
    "1x1, stride 2": ((2, 5, 5, 4), (4, 5, 1, 1), {"stride": 2}),
    "7x7, stride 2": ((1, 3, 12, 11), (8, 3, 7, 7), {"padding": 3, "stride": 2}),
    "groups": ((2, 4, 6, 6), (8, 2, 3, 3), {"groups": 2, "stride": (1, 2), "padding": (0, 1)}),
    "packed bytes of groups": ((2, 16, 4, 4), (6, 8, 3, 3), {"groups": 2, "padding": 1}),
    "dilation": ((2, 4, 7, 7), (4, 4, 3, 3), {"dilation": 2, "padding": 2}),
    "depthwise": ((2, 8, 6, 7), (8, 1, 3, 3), {"groups": 8, "padding": 1}),
    "depthwise, stride 2": ((2, 6, 7, 8), (6, 1, 5, 5), {"groups": 6, "padding": 2, "stride": 2}),
    "depthwise, dilation": ((2, 4, 7, 7), (4, 1, 3, 3), {"groups": 4, "padding": 1, "dilation": 2}),
    "one pixel": ((3, 8, 1, 1), (8, 8, 1, 1), {}),
    "no image": ((0, 8, 5, 5), (8, 8, 3, 3), {"padding": 1}),
}
LAYOUTS = {"channels last": torch.channels_last, "contiguous": torch.contiguous_format}
GATES = ("bits", "output", None)
UPPERS = (math.inf, 6.0)


def pair(number):
    return list(number) if isinstance(number, tuple) else [number, number]


def geometry(options):
    sides = [pair(options.get(name, default)) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1))]
    return *sides, options.get("groups", 1)


def tensors(case, dtype=torch.float32, layout=torch.contiguous_format):
    """The layer's input, weight, and a random tensor like the output."""
    input, weight, options = LAYERS[case]
    input, weight = (rand(*size, dtype=dtype).to(memory_format=layout) for size in (input, weight))
    size = F.conv2d(input.double(), weight.double(), **options).shape
    return input, weight, rand(*size, dtype=dtype).to(memory_format=layout)


def serves(backend, op, *arguments):
    tensors = [argument for argument in arguments if isinstance(argument, torch.Tensor)]
    if reason := _dispatch.why_not(backend, op, *tensors):
        pytest.skip(reason)


def check(op, plain, arguments, backend):
    """By FlashAttention's rule: at most twice the error of plain torch in these dtypes. Laid out as the reference's."""
    serves(backend, op, *arguments)
    call = getattr(ops, op)
    with poisoned():
        value = call(*arguments, backend=backend)
    reference = call(*arguments, backend="reference")
    described = [(tensor.shape, tensor.dtype, tensor.stride()) for tensor in (value, reference)]
    assert described[0] == described[1]
    doubled = [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments]
    truth, expected = plain(*doubled), plain(*arguments)
    slack = 4 * torch.finfo(value.dtype).eps * largest(truth)
    error, allowed = largest(value - truth), 2 * largest(expected - truth) + slack
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def plain_conv_relu(input, weight, bias, residual, stride, padding, dilation, groups, upper):
    output = F.conv2d(input, weight, bias, stride, padding, dilation, groups)
    output = output if residual is None else output + residual.to(output.dtype)
    return output.clamp(0, upper)


def opened(gate, upper, like):
    """Where a gate lets the gradient pass."""
    if gate.dtype != torch.uint8:
        return (gate != 0) & ((gate != upper) if upper < math.inf else True)
    bits = (gate.unsqueeze(1) >> torch.arange(8, device=DEVICE) & 1).view(-1)[: like.numel()]
    return bits.bool().as_strided(like.shape, like.stride())


def plain_relu_backward(grad, gate, addend, upper):
    grad = grad if addend is None else grad + addend
    return torch.where(opened(gate, upper, grad), grad, 0)


def plain_conv_input_grad(grad, weight, gate, addend, input_size, stride, padding, dilation, groups, upper):
    input = torch.empty(input_size, dtype=grad.dtype, device=DEVICE)
    if grad.is_contiguous(memory_format=torch.channels_last):
        input = input.to(memory_format=torch.channels_last)
    result = torch.ops.aten.convolution_backward(
        *(grad, input, weight, None, stride, padding, dilation, False, [0, 0], groups), [True, False, False]
    )[0]
    if gate is None:
        return result if addend is None else result + addend
    return plain_relu_backward(result, gate, addend, upper)


def gate_of(kind, input, upper):
    """Of a ReLU that made the input: some of it is 0, some at the upper bound."""
    output = (input * (2 if upper == math.inf else 9)).clamp(0, upper)
    if kind == "bits":
        return ops.relu_bits_(output.clone(), upper, backend="reference")
    return output if kind == "output" else None


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("parts", "upper"), [("", 6.0), ("bias", math.inf), ("bias, residual", math.inf)])
def test_conv_relu(case, dtype, layout, parts, upper, backend):
    input, weight, output = tensors(case, dtype, LAYOUTS[layout])
    bias = rand(weight.shape[0], dtype=dtype) if "bias" in parts else None
    residual = output if "residual" in parts else None
    arguments = input, weight, bias, residual, *geometry(LAYERS[case][2]), upper
    check("conv_relu", plain_conv_relu, arguments, backend)


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("gate", "addend", "upper"),
    [("bits", True, math.inf), ("output", True, 6.0), ("output", False, math.inf), (None, True, math.inf)],
)
def test_conv_input_grad(case, dtype, layout, gate, addend, upper, backend):
    input, weight, grad = tensors(case, dtype, LAYOUTS[layout])
    added = torch.randn_like(input) if addend else None
    arguments = grad, weight, gate_of(gate, input, upper), added, list(input.shape), *geometry(LAYERS[case][2]), upper
    check("conv_input_grad", plain_conv_input_grad, arguments, backend)


@pytest.mark.parametrize("case", ["packed bytes", "depthwise"])
@pytest.mark.parametrize("gate", GATES)
def test_conv_input_grad_without_addend(case, gate, backend):
    input, weight, grad = tensors(case, torch.float16, torch.channels_last)
    arguments = grad, weight, gate_of(gate, input, 6.0), None, list(input.shape), *geometry(LAYERS[case][2]), 6.0
    check("conv_input_grad", plain_conv_input_grad, arguments, backend)


@pytest.mark.parametrize("case", ["packed bytes", "depthwise, stride 2", "3x3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_is_added_may_have_any_strides_and_dtype(case, dtype, backend):
    input, weight, grad = tensors(case, torch.float16, torch.channels_last)
    shape, numbers = LAYERS[case][2], list(input.shape)
    residual = torch.randn_like(grad, dtype=dtype).contiguous()
    check("conv_relu", plain_conv_relu, (input, weight, None, residual, *geometry(shape), 6.0), backend)
    addend = rand(*numbers[:3], 2 * numbers[3], dtype=dtype)[..., ::2]
    for gate in ("bits", "output"):
        arguments = grad, weight, gate_of(gate, input, math.inf), addend, numbers, *geometry(shape), math.inf
        check("conv_input_grad", plain_conv_input_grad, arguments, backend)


@pytest.mark.parametrize("gate", GATES[:2])
@pytest.mark.parametrize("upper", UPPERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("addend", [None, *DTYPES[1:]], ids=str)
@pytest.mark.parametrize("size", [(3, 5, 7, 3), (2, 16, 9, 8), (0, 4), (1031,), (2, 3, 4, 5, 3)], ids=str)
def test_relu_backward_of_any_size_and_dtype(gate, upper, dtype, addend, size, backend):
    grad = rand(*size, dtype=dtype)
    if len(size) == 4:
        grad = grad.to(memory_format=torch.channels_last)
    added = None if addend is None else torch.randn_like(grad, dtype=addend)
    arguments = grad, gate_of(gate, torch.randn_like(grad), upper), added, upper
    serves(backend, "relu_backward", *arguments)
    same(arguments, backend)


def same(arguments, backend):
    with poisoned():
        value = ops.relu_backward(*arguments, backend=backend)
    expected = ops.relu_backward(*arguments, backend="reference")
    assert (value.dtype, value.stride()) == (expected.dtype, expected.stride())
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(value, plain_relu_backward(*arguments), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("gate", GATES[:2])
def test_relu_backward_of_other_strides(gate, backend):
    grad = rand(2, 4, 5, 6).to(memory_format=torch.channels_last)
    chosen = gate_of(gate, torch.randn_like(grad), 6.0)
    for addend in (rand(2, 4, 5, 6), rand(2, 4, 5, 12)[..., ::2], rand(2, 4, 1, 1).expand(2, 4, 5, 6)):
        same((grad, chosen, addend, 6.0), backend)
    begins_anywhere = rand(240)[3:], gate_of(gate, rand(237), math.inf), rand(300)[5:242], math.inf
    same(begins_anywhere, backend)
    if gate == "output":
        same((grad, chosen.contiguous(), None, 6.0), backend)
        same((rand(4, 12)[:, ::2], rand(4, 6).relu(), None, math.inf), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_gradients_pass_at_nan_and_stop_at_both_bounds(dtype, backend):
    special = [math.nan, 0.0, -0.0, 6.0, 5.0, math.inf, math.nan, 0.0, 1e-7]
    gate = torch.tensor(special, dtype=dtype, device=DEVICE)
    grad = torch.tensor([1.0, math.nan, 1.0, math.inf, -0.0, math.nan, 2.0, -1.0, 1.0], dtype=dtype, device=DEVICE)
    for upper in (math.inf, 6.0):
        same((grad, gate, None, upper), backend)
        same((grad, gate, torch.ones_like(grad), upper), backend)
        stops = torch.tensor([value == 0 or value == upper < math.inf for value in special], device=DEVICE)
        value = ops.relu_backward(torch.ones_like(grad), gate, None, upper, backend=backend)
        assert torch.equal(value != 0, ~stops)
    every = torch.full((2,), 0b10101010, dtype=torch.uint8, device=DEVICE)
    same((grad, every, None, math.inf), backend)
    image = gate[:8].view(1, 8, 1, 1)
    weight = torch.eye(8, dtype=dtype, device=DEVICE).view(8, 8, 1, 1)
    layer = torch.ones_like(image), weight, image, None, [1, 8, 1, 1], [1, 1], [0, 0], [1, 1], 1, 6.0
    assert torch.equal(ops.conv_input_grad(*layer, backend=backend).view(-1) != 0, ~stops[:8])


@pytest.mark.parametrize("upper", UPPERS)
@pytest.mark.parametrize("case", ["packed bytes", "depthwise"])
def test_nan_goes_through_the_relu(case, upper, backend):
    input, weight, output = tensors(case)
    input[0, :, 1, 1] = math.nan
    arguments = input, weight, None, output, *geometry(LAYERS[case][2]), upper
    value, expected = (ops.conv_relu(*arguments, backend=b) for b in (backend, "reference"))
    assert expected.isnan().any()
    assert torch.equal(value.isnan(), expected.isnan())


@pytest.fixture
def launches(monkeypatch):
    """The kernels that Triton's backend starts."""
    launch = pytest.importorskip("maskops.backends.triton._launch")
    started, start = [], launch.launch

    def record(kernel, *rest):
        started.append(kernel.fn.__name__)
        start(kernel, *rest)

    monkeypatch.setattr(launch, "launch", record)
    return started


@pytest.mark.parametrize("case", ["packed bytes", "packed bytes, stride 2", "depthwise", "depthwise, stride 2"])
def test_a_layer_is_one_launch(case, launches):
    input, weight, output = tensors(case, layout=torch.channels_last)
    numbers = geometry(LAYERS[case][2])
    ops.conv_relu(input, weight, rand(weight.shape[0]), output, *numbers, 6.0, backend="triton")
    assert len(launches) == 1
    given = output, weight, gate_of("bits", input, math.inf), torch.randn_like(input), list(input.shape)
    ops.conv_input_grad(*given, *numbers, math.inf, backend="triton")
    assert len(launches) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["3x3", "packed bytes, stride 2", "depthwise"])
@pytest.mark.parametrize("gate", GATES)
def test_the_way_of_torch_s_own_convolution(case, layout, gate, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setenv("MASKOPS_LAYERS", "materialised")
    input, weight, output = tensors(case, layout=LAYOUTS[layout])
    numbers = geometry(LAYERS[case][2])
    for residual, upper in ((output, 6.0), (output, math.inf), (None, 6.0), (None, math.inf)):
        arguments = input, weight, rand(weight.shape[0]), residual, *numbers, upper
        check("conv_relu", plain_conv_relu, arguments, "triton")
        addend = None if residual is None else torch.randn_like(input)
        arguments = output, weight, gate_of(gate, input, upper), addend, list(input.shape), *numbers, upper
        check("conv_input_grad", plain_conv_input_grad, arguments, "triton")


@pytest.mark.parametrize(
    ("images", "channels", "way", "reason"),
    [
        (2, 16, "fused", "128 pixels are so few"),
        (128, 16, "materialised", "with 8192 pixels torch's own convolution is expected to be the faster one"),
        (128, 1, "fused", "a depthwise layer has a kernel of its own"),
    ],
)
def test_the_way_follows_the_work(images, channels, way, reason, monkeypatch, tmp_path):
    ways = pytest.importorskip("maskops.backends.triton.ways")
    monkeypatch.setattr(ways, "INTERPRETED", False)
    monkeypatch.setenv("MASKOPS_CACHE", str(tmp_path))
    input, weight = torch.empty(images, 16, 8, 8), torch.empty(16, channels, 3, 3)
    numbers = [1, 1], [1, 1], [1, 1], 16 // channels, math.inf
    for op, arguments in (
        ("conv_relu", (input, weight, None, None, *numbers)),
        ("conv_input_grad", (input, weight, None, None, list(input.shape), *numbers)),
    ):
        chosen, why = ways.choose(op, *arguments)
        assert chosen == way
        assert why.startswith(reason)
        assert f"{way}: {why}" in explain(op, *arguments)


def test_the_cuda_backend_says_what_it_takes():
    cuda = _dispatch._load("cuda")
    if isinstance(cuda, str):
        pytest.skip(cuda)
    input, weight, output = tensors("3x3")
    numbers = *geometry(LAYERS["3x3"][2]), math.inf
    assert "torch's own convolution" in explain("conv_relu", input, weight, None, output, *numbers)
    input, weight, output = tensors("depthwise")
    numbers = *geometry(LAYERS["depthwise"][2]), math.inf
    given = output, weight, None, None, list(input.shape), *numbers
    assert "a depthwise layer has a kernel of its own" in explain("conv_input_grad", *given)


def test_ops_compile_in_one_graph(backend):
    input, weight, output = tensors("packed bytes", layout=torch.channels_last)
    numbers = *geometry(LAYERS["packed bytes"][2]), math.inf

    def step(input, weight, output):
        value = ops.conv_relu(input, weight, None, output, *numbers, backend=backend)
        return ops.conv_input_grad(value, weight, input, None, list(input.shape), *numbers, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(input, weight, output), partial(step)(input, weight, output))
