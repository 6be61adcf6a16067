"""The lean mode under autocast, tracing, compilation, checkpointing and derivatives of derivatives."""

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, rand
from helpers_lean import IMAGE_OPS, assert_same, frozen, run
from torch import nn
from torch.utils.checkpoint import checkpoint

from maskops import lean_autograd, models


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
