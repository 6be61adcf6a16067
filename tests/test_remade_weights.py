"""Effective weights that are made before each use instead of kept: the same bit for bit."""

import copy

import pytest
import torch
from graph_emulator import record
from helpers_resume import images, network
from helpers_tape import Net, Transformer, made
from test_memory_options import Branching, TwoHeads, run
from test_working import with_statistics
from torch import nn

from maskops.arena import MaskArena
from maskops.purify import _graphs, anp, nft, swm
from maskops.purify._masks import MaskRun
from maskops.purify._setting import MaskSetting
from maskops.purify._tape import Tape
from maskops.purify.awm import AWM, awm
from maskops.purify.swm import SWM


class Crossing(Net):
    """Weights that are read by functions, one of them as a view that is read again after other layers."""

    def forward(self, x):
        x = self.first(x)
        weight = self.linear.weight.t()
        x = torch.relu(self.second(torch.relu(x)) + x)
        return x.mean((2, 3)) @ weight + self.linear.bias + 0 * self.first.weight.sum() * self.second.weight.mean()


class Norms(nn.Module):
    """Layer norms and a transposed convolution, which autograd runs as steps of the tape."""

    def __init__(self):
        super().__init__()
        self.first, self.up = nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.norm, self.deep, self.head = nn.LayerNorm(5), nn.Linear(5, 7), nn.Linear(7, 4)

    def forward(self, x):
        x = self.norm(self.up(torch.relu(self.first(x))).mean((2, 3)))
        return self.head(nn.functional.gelu(self.deep(x)))


def arenas(granularity):
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (6, 4, 3, 3), "b": (5, 7), "c": (4, 6, 1, 1)}
    kept = {"weight": 4, "kernel": 2, "neuron": 1}[granularity]
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    masks = {
        name: torch.rand([*w.shape[:kept], *[1] * (w.dim() - kept)], generator=generator) for name, w in weights.items()
    }
    found = [MaskArena(weights, masks, torch.bfloat16, keep=keep) for keep in (True, False)]
    for arena in found:
        arena.draw_noise(0.1, torch.Generator().manual_seed(1))
    return found


@pytest.mark.parametrize("granularity", ["weight", "kernel", "neuron"])
@pytest.mark.parametrize("perturbed", [False, True])
def test_a_weight_that_is_made_is_the_one_that_is_kept(granularity, perturbed):
    kept, remade = arenas(granularity)
    a, b, c = remade.effective_weights.values()
    remade.lay_out([[a, b], [c, torch.zeros(1)]])
    for arena in (kept, remade):
        (arena.perturb if perturbed else arena.refresh)()
    for together in ((a, b), (c,), (b, a)):
        remade.make(together)
        for name, weight in remade.effective_weights.items():
            if any(weight is each for each in together):
                assert torch.equal(weight, kept.effective_weights[name]), name
                assert weight.stride() == kept.effective_weights[name].stride()
    assert remade.effective.numel() < kept.effective.numel()
    with remade.whole():
        assert all(map(torch.equal, remade.effective_weights.values(), kept.effective_weights.values()))


def same(build, method=awm, **options):
    torch.manual_seed(0)
    model = with_statistics(build()).float()
    shared = {"layers": ("conv", "linear", "norm") if build is Norms else ("conv", "linear"), "gamma": 1e-3}
    few = {"epochs": 1, "inner_steps": 1, "outer_steps": 2} if method is awm else {"epochs": 1, "steps": 2}
    shared = {**(shared if method is awm else {"layers": shared["layers"]}), **few, **options}
    expected = run(model, method, **shared)
    result = run(model, method, remake_weights=True, **shared)
    for name, mask in expected.masks.items():
        assert torch.equal(result.masks[name], mask), name
    assert result.history == expected.history
    assert result.trigger is None or torch.equal(result.trigger, expected.trigger)
    assert all(map(torch.equal, result.model.state_dict().values(), expected.model.state_dict().values()))
    assert any(bool((mask < 1).any()) for mask in result.masks.values())


@pytest.mark.parametrize("build", [network, TwoHeads, Crossing, Norms, Transformer], ids=lambda build: build.__name__)
@pytest.mark.parametrize("branches", ["sequential", "concatenated"])
def test_masks_are_the_same(build, branches):
    how = {"exclude": ("attention*",), "dtype": torch.bfloat16} if build is Transformer else {"gate": "output"}
    same(build, branches=branches, recompute=branches == "sequential", **how)


@pytest.mark.parametrize("build", [network, TwoHeads, Crossing, Norms], ids=lambda build: build.__name__)
def test_masks_that_are_stepped_in_the_backward_are_the_same(build):
    same(build, step_in_backward=True, recompute=True, state_bits=8)


@pytest.mark.parametrize("granularity", ["weight", "neuron"])
def test_masks_against_noise_are_the_same(granularity):
    same(TwoHeads, swm, granularity=granularity, noise_steps=2)


@pytest.mark.parametrize("method", [anp, nft])
def test_masks_of_neurons_are_the_same(method):
    more = {"threshold": "auto"} if method is anp else {"tune_bias": True, "floor_by": "depth"}
    for statistics in ("running", "batch"):
        results = []
        for remade in (False, True):
            options = {"epochs": 1, "steps": 2, "batch_size": 8, "progress": False, "statistics": statistics, **more}
            results.append(method(network(), images(), layers="conv", remake_weights=remade, **options))
        assert results[0].history == results[1].history
        for name, mask in results[0].masks.items():
            assert torch.equal(results[1].masks[name], mask), name


def test_who_measures_finds_all_weights():
    seen = []

    def measure(epoch, model):
        pixels = images()[0][:3].clone().requires_grad_()
        twin = copy.deepcopy(model)
        for each in (model, twin):
            logits = each(pixels)
            seen.append(logits.detach())
            seen.append(torch.autograd.grad(logits.sum(), pixels)[0])
        seen.extend(value.clone() for value in (*model.state_dict().values(), *twin.state_dict().values()))

    found = []
    for remade in (False, True):
        run(network(), on_epoch=measure, remake_weights=remade)
        found.append(list(seen))
        seen.clear()
    assert len(found[0]) == len(found[1]) and all(map(torch.equal, *found))


@pytest.mark.parametrize("build", [network, Crossing, Norms], ids=lambda build: build.__name__)
def test_autograd_finds_weights_made_too(build):
    torch.manual_seed(0)
    layers = ("conv", "linear", "norm") if build is Norms else ("conv", "linear")
    model = with_statistics(build()).float()
    found = []
    for remade in (False, True):
        one = MaskRun("awm", model, images(), MaskSetting(layers=layers, remake_weights=remade))
        for hooked in (False, True):
            if hooked:
                one.model.network.register_forward_hook(lambda *_: None)
            pixels = one.images.at(torch.arange(4)).requires_grad_()
            logits = one.model(pixels)
            one.model(pixels.detach() + 1)  # whose weights lie where those of the first did
            logits.square().sum().backward()
            found.append([logits.detach(), pixels.grad, one.arena.grad.clone()])
            one.arena.zero_grad()
    kept, kept_hooked, remade, remade_hooked = found
    assert all(map(torch.equal, remade, kept)) and all(map(torch.equal, remade_hooked, kept_hooked))


def test_weights_that_change_before_the_backward_are_found():
    one = MaskRun("awm", TwoHeads(), images(), MaskSetting(remake_weights=True))
    loss = one.model(one.images.at(torch.arange(4))).sum()
    one.noise.draw(0.1)
    with one.noise.perturbed(), pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_has_no_tape_is_refused():
    with pytest.raises(
        ValueError, match="awm: remake_weights=True can't be done for this model: its forward can't be traced"
    ):
        run(Branching(), remake_weights=True)


@pytest.mark.parametrize("algorithm", [AWM, SWM])
def test_recorded_steps_make_their_weights(algorithm, monkeypatch):
    how = {"layers": ("conv", "linear"), "batch_size": 8, "epochs": 1, "progress": False, "remake_weights": True}
    how |= {"inner_steps": 5, "outer_steps": 5, "step_in_backward": True} if algorithm is AWM else {"steps": 5}
    method = awm if algorithm is AWM else swm
    model = TwoHeads()
    eager = method(model, images(), **how)
    monkeypatch.setattr(_graphs, "why_not", lambda device: None)
    monkeypatch.setattr(_graphs, "record", record)
    recorded = method(model, images(), **how)
    assert set(recorded.execution.values()) == {"CUDA graph"}
    assert recorded.history == eager.history
    for name, mask in eager.masks.items():
        assert torch.equal(recorded.masks[name], mask), name


def deep():
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]
    return nn.Sequential(nn.Conv2d(3, 32, 3), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def test_bytes_of_a_masked_parameter():
    """θ 2, m 4, Adam's state 2.03: eight, and room for the largest layer's effective weight."""
    options = {"state_bits": 8, "weight_dtype": torch.bfloat16, "dtype": torch.bfloat16}
    options |= {"step_in_backward": True, "remake_weights": True, "layers": ("conv", "linear")}
    algorithm = AWM(deep(), images(), "official", None, options)
    algorithm.outer(next(algorithm.run.batches(1, 4)))
    arena, (state,) = algorithm.run.arena, algorithm.masks.state.values()
    parameters = sum(weight.numel() for weight in arena.weights.values())
    flat = arena.weight, arena.mask, *state.values()
    assert sum(tensor.nbytes for tensor in flat) / parameters < 8.1
    assert arena.grad is None
    assert arena.effective.numel() == 32 * 32 * 9


def test_a_tape_s_steps_say_what_they_use():
    model = made(TwoHeads)
    tape = Tape.of(model, torch.rand(2, 3, 8, 8, dtype=torch.float64))
    used = [[id(parameter) for parameter in of_step] for of_step in tape.uses()]
    assert [id(model.shared.weight), id(model.shared.bias)] in used
    assert sum(id(model.shared.weight) in of_step for of_step in used) == 2
