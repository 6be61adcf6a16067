"""RNP against a literal transcription in plain torch."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny_network
from helpers_baselines import QUIET, gradients_of, momentum_sgd, passes
from torch import nn

from maskops.purify import prune
from maskops.purify.baselines import rnp


def test_rnp_takes_the_published_steps(clean_data):
    """Unlearn, recover by masks on batch norms' scales, prune the original."""
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    settings = {"unlearn_epochs": 3, "lr_decay_epochs": 2, "max_norm": 0.5, "least_accuracy": 0.0, "epochs": 4}
    result = rnp(model, clean_data, batch_size=8, threshold=0.9, lr=0.5, **settings, **QUIET)

    generator = torch.Generator().manual_seed(3)
    unlearned = copy.deepcopy(model).train()
    parameters = list(unlearned.parameters())
    step = momentum_sgd(parameters, 0.01, 0.9, 5e-4)
    for epoch, batches in enumerate(passes(3, generator=generator)):
        for batch in batches:
            gradients = gradients_of(-F.cross_entropy(unlearned(images[batch]), labels[batch]), parameters)
            norm = math.sqrt(sum(gradient.square().sum().item() for gradient in gradients))
            step([g * min(1, 0.5 / (norm + 1e-6)) for g in gradients], 0.1 if epoch >= 2 else 1)

    norms = {name: module for name, module in unlearned.named_modules() if isinstance(module, nn.BatchNorm2d)}
    masks = {name: torch.ones_like(norm.weight, requires_grad=True) for name, norm in norms.items()}
    step = momentum_sgd(list(masks.values()), 0.5, 0.9, 0)
    for batches in passes(4, generator=generator):
        for batch in batches:
            scales = {f"{name}.weight": norm.weight.detach() * masks[name] for name, norm in norms.items()}
            logits = torch.func.functional_call(unlearned, scales, (images[batch],))
            step(gradients_of(0.2 * F.cross_entropy(logits, labels[batch]), list(masks.values())))
            for mask in masks.values():
                mask.data.clamp_(0, 1)

    pruned = copy.deepcopy(model)
    for name, mask in masks.items():
        torch.testing.assert_close(result.scores[f"{name}.neuron_mask"], mask.detach(), rtol=1e-8, atol=1e-9)
        pruned.get_submodule(name).weight.data[mask <= 0.9] = 0
    assert 0 < sum(int((mask == 0).sum()) for mask in result.masks.values()) < 8
    for name, value in pruned.state_dict().items():
        assert torch.equal(result.model.state_dict()[name], value), name
    again = prune(model, result.scores, threshold=0.9).state_dict()
    assert all(torch.equal(value, again[name]) for name, value in result.model.state_dict().items())


def test_rnp_stops_unlearning_at_an_accuracy_and_finds_its_threshold_on_held_out_images(clean_data):
    result = rnp(tiny_network(), clean_data, least_accuracy=1.0, epochs=2, **QUIET)
    assert len(result.history["unlearning loss"]) == 1
    assert -1 <= result.options["threshold"] <= 0.95
    with pytest.raises(ValueError, match=r"^rnp: folded must be one of True; got False$"):
        rnp(tiny_network(), clean_data, folded=False, **QUIET)
