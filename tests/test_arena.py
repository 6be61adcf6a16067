"""The ops behind arenas: masks of any granularity over flat buffers, and a run over one."""

import math
from functools import partial

import pytest
import torch
from helpers import DEVICE, rand
from test_mask_step import BF16, F16, F32, call

from maskops._flat import views_of
from maskops.arena import MaskArena
from maskops.optim import MaskAdam, MaskSGD

WEIGHTS = {
    "conv": (24, 12, 3, 3),
    "pointwise": (7, 5, 1, 1),
    "linear": (3, 50),
    "norm": (9,),
    "volume": (2, 3, 1, 2, 5),
}
MASKS = {  # of each weight's shape
    "weight": lambda *shape: shape,
    "kernel": lambda *shape: (*shape[:2], *[1] * (len(shape) - 2)),
    "neuron": lambda out, *rest: (out, *[1] * len(rest)),
    "input": lambda out, *rest: (1, *rest[:1], *[1] * (len(rest) - 1)),
    "spatial": lambda *shape: shape[2:],
    "column": lambda *shape: shape[-1:],
    "two apart": lambda *shape: (shape[0], *[1] * (len(shape) - 2), shape[-1]) if len(shape) > 1 else shape,
    "rows of fewer dimensions": lambda *shape: shape[1:],
    "number": lambda *shape: (),
}
MASKS["mixed"] = lambda *shape: MASKS[("weight", "neuron", "kernel", "number", "column")[len(shape) - 1]](*shape)


def make_arena(kind, dtype=F32, weights=WEIGHTS):
    arena = MaskArena(
        {name: rand(*shape) for name, shape in weights.items()},
        {name: rand(*MASKS[kind](*shape)).abs() for name, shape in weights.items()},
        dtype,
    )
    for name, effective in arena.effective_weights.items():
        effective.grad.copy_(rand(*weights[name]))
    return arena


@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("kind", MASKS)
def test_effective_weights_of_an_arena_are_those_of_its_layers(kind, noisy, backend):
    arena = make_arena(kind)
    noise = arena.mask.detach() * 0.3 if noisy else None
    effective = torch.full_like(arena.effective, math.nan)
    table = arena._table, arena._layers
    call("arena_effective_weight_", backend, effective, arena.weight, arena.mask.detach(), noise, *table)
    for name, found in views_of(effective, arena.weights).items():
        mask = arena.masks[name]
        assert torch.equal(found, arena.weights[name] * (mask + mask * 0.3 if noisy else mask)), name
        found.zero_()
    assert not effective.nan_to_num().any()  # a backend may write the zeros between the layers


@pytest.mark.parametrize("kind", MASKS)
def test_mask_gradients_of_an_arena_are_those_of_its_layers(kind, backend):
    arena = make_arena(kind)
    found = call("arena_mask_grad", backend, arena.grad, arena.weight, arena.mask.detach(), arena._table, arena._layers)
    for name, value in views_of(found, arena.masks).items():
        product = arena.effective_weights[name].grad.double() * arena.weights[name]
        error = (value - product.sum_to_size(value.shape)).abs()
        assert (error <= 1e-6 * product.abs().sum_to_size(value.shape)).all(), name
        value.zero_()
    assert not found.any()  # zeros between the layers


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("kind", ["neuron", "weight", "kernel"])
def test_arenas_of_sixteen_bits(kind, dtype, backend):
    arena = make_arena(kind, dtype)
    table = arena._table, arena._layers
    found, expected = torch.zeros_like(arena.effective), torch.zeros_like(arena.effective)
    for name, effective in ((backend, found), ("reference", expected)):
        call("arena_effective_weight_", name, effective, arena.weight, arena.mask.detach(), None, *table)
    assert torch.equal(found, expected)
    found, expected = (
        call("arena_mask_grad", name, arena.grad, arena.weight, arena.mask.detach(), *table)
        for name in (backend, "reference")
    )
    assert found.dtype == F32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("weights", [{"none": (0, 3)}, {"none": (0, 3), "some": (2, 3), "nothing": (4, 0)}], ids=str)
@pytest.mark.parametrize("kind", ["weight", "neuron", "column"])
def test_layers_without_entries_are_passed_over(weights, kind, backend):
    arena = make_arena(kind, weights=weights)
    table = arena._table, arena._layers
    call("arena_effective_weight_", backend, arena.effective, arena.weight, arena.mask.detach(), None, *table)
    found = call("arena_mask_grad", backend, arena.grad, arena.weight, arena.mask.detach(), *table)
    if "some" in weights:
        assert torch.equal(arena.effective_weights["some"], arena.weights["some"] * arena.masks["some"])
        assert found.any()
    else:
        assert not found.any()


@pytest.mark.parametrize("kind", ["weight", "neuron"])
@pytest.mark.parametrize("optimizer", [MaskAdam, partial(MaskSGD, momentum=0.9)], ids=["adam", "sgd"])
def test_a_run_over_an_arena_is_the_reference_s(kind, optimizer, backend, monkeypatch):
    ends = []
    for name in (backend, "reference"):
        monkeypatch.setenv("MASKOPS_BACKEND", name)
        torch.manual_seed(3)
        arena = make_arena(kind)
        step = optimizer(arena, lr=0.05, l1=0.1, lower=arena.per_mask(dict.fromkeys(WEIGHTS, 0.25)))
        arena.draw_noise(0.3, torch.Generator(DEVICE).manual_seed(0))
        for _ in range(2):
            arena.perturb()
            arena.grad.copy_(arena.effective.detach().cos())
            arena.ascend_noise(0.1, 0.35)
            arena.perturb()
            arena.grad.copy_(arena.effective.detach().sin())
            step.step()
        ends.append((arena.mask.detach(), arena.effective.detach(), arena.noise))
    for found, expected in zip(*ends, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
