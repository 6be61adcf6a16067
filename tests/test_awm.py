"""AWM against a literal transcription of the published update, and end to end on what its options promise."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import maskops
from maskops.purify import NonFiniteError, awm


def tiny_network(channels=2, classes=3):
    """Convolutions with and without bias and batch norm, a residual, strides and a linear layer, in float64."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
            self.bn = nn.BatchNorm2d(4)

        def forward(self, x):
            return F.relu(x + self.bn(self.conv(x)))

    net = nn.Sequential(
        nn.Conv2d(channels, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ELU(inplace=True),
        Block(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, stride=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, classes),
    )
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return net.double().train()


@pytest.fixture
def clean_data():
    return torch.rand(20, 2, 8, 8), torch.randint(3, (20,))


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


def test_awm_leaves_the_users_model_alone_and_shares_nothing_with_it(clean_data):
    model = tiny_network()
    model[0].weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    result = awm(model, clean_data, epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and type(model[0]) is nn.Conv2d
    assert not model[0].weight.requires_grad and model[1].weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert theirs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in result.model.state_dict().values())


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


def test_a_loss_that_is_no_number_stops_with_one_line(clean_data):
    model = tiny_network()
    with torch.no_grad():
        model[9].weight.fill_(math.inf)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(NonFiniteError, match=r"^awm: the inner loss became nan in the inner phase of epoch 1; .*\Z"):
        awm(model, clean_data, epochs=1, progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "fast"}, "awm: preset must be one of paper, official; got 'fast'"),
        ({"alpha": 1.5}, "awm: alpha must be at most 1; got 1.5"),
        ({"tau": -1.0}, "awm: tau must be a number >= 0; got -1.0"),
        ({"tau": "big"}, "awm: tau must be a number >= 0; got 'big'"),
        ({"gamma": math.nan}, "awm: gamma must be a number >= 0; got nan"),
        ({"epochs": 0}, "awm: epochs must be at least 1; got 0"),
        ({"epochs": "auto"}, "awm: epochs must be at least 1; got 'auto'"),
        ({"projection": "l3"}, "awm: projection must be one of rescale, project, l2, none; got 'l3'"),
        ({"branches": "both"}, "awm: branches must be 'auto', 'sequential' or 'concatenated'; got 'both'"),
        ({"mean": (0.5,)}, "awm: mean and std must have 2 values, one per channel; got (0.5,)"),
    ],
)
def test_bad_options_are_one_line(clean_data, options, message):
    with pytest.raises(ValueError) as error:
        awm(tiny_network(), clean_data, progress=False, **{"epochs": 1, **options})
    assert str(error.value) == message


def test_unknown_options_name_the_known_ones(clean_data):
    with pytest.raises(TypeError, match=r"^awm: no option tow; there are alpha, batch_size, .*"):
        awm(tiny_network(), clean_data, tow=3)


def test_other_precisions_are_refused(clean_data):
    with pytest.raises(
        TypeError, match=r"^awm: dtype must be the model's torch.float64 or bfloat16; got torch.float16$"
    ):
        awm(tiny_network(), clean_data, dtype=torch.float16, progress=False)


def test_labels_beyond_the_classes_are_refused(clean_data):
    images, labels = clean_data
    with pytest.raises(ValueError, match="awm: labels must be below the model's 3 classes; got 7"):
        awm(tiny_network(), (images, labels + 5), progress=False)
