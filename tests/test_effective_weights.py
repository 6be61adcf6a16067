"""The effective weights of many layers at once."""

from functools import partial

import pytest
import torch
from helpers import DEVICE, DTYPES, check, plain_weight, poisoned, rand

from maskops import _dispatch
from maskops._flat import views_of
from maskops.arena import MaskArena
from maskops.functional import effective_weight, effective_weights

SHAPES = [(6, 4, 3, 3), (5, 7), (4, 1, 3, 3), (3,), (2, 3, 1, 1)]
GRANULARITIES = {
    "weight": SHAPES,
    "neuron": [(shape[0], *(1,) * (len(shape) - 1)) for shape in SHAPES],
    "kernel": [(*shape[:2], *(1,) * (len(shape) - 2)) for shape in SHAPES],
    "number": [()] * len(SHAPES),
}


def call(weights, scales, backend=None, noised=False, dtype=None, **factors):
    """The effective weights as one flat list, for masks and noises given by name."""
    masks = [factors[f"mask{i}"] for i in range(len(weights))]
    noises = [factors[f"noise{i}"] for i in range(len(weights))] if noised else None
    found = effective_weights(weights, masks, noises, scales, dtype=dtype, backend=backend)
    return tuple(found[0] + found[1]) if noised else tuple(found)


def plain(weights, scales, noised=False, dtype=None, **factors):
    wide = factors["mask0"].dtype
    outputs = []
    for kind in ("mask", "noise") if noised else ("mask",):
        for i, weight in enumerate(weights):
            factor = factors[f"mask{i}"] + (factors[f"noise{i}"] if kind == "noise" else 0)
            weight = weight.double() if wide == torch.float64 else weight
            product = weight * factor
            if scales is not None:
                product = product * scales[i].view(-1, *(1,) * (weight.dim() - 1))
            outputs.append(product.to(wide if wide == torch.float64 else dtype or weights[0].dtype))
    return tuple(outputs)


def layers(dtype=torch.float32):
    weights = [rand(*shape, dtype=dtype) for shape in SHAPES]
    weights[0] = weights[0].contiguous(memory_format=torch.channels_last)
    weights[1] = weights[1].t().contiguous().t()
    return weights, [rand(shape[0]) for shape in SHAPES]


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("noise", [None, "weight", "neuron"])
@pytest.mark.parametrize("scaled", [False, True], ids=["", "scaled"])
def test_all_layers_and_their_gradients_are_right(granularity, noise, scaled, dtype, backend):
    weights, scales = layers(dtype)
    factors = {f"mask{i}": rand(*shape) for i, shape in enumerate(GRANULARITIES[granularity])}
    if noise:
        factors |= {f"noise{i}": rand(*shape) for i, shape in enumerate(GRANULARITIES[noise])}
    fixed = {"weights": weights, "scales": scales if scaled else None, "noised": noise is not None}
    check(partial(call, **fixed), partial(plain, **fixed), factors, backend)


def test_many_more_layers_than_a_launch_takes(backend):
    weights = [rand(1 + i % 5, 3) for i in range(150)]
    factors = {f"mask{i}": rand(len(weight), 1) for i, weight in enumerate(weights)}
    fixed = {"weights": weights, "scales": None}
    check(partial(call, **fixed), partial(plain, **fixed), factors, backend, exact=True)


@pytest.fixture
def quick_backend(backend):
    """Not Triton's interpreter, which takes minutes over so many weights."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("too many weights for Triton's interpreter")
    return backend


@pytest.mark.parametrize("rows", [1, 3], ids=["number", "rows"])
@pytest.mark.parametrize("other", [None, "noised", "scaled"])
def test_sums_of_very_many_terms(rows, other, quick_backend):
    """Some are divided among blocks, others not; some lie so that many are loaded at once, others don't."""
    weights = [rand(3, size) for size in (40_000, 40_003, 3_000, 2_501, 300)]
    weights.append(rand(35_000, 3).t())
    factors = {f"mask{i}": rand(rows, 1) for i in range(len(weights))}
    if other == "noised":
        factors |= {f"noise{i}": rand(*weight.shape) for i, weight in enumerate(weights)}
    scales = [rand(3) for _ in weights] if other == "scaled" else None
    fixed = {"weights": weights, "scales": scales, "noised": other == "noised"}
    check(partial(call, **fixed), partial(plain, **fixed), factors, quick_backend)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 40_003)], ids=str)
@pytest.mark.parametrize("size", [1_003, 40_000, 40_003])
def test_a_mask_of_one_layer_of_very_many_weights(shape, size, quick_backend):
    mask = rand(shape[0], min(shape[1], size))
    for weight in (rand(3, size), rand(size, 3).t()):
        check(partial(effective_weight, weight), partial(plain_weight, weight), {"mask": mask}, quick_backend)


def test_entries_that_do_not_fill_the_last_eight(quick_backend):
    weights = [rand(*shape) for shape in ((2_048,), (2_047,), (2_049,), (4_099,), (5,), (1_025, 3))]
    factors = {f"{name}{i}": rand(*weight.shape) for i, weight in enumerate(weights) for name in ("mask", "noise")}
    fixed = {"weights": weights, "scales": None, "noised": True}
    check(partial(call, **fixed), partial(plain, **fixed), factors, quick_backend, exact=True)


ARENA = {
    "one mask": ((3, 40_003), (1, 1)),
    "a mask for each row": ((3, 40_000), (3, 1)),
    "uneven rows": ((3, 35_001), (3, 1)),
    "a mask for each column": ((20, 1_000), (1_000,)),
    "uneven columns": ((20, 995), (995,)),
    "kernels": ((16, 24, 3, 3), (16, 24, 1, 1)),
    "positions": ((4, 6, 3, 3), (3, 3)),
    "weights": ((45,), (45,)),
}


def moved(tensor, by):
    """The same numbers that many entries further on than where memory is aligned."""
    return torch.cat((tensor.detach().new_zeros(by), tensor.detach()))[by:]


@pytest.mark.parametrize("by", [(0, 0, 0), (1, 0, 0), (8, 1, 0), (0, 8, 1), (1, 1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_buffers_of_arenas_may_lie_anywhere(dtype, by, quick_backend):
    arena = MaskArena(
        {name: rand(*shape) for name, (shape, _) in ARENA.items()},
        {name: rand(*shape) for name, (_, shape) in ARENA.items()},
        dtype,
    )
    noise, weight = moved(rand(*arena.mask.shape), by[2]), moved(arena.weight, by[0])
    mask, effective = moved(arena.mask, by[1]), moved(torch.full_like(arena.effective, torch.nan), by[0])
    grad, table = moved(rand(*arena.grad.shape, dtype=dtype), by[0]), (arena._table, arena._layers)
    reason = _dispatch.why_not(quick_backend, "arena_mask_grad", grad, weight, mask, table[0])
    if reason:
        pytest.skip(reason)
    ops = torch.ops.maskops
    for added in (None, noise):
        ops.arena_effective_weight_(effective, weight, mask, added, *table, backend=quick_backend)
        for name, found in views_of(effective, arena.weights).items():
            factor = views_of(mask if added is None else mask + added, arena.masks)[name]
            assert torch.equal(found, (arena.weights[name].detach() * factor).to(dtype)), name
    with poisoned():
        grads = ops.arena_mask_grad(grad, weight, mask, *table, backend=quick_backend)
    for name, found in views_of(grads, arena.masks).items():
        product = views_of(grad, arena.weights)[name].double() * arena.weights[name].detach()
        error = (found - product.sum_to_size(found.shape)).abs()
        assert (error <= 1e-6 * product.abs().sum_to_size(found.shape)).all(), name


def test_gradients_in_float64():
    weights, scales = [rand(3, 2, 2, dtype=torch.float64)], [rand(3, dtype=torch.float64)]
    mask, noise = rand(3, 1, 1, dtype=torch.float64, grad=True), rand(3, 2, 2, dtype=torch.float64, grad=True)

    def function(mask, noise):
        clean, perturbed = effective_weights(weights, [mask], [noise], scales)
        return *clean, *perturbed

    assert torch.autograd.gradcheck(function, (mask, noise))
    assert torch.autograd.gradgradcheck(function, (mask, noise))


def test_masks_of_bytes_and_layers_of_nothing(backend):
    weights = [rand(2, 3), rand(0, 3), rand(2, 0)]
    masks = [torch.full((2, 3), 51, dtype=torch.uint8, device=DEVICE), rand(0, 1), rand(2, 1)]
    try:
        found = effective_weights(weights, masks, backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(found[0], weights[0] * 0.2)
    assert [output.shape for output in found[1:]] == [(0, 3), (2, 0)]
    masks[2].requires_grad_()
    (grad,) = torch.autograd.grad(effective_weights(weights, masks, backend=backend)[2].sum(), masks[2])
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_masks_of_bytes_have_no_gradient_but_their_noise_has(granularity, backend):
    weights, noise = [rand(8, 64)], rand(8, 64, grad=True)
    mask = torch.randint(256, (8, 64) if granularity == "weight" else (8, 1), dtype=torch.uint8, device=DEVICE)
    try:
        _, (perturbed,) = effective_weights(weights, [mask], [noise], backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))
    torch.testing.assert_close(perturbed, weights[0] * (mask / 255 + noise))
    torch.testing.assert_close(torch.autograd.grad(perturbed.sum(), noise)[0], weights[0])
    call = torch.ops.maskops.effective_weights_backward
    found = call([torch.ones_like(weights[0])] * 2, weights, [mask], [noise.detach()], [], backend=backend)
    assert found[0].dtype == torch.uint8 and found[0].shape == mask.shape
    torch.testing.assert_close(found[1], weights[0])


def test_results_in_float64(backend):
    weights, masks = [rand(3, 4), rand(2)], [rand(3, 1), rand(2)]
    try:
        found = effective_weights(weights, masks, dtype=torch.float64, backend=backend)
    except RuntimeError as error:
        pytest.skip(str(error))
    for output, weight, mask in zip(found, weights, masks, strict=True):
        assert torch.equal(output, (weight * mask).double())


def test_no_layers_are_none():
    assert effective_weights([], []) == []


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (([rand(2)], []), "expected one of masks for each of 1 weights; got 0"),
        (
            ([rand(2)], [rand(2)], [rand(2)] * 2),
            "expected one of noises for each of 1 weights; got 2",
        ),
        (([rand(2)], [rand(2)], None, [rand(3)]), "expected a scale (2,); got (3,)"),
        (([rand(2)], [rand(3)]), "mask must broadcast to weight (2,); got mask (3,)"),
    ],
)
def test_wrong_lists_are_refused_in_one_line(lists, message):
    with pytest.raises(ValueError) as error:
        effective_weights(*lists)
    assert str(error.value) == f"effective_weights: {message}"
