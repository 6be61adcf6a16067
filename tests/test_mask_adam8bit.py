"""Adam's step on masks with moments of eight bits: the numbers that codes stand for, and the step on every backend."""

import math

import pytest
import torch
from helpers import DEVICE, poisoned, rand

from maskops import _dispatch
from maskops.backends.reference.mask_adam8bit import BLOCK, code_values, dequantise, quantise_

BETAS = 0.9, 0.999


def blocks_of(entries):
    return -(-entries // BLOCK)


def state(entries):
    """Codes and scales of both moments, all of zeros."""
    return [
        torch.zeros(size, dtype=dtype, device=DEVICE)
        for size, dtype in ((entries, torch.uint8), (blocks_of(entries), torch.float32)) * 2
    ]


def tensors(entries, dtype=torch.float32):
    """Mask, gradient, weight and effective weight; magnitudes of gradients differ much."""
    mask, grad, weight = rand(entries).abs().clamp(max=1), rand(entries) * (2 * rand(entries)).exp(), rand(entries)
    return [tensor.to(dtype) for tensor in (mask, grad, weight, weight)]


def step(backend, given, moments, *, lr=0.02, betas=BETAS, l1=0.01, lower=0.1, totals=None, count=None):
    """One step in place."""
    arguments = (
        *(*given, *moments, torch.zeros(()) if count is None else count, torch.tensor(lr, dtype=torch.float64), *betas),
        *(1e-8, l1, 1.0, lower if isinstance(lower, torch.Tensor) else torch.tensor(lower), 1.0, totals),
    )
    tensors = (a for a in arguments if isinstance(a, torch.Tensor))
    if reason := _dispatch.why_not(backend, "mask_adam8bit_step_", *tensors):
        pytest.skip(reason)
    with poisoned():
        torch.ops.maskops.mask_adam8bit_step_(*arguments, backend=backend)


def assert_steps_are_the_reference_s(backend, entries, *, place=lambda tensor: tensor, dtype=torch.float32, **options):
    """Codes may be one apart, but for few entries: where rounding in float32 puts a moment across a midpoint."""
    given, gradients = tensors(entries, dtype), [tensors(entries, dtype)[1] for _ in range(3)]
    ends = []
    for name in (backend, "reference"):
        mask, _, weight, effective = (place(tensor.clone()) for tensor in given)
        moments = [place(tensor) if len(tensor) == entries else tensor for tensor in state(entries)]
        totals, count = torch.full((3,), math.nan, device=DEVICE), torch.zeros(())
        for gradient in gradients:
            arguments = mask, place(gradient.clone()), weight, effective
            step(name, arguments, moments, totals=totals, count=count, **options)
        assert count == 3
        ends.append((mask, effective, *moments, totals))
    for found, expected in zip(*ends, strict=True):
        assert found.dtype == expected.dtype
        if found.dtype == torch.uint8:
            apart = (found.int() - expected.int()).abs()
            assert not entries or (apart.max() <= 1 and apart.sum() <= 1 + entries / 1000)
        else:
            exact = torch.finfo(found.dtype).eps
            torch.testing.assert_close(found, expected, rtol=4 * exact, atol=8 * exact)


@pytest.mark.parametrize("entries", [0, 1, 63, 256, 257, 5000])
def test_steps_of_any_size_are_the_reference_s(entries, backend):
    assert_steps_are_the_reference_s(backend, entries)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_steps_in_every_dtype_are_the_reference_s(dtype, backend):
    assert_steps_are_the_reference_s(backend, 700, dtype=dtype)


def unaligned(tensor):
    return torch.cat([tensor[:1], tensor])[1:]


def every_other(tensor):
    return tensor.repeat_interleave(2)[::2]


@pytest.mark.parametrize("place", [unaligned, every_other])
def test_steps_of_tensors_that_lie_otherwise_are_the_reference_s(place, backend):
    assert_steps_are_the_reference_s(backend, 700, place=place)


@pytest.mark.parametrize("place", [lambda tensor: tensor, unaligned], ids=["aligned", "unaligned"])
def test_lower_bounds_may_differ_by_entry(place, backend):
    lower = rand(700).abs().clamp(max=0.9)
    assert_steps_are_the_reference_s(backend, 700, place=place, lower=lower, lr=0.5)


def test_steps_with_the_count_on_the_device(backend, monkeypatch):
    monkeypatch.setenv("CUDA_EMULATOR_DEVICE_MEMORY", "all")
    given, ends = tensors(300), []
    for name, device in ((backend, DEVICE), ("reference", "cpu")):
        copies, moments, count = [tensor.clone() for tensor in given], state(300), torch.zeros((), device=device)
        for _ in range(3):
            step(name, copies, moments, count=count)
        assert count == 3
        ends.append(copies[0])
    torch.testing.assert_close(*ends)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_first_step_is_that_of_float32(weighted, backend):
    given, moments = tensors(600), state(600)
    if not weighted:
        given[2:] = None, None
    plain = [None if tensor is None else tensor.clone() for tensor in given]
    zeros = [torch.zeros(600, device=DEVICE) for _ in range(2)]
    step(backend, given, moments)
    numbers = torch.zeros(()), torch.tensor(0.02), *BETAS, 1e-8, 0.01, 1.0, torch.tensor(0.1), 1.0
    torch.ops.maskops.mask_adam_step_(*plain, *zeros, *numbers, backend="reference")
    torch.testing.assert_close(given[0], plain[0], rtol=1e-6, atol=1e-7)


def halfway(signed):
    """Numbers halfway between two codes' values, each with its neighbours in float32, and the values themselves."""
    values = code_values(signed, DEVICE).double()
    middle = ((values[1:] + values[:-1]) / 2).float()
    around = [middle, *(middle.nextafter(torch.full_like(middle, end)) for end in (-math.inf, math.inf))]
    return torch.cat([*around, values.float(), torch.tensor([-1.0, 1e-12, -0.0], device=DEVICE)])


def in_blocks(values):
    """The values in blocks of which each begins with 1, so that its scale is 1."""
    rows = torch.nn.functional.pad(values, (0, -len(values) % (BLOCK - 1))).view(-1, BLOCK - 1)
    return torch.nn.functional.pad(rows, (1, 0), value=1.0).flatten()


@pytest.mark.parametrize("signed", [True, False])
def test_every_code_begins_and_ends_halfway_to_the_next(signed, backend):
    """With betas of 0 the moments are the gradient and its square."""
    gradient = in_blocks(halfway(signed))
    if not signed:
        gradient = gradient.abs().sqrt()
    moments = state(len(gradient))
    step(backend, [torch.ones_like(gradient), gradient, None, None], moments, betas=(0.0, 0.0), l1=0.0)
    codes, scales = moments[:2] if signed else moments[2:]
    expected = [torch.zeros_like(codes), torch.zeros_like(scales)]
    quantise_(*expected, gradient if signed else gradient * gradient, signed)
    assert torch.equal(codes, expected[0]) and torch.equal(scales, expected[1])
    assert len(codes.unique()) == 256


@pytest.mark.parametrize("signed", [True, False])
def test_codes_are_of_the_nearest_number(signed):
    values, scale = code_values(signed), torch.tensor([2.0, 0.0])
    numbers = torch.cat([torch.randn(255) * torch.randn(255).exp(), torch.zeros(50)])
    numbers = (numbers if signed else numbers.abs()) / numbers.abs().max()
    numbers[0] = 1
    codes = torch.zeros(305, dtype=torch.uint8)
    quantise_(codes, scale, numbers, signed)
    nearest = (numbers.double()[:256, None] - values.double()).abs().argmin(1)
    if not signed:
        nearest = torch.where(numbers[:256] > 0, nearest.clamp(min=1), nearest)
    assert torch.equal(codes[:256].long(), nearest)
    assert scale.tolist() == [1, 0]
    assert torch.equal(dequantise(codes, scale, signed, torch.float64)[:256], values[nearest].double())
    assert not dequantise(codes, scale, signed, torch.float32)[256:].any()


def test_numbers_of_the_codes_are_those_of_the_dynamic_tree():
    """A decade's pieces: 64 of 0.9 / 64 in the uppermost with a sign, 128 without; so many fewer in those below."""
    signed, unsigned = code_values(True), code_values(False)
    assert len(signed) == len(unsigned) == 256
    assert (signed.diff() > 0).all() and (unsigned.diff() > 0).all()
    assert torch.equal(signed[:127], -signed[128:255].flip(0))
    assert signed[127] == unsigned[0] == 0 and signed[255] == unsigned[255] == 1
    for decade in range(7):
        low, high = 10.0 ** (decade - 7), 10.0 ** (decade - 6)
        assert ((signed > low) & (signed < high)).sum() == 2**decade
        assert ((unsigned > low) & (unsigned < high)).sum() == 2 ** (decade + 1)
    torch.testing.assert_close(signed[191:255], 0.1 + 0.9 * (torch.arange(64) + 0.5) / 64)


def test_blocks_without_gradients_stay_as_they_are(backend):
    given, moments = tensors(600), state(600)
    given[1][:256] = 0
    mask = given[0].clone().clamp(min=0.1)
    step(backend, given, moments, l1=0.0)
    assert torch.equal(given[0][:256], mask[:256])
    assert moments[1][0] == moments[3][0] == 0 and moments[1][1] > 0


def test_what_is_not_finite_stays_in_its_block(backend):
    given, moments = tensors(600), state(600)
    given[1][300] = math.nan
    step(backend, given, moments)
    assert given[0].isnan().nonzero().tolist() == [[300]]
    assert moments[1].isnan().tolist() == moments[3].isnan().tolist() == [False, True, False]
    given[1][300] = 0
    step(backend, given, moments)
    assert given[0][256:512].isnan().all() and not given[0][:256].isnan().any() and not given[0][512:].isnan().any()
