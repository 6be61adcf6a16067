"""ANP and SWM against literal transcriptions of their updates, and what ANP prunes."""

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from torch import nn

from maskops import demo
from maskops.backdoor import evaluate
from maskops.data import split
from maskops.purify import anp, prune, swm
from maskops.purify._pruning import apply_masks
from maskops.purify._setting import NOISE

PLAIN = {"crop": 0, "flip": False, "progress": False}


def without_norms():
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten()
    )
    return nn.Sequential(*net, nn.Linear(6 * 9, 5), nn.ReLU(), nn.Linear(5, 3)).double()


def uniform(shapes, bound, generator):
    """One draw for all tensors, each padded to a multiple of 16 numbers, as the run's flat buffers are."""
    lengths = [-(-math.prod(shape) // 16) * 16 for shape in shapes]
    flat = torch.empty(sum(lengths), dtype=torch.float64).uniform_(-bound, bound, generator=generator)
    parts = zip(flat.split(lengths), shapes, strict=True)
    return [part[: math.prod(shape)].view(shape) for part, shape in parts]


def published(
    model, images, labels, kinds, *, epochs, steps, batch, noise_steps, project, alpha, epsilon, lr, momentum, train
):
    """Algorithm 1, line by line: one mask m and noise δ for each neuron's weight, noise ξ for its bias."""
    model = copy.deepcopy(model).train(train)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
    shape = {name: (len(m.weight), *(1 for _ in m.weight.shape[1:])) for name, m in layers.items()}
    with_bias = [name for name, layer in layers.items() if layer.bias is not None]
    m = {name: torch.ones(shape[name], dtype=torch.float64, requires_grad=True) for name in layers}  # line 2
    optimizer = torch.optim.SGD(m.values(), lr=lr, momentum=momentum)
    generator, noise_generator = (torch.Generator().manual_seed(seed) for seed in (3, 3 + NOISE))

    def loss(x, y, weight_factor, bias_factor):
        changed = {f"{n}.weight": layers[n].weight.detach() * weight_factor[n] for n in layers}
        changed |= {f"{n}.bias": layers[n].bias.detach() * bias_factor[n] for n in with_bias}
        return F.cross_entropy(torch.func.functional_call(model, changed, (x,)), y)

    ones = {name: torch.ones_like(layers[name].bias) for name in with_bias}
    for index in (i for _ in range(epochs) for i in torch.randint(len(images), (steps, batch), generator=generator)):
        x, y = images[index], labels[index]  # line 4
        delta = dict(zip(layers, uniform(list(shape.values()), epsilon, noise_generator), strict=True))  # line 5
        sizes = [layers[name].bias.shape for name in with_bias]
        xi = dict(zip(with_bias, uniform(sizes, epsilon, noise_generator), strict=True))
        for _ in range(noise_steps):
            leaves = [*(v.requires_grad_() for v in delta.values()), *(v.requires_grad_() for v in xi.values())]
            perturbed = {n: m[n].detach() + delta[n] for n in layers}
            value = loss(x, y, perturbed, {n: 1 + xi[n] for n in with_bias})
            steps_up = [epsilon / noise_steps * g.sign() for g in torch.autograd.grad(value, leaves)]
            moved = [(leaf + step).detach() for leaf, step in zip(leaves, steps_up, strict=True)]  # lines 6, 7
            if project:
                moved = [leaf.clamp(-epsilon, epsilon) for leaf in moved]  # lines 8, 9
            delta = dict(zip(delta, moved[: len(delta)], strict=True))
            xi = dict(zip(xi, moved[len(delta) :], strict=True))
        noisy = loss(x, y, {n: m[n] + delta[n] for n in layers}, {n: 1 + xi[n] for n in with_bias})
        optimizer.zero_grad()
        (alpha * loss(x, y, m, ones) + (1 - alpha) * noisy).backward()
        optimizer.step()  # line 10
        for mask in m.values():
            mask.data.clamp_(0, 1)  # line 11
    return {name: mask.detach() for name, mask in m.items()}


@pytest.mark.parametrize(("epochs", "steps", "noise_steps"), [(1, 1, 1), (2, 3, 1), (1, 4, 3)])
@pytest.mark.parametrize("preset", ["paper", "official"])
@pytest.mark.parametrize("network", ["batch norm", "batch norm, running", "without norms"])
def test_anp_takes_the_published_steps(clean_data, network, preset, epochs, steps, noise_steps):
    images, labels = clean_data
    model = without_norms() if network == "without norms" else tiny_network()
    kinds = (nn.Conv2d, nn.Linear) if network == "without norms" else nn.BatchNorm2d
    options = {"epochs": epochs, "steps": steps, "noise_steps": noise_steps, "batch_size": 7, "lr": 0.05, "seed": 3}
    if network == "without norms":
        options["layers"] = "auto"
    elif network.endswith("running"):
        options["statistics"] = "running"
    result = anp(model, clean_data, preset=preset, **options, **PLAIN)
    masks = published(
        *(model, images.double(), labels, kinds),
        epochs=epochs,
        steps=steps,
        batch=7,
        noise_steps=noise_steps,
        project=preset == "paper",
        alpha=0.2,
        epsilon=0.4,
        lr=0.05,
        momentum=0.9,
        train=not network.endswith("running"),
    )
    found = {name.rpartition(".")[0]: mask for name, mask in result.scores.items()}
    assert found.keys() == masks.keys()
    for name, mask in masks.items():
        torch.testing.assert_close(found[name], mask, rtol=1e-9, atol=1e-9)
        assert torch.equal(
            result.masks.get(f"{name}.mask", result.masks.get(f"{name}.neuron_mask")), mask.gt(0.2).double()
        )
    assert min(mask.min() for mask in masks.values()) < 1


@pytest.mark.parametrize("noise_steps", [1, 2])
def test_swm_takes_the_steps_of_its_equation(clean_data, noise_steps):
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    result = swm(model, clean_data, epochs=2, steps=3, noise_steps=noise_steps, batch_size=7, seed=3, progress=False)
    model = copy.deepcopy(model).eval()
    convs = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d)}
    m = {name: torch.ones_like(conv.weight, requires_grad=True) for name, conv in convs.items()}
    optimizer = torch.optim.Adam(m.values(), lr=0.01)
    generator, noise_generator = (torch.Generator().manual_seed(seed) for seed in (3, 3 + NOISE))

    def loss(x, y, factor):
        changed = {f"{name}.weight": conv.weight.detach() * factor[name] for name, conv in convs.items()}
        return F.cross_entropy(torch.func.functional_call(model, changed, (x,)), y)

    for index in (i for _ in range(2) for i in torch.randint(len(images), (3, 7), generator=generator)):
        x, y = images[index], labels[index]
        # the buffers are in channels_last order
        sizes = [conv.weight.permute(0, 2, 3, 1).shape for conv in convs.values()]
        drawn = uniform(sizes, 0.4, noise_generator)
        delta = {name: noise.permute(0, 3, 1, 2) for name, noise in zip(convs, drawn, strict=True)}
        for _ in range(noise_steps):
            leaves = [noise.requires_grad_() for noise in delta.values()]
            value = loss(x, y, {name: m[name].detach() + delta[name] for name in convs})
            gradients = torch.autograd.grad(value, leaves)
            moved = [(leaf + 0.4 / noise_steps * g.sign()).detach() for leaf, g in zip(leaves, gradients, strict=True)]
            delta = {name: noise.clamp(-0.4, 0.4) for name, noise in zip(convs, moved, strict=True)}
        perturbed = loss(x, y, {name: m[name] + delta[name] for name in convs})
        optimizer.zero_grad()
        (0.9 * loss(x, y, m) + (1 - 0.9) * perturbed).backward()
        optimizer.step()
        for mask in m.values():
            mask.data.clamp_(0, 1)
    for name, mask in m.items():
        torch.testing.assert_close(result.masks[f"{name}.mask"], mask.detach(), rtol=1e-9, atol=1e-9)


def test_pruning_cuts_the_original_weights_and_keeps_the_biases(clean_data):
    model = tiny_network()
    result = anp(model, clean_data, epochs=1, steps=5, number=3, **PLAIN)
    assert sum(int((mask == 0).sum()) for mask in result.masks.values()) == 3
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            purified = result.model.get_submodule(name)
            assert torch.equal(purified.weight, module.weight * result.masks[f"{name}.neuron_mask"])
            assert torch.equal(purified.bias, module.bias)


@pytest.mark.parametrize("how", [{"threshold": 0.9}, {"number": 4}, {"fraction": 0.25}])
def test_pruning_again_from_the_scores_gives_the_same_model(clean_data, how):
    model, images = tiny_network(), clean_data[0].double()
    result = anp(model, clean_data, epochs=2, steps=5, **how, **PLAIN)
    again = prune(model, result.scores, **how)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in result.model.state_dict().items())
    assert torch.equal(again.eval()(images), result.model.eval()(images))


def test_the_users_model_and_its_statistics_are_left_alone(clean_data):
    model = tiny_network()
    before = copy.deepcopy(model.state_dict())
    measured = []
    images = clean_data[0].double()

    def on_epoch(_, working):
        assert not working.training
        measured.append(working(images).detach())

    result = anp(model, clean_data, epochs=2, steps=2, threshold=0.0, on_epoch=on_epoch, **PLAIN)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(
        torch.equal(value, before[name]) for name, value in result.model.state_dict().items() if "running" in name
    )
    assert model.training and result.model.training
    assert len(measured) == 2 and not torch.equal(*measured)
    theirs = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    assert theirs.isdisjoint(tensor.untyped_storage().data_ptr() for tensor in result.model.state_dict().values())


@pytest.mark.parametrize("statistics", ["batch", "running"])
def test_the_model_given_to_on_epoch_has_the_masks_and_no_noise(clean_data, statistics):
    for network in (tiny_network(), without_norms()):
        outputs, images = [], clean_data[0].double()
        result = anp(
            *(network, clean_data),
            epochs=2,
            steps=2,
            statistics=statistics,
            on_epoch=lambda _, model: outputs.append(model(images).detach()),  # noqa: B023 - called at once
            **PLAIN,
        )
        torch.testing.assert_close(outputs[-1], apply_masks(network, result.scores).eval()(images).detach())


def test_anp_is_reproducible_and_layers_draw_by_its_seed(clean_data):
    model = nn.Sequential(tiny_network()[:-1], nn.Dropout(0.5), nn.Linear(6, 3)).double()
    state = torch.get_rng_state()
    runs = [anp(model, clean_data, epochs=2, steps=3, seed=seed, **PLAIN).scores for seed in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    same, other = ([torch.equal(runs[0][name], run[name]) for name in run] for run in runs[1:])
    assert all(same) and not all(other)


def test_the_threshold_is_chosen_by_accuracy_on_images_held_out(backdoored_digits):
    train, _ = demo.digits()
    images, labels = split(*train, 100, torch.Generator().manual_seed(0))[0]
    options = {"epochs": 2, "steps": 40, "threshold": "auto", "flip": False, "progress": False}
    none, some, everything = (
        anp(backdoored_digits, (images, labels), budget=budget, **options) for budget in (0.0, 0.1, 1.0)
    )
    thresholds = [result.options["threshold"] for result in (none, some, everything)]
    assert -1 <= thresholds[0] <= thresholds[1] <= thresholds[2] == 0.95
    accuracy = evaluate(some.model, images, labels).acc
    assert accuracy > evaluate(backdoored_digits, images, labels).acc - 0.15
    assert json.loads(json.dumps(some.options)) == some.options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "anp: alpha must be a number from 0 to 1; got 1.5"),
        ({"threshold": 2}, "anp: threshold must be a number from -1 to 1 or 'auto'; got 2"),
        ({"number": -1}, "anp: number must be a whole number of at least 0; got -1"),
        ({"number": 1, "fraction": 0.1}, "anp: number and fraction are two ways to say it: give one of them"),
        ({"statistics": "own"}, "anp: statistics must be one of batch, running; got 'own'"),
        ({"crop": -1}, "purify: crop must be a whole number of at least 0 or 'auto'; got -1"),
        ({"number": 11}, "anp: prune: expected a number of neurons from 0 to 8; got 11"),
    ],
)
def test_bad_options_are_one_line(clean_data, options, message):
    with pytest.raises(ValueError) as error:
        anp(tiny_network(), clean_data, **{"epochs": 1, "steps": 1, **PLAIN, **options})
    assert str(error.value) == message


def test_a_model_with_layer_norms_and_one_with_a_norm_without_scale(clean_data):
    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.norm = nn.Conv2d(2, 8, 4, stride=4), nn.LayerNorm(8)
            self.mlp, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).mT
            return self.head((tokens + self.mlp(self.norm(tokens))).mean(1))

    result = anp(Token().double(), clean_data, epochs=1, steps=3, **PLAIN)
    assert sorted(result.scores) == ["embed.mask", "head.mask", "mlp.mask", "norm.neuron_mask"]
    assert min(float(score.min()) for score in result.scores.values()) < 1
    net = tiny_network()
    net[1] = nn.BatchNorm2d(4, affine=False).double()
    assert sorted(anp(net, clean_data, epochs=1, steps=1, **PLAIN).scores) == ["3.bn.neuron_mask"]


class Overwrites(nn.Module):
    """Normalises its input in place, as some models do."""

    def __init__(self, network, inplace):
        super().__init__()
        self.network, self.inplace = network, inplace

    def forward(self, x):
        return self.network(x.sub_(0.4) if self.inplace else x - 0.4)


@pytest.mark.parametrize("method", [anp, swm])
def test_a_model_that_overwrites_its_input_sees_each_batch_as_it_was(clean_data, method):
    network = tiny_network()
    runs = [
        method(Overwrites(network, inplace), clean_data, epochs=1, steps=3, **PLAIN).masks for inplace in (True, False)
    ]
    assert all(torch.equal(mask, runs[1][name]) for name, mask in runs[0].items())


def test_sixteen_bit_activations_follow_the_masks(clean_data):
    """No cast of an effective weight outlives its step."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(128, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 3))
    options = {"dtype": torch.bfloat16, "batch_size": 20, "lr": 0.05, "layers": "auto", **PLAIN}
    images, labels = clean_data[0][:1].repeat(20, 1, 1, 1), clean_data[1][:1].repeat(20)
    losses = [
        anp(model, (images, labels), epochs=epochs, steps=steps, epsilon=0.0, **options).history["clean loss"]
        for epochs, steps in ((1, 8), (8, 1))
    ]
    assert sum(losses[1]) / 8 == pytest.approx(losses[0][0], rel=1e-3)


def test_auto_takes_the_layers_that_can_be_masked(clean_data):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.norm = nn.MultiheadAttention(8, 2, batch_first=True), nn.LayerNorm(8)
            self.embed, self.head = nn.Linear(16, 8), nn.Linear(8, 3)

        def forward(self, x):
            tokens = self.norm(self.embed(x.reshape(len(x), 8, 16)))
            return self.head(self.attention(tokens, tokens, tokens)[0].mean(1))

    result = anp(Attends().double(), clean_data, epochs=1, steps=1, **PLAIN)
    assert sorted(result.scores) == ["embed.mask", "head.mask", "norm.neuron_mask"]
    net = tiny_network()
    net[1] = nn.BatchNorm2d(4, affine=False).double()
    net[3].bn = nn.BatchNorm2d(4, affine=False).double()
    assert sorted(anp(net, clean_data, epochs=1, steps=1, **PLAIN).scores) == [
        "0.mask",
        "3.conv.mask",
        "5.mask",
        "9.mask",
    ]


def test_one_image_cannot_be_held_out(clean_data):
    images, labels = clean_data
    with pytest.raises(ValueError, match=r"^anp: holding out clean images needs at least 2 of them; got 1$"):
        anp(tiny_network(), (images[:1], labels[:1]), threshold="auto", statistics="running", **PLAIN)


def test_setting_up_draws_by_the_seed_and_leaves_torchs_generator_alone(clean_data):
    class Noisy(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x + 0.1 * torch.randn_like(x))

    model, scores = Noisy(tiny_network()), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        scores.append(anp(model, clean_data, epochs=1, steps=2, threshold="auto", **PLAIN).scores)
        assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(score, scores[1][name]) for name, score in scores[0].items())
