"""AWM against a literal transcription of the published update, and what its options change."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from torch import nn

import maskops
from maskops.purify import AWMOptions, awm
from maskops.purify._losses import Losses


def published(model, images, labels, *, epochs, steps, batch, tau, alpha, gamma, lr, clamp, predicted, seed):
    """The update of Algorithm 1 as the published code writes it, step by step, in plain torch."""
    model = copy.deepcopy(model).eval()
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    masks = {name: torch.ones_like(conv.weight, requires_grad=True) for name, conv in convs.items()}
    optimizer = torch.optim.Adam(masks.values(), lr=lr)
    generator = torch.Generator().manual_seed(seed)

    def f(x):
        weights = {f"{name}.weight": conv.weight.detach() * masks[name] for name, conv in convs.items()}
        return torch.func.functional_call(model, weights, (x,))

    for _ in range(epochs):
        delta = torch.zeros_like(images[:1])
        for index in torch.randint(len(images), (steps, batch), generator=generator):
            x, y = images[index], labels[index]
            delta = delta.detach().requires_grad_()
            target = f(x).argmax(1) if predicted else y
            (gradient,) = torch.autograd.grad(F.cross_entropy(f(x + delta), target), delta)
            delta = delta + 10 * gradient
        delta = delta.detach()
        delta = delta * min(1, tau / delta.abs().sum().item())
        for index in torch.randint(len(images), (steps, batch), generator=generator):
            x, y = images[index], labels[index]
            perturbed = torch.clamp(x + delta, 0, 1) if clamp else x + delta
            norm = sum(mask.abs().sum() for mask in masks.values())
            loss = alpha * F.cross_entropy(f(x), y) + (1 - alpha) * F.cross_entropy(f(perturbed), y) + gamma * norm
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for mask in masks.values():
                mask.data.clamp_(0, 1)
    return {f"{name}.mask": mask.detach() for name, mask in masks.items()}, delta


@pytest.mark.parametrize("branches", ["sequential", "concatenated"])
@pytest.mark.parametrize(("epochs", "steps"), [(1, 1), (1, 2), (1, 5), (3, 4)])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_awm_takes_the_published_steps(clean_data, preset, epochs, steps, branches):
    model = tiny_network()
    images, labels = clean_data
    settings = {"epochs": epochs, "tau": 5.0, "gamma": 1e-3, "batch_size": 7}
    result = awm(
        model,
        clean_data,
        preset=preset,
        **settings,
        inner_steps=steps,
        outer_steps=steps,
        branches=branches,
        seed=3,
        progress=False,
    )
    official = preset == "official"
    masks, delta = published(
        *(model, images.double(), labels),
        epochs=epochs,
        steps=steps,
        batch=7,
        tau=5.0,
        alpha=0.9,
        gamma=1e-3,
        lr=0.01,
        clamp=official,
        predicted=official,
        seed=3,
    )
    assert result.masks.keys() == masks.keys()
    torch.testing.assert_close(result.trigger, delta, rtol=1e-9, atol=1e-11)
    for name, mask in masks.items():
        torch.testing.assert_close(result.masks[name], mask, rtol=1e-9, atol=1e-9)
    assert min(mask.min() for mask in masks.values()) < 1


def test_awm_returns_the_folded_model_of_its_masks(clean_data):
    model = tiny_network()
    images = clean_data[0].double()
    folded = awm(model, clean_data, epochs=2, progress=False)
    masked = awm(model, clean_data, epochs=2, progress=False, folded=False)
    assert folded.model.state_dict().keys() == model.state_dict().keys()
    assert maskops.masks(masked.model).keys() == folded.masks.keys()
    torch.testing.assert_close(folded.model.eval()(images), masked.model.eval()(images), rtol=0, atol=0)
    for name, mask in maskops.masks(masked.model).items():
        assert torch.equal(mask.detach(), folded.masks[name])


def test_awm_is_reproducible_and_its_seed_matters(clean_data):
    model = tiny_network()
    runs = [awm(model, clean_data, epochs=2, seed=seed, progress=False, batch_size=4) for seed in (0, 0, 1)]
    same, other = ([torch.equal(runs[0].masks[name], run.masks[name]) for name in run.masks] for run in runs[1:])
    assert all(same) and not all(other)


def test_awm_records_history_timings_and_options(clean_data):
    seen = []
    result = awm(
        tiny_network(), clean_data, epochs=3, progress=False, on_epoch=lambda epoch, model: seen.append((epoch, model))
    )
    assert {name: len(values) for name, values in result.history.items()} == {
        "inner loss": 3,
        "clean loss": 3,
        "perturbed loss": 3,
    }
    assert [epoch for epoch, _ in seen] == [0, 1, 2]
    assert result.timings.keys() == {"inner", "outer", "total", "peak_bytes"}
    assert result.options["tau"] == pytest.approx(1000 * 2 * 8 * 8 / (3 * 32 * 32))
    assert result.options["batch_size"] == 16 and result.options["method"] == "awm"
    assert json.loads(json.dumps(result.options)) == result.options


def test_the_model_given_to_on_epoch_is_the_purified_one(clean_data):
    images = clean_data[0].double()
    outputs = []
    result = awm(
        tiny_network(),
        clean_data,
        epochs=2,
        progress=False,
        on_epoch=lambda _, model: outputs.append(model(images).detach()),
    )
    torch.testing.assert_close(outputs[-1], result.model.eval()(images))


@pytest.mark.parametrize("projection", ["rescale", "project", "l2"])
@pytest.mark.parametrize("every_step", [False, True])
def test_the_trigger_ends_inside_its_ball(clean_data, projection, every_step):
    result = awm(
        tiny_network(),
        clean_data,
        epochs=1,
        tau=0.5,
        projection=projection,
        project_every_step=every_step,
        progress=False,
    )
    norm = result.trigger.norm() if projection == "l2" else result.trigger.abs().sum()
    assert 0 < norm <= 0.5 * (1 + 1e-9)


def test_a_penalty_on_the_trigger_makes_it_smaller(clean_data):
    model = tiny_network()
    norms = [
        awm(model, clean_data, epochs=1, projection="none", trigger_penalty=penalty, progress=False).trigger.norm()
        for penalty in (0.0, 1e-3)
    ]
    assert norms[1] < norms[0]


def test_normalisation_keeps_the_trigger_in_pixel_space(clean_data):
    """A model on normalised images, and the same model with the normalisation built in, are purified alike."""
    images, labels = clean_data
    mean, std = (0.4, 0.5), (0.2, 0.3)

    class Normalise(nn.Module):
        def forward(self, x):
            return (x - x.new_tensor(mean).view(-1, 1, 1)) / x.new_tensor(std).view(-1, 1, 1)

    model = tiny_network()
    plain = awm(model, (images, labels), epochs=2, progress=False, mean=mean, std=std, preset="official")
    built_in = awm(nn.Sequential(Normalise(), model), (images, labels), epochs=2, progress=False, preset="official")
    torch.testing.assert_close(plain.trigger, built_in.trigger, rtol=1e-6, atol=1e-8)
    for name, mask in plain.masks.items():
        torch.testing.assert_close(mask, built_in.masks[f"1.{name}"], rtol=1e-6, atol=1e-8)


def test_awm_masks_only_the_chosen_layers(clean_data):
    result = awm(tiny_network(), clean_data, epochs=1, progress=False, layers=("conv", "linear"), exclude="0")
    assert sorted(result.masks) == ["3.conv.mask", "5.mask", "9.mask"]


@pytest.mark.parametrize("granularity", ["kernel", "neuron"])
def test_awm_works_with_coarser_masks(clean_data, granularity):
    result = awm(tiny_network(), clean_data, epochs=2, progress=False, granularity=granularity)
    assert result.masks["3.conv.mask"].shape == ((4, 4, 1, 1) if granularity == "kernel" else (4, 1, 1, 1))
    assert min(mask.min() for mask in result.masks.values()) < 1


def test_norm_masks_keep_their_batch_norm(clean_data):
    images = clean_data[0].double()
    model = tiny_network()
    result = awm(model, clean_data, epochs=2, progress=False, layers="norm", folded=False)
    assert sorted(result.masks) == ["1.neuron_mask", "3.bn.neuron_mask"]
    outputs = []
    awm(model, clean_data, epochs=2, progress=False, layers="norm", on_epoch=lambda _, m: outputs.append(m(images)))
    torch.testing.assert_close(outputs[-1].detach(), result.model.eval()(images).detach())


def test_bfloat16_stays_near_float32(clean_data):
    model = tiny_network().float()
    exact = awm(model, clean_data, epochs=2, progress=False)
    coarse = awm(model, clean_data, epochs=2, progress=False, dtype=torch.bfloat16)
    assert all(mask.dtype == torch.float32 for mask in coarse.masks.values())
    difference = max((exact.masks[name] - coarse.masks[name]).abs().max().item() for name in exact.masks)
    assert difference < 0.2  # twenty Adam steps of 0.01, some of which take the other sign
    assert exact.history["clean loss"][-1] == pytest.approx(coarse.history["clean loss"][-1], rel=0.05)


def test_fewer_images_than_a_batch_are_one_batch(clean_data):
    images, labels = clean_data
    result = awm(tiny_network(), (images[:3], labels[:3]), preset="official", epochs=1, progress=False)
    assert result.options["batch_size"] == 3 and result.options["inner_steps"] == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "awm: preset must be one of paper, official, swm_atr; got 'fast'"),
        ({"preset": ["paper"]}, "awm: preset must be one of paper, official, swm_atr; got ['paper']"),
        ({"alpha": 1.5}, "awm: alpha must be a number from 0 to 1; got 1.5"),
        ({"tau": -1.0}, "awm: tau must be a number of at least 0 or 'auto'; got -1.0"),
        ({"tau": "big"}, "awm: tau must be a number of at least 0 or 'auto'; got 'big'"),
        ({"gamma": math.nan}, "awm: gamma must be a number of at least 0; got nan"),
        ({"epochs": 0}, "awm: epochs must be a whole number of at least 1; got 0"),
        ({"epochs": 1.5}, "awm: epochs must be a whole number of at least 1; got 1.5"),
        ({"epochs": True}, "awm: epochs must be a whole number of at least 1; got True"),
        ({"epochs": "auto"}, "awm: epochs must be a whole number of at least 1; got 'auto'"),
        ({"projection": "l3"}, "awm: projection must be one of rescale, project, l2, none; got 'l3'"),
        ({"clamp": "no"}, "awm: clamp must be one of True, False; got 'no'"),
        ({"seed": -1}, f"purify: seed must be a whole number from 0 to {2**63 - 2**22}; got -1"),
        ({"branches": "both"}, "awm: branches must be one of auto, sequential, concatenated; got 'both'"),
        ({"granularity": "row"}, "purify: granularity must be one of weight, kernel, neuron; got 'row'"),
        ({"mean": (0.5,), "std": (0.5,)}, "awm: mean and std must have 2 values, one per channel; got (0.5,)"),
        ({"mean": (0.5, 0.5)}, "purify: mean and std must be given together"),
        ({"mean": 0.5, "std": 0.5}, "purify: mean must be finite numbers, one per channel; got 0.5"),
        (
            {"mean": (0.5, 0.5), "std": (0.5, 0.0)},
            "purify: std must be positive numbers, one per channel; got (0.5, 0.0)",
        ),
        ({"exclude": "nothing"}, "awm: mask_: pattern 'nothing' fits none of the model's conv layers"),
    ],
)
def test_bad_options_are_one_line(clean_data, options, message):
    with pytest.raises(ValueError) as error:
        awm(tiny_network(), clean_data, progress=False, **{"epochs": 1, **options})
    assert str(error.value) == message


def test_without_the_l1_term_it_is_the_ablation(clean_data):
    model = tiny_network()
    ablation = awm(model, clean_data, preset="swm_atr", epochs=2, progress=False)
    full = awm(model, clean_data, gamma=0.0, epochs=2, progress=False)
    assert all(torch.equal(mask, full.masks[name]) for name, mask in ablation.masks.items())


def test_branches_follow_one_another_where_memory_for_both_at_once_runs_out(clean_data, monkeypatch):
    network = tiny_network()
    options = {"epochs": 1, "inner_steps": 1, "outer_steps": 3, "progress": False}
    expected = awm(network, clean_data, branches="sequential", **options)
    descend, calls = Losses._descend, []

    def descend_in_little_memory(losses, *branches, **how):
        calls.append(len(branches) > 1)
        found = descend(losses, *branches, **how)
        if len(branches) > 1:  # when a gradient has been added
            raise torch.OutOfMemoryError("out of memory")
        return found

    monkeypatch.setattr(Losses, "_descend", descend_in_little_memory)
    for_images = AWMOptions.for_images

    def for_images_on_a_gpu(options, images):
        return replace(for_images(options, images), branches=options.branches)

    monkeypatch.setattr(AWMOptions, "for_images", for_images_on_a_gpu)
    result = awm(network, clean_data, **options)
    assert calls == [True, *[False] * 6] and result.options["branches"] == "sequential"
    assert all(torch.equal(result.masks[name], mask) for name, mask in expected.masks.items())
    with (
        pytest.raises(torch.OutOfMemoryError),
        pytest.warns(RuntimeWarning, match=r"from now on it takes \d+ images? at a time") as warned,
    ):
        awm(network, clean_data, branches="concatenated", **options)
    assert str(warned[-1].message).endswith("it takes 1 image at a time")
