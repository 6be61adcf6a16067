"""Masks of sixteen bits, rounded by chance in the mask step."""

import pytest
import torch
from helpers import DEVICE, rand
from test_mask_adam8bit import blocks_of
from test_mask_step import call

from maskops.arena import MaskArena
from maskops.backends.reference.mask_step import chances
from maskops.optim import MaskAdam

BF16 = torch.bfloat16
OPS = {"mask_adam_step_": 32, "mask_adam8bit_step_": 8}


def moments(entries, bits):
    if bits == 32:
        return [torch.zeros(entries, device=DEVICE) for _ in range(2)]
    sizes = (entries, torch.uint8), (blocks_of(entries), torch.float32)
    return [torch.zeros(size, dtype=dtype, device=DEVICE) for size, dtype in sizes * 2]


def stepped(op, backend, mask, grad, lr, start, step=4.0, where="cpu", upper=1.0):
    """The mask after a step of sign descent, which every backend computes alike to the last bit."""
    after, effective = mask.clone(), torch.empty(len(mask), device=DEVICE)
    count, rate = torch.tensor(step, device=where), torch.tensor(lr, dtype=torch.float64, device=where)
    lower = torch.tensor(0.0, dtype=torch.float64)
    options = 0.0, 0.0, 0.0, 0.0, 0.0, lower, upper, None, start  # betas, eps, l1, toward
    state = moments(len(mask), OPS[op])
    call(op, backend, after, grad, torch.full_like(grad, 2.0), effective, *state, count, rate, *options)
    assert torch.equal(effective, 2 * after.float())
    return after


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 300, 140_000])
def test_backends_round_alike(op, size, dtype, backend):
    mask, grad = rand(size).abs().clamp(max=1).to(BF16).to(dtype), rand(size).sign()
    for start, where in ((0, "cpu"), (48, DEVICE)):
        how = {"lr": 0.0123, "start": start, "where": where}
        after = stepped(op, backend, mask, grad, **how)
        assert torch.equal(after, stepped(op, "reference", mask, grad, **how))
        assert torch.equal(after, after.to(BF16).to(dtype))


@pytest.mark.parametrize("op", OPS)
def test_masks_move_on_average_as_they_would_unrounded(op, backend):
    mask, grad = torch.full((20_000,), 0.75, dtype=BF16, device=DEVICE), torch.ones(20_000, device=DEVICE)
    exact = 0.75 - 1e-4  # of the 2**-8 between two such numbers a fortieth
    nearest, by_chance = (stepped(op, backend, mask, grad, 1e-4, start) for start in (None, 0))
    assert (nearest == 0.75).all()
    assert set(by_chance.unique().tolist()) == {0.75, 0.75 - 2**-8}
    moved = (by_chance != 0.75).double().mean().item()
    share = (0.75 - exact) * 2**8
    assert abs(moved - share) < 5 * (share * (1 - share) / 20_000) ** 0.5


def test_a_mask_stays_within_its_bounds_and_nan_stays(backend):
    mask = torch.tensor([0.0, 1.0, 0.5, torch.nan, 1.0], dtype=BF16, device=DEVICE)
    grad = torch.tensor([1.0, -1.0, torch.nan, 1.0, -torch.inf], device=DEVICE)
    after = stepped("mask_adam_step_", backend, mask[:2], grad[:2], 0.1, 0)
    assert after.tolist() == [0.0, 1.0]
    found = mask.clone()
    lr, lower = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)
    options = torch.tensor(1.0), lr, 0.9, 0.999, 1e-8, 0.0, 0.0, lower, 1.0, None, 0
    call("mask_adam_step_", backend, found, grad, None, None, *moments(5, 32), *options)
    assert found[:2].tolist() == [0.0, 1.0] and found[2:4].isnan().all()


def test_chances_are_even_and_differ_by_entry_and_step():
    one, other = (chances(200_000, torch.tensor(count), 0) for count in (1.0, 2.0))
    assert one.min() >= 0 and one.max() < 2**16
    for drawn in (one, other, (one - other) % 2**16):
        assert abs(drawn.double().mean() / 2**16 - 0.5) < 5 * (1 / 12 / 200_000) ** 0.5
    pairs = torch.stack([one, other, one.roll(1)]).double()
    assert (torch.corrcoef(pairs) - torch.eye(3)).abs().max() < 0.012
    torch.testing.assert_close(chances(100, torch.tensor(7.0), 50), chances(150, torch.tensor(7.0), 0)[50:])


@pytest.mark.parametrize("state_bits", [8, 32])
def test_a_step_layer_by_layer_rounds_as_a_step_of_all(state_bits):
    shapes = {"a": (300, 7), "b": (5, 4, 3, 3)}
    weights = {name: torch.rand(shape) for name, shape in shapes.items()}
    masks = {name: torch.rand(shape).to(BF16) for name, shape in shapes.items()}
    whole, by_layer = (MaskArena(weights, masks) for _ in range(2))
    assert whole.mask.dtype == BF16
    one, other = (MaskAdam(arena, 0.01, state_bits=state_bits) for arena in (whole, by_layer))
    for _ in range(2):
        for name, weight in whole.effective_weights.items():
            grad = torch.randn_like(weight)
            weight.grad.copy_(grad)
            other.step_layer(name, grad)
        one.step()
    if state_bits == 32:  # blocks of eight bits begin anew with a layer
        assert torch.equal(whole.mask, by_layer.mask)
    for name, mask in by_layer.masks.items():
        assert mask.dtype == BF16 and (mask - whole.masks[name]).abs().max() < 0.03
