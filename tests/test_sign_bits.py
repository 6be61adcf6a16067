"""ReLU with a bit per element and max-pooling with a byte per window, against plain torch, bit for bit."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import DEVICE, DTYPES, rand
from hypothesis import given
from hypothesis import strategies as st

from maskops import why_not
from maskops.backends import reference

ops = torch.ops.maskops
SPECIAL = [math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-40, -1e-40, 3.0, -3.0, 6.0, 5.96875, 7.0]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3),
    "with gaps": lambda x: x[:, ::2, 1:],
    "expanded": lambda x: x[:1].expand(4, -1, -1, -1),
}
POOLS = {  # kernel_size, stride, padding, dilation, ceil_mode
    "2x2": ([2, 2], [2, 2], [0, 0], [1, 1], False),
    "3x3": ([3, 3], [2, 2], [1, 1], [1, 1], False),
    "ceil_mode": ([3, 2], [2, 3], [0, 1], [1, 1], True),
    "overlapping": ([4, 3], [1, 1], [2, 1], [1, 1], False),
    "dilation": ([3, 2], [1, 2], [1, 0], [2, 3], False),
    "dilation, ceil_mode": ([2, 3], [3, 2], [1, 1], [3, 2], True),
}


def plain_relu(input, upper):
    return input.relu() if upper == math.inf else F.hardtanh(input, 0, upper)


def gradient(function, input, grad):
    input = input.detach().requires_grad_()
    return torch.autograd.grad(function(input), input, grad)[0]


def same_bits(actual, expected):
    """Equal in dtype and in each bit, but for the payload of a NaN."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    assert torch.equal(actual.nan_to_num(1.0), expected.nan_to_num(1.0))
    assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())


def serves(backend, op, *tensors):
    reason = why_not(backend, op, *tensors)
    if reason:
        pytest.skip(reason)


@pytest.mark.parametrize("upper", [math.inf, 6.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_relu_bits_is_relu(layout, dtype, upper, backend):
    x = LAYOUTS[layout]((rand(4, 6, 5, 7) * 5).to(dtype))
    serves(backend, "relu_bits", x)
    output, bits = ops.relu_bits(x, upper, backend=backend)
    expected = plain_relu(x, upper)
    same_bits(output, expected)
    assert output.stride() == expected.stride()
    assert bits.dtype == torch.uint8 and bits.shape == (-(-x.numel() // 8),)
    grad = torch.empty_like(output).copy_(rand(*output.shape))
    actual = ops.relu_bits_backward(grad, bits, backend=backend)
    same_bits(actual, gradient(lambda x: plain_relu(x, upper), x, grad))
    assert actual.stride() == grad.stride()


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 63, 64, 65, 1023])
def test_relu_bits_of_any_size(count, backend):
    x = rand(count)
    serves(backend, "relu_bits", x)
    output, bits = ops.relu_bits(x, math.inf, backend=backend)
    assert torch.equal(output, x.relu())
    unpacked = bits.unsqueeze(1) >> torch.arange(8, device=DEVICE) & 1
    assert torch.equal(unpacked.view(-1)[:count].bool(), x > 0)
    assert not unpacked.view(-1)[count:].any(), "the last byte is filled up with zeros"
    grad = rand(count)
    assert torch.equal(ops.relu_bits_backward(grad, bits, backend=backend), grad * (x > 0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_relu_bits_of_many_elements(dtype, backend):
    x, grad = rand(40, 503, dtype=dtype), rand(40, 503, dtype=dtype)
    serves(backend, "relu_bits", x)
    output, bits = ops.relu_bits(x, 1.0, backend=backend)
    assert torch.equal(output, x.clamp(0, 1))
    passes = (x > 0) & (x < 1)
    unpacked = bits.unsqueeze(1) >> torch.arange(8, device=DEVICE) & 1
    assert torch.equal(unpacked.view(-1)[: x.numel()].bool(), passes.view(-1))
    assert torch.equal(ops.relu_bits_backward(grad, bits, backend=backend), torch.where(passes, grad, 0))


@pytest.mark.parametrize("begin", [1, 2, 7])
def test_relu_bits_of_memory_that_begins_anywhere(begin, backend):
    x, grad = rand(300)[begin:], rand(301)[begin + 1 :]
    output, bits = ops.relu_bits(x, math.inf, backend=backend)
    assert torch.equal(output, x.relu())
    assert torch.equal(ops.relu_bits_backward(grad, bits, backend=backend), grad * (x > 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upper", [math.inf, 6.0])
def test_relu_bits_at_special_values(upper, dtype, backend):
    x = torch.tensor(SPECIAL, device=DEVICE, dtype=torch.float64).to(dtype)
    serves(backend, "relu_bits", x)
    output, bits = ops.relu_bits(x, upper, backend=backend)
    same_bits(output, plain_relu(x, upper))
    for grad in (torch.ones_like(x), torch.full_like(x, math.nan), torch.full_like(x, -math.inf)):
        actual = ops.relu_bits_backward(grad, bits, backend=backend)
        expected = gradient(lambda x: plain_relu(x, upper), x, grad)
        if upper < math.inf:  # at NaN, torch's hardtanh_backward on the CPU gives 0 in whole vectors, else the gradient
            expected = torch.where(x.isnan(), grad, expected)
        same_bits(actual, expected)


@pytest.mark.parametrize("upper", [math.inf, 6.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_relu_bits_in_place_is_relu_bits(layout, upper, backend):
    x = LAYOUTS[layout](rand(4, 3, 5, 7) * 5)
    serves(backend, "relu_bits_", x)
    output, bits = ops.relu_bits(x, upper, backend=backend)
    assert torch.equal(ops.relu_bits_(x, upper, backend=backend), bits)
    assert torch.equal(x, output)


@given(st.lists(st.sampled_from([-2.0, -0.0, 0.0, 1e-30, 1.0, math.nan]), max_size=40))
def test_relu_bits_backward_is_a_projection(values):
    x = torch.tensor(values, dtype=torch.float32)
    _, bits = reference.relu_bits(x, math.inf)
    once = reference.relu_bits_backward(torch.arange(1.0, len(values) + 1), bits)
    assert torch.equal(reference.relu_bits_backward(once, bits), once)
    assert torch.equal(once != 0, ~(x <= 0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool_winners_is_max_pool(pool, layout, dtype, backend):
    arguments, ceil_mode = POOLS[pool][:-1], POOLS[pool][-1]
    x = LAYOUTS[layout](rand(4, 4, 9, 10).to(dtype))
    serves(backend, "max_pool_winners", x)
    output, winners = ops.max_pool_winners(x, *arguments, ceil_mode, backend=backend)
    expected = F.max_pool2d(x, *arguments, ceil_mode)
    assert torch.equal(output, expected) and output.stride() == expected.stride()
    assert winners.dtype == torch.uint8 and winners.shape == output.shape and winners.stride() == output.stride()
    grad = torch.randn_like(output)
    actual = ops.max_pool_winners_backward(grad, winners, x.shape, *arguments, backend=backend)
    expected = gradient(lambda x: F.max_pool2d(x, *arguments, ceil_mode), x, grad)
    assert actual.stride() == expected.stride()
    if backend != "reference" and (dtype != torch.float32 or DEVICE != "cpu"):
        # the sums are rounded once; plain torch rounds each, and on the GPU adds in another order
        expected = gradient(lambda x: F.max_pool2d(x, *arguments, ceil_mode), x.double(), grad.double()).to(dtype)
        torch.testing.assert_close(actual, expected)
    else:
        same_bits(actual, expected) if DEVICE == "cpu" else torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 24, 6])
@pytest.mark.parametrize("pool", POOLS)
def test_max_pool_winners_of_many_channels(pool, channels, dtype, backend):
    """Few values, so that there are ties, and gradients whose sums are exact."""
    arguments, ceil_mode = POOLS[pool][:-1], POOLS[pool][-1]
    x = torch.randint(-4, 5, (3, channels, 9, 11)).to(DEVICE, dtype).contiguous(memory_format=torch.channels_last)
    serves(backend, "max_pool_winners", x)
    output, winners = ops.max_pool_winners(x, *arguments, ceil_mode, backend=backend)
    expected, expected_winners = reference.max_pool_winners(x, *arguments, ceil_mode)
    assert torch.equal(output, expected) and torch.equal(winners, expected_winners)
    grad = torch.empty_like(output).copy_(torch.randint(-8, 8, output.shape))
    actual = ops.max_pool_winners_backward(grad, winners, x.shape, *arguments, backend=backend)
    expected = reference.max_pool_winners_backward(grad, winners, list(x.shape), *arguments)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()


@pytest.mark.parametrize(("kernel_size", "padding"), [([2, 2], [2, 0]), ([9, 2], [0, 0])])
def test_max_pool_winners_refuses_windows_that_plain_torch_refuses(kernel_size, padding, backend):
    with pytest.raises(RuntimeError, match=r"pad|[Oo]utput"):
        ops.max_pool_winners(rand(1, 2, 5, 5), kernel_size, [1, 1], padding, [1, 1], False, backend=backend)


@pytest.mark.parametrize("size", [(2, 3, 1, 1), (2, 3, 1, 9), (2, 3, 9, 1), (3, 5, 5), (0, 3, 4, 4)])
def test_max_pool_winners_of_small_images(size, backend):
    x = rand(*size)
    serves(backend, "max_pool_winners", x)
    window = [3, 3], [2, 2], [1, 1], [1, 1]
    output, winners = ops.max_pool_winners(x, *window, False, backend=backend)
    assert torch.equal(output, F.max_pool2d(x, *window))
    actual = ops.max_pool_winners_backward(torch.ones_like(output), winners, x.shape, *window, backend=backend)
    assert torch.equal(actual, gradient(lambda x: F.max_pool2d(x, *window), x, torch.ones_like(output)))


def test_max_pool_winners_are_places_row_by_row():
    x = torch.zeros(1, 1, 4, 6)
    x[0, 0, 0, 2] = x[0, 0, 3, 3] = 1
    _, winners = reference.max_pool_winners(x, [2, 3], [2, 3], [0, 0], [1, 1], False)
    assert winners.tolist() == [[[[2, 0], [0, 3]]]]


def test_max_pool_winners_of_ties_and_nan_are_plain_torch_s(backend):
    window = [3, 3], [1, 1], [1, 1], [1, 1]
    for value in (0.0, math.nan, -math.inf):
        x = torch.full((1, 2, 6, 6), value, device=DEVICE)
        x[0, 0, 1, 4] = math.nan
        output, winners = ops.max_pool_winners(x, *window, False, backend=backend)
        ones = torch.ones((), device=DEVICE).expand_as(output)
        actual = ops.max_pool_winners_backward(ones, winners, x.shape, *window, backend=backend)
        assert torch.equal(actual, gradient(lambda x: F.max_pool2d(x, *window), x, ones))


def test_max_pool_winners_have_up_to_256_places(backend):
    window = [8, 32], [4, 16], [4, 16], [1, 1]
    x = rand(1, 2, 9, 34)
    output, winners = ops.max_pool_winners(x, *window, False, backend=backend)
    assert torch.equal(output, F.max_pool2d(x, *window)) and winners.max() > 200
    actual = ops.max_pool_winners_backward(output, winners, x.shape, *window, backend=backend)
    torch.testing.assert_close(actual, gradient(lambda x: F.max_pool2d(x, *window), x, output), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_max_pool_winners_of_random_windows_over_few_values(seed, backend):
    """Mostly ties, between numbers as between infinities and NaN."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low, high, count=2):
        return torch.randint(low, high + 1, (count,), generator=generator).tolist()

    kernel, stride, dilation, size = draw(1, 3), draw(1, 3), draw(1, 2), draw(5, 8)
    window = kernel, stride, [draw(0, places // 2, 1)[0] for places in kernel], dilation
    values = torch.tensor([math.nan, -math.inf, math.inf, -1.0, -0.0, 0.0, 1.0, 2.0])
    x = values[torch.randint(seed % 4, 8, (2, 3, *size), generator=generator)].to(DEVICE)
    x = x.contiguous(memory_format=torch.channels_last) if seed % 3 == 0 else x[seed % 2]
    output, winners = ops.max_pool_winners(x, *window, bool(seed % 2), backend=backend)
    expected, expected_winners = reference.max_pool_winners(x, *window, bool(seed % 2))
    assert torch.equal(winners, expected_winners) and winners.stride() == expected_winners.stride()
    torch.testing.assert_close(output, expected, rtol=0, atol=0, equal_nan=True)
    grad = torch.randint(-8, 8, output.shape, generator=generator).to(x)  # whose sums are exact
    actual = ops.max_pool_winners_backward(grad, winners, x.shape, *window, backend=backend)
    expected = reference.max_pool_winners_backward(grad, winners, list(x.shape), *window)
    assert torch.equal(actual, expected) and actual.stride() == expected.stride()


def test_outputs_leave_no_memory_unwritten():
    """In deterministic mode uninitialised memory is NaN, and would show."""
    x = rand(2, 3, 5, 5).abs()
    torch.use_deterministic_algorithms(True)
    try:
        output, bits = reference.relu_bits(x, math.inf)
        assert torch.equal(reference.relu_bits_backward(x, bits), x)
        output, winners = reference.max_pool_winners(x, [2, 2], [2, 2], [0, 0], [1, 1], False)
        size = x.shape
        grad = reference.max_pool_winners_backward(output, winners, size, [2, 2], [2, 2], [0, 0], [1, 1])
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.equal(grad, torch.where(grad > 0, x, 0))
    assert torch.isclose(grad.sum(), output.sum())
