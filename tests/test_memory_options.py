"""Options that save memory: the same purification, or what they say that they change."""

from functools import partial

import pytest
import torch
from helpers_resume import images, network
from helpers_tape import Transformer
from test_working import with_statistics
from torch import nn

from benchmarks.counting import count
from maskops import models
from maskops.purify import awm, nft, swm
from maskops.purify.awm import AWM

SHORT = {"epochs": 2, "inner_steps": 2, "outer_steps": 3, "batch_size": 8, "progress": False}
SHORT_SWM = {"epochs": 2, "steps": 3, "batch_size": 8, "progress": False}


class TwoHeads(nn.Module):
    """A weight that two layers share, a linear layer and a convolution behind it."""

    def __init__(self):
        super().__init__()
        self.stem, self.shared, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))).mean((2, 3)))


class Branching(TwoHeads):
    """A network that can't be traced, so that autograd runs it."""

    def forward(self, x):
        return super().forward(x if x.sum() > -1e9 else -x)


def assert_same(result, expected, tolerance=0.0):
    for name, mask in expected.masks.items():
        assert (result.masks[name] - mask).abs().max() <= tolerance, name
    assert (result.trigger - expected.trigger).abs().max() <= 10 * tolerance


def run(model, method=awm, **options):
    usual = {"layers": ("conv", "linear"), "exclude": ("attention*",) if isinstance(model, Transformer) else ()}
    return method(model, images(), **{**usual, **(SHORT if method is awm else SHORT_SWM), **options})


@pytest.mark.parametrize("build", [network, TwoHeads], ids=lambda build: build.__name__)
@pytest.mark.parametrize("bits", [32, 8])
def test_masks_stepped_in_the_backward_are_those_stepped_after_it(build, bits):
    torch.manual_seed(0)
    model = with_statistics(build())
    expected = run(model, branches="concatenated", state_bits=bits)
    result = run(model, step_in_backward=True, state_bits=bits)
    if bits == 32:
        assert_same(result, expected)
        assert result.history == expected.history
    for name, mask in expected.masks.items():  # blocks of eight bits are those of a layer
        assert (result.masks[name] - mask).abs().mean() < 0.01, name


@pytest.mark.parametrize("name", ["small_vgg", "shufflenet_v2"])
def test_no_gradient_of_the_whole_model_exists(name):
    torch.manual_seed(0)
    model, data = with_statistics(models.build(name)), (torch.rand(4, 3, 32, 32), torch.arange(4))
    peaks = []
    for in_backward in (False, True):
        algorithm = AWM(model, data, "official", None, {"step_in_backward": in_backward, "branches": "concatenated"})
        step = partial(algorithm.outer, next(algorithm.run.batches(1, 4)))
        step()
        peaks.append(count(step).peak)
        assert (algorithm.run.arena.grad is None) == in_backward
    arena = algorithm.run.arena
    assert peaks[1] <= peaks[0] + 4 * max(weight.numel() for weight in arena.weights.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"branches": "sequential"}, r"awm: step_in_backward=True takes one backward: branches='concatenated'"),
        (
            {"granularity": "neuron"},
            r"awm: step_in_backward=True can't be done for this model: its masks are of another",
        ),
    ],
)
def test_what_cant_be_stepped_in_the_backward_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        run(network(), step_in_backward=True, **options)


@pytest.mark.parametrize("build", [network, TwoHeads, Transformer], ids=lambda build: build.__name__)
def test_recomputed_segments_give_the_same_masks(build):
    torch.manual_seed(0)
    model = with_statistics(build()).float()
    assert_same(run(model, recompute=True), run(model), 1e-6)


def test_recomputing_is_refused_where_it_would_count_twice_or_nothing_can_be_traced():
    with pytest.raises(ValueError, match="nft: recompute=True can't be done for this model: it computes with"):
        nft(network(), images(), recompute=True, epochs=1, progress=False)
    with pytest.raises(
        ValueError, match="awm: recompute=True can't be done for this model: its forward can't be traced"
    ):
        run(Branching(), recompute=True)


@pytest.mark.parametrize("method", [awm, swm])
def test_states_of_eight_bits_are_near_those_of_32(method):
    expected, result = run(network(), method), run(network(), method, state_bits=8)
    for name, mask in expected.masks.items():
        assert (result.masks[name] - mask).abs().mean() < 0.01, name


@pytest.mark.parametrize("method", [awm, swm])
def test_masks_of_sixteen_bits_are_near_those_of_32(method):
    expected, result = run(network(), method), run(network(), method, mask_bits=16)
    for name, mask in expected.masks.items():
        assert result.masks[name].dtype == torch.bfloat16
        assert (result.masks[name] - mask).abs().mean() < 0.01, name
        assert (result.masks[name] < 1).any()
    assert all(weight.dtype == torch.float32 for weight in result.model.parameters())


def test_weights_of_sixteen_bits_are_exact_where_they_are_such_numbers():
    model = TwoHeads()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    result = run(model, weight_dtype=torch.bfloat16)
    assert_same(result, run(model), 1e-6)
    assert all(mask.dtype == torch.float32 for mask in result.masks.values())


def test_a_model_of_sixteen_bits_has_masks_of_32():
    result = run(TwoHeads().bfloat16(), weight_dtype=torch.bfloat16)
    assert all(mask.dtype == torch.float32 and bool((mask < 1).any()) for mask in result.masks.values())
    assert all(value.dtype == torch.bfloat16 for value in result.model.state_dict().values())


def test_bytes_of_a_masked_parameter():
    """θ 2, m 4, Adam's state 2.03, effective weight 2: PERFORMANCE's ten, without a gradient."""
    model = models.build("resnet18")
    data = torch.rand(4, 3, 32, 32), torch.arange(4)
    options = {"step_in_backward": True, "state_bits": 8, "weight_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    algorithm = AWM(model, data, "official", None, options)
    algorithm.outer(next(algorithm.run.batches(1, 4)))
    arena, (state,) = algorithm.run.arena, algorithm.masks.state.values()
    flat = arena.weight, arena.mask, arena.effective, *state.values()
    parameters = sum(weight.numel() for weight in arena.weights.values())
    assert arena.grad is None and sum(tensor.nbytes for tensor in flat) / parameters < 10.1


class Drawing(TwoHeads):
    """Dropout that is on in eval mode too."""

    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1, training=True))


def test_recomputing_what_draws_is_refused():
    with pytest.raises(ValueError, match="awm: recompute=True can't be done for this model: it draws random numbers"):
        run(Drawing(), recompute=True)


def test_a_hook_that_a_measurement_leaves_doesn_t_end_the_learning_in_silence():
    def measure(epoch, model):
        model.network.stem.register_forward_hook(lambda *_: None)

    with pytest.raises(RuntimeError, match="step_in_backward=True: a layer now has a hook"):
        run(TwoHeads(), step_in_backward=True, on_epoch=measure)


class Detached(TwoHeads):
    """A layer that no loss depends on."""

    def __init__(self):
        super().__init__()
        self.beside = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        return super().forward(x) + self.beside(x).mean((2, 3))[:, :4].detach()


def test_masks_without_a_gradient_are_stepped_in_the_backward_too():
    torch.manual_seed(0)
    model = Detached()
    expected = run(model, branches="concatenated", gamma=1e-3)
    assert expected.masks["beside.mask"].max() < 1
    assert_same(run(model, step_in_backward=True, gamma=1e-3), expected)
