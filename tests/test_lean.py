"""The lean mode against plain torch: same outputs, same gradients, fewer bytes."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, rand
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskops import lean_autograd, models
from maskops.lean import saved_bytes

channels_last = partial(torch.Tensor.contiguous, memory_format=torch.channels_last)


def frozen(module):
    """The module in eval mode with random frozen state, so that no factor is 1 and no offset 0."""
    for norm in module.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            for state in (norm.weight, norm.running_var):
                if state is not None:
                    nn.init.uniform_(state, 0.5, 2.0)
            for state in (norm.bias, norm.running_mean):
                if state is not None:
                    nn.init.normal_(state)
    return module.to(DEVICE).eval().requires_grad_(False)


def state(module):
    return [*module.parameters(), *module.buffers()] if isinstance(module, nn.Module) else []


def run(function, input, mode=nullcontext):
    """Output, gradient of the input, bytes saved."""
    input = input.detach().requires_grad_()
    with mode():
        saved = saved_bytes(lambda: function(input), exclude=state(function))
        output = function(input)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
    output.backward(torch.empty_like(output).copy_(grad))
    return output.detach(), input.grad, saved


def assert_same(function, input, rounding=0.0):
    """Outputs bit for bit, and gradients to within ``rounding``; the bytes saved by plain torch and in the mode."""
    output, grad, saved = run(function, input)
    lean_output, lean_grad, lean_saved = run(function, input, lean_autograd)
    assert torch.equal(lean_output, output) and lean_output.stride() == output.stride()
    assert lean_output.dtype == output.dtype and lean_grad.dtype == grad.dtype
    if rounding:
        torch.testing.assert_close(lean_grad, grad, rtol=0, atol=rounding)
    else:
        assert torch.equal(lean_grad, grad)
    assert lean_grad.stride() == grad.stride()
    return saved, lean_saved


def assert_plain(function, *tensors):
    """The same graph as without the mode."""

    def graph(mode):
        with mode():
            node = function(*tensors).grad_fn
        names = []
        while node is not None:
            names.append(node.name())
            node = node.next_functions[0][0] if node.next_functions else None
        return names

    assert graph(lean_autograd) == graph(nullcontext)


BITS, INPUT = 2 * 6 * 9 * 8 // 8, 2 * 6 * 9 * 8 * 4  # bytes of the input of the ops below: one bit, four bytes each
WINDOWS = 2 * 6 * 4 * 4
IMAGE_OPS = {  # function, bytes saved in the mode
    "F.relu": (F.relu, BITS),
    "torch.relu": (torch.relu, BITS),
    "Tensor.relu": (lambda x: x.relu(), BITS),
    "relu(inplace)": (lambda x: F.relu(x * 1, inplace=True), BITS),
    "torch.relu_": (lambda x: torch.relu_(x * 1), BITS),
    "Tensor.relu_": (lambda x: (x * 1).relu_(), BITS),
    "F.relu_": (lambda x: F.relu_(x * 1), BITS),
    "ReLU": (nn.ReLU(), BITS),
    "ReLU(inplace)": (lambda x: nn.ReLU(inplace=True)(x * 1), BITS),
    "relu_ of a view": (lambda x: (x * 1)[:, 1:].relu_(), 2 * 5 * 9 * 8 // 8),
    "F.relu6": (F.relu6, BITS),
    "ReLU6(inplace)": (lambda x: nn.ReLU6(inplace=True)(x * 1), BITS),
    "F.hardtanh": (lambda x: F.hardtanh(x, 0, 2), BITS),
    "F.hardtanh_": (lambda x: F.hardtanh_(x * 1, 0.0, 2.0), BITS),
    "Hardtanh": (nn.Hardtanh(0.0, 1.0), BITS),
    "F.max_pool2d": (lambda x: F.max_pool2d(x, 2), WINDOWS),
    "torch.max_pool2d": (lambda x: torch.max_pool2d(x, (2, 2), stride=[]), WINDOWS),
    "MaxPool2d": (nn.MaxPool2d(3, stride=2, padding=1), 2 * 6 * 5 * 4),
    "MaxPool2d(ceil_mode)": (nn.MaxPool2d((3, 2), (2, 3), (1, 0), (1, 2), ceil_mode=True), 2 * 6 * 5 * 3),
    "F.avg_pool2d": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), 0),
    "AvgPool2d": (nn.AvgPool2d((3, 2), padding=(1, 0), divisor_override=5), 0),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((3, None)), 0),
    "BatchNorm2d": (frozen(nn.BatchNorm2d(6)), 0),
    "BatchNorm2d(affine=False)": (frozen(nn.BatchNorm2d(6, eps=0.1, affine=False)), 0),
    "Conv2d": (frozen(nn.Conv2d(6, 5, 3)), 0),
    "Conv2d(all)": (frozen(nn.Conv2d(6, 4, (3, 2), (2, 1), (1, 2), (1, 2), groups=2, bias=False)), 0),
    "Conv2d(depthwise)": (frozen(nn.Conv2d(6, 6, 3, padding=1, groups=6)), 0),
    "Conv2d(same)": (frozen(nn.Conv2d(6, 5, (3, 5), padding="same", dilation=(2, 1))), 0),
    "Conv2d(valid)": (frozen(nn.Conv2d(6, 5, 3, padding="valid")), 0),
    "ConvTranspose2d": (frozen(nn.ConvTranspose2d(6, 4, 3, (2, 1), 1, (1, 0), groups=2)), 0),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("name", IMAGE_OPS)
def test_image_op_is_plain_torch_with_fewer_bytes(name, layout, dtype):
    function, expected = IMAGE_OPS[name]
    if isinstance(function, nn.Module):
        function.to(dtype)
    saved, lean_saved = assert_same(function, layout(rand(2, 6, 9, 8) * 3).to(dtype))
    assert lean_saved == expected
    assert saved > 6 * lean_saved


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d", "MaxPool2d", "AvgPool2d", "ReLU"])
def test_input_that_is_no_dense_memory(name, layout):
    """A gradient that arrives expanded, an input with gaps, an input expanded over the batch."""
    function = IMAGE_OPS[name][0].float() if state(IMAGE_OPS[name][0]) else IMAGE_OPS[name][0]
    assert_same(lambda x: function(x).sum(), layout(rand(2, 6, 9, 8)))
    assert_same(lambda x: function(x[:, 6:, :, ::2]), layout(rand(2, 12, 9, 16)))
    assert_same(lambda x: function(x.expand(3, -1, -1, -1)), layout(rand(1, 6, 9, 8)))


@pytest.mark.parametrize(
    ("module", "size"),
    [
        (nn.Conv1d(4, 6, 3, 2, 1), (2, 4, 11)),
        (nn.Conv3d(4, 6, (1, 2, 3), (1, 2, 1), groups=2), (2, 4, 3, 6, 5)),
        (nn.ConvTranspose1d(4, 6, 3, 2, dilation=2), (2, 4, 7)),
        (nn.ConvTranspose3d(4, 6, 2, 2, bias=False), (2, 4, 3, 3, 3)),
        (nn.Conv2d(4, 6, 3), (0, 4, 5, 5)),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
        (nn.BatchNorm1d(4), (5, 4)),
        (nn.BatchNorm1d(4), (5, 4, 3)),
        (nn.BatchNorm3d(4), (2, 4, 3, 2, 2)),
    ],
)
def test_layer_of_other_dimensions_saves_nothing(module, size):
    assert assert_same(frozen(module), rand(*size))[1] == 0


def test_functions_called_with_keywords():
    weight, mean, var = rand(4, 3, 3, 3), rand(3), rand(3).abs()
    x = rand(2, 3, 8, 8)
    assert assert_same(lambda x: F.conv2d(weight=weight, input=x, padding=[1], stride=(2,)), x) == (
        x.nbytes + weight.nbytes,
        weight.nbytes,
    )
    assert assert_same(lambda x: F.batch_norm(x, running_var=var, running_mean=mean, eps=0.1), x)[1] == 2 * mean.nbytes
    assert assert_same(lambda x: F.max_pool2d(input=x, kernel_size=2), x)[1] == 2 * 3 * 4 * 4
    assert assert_same(lambda x: torch.relu(input=x), x)[1] == x.numel() // 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in IMAGE_OPS if "elu" in name.lower()])
def test_relu_at_special_values(name, dtype):
    values = [math.inf, -math.inf, 0.0, -0.0, 6.0, 1e-40, -1e-40, 1.0, 7.0] + [math.nan] * ("6" not in name)
    x = torch.tensor(values, dtype=dtype).expand(2, 6, 2, -1).clone()
    output, grad, _ = run(IMAGE_OPS[name][0], x)
    lean_output, lean_grad, _ = run(IMAGE_OPS[name][0], x, lean_autograd)
    torch.testing.assert_close(lean_output, output, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(lean_output.signbit(), output.signbit())
    assert torch.equal(lean_grad, grad)


@pytest.mark.parametrize("alpha", [1.0, 0.3, 2, 0.0])
def test_elu_saves_its_output(alpha):
    x = rand(64, 50) * 4
    function = partial(F.elu, alpha=alpha)
    assert assert_same(function, x, rounding=4 * max(alpha, 1) * torch.finfo().eps) == (x.nbytes, x.nbytes)
    weight = rand(7, 50).requires_grad_()
    # the trainable layer saves the same output; plain torch keeps elu's input, too
    assert assert_same(lambda x: F.linear(function(x), weight), x, rounding=1e-5) == (
        2 * x.nbytes + weight.nbytes,
        x.nbytes + weight.nbytes,
    )


def test_elu_that_lean_leaves_alone():
    x = rand(5).requires_grad_()
    assert_plain(partial(F.elu, alpha=-1.0), x)
    assert_plain(lambda x: F.elu(x * 1, inplace=True), x)
    assert_plain(lambda x: F.elu_(x * 1), x)
    with lean_autograd():
        output = F.elu(x)
        output += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


def test_in_place_relu_is_in_place():
    x = rand(4, 5).requires_grad_()
    with lean_autograd():
        before = x * 1
        after = F.relu(before, inplace=True)
        assert after is before
        view = before[1:]
        assert torch.relu_(view) is view
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            x.relu_()
        saved = x.exp()
        saved.relu_()
    assert torch.equal(before, x.relu()) and (x < 0).any(), "the leaf was not changed"
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_residual_connection_overwrites_and_reuses():
    def block(x):
        x = F.relu(x + 0.5, inplace=True)
        y = F.relu(x - 0.2, inplace=True) * 2 - 0.3
        y += x
        return F.relu(y, inplace=True)

    assert assert_same(block, rand(8, 8)) == (3 * 8 * 8 * 4, 3 * 8)


class Subclass(torch.Tensor):
    pass


def test_everything_else_is_plain_torch():
    x = rand(2, 3, 8, 8).requires_grad_()
    conv, norm = frozen(nn.Conv2d(3, 4, 3)), frozen(nn.BatchNorm2d(3))
    for frozen_op in (F.relu, conv, norm, partial(F.max_pool2d, kernel_size=2), partial(F.avg_pool2d, kernel_size=2)):
        assert_plain(frozen_op, x.detach())
        assert_plain(torch.no_grad()(frozen_op), x)
        assert_plain(frozen_op, x.detach().as_subclass(Subclass).requires_grad_())
    assert_plain(frozen(nn.Conv2d(3, 4, 3)).to("meta"), x.detach().to("meta").requires_grad_())
    assert_plain(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], x)
    assert_plain(partial(F.max_pool2d, kernel_size=(1, 257)), rand(1, 1, 1, 300).requires_grad_())
    assert_plain(partial(F.hardtanh, min_val=-1, max_val=1), x)
    assert_plain(partial(F.hardtanh, min_val=0, max_val=0.3), x)
    assert_plain(nn.AdaptiveAvgPool2d(1), x)
    assert_plain(frozen(nn.Conv2d(3, 4, 2, padding="same")), x)
    assert_plain(conv, x[0])
    assert_plain(lambda x: F.conv2d(x, torch.ones(4, 3, 1, 1, dtype=x.dtype)), (x + 0j).detach().requires_grad_())
    for plain_op in (
        F.gelu,
        frozen(nn.Linear(8, 8)),
        frozen(nn.LayerNorm(8)),
        torch.sigmoid,
        nn.LeakyReLU(),
        nn.ELU(-1),
    ):
        assert_plain(plain_op, x)
    assert saved_bytes(lambda: frozen(nn.Linear(8, 2))(x)) == 8 * 2 * 4, "a frozen linear layer saves its weight alone"
    with lean_autograd(), pytest.raises(RuntimeError, match=r"expected input\[2, 3, 8, 8\] to have 5 channels"):
        F.conv2d(x, rand(4, 5, 3, 3))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize("layer", [nn.Conv2d(3, 3, 3), nn.ConvTranspose2d(3, 3, 2), nn.BatchNorm2d(3)])
def test_trainable_layer_gets_its_gradients(layer, name):
    layer = frozen(layer)
    parameter = getattr(layer, name).requires_grad_()
    x = rand(2, 3, 8, 8).requires_grad_()
    assert_plain(layer, x)
    with lean_autograd():
        assert torch.autograd.grad(layer(x).sum(), parameter)[0].abs().sum() > 0


def test_batch_norm_in_training_mode_updates_its_statistics():
    norm = frozen(nn.BatchNorm2d(3)).train()
    before = norm.running_mean.clone()
    assert_plain(norm, rand(2, 3, 8, 8).requires_grad_())
    assert not torch.equal(norm.running_mean, before)


def test_trace_and_script_record_plain_ops():
    x = rand(1, 3, 8, 8).requires_grad_()
    model = frozen(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()))
    scripted = torch.jit.script(model)
    with lean_autograd():
        traced = torch.jit.trace(model, x, check_trace=False)
        assert torch.equal(scripted(x), model(x))
    assert "aten::relu" in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_plain_torch_does(dtype):
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.ConvTranspose2d(8, 4, 3),
        nn.ELU(inplace=True), nn.AvgPool2d(2), nn.Conv2d(4, 4, 1), nn.ReLU6(), nn.Flatten(), nn.LazyLinear(5),
    )  # fmt: skip
    x = rand(2, 3, 12, 12)
    model(x)
    model = torch.autocast(DEVICE, dtype)(frozen(model))
    assert_same(model, x)
    assert_same(lambda x: model(x.to(dtype)), x)


def test_autocast_keeps_no_copy_of_a_weight():
    conv = frozen(nn.Conv2d(64, 64, 3))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert assert_same(conv, rand(1, 64, 8, 8)) == (2 * (64 * 8 * 8 + 64 * 64 * 9), 0)


@pytest.mark.parametrize("name", IMAGE_OPS)
def test_gradient_can_be_differentiated(name):
    function, _ = IMAGE_OPS[name]
    function = function.double() if isinstance(function, nn.Module) else function
    # no two values nearer than the steps of gradcheck, and none near a kink
    x = (torch.randperm(2 * 6 * 6 * 6).view(2, 6, 6, 6)[:1, :, :5, :4] - 215.5).to(DEVICE, torch.float64) / 50
    if name.startswith(("Conv", "Batch")):
        x = x[:, :, :, :4]
    x.requires_grad_()
    with lean_autograd():
        assert torch.autograd.gradcheck(function, x, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, x, fast_mode=True)


def test_second_derivative_of_elu():
    x = rand(20, dtype=torch.float64).requires_grad_()
    with lean_autograd():
        assert torch.autograd.gradgradcheck(lambda x: F.elu(x, 0.7), x)


@pytest.mark.parametrize(
    "name", ["F.relu", "ReLU(inplace)", "F.relu6", "MaxPool2d", "AvgPool2d", "BatchNorm2d", "Conv2d"]
)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func(name):
    function, _ = IMAGE_OPS[name]
    function = function.double() if isinstance(function, nn.Module) else function
    x, tangent = rand(3, 1, 6, 5, 4, dtype=torch.float64), rand(1, 6, 5, 4, dtype=torch.float64)

    def loss(x):
        return function(x).pow(2).sum()

    for transformed in (
        lambda: torch.func.vmap(torch.func.grad(loss))(x),
        lambda: torch.func.grad(lambda x: torch.func.vmap(loss)(x).sum())(x),
        lambda: torch.func.grad(lambda x: torch.func.grad(loss)(x).pow(2).sum())(x[0]),
        lambda: torch.func.jacrev(lambda x: function(x).sum((0, 1)))(x[0]),
        lambda: torch.func.jvp(torch.func.grad(loss), (x[0],), (tangent,))[1],
        lambda: torch.autograd.functional.jacobian(lambda x: function(x).sum((0, 1)), x[0], vectorize=True),
    ):
        with lean_autograd():
            actual = transformed()
        assert torch.equal(actual, transformed())


def test_compile_traces_through_the_mode():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding="same"), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.ConvTranspose2d(8, 4, 3), nn.ELU(), nn.AvgPool2d(2), nn.Hardtanh(0, 2, inplace=True), nn.ReLU6(),
        nn.AdaptiveAvgPool2d(2),
    )  # fmt: skip
    model = frozen(model)
    x = rand(2, 3, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output, grad, saved = run(model, x, lean_autograd)
    compiled_output, compiled_grad, compiled_saved = run(compiled, x, lean_autograd)
    assert torch.equal(compiled_output, output) and torch.equal(compiled_grad, grad)
    assert compiled_saved <= saved
    assert run(compiled, x)[2] > 3 * saved, "outside the mode the compiled model is plain again"


@pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last])
@pytest.mark.parametrize(
    ("name", "plain_megabytes", "megabytes"),
    [("resnet18", 150.3, 2.3), ("small_vgg", 34.9, 15.2), ("mobilenet_v2", 435.0, 6.2), ("shufflenet_v2", 50.0, 1.7)],
)
def test_frozen_network_of_the_papers(name, plain_megabytes, megabytes, layout):
    """Batches of 4, counted as 32."""
    model = frozen(getattr(models, name)())
    saved, lean_saved = assert_same(model, layout(rand(4, 3, 32, 32)))
    assert saved * 8 / 1e6 > plain_megabytes
    assert lean_saved * 8 / 1e6 < megabytes


def test_nesting_and_decorating():
    x = rand(40).requires_grad_()
    assert saved_bytes(lambda: F.relu(x)) == 160
    with lean_autograd(), lean_autograd():
        assert saved_bytes(lambda: F.relu(x)) == 5
    mode = lean_autograd()
    with mode, mode:
        assert saved_bytes(lambda: F.relu(x)) == 5
    assert saved_bytes(lambda: lean_autograd()(F.relu)(x)) == 5
    assert saved_bytes(lambda: F.relu(x)) == 160


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_function_that_enters_the_mode(use_reentrant):
    model = frozen(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2)))
    lean = lean_autograd()(model.forward)
    x = rand(2, 3, 8, 8)
    expected = run(model, x)[1]
    assert torch.equal(run(lambda x: checkpoint(lean, x, use_reentrant=use_reentrant), x)[1], expected)


def test_backward_may_run_in_and_out_of_the_mode():
    model, x = frozen(models.small_vgg()), rand(2, 3, 32, 32).requires_grad_()
    with lean_autograd():
        loss = model(x).logsumexp(1).sum()
        (inside,) = torch.autograd.grad(loss, x, retain_graph=True)
    assert torch.equal(torch.autograd.grad(loss, x)[0], inside)


def test_saved_bytes_counts_each_storage_once():
    x, w = rand(10).requires_grad_(), rand(10).requires_grad_()
    assert saved_bytes(lambda: (x * w, x[:5] * w[5:])) == 80
    assert saved_bytes(lambda: (x * w, x[:5] * w[5:]), exclude=[w]) == 40
    assert saved_bytes(lambda: x + w) == 0
    with torch.no_grad():
        assert saved_bytes(lambda: x * w) == 0


def test_without_bits_relu_keeps_its_output_alone():
    x = torch.randn(4, 8, requires_grad=True)
    with lean_autograd(relu_bits=False):
        assert saved_bytes(lambda: F.relu(x).relu()) == 2 * x.nbytes
    with lean_autograd():
        assert saved_bytes(lambda: F.relu(x).relu()) == 2 * x.numel() // 8
