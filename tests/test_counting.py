"""Counts of steps against counting by hand."""

import doctest

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import counting, dry, minimal
from benchmarks.contestants import CONTESTANTS
from benchmarks.counting import count, scaled
from maskops import mask_
from maskops.functional import rescale_to_l1_ball

FLOAT = 4


def test_a_linear_layer_forward_and_backward_by_hand():
    layer, x = nn.Linear(8, 2), torch.randn(4, 8)
    forward = count(lambda: layer(x))
    assert forward.by_op == {"aten.addmm": 1}
    assert forward.flops == 2 * 4 * 8 * 2
    # input, weight, bias and output
    assert forward.bytes == FLOAT * (4 * 8 + 8 * 2 + 2 + 4 * 2)
    assert forward.peak == FLOAT * 4 * 2
    step = count(lambda: layer(x).sum().backward())
    # the seed of the gradient, the weight's and the bias's; the input's isn't asked for
    assert step.by_op == {"aten.addmm": 1, "aten.sum": 2, "aten.ones_like": 1, "aten.mm": 1}
    assert step.flops == 2 * forward.flops and step.ops == 5


def test_a_convolution_counts_the_gradients_that_are_asked_for():
    layer, x = nn.Conv2d(3, 5, 3, padding=1, bias=False), torch.randn(2, 3, 6, 6)
    flops = 2 * (2 * 5 * 6 * 6) * (3 * 3 * 3)
    assert count(lambda: layer(x)).flops == flops
    assert count(lambda: layer(x).sum().backward()).flops == 2 * flops
    assert count(lambda: layer(x.requires_grad_()).sum().backward()).flops == 3 * flops
    layer.requires_grad_(False)
    assert count(lambda: layer(x).sum().backward()).flops == 2 * flops


def test_a_depthwise_convolution_counts_its_own_channels_alone():
    layer, x = nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.randn(2, 8, 6, 6, requires_grad=True)
    assert count(lambda: layer(x).sum().backward()).flops == 3 * 2 * (2 * 8 * 6 * 6) * 9


def test_what_is_written_in_place_is_read_and_written():
    x, y = torch.ones(10), torch.ones(10)
    assert count(lambda: x.add_(y)).bytes == 3 * 10 * FLOAT
    assert count(lambda: x.add(y)).bytes == 3 * 10 * FLOAT
    assert count(lambda: torch._foreach_mul_([x, y], 2.0)).bytes == 4 * 10 * FLOAT
    # an expanded tensor has one number
    assert count(lambda: x + torch.ones(()).expand(10)).by_op["aten.add"] == 1
    one = torch.ones(()).expand(10)
    assert count(lambda: x + one).bytes == (10 + 1 + 10) * FLOAT


def test_views_empty_tensors_and_numbers_start_nothing():
    x = torch.ones(4, 6)
    counts = count(lambda: (x.t().reshape(24)[3:], x.view(3, 8), x.detach(), x.sum().item(), torch.empty(100)))
    assert counts.by_op == {"aten.clone": 1, "aten.sum": 1}
    # the clone lives on, the sum is gone before the last
    assert counts.peak == (4 * 6 + 100) * FLOAT


def test_an_op_of_ours_is_one_launch_with_the_work_of_its_reference():
    layer = mask_(nn.Conv2d(3, 5, 3, bias=False))
    x = torch.randn(2, 3, 6, 6)
    counts = count(lambda: layer(x))
    assert counts.by_op == {"maskops.masked_conv": 1}
    assert counts.flops == 2 * (2 * 5 * 4 * 4) * 27
    weight = 5 * 3 * 9
    assert counts.bytes == FLOAT * (x.numel() + 2 * weight + 2 * 5 * 4 * 4)
    assert count(lambda: rescale_to_l1_ball(x, 1.0)).by_op == {"maskops.rescale_to_l1_ball": 1}


def test_peak_follows_what_is_alive():
    x = torch.ones(1000)

    def chain():
        y = x + 1
        y = y + 1  # both at one time
        y = y + 1
        return y

    assert count(chain).peak == 2 * 1000 * FLOAT
    assert count(lambda: [x + 1 for _ in range(5)]).peak == 5 * 1000 * FLOAT
    assert count(lambda: x.add_(1)).peak == 0
    both = count(chain) + count(chain)
    assert both.ops == 6 and both.peak == 2 * 1000 * FLOAT


def test_attention_on_the_cpu_is_counted():
    query = torch.randn(2, 3, 8, 16, requires_grad=True)
    forward = count(lambda: F.scaled_dot_product_attention(query, query, query))
    assert forward.flops == 2 * 2 * (2 * 3 * 8 * 8 * 16)
    step = count(lambda: F.scaled_dot_product_attention(query, query, query).sum().backward())
    assert step.flops > 3 * forward.flops


def test_counts_of_two_batches_give_every_other():
    layer = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))

    def counts(batch):
        images = torch.randn(batch, 3, 6, 6)
        return count(lambda: layer(images).square().mean().backward())

    counts(2)  # gradients are there from now on
    found, expected = scaled(counts(2), counts(4), 2, 4, 9), counts(9)
    assert (found.ops, found.flops, found.bytes, found.peak) == (
        *(expected.ops, expected.flops, expected.bytes, expected.peak),
    )
    with pytest.raises(ValueError, match="expected the same ops"):
        scaled(counts(2), count(lambda: None), 2, 4, 9)
    squares = [count(lambda size=size: torch.ones(size, size).cos()) for size in (2, 5)]
    with pytest.raises(ValueError, match="are on no line"):
        scaled(*squares, 2, 7, 9)


@pytest.mark.parametrize("phase", ["inner", "outer"])
def test_the_published_step_is_the_one_that_was_counted_before(phase):
    """An independent count, which has one op more for each of the 20 batch norms that an inner step differentiates."""
    found = dry.counts(CONTESTANTS["awm"]["official"], "resnet18", 128, "awm", phase)
    expected = minimal.PUBLISHED["awm", "resnet18", phase]
    assert found.flops / 1e9 == pytest.approx(expected.gflop, rel=1e-3)
    assert found.bytes / 1e9 == pytest.approx(expected.gb, rel=0.05)
    more = 20 if phase == "inner" else 0
    assert found.ops + more == pytest.approx(expected.launches, rel=0.05)


def test_examples():
    assert doctest.testmod(counting).failed == 0


@pytest.mark.parametrize(("phase", "launches"), [("inner", 60), ("outer", 90)])
def test_our_steps_on_resnet18_come_near_to_the_least(phase, launches):
    found = dry.counts(CONTESTANTS["awm"]["maskops"], "resnet18", 128, "awm", phase)
    least = minimal.LEAST["awm", "resnet18", phase]
    assert found.ops <= launches
    assert found.flops <= 1.01e9 * least.gflop
    assert found.bytes <= 2 * 1.5e9 * least.gb  # that is in 16 bits, this in 32
