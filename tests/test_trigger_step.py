"""The step on a trigger: up its gradient, into the L1 ball, into the bounds."""

import math
import sys
from functools import partial

import pytest
import torch
from helpers import DEVICE, DTYPES, largest, poisoned, rand, saved_for_backward

from maskops import _dispatch
from maskops.functional import prepare_images, rescale_to_l1_ball, trigger_step_

BALL = {"projection": "rescale", "radius": 20.0}
BOUNDS = {"low": -0.25, "high": 0.5}
OPTIONS = {"step": {}, "rescale": BALL, "clamp": BOUNDS, "rescale and clamp": BALL | BOUNDS}
LAYOUTS = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "cut out": lambda t: torch.cat([t] * 2, 3)[..., : t.shape[3]],
}


def plain(trigger, grad, step_size, projection="none", radius=math.inf, low=None, high=None):
    """As anyone would write it."""
    stepped = trigger + step_size * grad.sum(0)
    if projection == "rescale":
        stepped = stepped * (radius / stepped.abs().sum()).clamp(max=1)
    return stepped if low is None and high is None else stepped.clamp(low, high)


def check_step(trigger, grad, step_size, backend, **options):
    """By the rule of ``helpers.check``: at most twice the error of plain torch, and a few units in the last place."""
    expected = plain(trigger, grad, step_size, **options)
    truth = plain(trigger.double(), grad.double(), step_size, **options)
    stepped = torch.empty_strided(trigger.shape, trigger.stride(), dtype=trigger.dtype, device=DEVICE).copy_(trigger)
    before = grad.clone()
    try:
        with poisoned():
            returned = trigger_step_(stepped, grad, step_size, **options, backend=backend)
    except RuntimeError as error:
        if "was asked for, but" not in str(error):
            raise
        pytest.skip(str(error))
    assert returned is stepped
    assert stepped.stride() == trigger.stride()
    assert torch.equal(grad, before)
    slack = 4 * torch.finfo(trigger.dtype).eps * largest(truth)
    error, allowed = largest(stepped - truth), 2 * largest(expected.to(trigger.dtype) - truth) + slack
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_trigger_step_is_the_formula(dtype, batch, layout, options, backend):
    trigger, grad = rand(1, 3, 5, 7, dtype=dtype), rand(batch, 3, 5, 7, dtype=dtype)
    check_step(LAYOUTS[layout](trigger), grad, 0.3, backend, **OPTIONS[options])
    check_step(trigger, LAYOUTS[layout](grad), -0.3, backend, **OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 5), (3, 9, 11), (2, 0, 3)], ids=str)
@pytest.mark.parametrize("batch", [0, 1, 9, 40])
def test_trigger_step_takes_any_size_and_number_of_gradients(batch, size, options, backend):
    check_step(rand(*size), rand(batch, *size), 0.1, backend, **OPTIONS[options])


@pytest.mark.parametrize("options", OPTIONS)
def test_trigger_step_of_a_trigger_for_several_programs(options, backend):
    trigger = rand(1, 3, 75, 75).to(memory_format=torch.channels_last)
    check_step(trigger, rand(1, 3, 75, 75), 0.1, backend, **OPTIONS[options])


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_trigger_step_mixes_dtypes(dtype, grad_dtype, backend):
    trigger, grad = rand(1, 3, 4, 4, dtype=dtype), rand(5, 3, 4, 4, dtype=grad_dtype)
    check_step(trigger, grad, 0.1, backend, **BALL)


@pytest.mark.parametrize("batch", [1, 20])
def test_trigger_step_is_awm_s(batch, backend):
    """Lines 7 and 9 of Algorithm 1 as two functions."""
    trigger, grad = rand(1, 3, 8, 8), rand(batch, 3, 8, 8)
    expected = rescale_to_l1_ball(trigger + 10.0 * grad.sum(0, keepdim=True), 50.0, backend="reference")
    trigger_step_(trigger, grad, 10.0, projection="rescale", radius=50.0, backend=backend)
    torch.testing.assert_close(trigger, expected, rtol=1e-5, atol=1e-6)
    assert trigger.abs().sum(dtype=torch.float64) == pytest.approx(50.0, rel=1e-6)


@pytest.mark.parametrize("batch", [1, 20])
def test_trigger_step_leaves_what_is_inside_the_ball(batch, backend):
    trigger, grad = rand(1, 3, 8, 8), rand(batch, 3, 8, 8)
    free = trigger_step_(trigger.clone(), grad, 1.0, backend=backend)
    norm = free.abs().sum(dtype=torch.float64).item()
    for radius in (norm * (1 + 1e-12), 2 * norm):
        boxed = trigger_step_(trigger.clone(), grad, 1.0, projection="rescale", radius=radius, backend=backend)
        assert torch.equal(boxed, free)


@pytest.mark.parametrize("batch", [1, 20])
def test_trigger_step_of_zeros_and_into_a_ball_of_radius_zero(batch, backend):
    zeros, grad = torch.zeros(1, 2, 3, 3, device=DEVICE), rand(batch, 2, 3, 3)
    for radius in (0.0, 1.0):
        still = trigger_step_(zeros.clone(), 0 * grad, 1.0, projection="rescale", radius=radius, backend=backend)
        assert torch.equal(still, zeros)
    assert torch.equal(trigger_step_(zeros, grad, 1.0, projection="rescale", radius=0.0, backend=backend), 0 * zeros)


@pytest.mark.parametrize("batch", [1, 20])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_trigger_step_with_an_entry_that_is_not_finite(bad, batch, backend):
    trigger, grad = rand(1, 2, 3, 3), rand(batch, 2, 3, 3)
    grad[0, 1, 2, 0] = bad
    alone = trigger_step_(trigger.clone(), grad, 1.0, backend=backend)
    assert (~alone.isfinite()).sum() == 1
    assert trigger_step_(trigger, grad, 1.0, **BALL, **BOUNDS, backend=backend).isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_trigger_step_sums_what_half_precision_cannot_hold(dtype, backend):
    trigger = torch.zeros(1, 1, 8, 512, device=DEVICE, dtype=dtype)
    grad = torch.full((3, 1, 8, 512), 30000.0, device=DEVICE, dtype=dtype)
    trigger_step_(trigger, grad, 1.0, projection="rescale", radius=4096.0, backend=backend)
    assert torch.equal(trigger, torch.ones_like(trigger))


def test_trigger_step_takes_a_leaf_and_autograd_sees_that_it_changed(backend):
    images, trigger = torch.rand(4, 3, 5, 5).to(DEVICE), rand(1, 3, 5, 5, grad=True)
    result = prepare_images(images, None, trigger, low=0, high=1, backend=backend)
    (grad,) = torch.autograd.grad(result.sum(), trigger, retain_graph=True)
    assert trigger_step_(trigger, grad, 1.0, backend=backend) is trigger
    assert trigger.is_leaf
    assert trigger.requires_grad
    assert not saved_for_backward(partial(trigger_step_, trigger, grad, 1.0, backend=backend))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(result.sum(), trigger)


@pytest.mark.parametrize(
    ("size", "batch", "options", "launches"),
    [
        ((3, 32, 32), 1, BALL | BOUNDS, 1),
        ((3, 32, 32), 8, BALL, 1),
        ((3, 4, 4), 9, BOUNDS, 1),
        ((3, 4, 4), 9, BALL, 2),
        ((1, 129, 128), 1, BALL, 2),
        ((1, 129, 128), 1, {}, 1),
    ],
)
def test_trigger_step_takes_one_launch_or_two(size, batch, options, launches, monkeypatch):
    reason = _dispatch.why_not("triton", "trigger_step_", torch.empty(1, device=DEVICE))
    if reason is not None:
        pytest.skip(reason)
    counted = []
    module = sys.modules["maskops.backends.triton.trigger_step"]
    monkeypatch.setattr(module, "run", lambda kernel, *arguments, **options: counted.append(kernel))
    trigger_step_(rand(1, *size), rand(batch, *size), 1.0, **options, backend="triton")
    assert len(counted) == launches


def test_trigger_ascends_with_a_positive_step():
    trigger = trigger_step_(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, -2.0]]]]), 0.5)
    assert trigger.flatten().tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": rand(3, 4, 5)}, ValueError, "grad must have shape (B, C, H, W); got (3, 4, 5)"),
        ({"grad": torch.ones(1, 3, 4, 5).int()}, TypeError, "grad must be a floating dtype; got torch.int32"),
        (
            {"trigger": rand(2, 3, 4, 5)},
            ValueError,
            "trigger must have shape (1, 3, 4, 5) or (3, 4, 5); got (2, 3, 4, 5)",
        ),
        ({"trigger": torch.ones(3, 4, 5).byte()}, TypeError, "trigger must be a floating dtype; got torch.uint8"),
        ({"projection": "l2"}, ValueError, "projection must be one of none, rescale; got 'l2'"),
        ({"projection": "rescale"}, ValueError, "radius must be finite and not negative; got inf"),
        (BALL | {"radius": -1.0}, ValueError, "radius must be finite and not negative; got -1.0"),
        (BALL | {"radius": math.nan}, ValueError, "radius must be finite and not negative; got nan"),
        ({"low": 1.0, "high": 0.0}, ValueError, "low must not be above high; got low 1.0 and high 0.0"),
        (
            {"grad": torch.ones(1, 3, 4, 5, device="meta")},
            ValueError,
            f"grad must be on the trigger's device {torch.empty(0, device=DEVICE).device}; got meta",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_trigger_step_refuses_in_one_line(change, error, message):
    with pytest.raises(error) as raised:
        trigger_step_(**{"trigger": rand(1, 3, 4, 5), "grad": rand(2, 3, 4, 5), "step_size": 1.0} | change)
    assert str(raised.value) == f"trigger_step_: {message}"
