"""The ops behind mask optimisers: steps and noise."""

import math
from functools import partial

import pytest
import torch
from helpers import DEVICE, largest, poisoned, rand

from maskops import _dispatch

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = {  # of mask and states, gradient, weight, effective weight
    "float32": (F32, F32, F32, F32),
    "bfloat16 weights": (F32, BF16, BF16, BF16),
    "float16 gradients": (F32, F16, F32, F16),
    "float16": (F16, F16, F16, F16),
    "bfloat16": (BF16, BF16, BF16, BF16),
}
ADAM = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


def call(op, backend, *arguments):
    """The op on a backend; the test is skipped where that one can't serve it."""
    reason = _dispatch.why_not(backend, op, *(a for a in arguments if isinstance(a, torch.Tensor)))
    if reason:
        pytest.skip(reason)
    with poisoned():
        return getattr(torch.ops.maskops, op)(*arguments, backend=backend)


def number(value, dtype=torch.float64):
    return torch.tensor(value, dtype=dtype)


def tensors(shape, dtypes=(F32,) * 4):
    """What a step works on, by name."""
    mask, grad, weight, effective = dtypes
    return {
        "mask": rand(*shape, dtype=mask).abs(),
        "grad": rand(*shape, dtype=grad),
        "weight": rand(*shape, dtype=weight),
        "effective": rand(*shape, dtype=effective),
        "first": rand(*shape, dtype=mask),
        "second": rand(*shape, dtype=mask).abs(),
    }


def stepped(kind, backend, given, lower=0.25, toward=1.0, l1=0.1, upper=1.0, totals=None, lr=0.05, step=2.0):
    """The tensors after a step; those given stay as they are."""
    after = {
        name: tensor if tensor is None else tensor.clone(memory_format=torch.preserve_format)
        for name, tensor in given.items()
    }
    lr, step, lower = (
        value if isinstance(value, torch.Tensor) else number(value, dtype)
        for value, dtype in ((lr, torch.float64), (step, F32), (lower, torch.float64))
    )
    main = [after[name] for name in ("mask", "grad", "weight", "effective", "first")]
    end = (l1, toward, lower, upper, totals)
    if kind == "adam":
        call("mask_adam_step_", backend, *main, after["second"], step, lr, *ADAM.values(), *end)
    else:
        call("mask_sgd_step_", backend, *main, lr, 0.9 if after["first"] is not None else 0.0, *end)
    return after


def assert_as_near_as_the_reference(found, given, step):
    """No further from float64 than twice the reference in the same dtypes, plus a few units in the last place."""
    plain = step("reference", given)
    truth = step("reference", {name: tensor if tensor is None else tensor.double() for name, tensor in given.items()})
    for name, value in found.items():
        if value is None:
            continue
        assert (value.dtype, value.stride()) == (plain[name].dtype, plain[name].stride()), name
        slack = 4 * torch.finfo(value.dtype).eps * largest(truth[name])
        allowed = 2 * largest(plain[name] - truth[name]) + slack
        assert largest(value - truth[name]) <= allowed, name


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("size", [0, 1, 63, 1023, 5000])
def test_a_step_of_any_size_is_that_of_float64(kind, size, backend):
    given = tensors((size,))
    assert_as_near_as_the_reference(stepped(kind, backend, given), given, partial(stepped, kind))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_a_step_in_every_dtype_is_that_of_float64(kind, dtypes, backend):
    given = tensors((300,), DTYPES[dtypes])
    assert_as_near_as_the_reference(stepped(kind, backend, given), given, partial(stepped, kind))


@pytest.mark.parametrize("kind", ["adam", "sgd", "sgd without momentum"])
@pytest.mark.parametrize("l1", [0.0, 0.1])
@pytest.mark.parametrize("missing", [("weight", "effective"), ("effective",)], ids=str)
def test_a_step_without_weight_or_momentum(kind, l1, missing, backend):
    given = tensors((70,)) | dict.fromkeys(missing)
    if kind == "sgd without momentum":
        given["first"] = None
    step = partial(stepped, kind, l1=l1, toward=0.0)
    assert_as_near_as_the_reference(step(backend, given), given, step)


@pytest.mark.parametrize("beta1", [0.0, 0.3])
def test_adam_averages_fast_too(beta1, backend, monkeypatch):
    monkeypatch.setitem(ADAM, "beta1", beta1)
    given = tensors((70,))
    assert_as_near_as_the_reference(stepped("adam", backend, given), given, partial(stepped, "adam"))


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("layout", ["channels_last", "mixed", "strided"])
def test_a_step_in_any_layout(kind, layout, backend):
    given = tensors((6, 4, 3, 3))
    if layout == "strided":
        given["mask"] = rand(6, 8, 3, 3).abs()[:, ::2]
    for name in given if layout == "channels_last" else ("grad", "first"):
        given[name] = given[name].to(memory_format=torch.channels_last)
    assert_as_near_as_the_reference(stepped(kind, backend, given), given, partial(stepped, kind))
    if layout == "strided":
        mask, inside = given["mask"].clone(), given["mask"]
        call("noise_step_", backend, inside, given["grad"], None, 0.5, math.inf)
        assert torch.equal(inside, mask + 0.5 * given["grad"].sign())


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("shape", [(), (1,), (6, 1, 1), (3,), (6, 4, 3)], ids=str)
def test_the_lower_bound_may_differ_by_entry(kind, shape, backend):
    given, lower = tensors((6, 4, 3)), rand(*shape).abs().clamp(max=1)
    found = stepped(kind, backend, given, lower=lower, lr=2.0)
    assert_as_near_as_the_reference(found, given, partial(stepped, kind, lower=lower, lr=2.0))
    at_bound = found["mask"] == lower
    assert at_bound.any() and not at_bound.all() and (found["mask"] >= lower).all()


def test_whole_numbers_as_bounds_by_entry(backend):
    given, lower = tensors((40,)), torch.arange(40, device=DEVICE) % 2
    reason = _dispatch.why_not(backend, "mask_sgd_step_", given["mask"], lower)
    if backend == "cuda":
        assert reason == "its mask steps take floating dtypes, not torch.int64"
    else:
        expected = stepped("sgd", "reference", given, lower=lower.float())["mask"]
        torch.testing.assert_close(stepped("sgd", backend, given, lower=lower)["mask"], expected)


@pytest.mark.parametrize("kind", ["adam", "sgd"])
@pytest.mark.parametrize("size", [0, 1, 5000])
@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
def test_totals_are_the_l1_norm_and_the_entries_at_the_bounds(kind, size, dtype, backend):
    given, lower = tensors((size,), (dtype,) * 4), rand(size, dtype=dtype).abs().clamp(0.1, 0.7)
    totals = [torch.full((3,), math.nan, device=DEVICE) for _ in range(2)]
    for each in totals:
        mask = stepped(kind, backend, given, lower=lower, lr=0.5, totals=each)["mask"]
    expected = [(mask.double() - 1).abs().sum(), (mask == lower).sum(), (mask == 1).sum()]
    torch.testing.assert_close(totals[0], torch.tensor(expected, dtype=F32, device=DEVICE), rtol=1e-6, atol=1e-6)
    assert torch.equal(*totals)
    assert size < 5000 or min(expected) > 100


def test_totals_of_the_reference_may_be_in_float64():
    given, totals = tensors((500,)), torch.empty(3, dtype=torch.float64, device=DEVICE)
    mask = stepped("sgd", "reference", given, totals=totals)["mask"]
    assert totals[0] == (mask.double() - 1).abs().sum()


@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_nan_stays_and_infinity_is_clipped(kind, backend):
    given = tensors((4,))
    given["mask"][0] = math.nan
    given["grad"][1] = math.nan
    given["mask"][2] = math.inf
    mask = stepped(kind, backend, given)["mask"]
    assert mask.isnan().tolist() == [True, True, False, False]
    assert mask[2] == 1
    given["grad"][:2] = math.nan
    noise = given["mask"].clone()
    call("noise_step_", backend, noise, given["grad"], None, 0.5, 1.0)
    assert noise.isnan().tolist() == [True, False, False, False]


@pytest.fixture
def stored(backend, monkeypatch):
    """The backend, for which 0-d tensors are on its device: on the CPU its kernels shall read them too."""
    if backend == "triton" and DEVICE == "cpu":
        from maskops.backends.triton import mask_step

        monkeypatch.setattr(mask_step, "_on_host", lambda number: False)
    monkeypatch.setenv("CUDA_EMULATOR_DEVICE_MEMORY", "all")
    return backend


@pytest.mark.parametrize("beta1", [0.9, 0.0])
def test_steps_with_every_number_on_the_device(stored, beta1, monkeypatch):
    monkeypatch.setitem(ADAM, "beta1", beta1)
    given = tensors((100,)) | {"first": torch.zeros(100, device=DEVICE), "second": torch.zeros(100, device=DEVICE)}
    lr, step, lower = (torch.tensor(value, device=DEVICE) for value in (0.05, 0.0, 0.25))
    after, expected = given, given
    for count in range(3):
        after = stepped("adam", stored, after, lr=lr, step=step, lower=lower)
        expected = stepped("adam", "reference", expected, step=float(count))
        assert step.item() == count + 1
    for name, value in after.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    found = stepped("sgd", stored, given, lr=lr, lower=lower)
    torch.testing.assert_close(found["mask"], stepped("sgd", "reference", given)["mask"])


NUMBERS = (torch.float64, F32, F16, BF16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


@pytest.mark.parametrize("where", ["device", "host"])
@pytest.mark.parametrize("dtype", NUMBERS, ids=str)
def test_numbers_of_any_dtype(dtype, where, backend, monkeypatch):
    device = DEVICE if where == "device" else "cpu"
    lr, lower = (torch.tensor(value, device=device).to(dtype) for value in (1.0, 0.0))
    step = torch.tensor(2, device=device).to(dtype if dtype != torch.bool else F32)
    if where == "device":
        monkeypatch.setenv("CUDA_EMULATOR_DEVICE_MEMORY", "all")
    given = tensors((100,))
    found = stepped("adam", backend, given, lr=lr, step=step, lower=lower)
    assert step == 3
    torch.testing.assert_close(found["mask"], stepped("adam", "reference", given, lr=1.0, lower=0.0)["mask"])
    found = stepped("sgd", backend, given, lr=lr, lower=lower)
    torch.testing.assert_close(found["mask"], stepped("sgd", "reference", given, lr=1.0, lower=0.0)["mask"])


@pytest.mark.parametrize("where", ["step", "lr"])
def test_one_number_on_the_device_and_one_on_the_host(where, backend, monkeypatch):
    given = tensors((100,))
    numbers = {"step": number(2.0, F32), "lr": number(0.05)}
    if backend == "triton" and DEVICE == "cpu":
        from maskops.backends.triton import mask_step

        monkeypatch.setattr(mask_step, "_on_host", lambda tensor: tensor is not numbers[where])
    else:
        numbers[where] = numbers[where].to(DEVICE)
        monkeypatch.setenv("CUDA_EMULATOR_DEVICE_MEMORY", str(numbers[where].data_ptr()))
    found = stepped("adam", backend, given, **numbers)
    assert numbers["step"] == 3
    torch.testing.assert_close(found["mask"], stepped("adam", "reference", given)["mask"])


@pytest.mark.parametrize("size", [0, 1, 63, 1023, 5000])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("bound", [0.5, math.inf])
def test_the_noise_climbs_by_its_gradient_s_sign(size, weighted, bound, backend):
    noise, grad, weight = rand(size).clamp(-0.5, 0.5), rand(size), rand(size) if weighted else None
    grad[::7] = 0
    product = grad * weight if weighted else grad
    expected = (noise + 0.4 * product.sign()).clamp(-bound, bound)
    call("noise_step_", backend, noise, grad, weight, 0.4, bound)
    torch.testing.assert_close(noise, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtypes", [(F32, F16, F16), (F32, F16, F32), (F32, BF16, BF16)], ids=str)
def test_the_noise_s_gradient_is_multiplied_in_its_precision(dtypes, backend):
    noise, grad, weight = (
        torch.full((40,), value, device=DEVICE).to(dtype)
        for value, dtype in zip((0.0, 1e-5, -1e-4), dtypes, strict=True)
    )
    call("noise_step_", backend, noise, grad, weight, 0.25, math.inf)
    assert torch.equal(noise, torch.full_like(noise, -0.25))


def test_a_triton_step_is_one_launch(monkeypatch):
    pytest.importorskip("triton")
    from maskops.backends.triton import arena as kernels
    from maskops.backends.triton import mask_step

    launches = []
    for module in (mask_step, kernels):
        monkeypatch.setattr(module, "run", lambda kernel, grid, *arguments, **options: launches.append(kernel.__name__))

    def launched(op, *arguments):
        launches.clear()
        op(*arguments)
        return list(launches)

    one, rows = torch.empty(3000, device="meta"), [torch.empty(3000, device="meta") for _ in range(5)]
    host, device, totals = number(0.0), torch.empty((), device="meta"), torch.empty(3, device="meta")
    adam = partial(launched, mask_step.mask_adam_step_, one, *rows)
    end = (*ADAM.values(), 0.1, 0.0, host, 1.0)
    assert adam(host.clone(), host, *end) == ["_adam"]
    assert adam(host.clone(), host, *end, totals) == ["_adam", "_sum_partials"]
    assert adam(device, device, *end) == ["_count_and_scale", "_adam"]
    assert launched(mask_step.mask_sgd_step_, one, *rows[:4], device, 0.9, 0.1, 0.0, host, 1.0) == ["_sgd"]
    assert launched(mask_step.noise_step_, one, *rows[:2], 0.1, 1.0) == ["_noise"]
    table = torch.empty(7, 8, dtype=torch.int64, device="meta")
    assert launched(kernels.arena_effective_weight_, one, *rows[:3], table, []) == ["_arena_effective_weight"]
    assert launched(kernels.arena_mask_grad, one, *rows[:2], table, []) == ["_arena_mask_grad"]
