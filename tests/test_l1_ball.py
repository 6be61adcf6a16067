import math
from functools import partial

import pytest
import torch
from helpers import DEVICE, DTYPES, check, rand
from hypothesis import given, settings
from hypothesis import strategies as st

from maskops import why_not
from maskops.functional import project_onto_l1_ball, rescale_to_l1_ball

BOTH = pytest.mark.parametrize("into", [rescale_to_l1_ball, project_onto_l1_ball], ids=["rescale", "project"])

sizes = st.integers(1, 40)
radii = st.sampled_from([0.0, 1e-30, 1e-6, 0.1, 1.0, 3.0, 1000.0, 1e30])
scales = st.sampled_from([1e-30, 1e-6, 1.0, 1e6, 1e30])


@st.composite
def points(draw):
    """Float32 vectors of every scale: normal, with ties, with zeros, with one entry that outweighs the others."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(draw(sizes), generator=generator)
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "outlier", "equal"]))
    if kind == "ties":
        x = (2 * x).round()
    if kind == "zeros":
        x[torch.rand(x.shape, generator=generator) < 0.7] = 0
    if kind == "outlier":
        x[0] *= 1e6
    if kind == "equal":
        x = x.sign()
    return x * draw(scales)


def norm(x):
    return x.abs().sum(dtype=torch.float64).item()


def inside(y, radius, x):
    """Whether y, which came from x, is in the ball up to its last place, and that of a threshold as large as x."""
    return norm(y) <= radius * (1 + 1e-6) + y.numel() * (1e-44 + 1e-15 * x.abs().max().item())


@BOTH
@given(x=points(), radius=radii)
@settings(max_examples=150)
def test_l1_ball_result_is_inside_keeps_signs_and_what_was_inside(into, x, radius):
    y = into(x, radius)
    assert inside(y, radius, x)
    assert (y.abs() <= x.abs()).all()
    assert (y * x.sign() >= 0).all()
    if norm(x) <= radius:
        assert torch.equal(y, x)


@BOTH
@given(x=points(), radius=radii)
@settings(max_examples=60)
def test_l1_ball_is_idempotent(into, x, radius):
    once = into(x, radius)
    atol = 1e-44 + 1e-6 * once.abs().max().item() + 1e-15 * x.abs().max().item()
    assert torch.allclose(into(once, radius), once, rtol=0, atol=atol)


@given(x=points(), radius=radii)
@settings(max_examples=100)
def test_rescale_to_l1_ball_keeps_the_direction_and_ends_on_the_sphere(x, radius):
    y = rescale_to_l1_ball(x, radius)
    scale = min(1.0, radius / norm(x)) if norm(x) else 0.0
    assert torch.allclose(y.double(), x.double() * scale, rtol=2e-7, atol=1e-44)


@given(x=points(), radius=radii)
@settings(max_examples=100)
def test_project_onto_l1_ball_is_no_farther_than_the_rescaled_point(x, radius):
    projected, rescaled = project_onto_l1_ball(x, radius), rescale_to_l1_ball(x, radius)
    distances = [(x.double() - y.double()).norm().item() for y in (projected, rescaled)]
    assert distances[0] <= distances[1] * (1 + 1e-6)


def projection_by_bisection(x, radius):
    """The threshold found by halving an interval, instead of by sorting."""
    magnitude = x.double().abs()
    low, high = 0.0, magnitude.max().item()
    for _ in range(200):
        middle = (low + high) / 2
        excess = (magnitude - middle).clamp_min(0).sum() - radius
        low, high = (middle, high) if excess > 0 else (low, middle)
    return x.double().sign() * (magnitude - high).clamp_min(0)


@given(x=points(), radius=radii)
@settings(max_examples=100)
def test_project_onto_l1_ball_finds_the_threshold_that_bisection_finds(x, radius):
    if norm(x) <= radius:
        return
    expected = projection_by_bisection(x, radius)
    atol = 1e-6 * x.abs().max().item()
    assert torch.allclose(project_onto_l1_ball(x.double(), radius), expected, rtol=1e-9, atol=1e-9 * atol)
    assert torch.allclose(project_onto_l1_ball(x, radius).double(), expected, rtol=1e-6, atol=atol)


@given(x=points(), radius=st.sampled_from([0.1, 1.0, 3.0]))
@settings(max_examples=60)
def test_project_onto_l1_ball_satisfies_the_optimality_conditions(x, radius):
    x = x.double()
    if norm(x) <= radius:
        return
    y = project_onto_l1_ball(x, radius)
    scale = x.abs().max()
    assert norm(y) == pytest.approx(radius, rel=1e-6, abs=1e-12 * scale.item())
    removed = x.abs() - y.abs()
    threshold = removed.max()
    support = y != 0
    assert torch.allclose(removed[support], threshold, rtol=1e-9, atol=1e-12 * scale)
    assert (x.abs()[~support] <= threshold).all()


def serves(backend, op, *tensors):
    reason = why_not(backend, op.__name__, *tensors)
    if reason:
        pytest.skip(reason)


def plain_rescale(input, radius, batch_dims=0):
    dims = tuple(range(batch_dims, input.dim()))
    total = input.abs().sum(dims, keepdim=True) if dims else input.abs()
    return input * (radius / total).clamp(max=1)


def plain_project(input, radius, batch_dims=0):
    rows = input.reshape(-1, input[(0,) * batch_dims].numel()) if input.numel() else input
    largest, _ = rows.abs().sort(1, descending=True)
    count = torch.arange(1, rows.shape[1] + 1, device=input.device)
    threshold = ((largest.cumsum(1) - radius) / count).max(1, keepdim=True).values.clamp_min(0)
    return (rows.sign() * (rows.abs() - threshold).clamp_min(0)).reshape(input.shape)


@pytest.mark.parametrize(
    ("into", "plain"), [(rescale_to_l1_ball, plain_rescale), (project_onto_l1_ball, plain_project)]
)
@pytest.mark.parametrize("batch_dims", [0, 1, 2, 4])
@pytest.mark.parametrize("radius", [0.5, 20.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l1_ball_value_and_gradient_are_those_of_plain_torch(into, plain, batch_dims, radius, dtype, backend):
    inputs = {"input": rand(2, 3, 4, 5, dtype=dtype)}
    bound = {"radius": radius, "batch_dims": batch_dims}
    check(partial(into, **bound), partial(plain, **bound), inputs, backend)


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l1_ball_treats_each_batch_entry_alone(into, dtype, backend):
    x = rand(3, 2, 7, dtype=dtype) * torch.tensor([0.01, 1.0, 100.0], device=DEVICE, dtype=dtype).view(3, 1, 1)
    serves(backend, into, x)
    batched = into(x, 1.5, batch_dims=1, backend=backend)
    assert torch.equal(batched, torch.stack([into(one, 1.5, backend=backend) for one in x]))
    assert torch.equal(batched[0], x[0])


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_l1_ball_one_entry_that_is_not_finite_makes_its_ball_nan_and_no_other(into, dtype, bad, backend):
    x = rand(3, 5, dtype=dtype)
    serves(backend, into, x)
    x[1, 2] = bad
    y = into(x, 1.0, batch_dims=1, backend=backend)
    assert y[1].isnan().all()
    assert y[::2].isfinite().all()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_l1_ball_of_radius_zero_is_zero_and_of_zeros_is_zeros(into, dtype, backend):
    x = rand(2, 6, dtype=dtype)
    serves(backend, into, x)
    assert into(x, 0.0, backend=backend).eq(0).all()
    zeros = torch.zeros_like(x)
    for radius in (0.0, 1.0):
        assert torch.equal(into(zeros, radius, backend=backend), zeros)


@BOTH
def test_l1_ball_of_half_precision_has_sums_that_half_precision_cannot_hold(into, backend):
    x = torch.full((4096,), 100.0, dtype=torch.float16, device=DEVICE)
    y = into(x, 4096.0, backend=backend)
    assert torch.equal(y, torch.ones_like(x))
    # the scale itself is a number that float16 can't hold
    y = rescale_to_l1_ball(torch.full((4096,), 60000.0, dtype=torch.float16, device=DEVICE), 1.0, backend=backend)
    assert norm(y) == pytest.approx(1.0, rel=1e-3)


@BOTH
def test_l1_ball_gradient_of_half_precision_does_not_overflow(into, backend):
    x = torch.full((4096,), 100.0, dtype=torch.float16, device=DEVICE, requires_grad=True)
    gradient = torch.linspace(0, 100, 4096, device=DEVICE).half()
    (actual,) = torch.autograd.grad(into(x, 4096.0, backend=backend), x, gradient)
    wide = x.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(into(wide, 4096.0, backend="reference"), wide, gradient.double())
    assert torch.allclose(actual.double(), expected, rtol=1e-3, atol=1e-3)


@BOTH
@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 0), (0, 3)])
@pytest.mark.parametrize("batched", [False, True])
def test_l1_ball_takes_scalars_and_nothing(into, shape, batched, backend):
    x = 3 * torch.ones(shape, device=DEVICE, requires_grad=True)
    y = into(x, 1.0, batch_dims=len(shape) if batched else 0, backend=backend)
    assert y.shape == x.shape
    assert torch.equal(y, torch.ones_like(y))
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape


@BOTH
@pytest.mark.parametrize("radius", [0.0, 1.0])
def test_l1_ball_gradient_at_zero_is_finite_however_it_is_taken(into, radius):
    x = torch.zeros(5, requires_grad=True)
    expected = torch.ones(5) if radius else torch.zeros(5)

    def total(x):
        return into(x, radius).sum()

    gradients = torch.autograd.grad(total(x), x)[0], torch.func.grad(total)(x.detach())
    (created,) = torch.autograd.grad(total(x), x, create_graph=True)
    for gradient in (*gradients, created):
        assert gradient.isfinite().all()
        assert not radius or torch.equal(gradient, expected)


@BOTH
def test_l1_ball_takes_any_layout(into, backend):
    x = rand(2, 3, 4, 5)
    expected = into(x, 2.0, backend=backend)
    for view in (x.to(memory_format=torch.channels_last), x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.allclose(into(view, 2.0, backend=backend), expected, rtol=1e-6)
    expanded = x[:1].expand(4, 3, 4, 5)
    assert torch.allclose(into(expanded, 2.0, backend=backend), into(expanded.clone(), 2.0, backend=backend))


@BOTH
@pytest.mark.parametrize(
    ("kind", "entries"),
    [("normal", 1), ("normal", 300), ("ties", 300), ("outlier", 300), ("powers", 300), ("normal", 17_000)],
)
def test_l1_ball_of_many_rows_is_the_reference_s(into, kind, entries, backend):
    x = rand(3, entries)
    if kind == "ties":
        x = (2 * x).round()
    if kind == "outlier":
        x[:, 0] *= 1e6
    if kind == "powers":
        x = torch.exp2(-torch.arange(entries, device=DEVICE) % 100.0).expand(3, -1).contiguous()
    for radius in (0.0, 0.1, 1e-3 * norm(x[1]), (1 + 1e-12) * norm(x[1])):
        actual = into(x, radius, batch_dims=1, backend=backend)
        expected = into(x, radius, batch_dims=1, backend="reference")
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12 * x.abs().max().item())
        assert actual.signbit().eq(expected.signbit()).all()
        for row, result in zip(x, actual, strict=True):
            assert inside(result, radius, row)
            assert norm(row) > radius or torch.equal(result, row)


@BOTH
def test_l1_ball_reads_rows_of_any_strides(into, backend):
    x = rand(30, 7)
    for view in (x.t(), x[::2, 1:6], x[:, :1].expand(30, 9), x[:1].expand(4, 7)):
        actual = into(view, 1.0, batch_dims=1, backend=backend)
        torch.testing.assert_close(actual, into(view.clone(), 1.0, batch_dims=1, backend="reference"))


@BOTH
@pytest.mark.parametrize(
    ("rows", "entries", "capability"),
    [
        pytest.param(3, 9_001, 9, id="a block each"),
        pytest.param(1, 9_001, 9, id="cluster of two"),
        pytest.param(1, 240_000, 9, id="cluster of eight"),
        pytest.param(1, 470_000, 9, id="more than a cluster keeps"),
        pytest.param(2, 60_000, 8, id="more than a block keeps"),
        pytest.param(2, 120_008, 8, id="grid, row after row"),
    ],
)
def test_l1_ball_of_long_rows_in_cuda(into, rows, entries, capability, monkeypatch):
    """The names are of what the emulator runs, which has two processors of 227 KiB of shared memory each."""
    x = rand(rows, entries)
    serves("cuda", into, x)
    if capability < 9:
        monkeypatch.setenv("CUDA_EMULATOR_SM80", "1")
    actual = into(x, 1e-2 * norm(x[0]), batch_dims=1, backend="cuda")
    expected = into(x, 1e-2 * norm(x[0]), batch_dims=1, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)
    assert torch.equal(into(x, (1 + 1e-12) * norm(x), batch_dims=1, backend="cuda"), x)
    x[0, -1] = math.nan
    assert into(x, 1.0, batch_dims=1, backend="cuda").isnan().all(1).tolist() == [True, *[False] * (rows - 1)]


@BOTH
@pytest.mark.parametrize("capability", [8, 9])
@pytest.mark.parametrize("view", ["half", "columns", "cut out"])
def test_l1_ball_of_long_rows_of_any_layout_in_cuda(into, view, capability, monkeypatch):
    x = (
        rand(2, 70_001).half()
        if view == "half"
        else rand(70_001, 2).t()
        if view == "columns"
        else rand(2, 70_009)[:, 3:-5]
    )
    serves("cuda", into, x)
    if capability < 9:
        monkeypatch.setenv("CUDA_EMULATOR_SM80", "1")
    actual = into(x, 100.0, batch_dims=1, backend="cuda")
    expected = into(x, 100.0, batch_dims=1, backend="reference")
    torch.testing.assert_close(actual, expected, rtol=1e-3 if view == "half" else 1e-6, atol=1e-7)
    assert actual.stride() == expected.stride()
