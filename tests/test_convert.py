import copy

import pytest
import torch
from helpers import DEVICE, rand, relative_error
from torch import nn
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import maskops
from maskops import fold_, mask_, masked_layers, masks, models
from maskops.nn import MASKED

KINDS = ("conv", "linear", "norm")
NETWORKS = pytest.mark.parametrize("arch", models.ARCHITECTURES)


def network(arch):
    model = models.build(arch, **({"image_size": 16} if arch == "small_vgg" else {})).eval().to(DEVICE)
    # statistics other than 0 and 1, so that a forgotten buffer shows
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2), module.running_var.uniform_(0.5, 1.5)
    return model


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).eval().to(DEVICE)


def classes(model):
    return {name: type(module) for name, module in model.named_modules()}


def described(model):
    """Everything that a refusal must leave as it was."""
    tensors = {
        name: (id(tensor), tensor._version) for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }
    return classes(model), tensors, repr(model)


def randomize(model, lower=0.0):
    with torch.no_grad():
        for mask in masks(model).values():
            mask.uniform_(lower, 1)
    return model


@NETWORKS
@pytest.mark.parametrize("granularity", ["weight", "kernel", "neuron"])
def test_mask_changes_no_output_and_fold_brings_the_network_back(arch, granularity):
    model = network(arch)
    x = rand(2, 3, 16, 16)
    with torch.no_grad():
        expected = model(x)
        before, keys, weights = classes(model), list(model.state_dict()), dict(model.named_parameters())
        assert mask_(model, granularity, layers=KINDS) is model
        assert torch.equal(model(x), expected)
        assert all(dict(model.named_parameters())[name] is weight for name, weight in weights.items())
        masked = randomize(model, lower=0.5)(x)
        assert not torch.allclose(masked, expected)
        copies = {name: weight.clone() for name, weight in weights.items()}
        assert fold_(model) is model
        assert relative_error(model(x), masked) < 1e-6
    assert classes(model) == before
    assert list(model.state_dict()) == keys
    assert all(torch.equal(weights[name], copy) for name, copy in copies.items())


@NETWORKS
def test_fold_of_masks_of_ones_changes_no_bit(arch):
    model = network(arch)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fold_(mask_(model, layers=KINDS))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@NETWORKS
def test_masked_network_is_learnt_copied_and_loaded(arch):
    model = randomize(mask_(network(arch).requires_grad_(False)))
    x = rand(2, 3, 16, 16)
    model(x).logsumexp(1).sum().backward()
    assert all(mask.grad is not None and mask.grad.isfinite().all() for mask in masks(model).values())
    assert {name for name, p in model.named_parameters() if p.grad is not None} == set(masks(model))
    twin = mask_(network(arch))
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), model(x))
        assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_masked_network_is_compiled_and_exported():
    torch.compiler.reset()
    model = randomize(mask_(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), layers=KINDS[::2]))
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), expected, rtol=1e-5, atol=1e-6)
        exported = torch.export.export(model, (x,))
        assert torch.allclose(exported.module()(x), expected, rtol=1e-5, atol=1e-6)
    ops = {str(node.target) for node in exported.graph.nodes}
    assert {"maskops.masked_conv.default", "maskops.effective_weight.default"} <= ops


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 2, 1), nn.ConvTranspose2d(3, 2, 2), nn.BatchNorm2d(3), nn.LayerNorm(4), nn.Linear(4, 2)],
    ids=lambda layer: type(layer).__name__,
)
def test_a_model_that_is_a_layer_itself(layer):
    layer, x = copy.deepcopy(layer).eval(), torch.randn(2, 3, 4, 4)
    expected = layer(x)
    assert mask_(layer, layers=KINDS) is layer
    assert list(masked_layers(layer)) == [""]
    assert list(masks(layer)) == [layer.mask_name]
    assert torch.equal(layer(x), expected)
    assert isinstance(layer, type(layer).plain)
    assert type(fold_(layer)) in MASKED


def test_masked_layers_are_still_torch_s_layers_for_others():
    model = mask_(tiny(), layers=KINDS)
    assert [type(module).__name__ for module in model] == [
        "MaskedConv2d",
        "MaskedBatchNorm2d",
        "Flatten",
        "MaskedLinear",
    ]
    assert isinstance(model[0], nn.Conv2d)
    assert isinstance(model[1], nn.BatchNorm2d)
    assert isinstance(model[3], nn.Linear)


def test_mask_touches_no_requires_grad_and_fold_keeps_it():
    model = tiny()
    model[0].weight.requires_grad_(False)
    mask_(model, layers=KINDS)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad
    assert all(mask.requires_grad for mask in masks(model).values())
    fold_(model)
    assert not model[0].weight.requires_grad
    assert model[3].weight.requires_grad


def test_fold_writes_into_no_tensor_of_the_user():
    model = tiny()
    sibling = nn.Conv2d(3, 4, 3)
    sibling.weight = model[0].weight
    before = sibling.weight.clone()
    fold_(randomize(mask_(model)))
    assert torch.equal(sibling.weight, before)
    assert model[0].weight is not sibling.weight


def test_fold_drops_the_noise():
    model = randomize(mask_(tiny(), layers=KINDS))
    x = rand(2, 3, 6, 6)
    expected = model(x)
    for layer in masked_layers(model).values():
        for name in layer.noise_names:
            setattr(layer, name, Parameter(torch.ones_like(getattr(layer, layer.mask_name))))
    assert not torch.allclose(model(x), expected)
    keys = list(tiny().state_dict())
    assert relative_error(fold_(model)(x), expected) < 1e-6
    assert list(model.state_dict()) == keys


def test_fold_keeps_dtype_and_layout_of_the_weight():
    for dtype in (torch.float16, torch.float64):
        model = mask_(tiny().to(dtype).to(memory_format=torch.channels_last))
        fold_(randomize(model))
        assert model[0].weight.dtype == dtype
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_mask_again_after_fold():
    model = fold_(mask_(tiny()))
    assert list(masks(mask_(model))) == ["0.mask"]


def test_hooks_survive_both_ways():
    model, calls = tiny(), []
    model[0].register_forward_hook(lambda module, *_: calls.append(type(module).__name__))
    x = rand(1, 3, 6, 6)
    mask_(model)(x), fold_(model)(x)
    assert calls == ["MaskedConv2d", "Conv2d"]


class Tied(nn.Module):
    """Two linear layers over one weight, and a third over its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.third(self.second(self.first(x).relu()).relu())


def test_tied_layers_share_one_mask_and_one_folded_weight():
    model = mask_(Tied(), layers="linear")
    assert model.first.mask is model.second.mask
    assert model.third.mask is not model.first.mask
    assert list(masks(model)) == ["first.mask", "third.mask"]
    x = torch.randn(3, 4)
    expected = randomize(model)(x)
    fold_(model)
    assert model.first.weight is model.second.weight
    assert torch.allclose(model(x), expected, atol=1e-6)


def test_tied_layers_whose_masks_were_parted_fold_into_two_weights():
    model = mask_(Tied(), layers="linear")
    model.second.mask = Parameter(torch.zeros(4, 4))
    fold_(model)
    assert model.second.weight.eq(0).all()
    assert model.first.weight.any()


def test_tied_to_what_stays_without_a_mask_is_refused():
    model = Tied()
    refuses(
        model, "first shares its weight with second, which would stay without a mask", layers="linear", exclude="second"
    )
    model.third = nn.Embedding(4, 4)
    model.third.weight = model.first.weight
    refuses(model, "first shares its weight with third, which would stay without a mask", layers="linear")


def test_one_layer_in_two_places_has_one_mask():
    conv = nn.Conv2d(3, 3, 1)
    model = mask_(nn.Sequential(conv, nn.ReLU(), conv))
    assert list(masks(model)) == ["0.mask"]
    assert model[0] is model[2]
    assert type(fold_(model)[2]) is nn.Conv2d


def refuses(model, message, error=ValueError, **arguments):
    before = described(model)
    with pytest.raises(error) as raised:
        mask_(model, **arguments)
    assert str(raised.value) in (
        f"mask_: {message}",
        f"mask_: can't mask {message}. Leave them out with exclude=",
        message,
    )
    assert described(model) == before


class OwnConv(nn.Conv2d):
    pass


def pruned():
    layer = nn.Conv2d(3, 4, 3)
    prune.l1_unstructured(layer, "weight", 0.5)
    return layer


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated", "ignore:Lazy modules are a new feature")
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: maskops.MaskedConv2d(3, 4, 3), "is masked already"),
        (lambda: parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), "is parametrised"),
        (lambda: parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), "is parametrised"),
        (lambda: weight_norm(nn.Conv2d(3, 4, 3)), "is parametrised"),
        (lambda: spectral_norm(nn.Conv2d(3, 4, 3)), "is parametrised"),
        (pruned, "is parametrised"),
        (lambda: OwnConv(3, 4, 3), "is a OwnConv, a subclass with code of its own"),
        (lambda: nn.LazyConv2d(4, 3), "has no shape before the model's first forward"),
        (lambda: nn.BatchNorm2d(4, affine=False), "has no weight"),
        (lambda: nn.LayerNorm(4, elementwise_affine=False), "has no weight"),
    ],
)  # fmt: skip
def test_what_cannot_be_masked_is_refused_with_its_name_and_reason(make, reason):
    refuses(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(make())), f"1.0 {reason}", layers=KINDS)
    refuses(make(), f"the model itself {reason}", layers=KINDS)


def test_all_reasons_are_told_at_once():
    model = nn.Sequential(OwnConv(3, 3, 1), nn.Conv2d(3, 3, 1), maskops.MaskedConv2d(3, 3, 1))
    refuses(model, "0 is a OwnConv, a subclass with code of its own; 2 is masked already")
    mask_(model, exclude=("0", "2"))
    assert type(model[1]) is maskops.MaskedConv2d


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature")
def test_lazy_layers_are_masked_after_the_first_forward():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    model(torch.randn(1, 3, 6, 6))
    assert list(masks(mask_(model))) == ["0.mask"]


def test_a_granularity_that_one_layer_refuses_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ConvTranspose2d(4, 4, 2, groups=2))
    message = "MaskedConvTranspose2d: granularity 'neuron' needs groups 1; got groups 2"
    refuses(model, message, granularity="neuron")
    refuses(model, "MaskedConv2d: granularity must be one of weight, kernel, neuron; got 'pixel'", granularity="pixel")


def test_multihead_attention_output_projection_is_refused():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 2)})
    reason = "is a NonDynamicallyQuantizableLinear, a subclass with code of its own"
    refuses(model, f"attention.out_proj {reason}", layers="linear")
    assert list(masks(mask_(model, layers="linear", exclude="*.out_proj"))) == ["head.mask"]


def test_layers_that_a_fused_transformer_bypasses_are_refused_while_it_may():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    reason = "is bypassed in eval mode, until torch.backends.mha.set_fastpath_enabled(False)"
    refuses(encoder, f"linear1 {reason}; linear2 {reason}", layers="linear", exclude="*.out_proj")
    x = torch.randn(2, 3, 8)
    expected = encoder(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        mask_(encoder, layers=("linear", "norm"), exclude="*.out_proj")
        assert torch.allclose(encoder(x), expected, atol=1e-6)
        with torch.no_grad():
            encoder.linear2.mask.zero_()
        assert not torch.allclose(encoder(x), expected, atol=1e-3)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, ["0", "2.0", "2.1"]),
        ({"include": "2.*"}, ["2.0", "2.1"]),
        ({"include": ["0", "2.1"]}, ["0", "2.1"]),
        ({"exclude": "2.0"}, ["0", "2.1"]),
        ({"include": "2.*", "exclude": ["*.1"]}, ["2.0"]),
        ({"include": "[02]*", "exclude": "2.?"}, ["0"]),
        ({"layers": ("conv", "linear")}, ["0", "2.0", "2.1", "3"]),
        ({"layers": "norm"}, ["1"]),
    ],
    ids=str,
)
def test_patterns_choose_layers_by_name(arguments, names):
    inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1))
    model = mask_(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), inner, nn.Linear(4, 2)), **arguments)
    assert list(masked_layers(model)) == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"include": "layer9.*"}, "pattern 'layer9.*' fits none of the model's conv layers"),
        ({"exclude": ["0", "stem"]}, "pattern 'stem' fits none of the model's conv layers"),
        ({"include": "3"}, "pattern '3' fits none of the model's conv layers"),
        ({"exclude": "*"}, "the model has no conv layer to mask"),
        ({"layers": ("conv", "norm"), "exclude": ("0", "1")}, "the model has no conv or norm layer to mask"),
        ({"layers": "attention"}, "layers must be among conv, linear, norm; got attention"),
        ({"layers": ()}, "layers must be among conv, linear, norm; got none"),
    ],
    ids=str,
)
def test_patterns_that_choose_nothing_are_refused(arguments, message):
    refuses(tiny(), message, **arguments)


def test_fold_refuses_a_model_without_masked_layers():
    with pytest.raises(ValueError, match=r"^fold_: expected a model with masked layers; got none$"):
        fold_(tiny())
