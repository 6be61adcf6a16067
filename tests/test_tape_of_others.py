"""Networks of transformers on a tape: forwards that look at shapes, and return more than logits."""

import pytest
import torch
from helpers_tape import check, check_recomputed, images
from test_working import with_statistics
from torch import nn

from maskops.purify import awm, plan
from maskops.purify._tape import Tape
from maskops.purify._working import WorkingModel

library = pytest.importorskip("transformers", reason="transformers is not installed")

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
KINDS = {
    "ViT": {**SMALL, "intermediate_size": 32},
    "DeiT": {**SMALL, "intermediate_size": 32},
    "Beit": {**SMALL, "intermediate_size": 32},
    "Dinov2": SMALL,
    "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 16, 16], "patch_size": 2},
    "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
    "Swin": {
        "image_size": 16,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [1, 1],
        "num_heads": [2, 2],
        "window_size": 4,
    },
}


class OnlyLogits(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network(images).logits


def made(name):
    torch.manual_seed(0)
    config = getattr(library, f"{name}Config")(num_labels=5, **KINDS[name])
    return with_statistics(getattr(library, f"{name}ForImageClassification")(config))


@pytest.mark.parametrize("name", KINDS)
def test_every_gradient_is_autograds(name):
    network = OnlyLogits(made(name))
    tape = check(network, images(16))
    kinds = [type(step).__name__ for step in tape._steps]
    assert kinds.count("Linear") == sum(isinstance(module, nn.Linear) for module in network.modules())
    check_recomputed(network, images(16))


@pytest.mark.parametrize("name", ["ViT", "Swin"])
def test_any_number_of_images(name):
    network = OnlyLogits(made(name)).requires_grad_(False)
    tape = Tape.of(network, images(16))
    for count in (1, 2, 5, 1009):
        x = images(16, count)
        with torch.no_grad():
            assert torch.allclose(tape(x), network(x))


@pytest.mark.parametrize("name", KINDS)
def test_the_network_itself_is_taped(name):
    model = WorkingModel(made(name), images(16))
    model.make_tape(images(16))
    assert model.tape_reason is None


def test_a_forward_that_asks_for_the_number_of_images_is_refused():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3 * 16 * 16, 5)

        def forward(self, x):
            return self.layer(x.flatten(1) if x.shape[0] > 2 else 2 * x.flatten(1))

    assert "control flow" in Tape.of(Asking().double(), images(16))


@pytest.mark.parametrize("name", ["ViT", "ConvNext"])
def test_a_transformer_in_sixteen_bits_is_taped(name):
    model = WorkingModel(made(name).float(), images(16).float(), dtype=torch.bfloat16)
    model.make_tape(images(16).float())
    assert model.tape_reason is None


def test_a_plan_of_a_transformer_holds_nothing_of_its_tracing():
    about = {"shape": (3, 16, 16), "classes": 5, "batch_size": 4, "layers": ("conv", "linear")}
    assert plan(made("ViT").float(), dtype=torch.bfloat16, recompute=True, **about).kept["other"] < 1e6


def test_memory_options_of_a_transformer():
    model = made("ViT").float()
    data = torch.rand(8, 3, 16, 16), torch.arange(8) % 5
    short = {"epochs": 2, "inner_steps": 2, "outer_steps": 2, "batch_size": 4, "layers": ("conv", "linear")}
    expected = awm(model, data, branches="concatenated", progress=False, **short)
    result = awm(model, data, step_in_backward=True, recompute=True, progress=False, **short)
    for name, mask in expected.masks.items():
        assert (result.masks[name] - mask).abs().max() < 1e-4, name
