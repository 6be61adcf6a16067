"""NFT against a literal transcription of its update, its floors, and its augmentations."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from torch import nn

from maskops import augment, models
from maskops.purify import nft
from maskops.purify._depth import depths
from maskops.purify.nft import AUGMENTATIONS

PLAIN = {"crop": 0, "flip": False, "progress": False}


def published(model, images, labels, *, epochs, steps, batch, eta, floors, rates, momentum, tune_bias):
    """The published training loop: MixUp, SGD on the masks of batch norms, |1 - m|, floors."""
    model = copy.deepcopy(model).train()
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    m = {name: torch.ones_like(norm.weight, requires_grad=True) for name, norm in norms.items()}
    bias = {name: norm.bias.detach().clone().requires_grad_(tune_bias) for name, norm in norms.items()}
    learned = [*m.values(), *(bias.values() if tune_bias else ())]
    optimizer = torch.optim.SGD(learned, lr=1.0, momentum=momentum)
    generator = torch.Generator().manual_seed(3)

    def f(x):
        changed = {f"{name}.weight": norm.weight.detach() * m[name] for name, norm in norms.items()}
        changed |= {f"{name}.bias": bias[name] for name in norms}
        return torch.func.functional_call(model, changed, (x,))

    for epoch in range(epochs):
        optimizer.param_groups[0]["lr"] = rates[epoch]
        for index in torch.randint(len(images), (steps, batch), generator=generator):
            mixed = augment.mixup(images[index], labels[index], generator, 1.0)
            logits, lam = f(mixed.images), mixed.weight
            loss = lam * F.cross_entropy(logits, mixed.labels) + (1 - lam) * F.cross_entropy(logits, mixed.other_labels)
            loss = loss + eta * sum((1 - mask).abs().sum() for mask in m.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            for name, mask in m.items():
                mask.data.clamp_(floors[name], 1)
    found = {name: mask.detach() for name, mask in m.items()}, {name: value.detach() for name, value in bias.items()}
    return *found, dict(model.named_buffers())


@pytest.mark.parametrize("tune_bias", [False, True])
@pytest.mark.parametrize("preset", ["paper", "official"])
def test_nft_takes_the_published_steps(clean_data, preset, tune_bias):
    images, labels = clean_data
    model = tiny_network()
    official = preset == "official"
    eta = 1e-3 / (20 / len(labels.unique())) if official else 0.03
    options = {"epochs": 3, "steps": 4, "batch_size": 7, "momentum": 0.9, "tune_bias": tune_bias, "seed": 3}
    options |= {} if official else {"eta": 0.03}
    result = nft(model, clean_data, preset=preset, **options, **PLAIN)
    before = copy.deepcopy(model.state_dict())
    masks, biases, buffers = published(
        *(model, images.double(), labels),
        epochs=3,
        steps=4,
        batch=7,
        eta=eta,
        floors={"1": 1.0, "3.bn": 0.8 * math.exp(-0.5)},
        rates=[0.02 + 0.03 * (1 + math.cos(math.pi * e / 3)) / 2 for e in range(3)] if official else [0.05] * 3,
        momentum=0.9,
        tune_bias=tune_bias,
    )
    for name, mask in masks.items():
        torch.testing.assert_close(result.masks[f"{name}.neuron_mask"], mask, rtol=1e-9, atol=1e-9)
        norm = result.model.get_submodule(name)
        torch.testing.assert_close(norm.bias.detach(), biases[name], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(norm.weight.detach(), model.get_submodule(name).weight.detach() * mask)
    for name, buffer in buffers.items():
        torch.testing.assert_close(result.model.get_buffer(name), buffer, rtol=1e-9, atol=1e-9)
        assert not torch.equal(buffer, before[name]) and torch.equal(model.get_buffer(name), before[name])
    assert result.masks["3.bn.neuron_mask"].min() < 1 and (result.masks["1.neuron_mask"] == 1).all()
    assert torch.equal(biases["3.bn"], model[3].bn.bias.detach()) != tune_bias


def test_the_learning_rate_decays_by_steps(clean_data):
    model = tiny_network()
    still = nft(model, clean_data, epochs=4, lr_decay=0.0, lr_decay_epochs=2, momentum=0.0, **PLAIN)
    half = nft(model, clean_data, epochs=2, momentum=0.0, **PLAIN)
    assert all(torch.equal(mask, half.masks[name]) for name, mask in still.masks.items())


def test_floors_follow_depth_or_the_order_of_the_masks():
    torch.manual_seed(0)
    model = models.build("resnet18").double()
    data = torch.rand(6, 3, 16, 16), torch.randint(10, (6,))
    # at this rate a step takes a mask to its floor or to 1
    options = {"epochs": 1, "steps": 8, "lr": 1e4, "momentum": 0.0, "eta": 0.0, "floor": 0.5, "floor_decay": 0.1}
    by_depth, by_index = (nft(model, data, floor_by=by, **options, **PLAIN).masks for by in ("depth", "index"))
    assert (by_depth["bn1.neuron_mask"] == 1).all()
    for place, name in enumerate(list(by_index)[1:], start=1):
        assert float(by_index[name].min()) == pytest.approx(0.5 * math.exp(-0.1 * place))
    shortcut = next(name for name in by_depth if "shortcut" in name or "downsample" in name)
    before = list(by_depth).index(shortcut) - 2
    assert float(by_depth[shortcut].min()) == pytest.approx(float(by_depth[list(by_depth)[before]].min()))


def test_depth_counts_the_layers_on_the_longest_path():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c, self.d, self.e = (nn.Linear(2, 2) for _ in range(5))

        def forward(self, x):
            x = self.a(x)
            long = self.c(self.b(x).relu_())
            return self.e(torch.cat([long, self.d(x)]).view(2, -1, 2).sum(0))

    net = Branches()
    weights = {name: net.get_submodule(name).weight for name in "abcde"}
    assert depths(net, torch.rand(3, 2), weights) == {"a": 1, "b": 2, "c": 3, "d": 2, "e": 4}


@pytest.mark.parametrize("augmentation", AUGMENTATIONS)
def test_every_augmentation_serves(augmentation):
    model = tiny_network(channels=3).float()
    data = torch.rand(12, 3, 8, 8), torch.randint(3, (12,))
    runs = [
        nft(model, data, epochs=2, augmentation=augmentation, seed=seed, progress=False).masks["3.bn.neuron_mask"]
        for seed in (0, 0, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


def test_a_vision_transformer_gets_masks_on_linear_layers_and_layer_norms():
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=3, **sizes)
    model = transformers.ViTForImageClassification(config)
    data = torch.rand(6, 3, 16, 16), torch.randint(3, (6,))
    result = nft(model, data, epochs=2, progress=False)
    kinds = {type(model.get_submodule(name.rpartition(".")[0])) for name in result.masks}
    assert kinds == {nn.Conv2d, nn.Linear, nn.LayerNorm}
    patches = next(name for name in result.masks if "patch_embeddings" in name)
    assert (result.masks[patches] == 1).all()
    moved = {
        type(model.get_submodule(name.rpartition(".")[0])) for name, mask in result.masks.items() if mask.min() < 1
    }
    assert moved == {nn.Linear, nn.LayerNorm}
    torch.testing.assert_close(
        result.model.eval()(data[0]).logits,
        nft(model, data, epochs=2, progress=False, folded=False).model.eval()(data[0]).logits,
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"floor": 1.5}, "nft: floor must be a number from 0 to 1; got 1.5"),
        ({"eta": -1}, "nft: eta must be a number of at least 0 or 'auto'; got -1"),
        ({"cosine_to": "0"}, "nft: cosine_to must be a number of at least 0; got '0'"),
        (
            {"augmentation": "mix"},
            "nft: augmentation must be one of mixup, cutmix, cutout, augmix, randaugment, adversarial, none; got 'mix'",
        ),
    ],
)
def test_bad_options_are_one_line(clean_data, options, message):
    with pytest.raises(ValueError) as error:
        nft(tiny_network(), clean_data, **options)
    assert str(error.value) == message


class Awkward(nn.Module):
    """Layers whose results are written into a buffer, whose weights are transformed, or that are read together."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d, self.e = (nn.Linear(4, 4) for _ in range(5))

    def forward(self, x):
        buffer = torch.zeros(len(x), 8)
        buffer[:, :4] = self.a(x)
        buffer[:, 4:].copy_(self.b(x))
        x = F.linear(buffer[:, 2:6], self.c.weight - self.c.weight.mean())
        return F.linear(x, torch.cat([self.d.weight, self.e.weight]))


def test_depth_follows_buffers_views_and_transformed_weights():
    net = Awkward()
    weights = {name: net.get_submodule(name).weight for name in "abcde"}
    assert depths(net, torch.rand(3, 4), weights) == {"a": 1, "b": 1, "c": 2, "d": 3, "e": 3}


def test_tuned_biases_that_layers_share_stay_shared(clean_data):
    model = tiny_network()
    model[3].bn.bias = model[1].bias
    result = nft(model, clean_data, epochs=1, tune_bias=True, **PLAIN)
    assert result.model[3].bn.bias is result.model[1].bias
    assert not torch.equal(result.model[1].bias, model[1].bias)


def test_a_network_with_one_norm_has_nothing_to_learn_and_says_no_error(clean_data):
    network = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    result = nft(network, clean_data, epochs=2, batch_size=5, progress=False)
    assert result.masks["1.neuron_mask"].tolist() == [1, 1, 1, 1]
