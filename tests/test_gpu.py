"""What must hold on a GPU. Each test runs on the CPU too, where most of them compare a thing with itself, so that a
mistake in a test doesn't wait for a machine with a GPU to be found.
"""

from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import outputs_and_gradients, relative_error
from torch import nn

from benchmarks import steps as benchmark
from benchmarks.contestants import CONTESTANTS, Maskops
from benchmarks.measure import full_float32
from benchmarks.problem import make_problem
from maskops.arena import MaskArena
from maskops.functional import (
    dual_masked_conv2d,
    dual_masked_linear,
    effective_weight,
    masked_batch_norm,
    masked_conv2d,
    masked_conv_transpose2d,
    masked_layer_norm,
    masked_linear,
    project_onto_l1_ball,
    rescale_to_l1_ball,
)
from maskops.lean import lean_autograd, saved_bytes
from maskops.models import ARCHITECTURES
from maskops.optim import MaskAdam, MaskSGD
from maskops.purify import awm
from maskops.purify.methods import METHODS

CPU = torch.device("cpu")
CUDA = pytest.param(torch.device("cuda"), marks=pytest.mark.gpu, id="cuda")
on_each_device = pytest.mark.parametrize("device", [pytest.param(CPU, id="cpu"), CUDA])

# largest error relative to the largest value: some units in the last place, which long sums and cancellation cost
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}

WEIGHT = (24, 16, 3, 3)
LAYER = {"input": (4, 16, 15, 13), "weight": WEIGHT, "mask": WEIGHT, "noise": WEIGHT, "bias": (24,)}
DEPTHWISE = {"input": (4, 20, 14, 14), "weight": (20, 1, 5, 5), "mask": (20, 1, 1, 1), "bias": (20,)}
GROUPED = {"input": (2, 12, 9, 9), "weight": (8, 3, 3, 3), "mask": (8, 3, 1, 1)}
TRANSPOSED = {"input": (2, 16, 7, 7), "weight": (16, 12, 3, 3), "mask": (16, 12, 3, 3), "bias": (12,)}
LINEAR = {"input": (5, 7, 40), "weight": (33, 40), "mask": (33, 40), "noise": (33, 1), "bias": (33,)}
CASES = {
    "masked_conv2d": (partial(masked_conv2d, stride=2, padding=1), LAYER),
    "masked_conv2d depthwise": (partial(masked_conv2d, padding=2, groups=20), DEPTHWISE),
    "masked_conv2d grouped": (partial(masked_conv2d, dilation=2, groups=4), GROUPED),
    "masked_conv_transpose2d": (partial(masked_conv_transpose2d, stride=2), TRANSPOSED),
    "dual_masked_conv2d": (
        partial(dual_masked_conv2d, padding="same"),
        {**LAYER, "perturbed_input": LAYER["input"]},
    ),
    "masked_linear": (masked_linear, LINEAR),
    "dual_masked_linear": (dual_masked_linear, LINEAR),
    "effective_weight": (effective_weight, {"weight": WEIGHT, "mask": (24, 1, 1, 1), "noise": WEIGHT}),
    "masked_layer_norm": (
        lambda input, weight, mask, bias: masked_layer_norm(input, (40,), weight, mask, bias),
        {"input": (5, 7, 40), "weight": (40,), "mask": (40,), "bias": (40,)},
    ),
    "masked_batch_norm": (
        lambda input, weight, mask, bias: masked_batch_norm(input, None, None, weight, mask, bias, True),
        {"input": (8, 6, 9, 9), "weight": (6,), "mask": (6,), "bias": (6,)},
    ),
    "rescale_to_l1_ball": (partial(rescale_to_l1_ball, radius=20.0), {"input": (3, 8, 8)}),
    "project_onto_l1_ball": (partial(project_onto_l1_ball, radius=20.0, batch_dims=1), {"input": (3, 500)}),
}


@on_each_device
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_op_and_gradients_are_those_of_float64_on_the_cpu(case, dtype, device, memory_format):
    op, shapes = CASES[case]
    given = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    moved = {
        name: tensor.to(device, memory_format=memory_format if tensor.dim() == 4 else torch.preserve_format)
        for name, tensor in given.items()
    }
    with full_float32():
        found = outputs_and_gradients(op, moved)
    expected = outputs_and_gradients(op, {name: tensor.double() for name, tensor in given.items()}, like=found)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert value.device.type == device.type and value.dtype == dtype, name
        assert relative_error(value.cpu(), expected[name]) <= TOLERANCE[dtype], name


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("arch", ["small_vgg", "resnet18"])
def test_lean_autograd_changes_nothing_but_what_is_kept(arch, dtype, device):
    model = ARCHITECTURES[arch]().to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    images = torch.rand(2, 3, 32, 32).to(device, memory_format=torch.channels_last)

    def logits_and_gradient(mode):
        x = images.clone().requires_grad_()
        with mode, torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            logits = model(x).float()
        return logits.detach(), *torch.autograd.grad(logits.logsumexp(1).sum(), x)

    def kept(mode):
        x = images.clone().requires_grad_()
        with mode:
            return saved_bytes(lambda: model(x), exclude=[*model.parameters(), *model.buffers()])

    with full_float32():
        plain, lean = logits_and_gradient(nullcontext()), logits_and_gradient(lean_autograd())
    for one, other in zip(plain, lean, strict=True):
        assert relative_error(other, one) <= TOLERANCE[dtype]
    assert kept(lean_autograd()) < kept(nullcontext()) / 2


def arena_on(device):
    torch.manual_seed(0)
    shapes = {"conv": (8, 4, 3, 3), "linear": (5, 7)}
    weights = {name: torch.randn(shape).to(device) for name, shape in shapes.items()}
    masks = {name: torch.rand(shape).to(device) for name, shape in shapes.items()}
    return MaskArena(weights, masks), torch.randn(2000).to(device)


def captured(step, device):
    """A function that replays a CUDA graph of the step; on the CPU, the step itself."""
    if device.type == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@on_each_device
@pytest.mark.parametrize("state_bits", [32, 8])
def test_mask_step_in_a_cuda_graph_is_the_eager_step(state_bits, device):
    """With a learning rate and gradients that change between the replays, and the count of steps on the device."""

    def masks_after_steps(capture):
        arena, noise = arena_on(device)
        rate = torch.tensor(0.1, dtype=torch.float64, device=device)
        lower = torch.tensor(0.2, device=device)
        optimizer = MaskAdam(arena, lr=rate, l1=0.1, lower=lower, capturable=True, state_bits=state_bits)
        gradient = torch.zeros_like(arena.grad)

        def step():
            arena.grad.copy_(gradient)
            optimizer.step()

        gradient.copy_(noise[: len(gradient)])
        step()  # creates the state
        run = captured(step, device) if capture else step
        for count in range(1, 4):
            gradient.copy_(noise[100 * count :][: len(gradient)])
            rate.mul_(0.5)
            run()
        steps = optimizer.state[arena.mask]["step"]
        return arena.mask.detach().clone(), arena.effective.detach().clone(), steps

    eager, graph = masks_after_steps(False), masks_after_steps(True)
    assert graph[2].device.type == device.type and graph[2].item() == 4
    for one, other in zip(eager, graph, strict=True):
        assert torch.equal(one, other)


OPTIMIZERS = {
    "adam": MaskAdam,
    "adam of eight bits": partial(MaskAdam, state_bits=8),
    "sgd": partial(MaskSGD, momentum=0.9),
}


@on_each_device
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_mask_step_is_that_of_the_cpu(optimizer, device):
    def masks_after_steps(device):
        arena, noise = arena_on(device)
        step = OPTIMIZERS[optimizer](arena, lr=0.05, l1=0.1)
        for count in range(3):
            arena.grad.copy_(noise[100 * count :][: len(arena.grad)])
            step.step()
        return arena.masks, arena.effective_weights

    for found, expected in zip(masks_after_steps(device), masks_after_steps(CPU), strict=True):
        for name, value in found.items():
            torch.testing.assert_close(value.cpu(), expected[name])


def tiny_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
        nn.Linear(8, 4),
    )
    images, labels = torch.rand(24, 3, 10, 10), torch.arange(24) % 4
    network(images)  # batch norms see something
    return network.eval(), (images, labels)


def purified(precision, **options):
    network, clean = tiny_network()
    steps = {"epochs": 2, "inner_steps": 3, "outer_steps": 3, "batch_size": 8, "tau": 5.0}
    return awm(network.to(precision), clean, preset="official", **steps, seed=1, progress=False, **options)


@on_each_device
def test_awm_is_that_of_the_cpu(device):
    """In float64: in less, Adam makes of a rounding in a gradient near zero a step the other way."""
    found, expected = purified(torch.float64, device=device), purified(torch.float64, device=CPU)
    assert next(found.model.parameters()).device.type == device.type
    for name, mask in expected.masks.items():
        torch.testing.assert_close(found.masks[name], mask, rtol=0, atol=1e-7)
        assert (mask != 1).any(), name
    torch.testing.assert_close(found.trigger, expected.trigger, rtol=1e-5, atol=1e-7)
    for name, values in expected.history.items():
        assert found.history[name] == pytest.approx(values, rel=1e-6), name


@on_each_device
def test_awm_in_bfloat16_stays_near_float32(device):
    expected = purified(torch.float32, device=device)
    found = purified(torch.float32, device=device, dtype=torch.bfloat16)
    for name, values in expected.history.items():
        assert found.history[name] == pytest.approx(values, rel=0.1), name
    for name, mask in found.masks.items():
        assert mask.dtype == torch.float32 and mask.min() >= 0 and mask.max() <= 1, name


@contextmanager
def no_waiting(device):
    """Raise when the CPU waits for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


@on_each_device
@pytest.mark.parametrize(("net", "dtype"), [("small_vgg", torch.bfloat16), ("resnet18", torch.float32)], ids=str)
def test_steps_of_awm_never_wait_for_the_gpu(net, dtype, device):
    steps = Maskops(make_problem(net, 2, dtype, device))
    steps.reset()
    steps.begin()
    steps.inner()
    steps.outer()
    with no_waiting(device):
        for index in range(3):
            steps.inner(index)
        for index in range(3):
            steps.outer(index)
    assert all(value.isfinite().all() for value in steps.result().values())


@pytest.mark.gpu
def test_no_waiting_notices_a_wait():
    device = torch.device("cuda")
    value = torch.ones(1, device=device)
    with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(device):
        value.item()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contestants_of_the_benchmark_agree(dtype):
    contestants = {name: make for name, make in CONTESTANTS["awm"].items() if not hasattr(make, "compiles")}
    outcome = benchmark.run("resnet18", 32, dtype, torch.device("cuda"), 2, 1, "awm", contestants)
    assert not outcome.failed and not outcome.absent
    assert all(float(row.peak_mb) > 0 for row in outcome.rows if row.contestant != benchmark.AGAIN)


@on_each_device
def test_predictions_of_masked_and_folded_networks_agree(device):
    result = purified(torch.float32, device=device)
    masked = purified(torch.float32, device=device, folded=False)
    _, (images, _) = tiny_network()
    with torch.no_grad(), full_float32():
        torch.testing.assert_close(result.model(images.to(device)), masked.model(images.to(device)))
    assert F.mse_loss(result.trigger, masked.trigger) == 0


QUICK = {"awm": {"inner_steps": 2, "outer_steps": 2}, "anp": {"steps": 2}, "swm": {"steps": 2}}


@on_each_device
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_and_its_result_is_where_it_belongs(method, dtype, device):
    model, data = tiny_network()
    options = {"epochs": 2, "device": device, "dtype": dtype, "progress": False, **QUICK.get(method, {})}
    result = METHODS[method].run(model, data, **options)
    assert all(parameter.device.type == device.type for parameter in result.model.parameters())
    assert all(parameter.isfinite().all() for parameter in result.model.parameters())
    assert all(mask.device.type == "cpu" and mask.isfinite().all() for mask in result.masks.values())
    assert all(parameter.device.type == "cpu" for parameter in model.parameters())


@on_each_device
@pytest.mark.parametrize("method", ["nft", "ft", "rnp"])
def test_methods_without_noise_find_the_same_on_the_gpu(method, device):
    model, data = tiny_network()
    options = {"epochs": 2, "dtype": torch.float64, "progress": False}
    options |= {"threshold": 0.5} if method == "rnp" else {}
    model = model.double()
    with full_float32():
        expected, found = (METHODS[method].run(model, data, device=where, **options) for where in (CPU, device))
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(found.model.state_dict()[name].cpu(), value, rtol=1e-6, atol=1e-8)
