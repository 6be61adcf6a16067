"""NAD against a literal transcription in plain torch."""

import copy

import torch
import torch.nn.functional as F
from helpers import tiny_network
from helpers_baselines import QUIET, assert_same_model, gradients_of, momentum_sgd, passes
from torch import nn

from maskops.purify.baselines import nad


def test_nad_distils_the_attention_of_a_fine_tuned_teacher(clean_data):
    """Maps at the three resolutions of the tiny network: after its block, its pooling and its last ReLU."""
    images, labels = clean_data[0].double(), clean_data[1]
    model = tiny_network()
    model[5], model[6] = nn.Conv2d(4, 6, 3, padding=1, stride=2).double(), nn.ReLU()
    options = {"betas": (2.0, 3.0, 5.0), "lr_decay_epochs": 1, "lr": 0.05, "least_lr": 0.02}
    result = nad(model, clean_data, epochs=2, teacher_epochs=2, batch_size=8, **options, **QUIET)

    generator = torch.Generator().manual_seed(3)
    teacher, student = copy.deepcopy(model).train(), copy.deepcopy(model).train()
    parameters = list(teacher.parameters())
    step = momentum_sgd(parameters, 0.05, 0.9, 1e-4)
    for epoch, batches in enumerate(passes(2, generator=generator)):
        for batch in batches:
            step(gradients_of(F.cross_entropy(teacher(images[batch]), labels[batch]), parameters), 0.4 if epoch else 1)

    def attention(network, x):
        maps = []
        for index, layer in enumerate(network):
            x = layer(x)
            if index in (3, 4, 6):
                squares = x.square().sum(1, keepdim=True)
                maps.append(squares / (squares.norm(dim=(2, 3), keepdim=True) + 1e-6))
        return x, maps

    teacher.eval()
    parameters = list(student.parameters())
    step = momentum_sgd(parameters, 0.05, 0.9, 1e-4)
    for epoch, batches in enumerate(passes(2, generator=generator)):
        for batch in batches:
            with torch.no_grad():
                _, taught = attention(teacher, images[batch])
            logits, own = attention(student, images[batch])
            loss = F.cross_entropy(logits, labels[batch])
            for beta, a, b in zip((2, 3, 5), own, taught, strict=True):
                loss = loss + beta * (a - b).square().mean()
            step(gradients_of(loss, parameters), 0.4 if epoch else 1)
    assert_same_model(result.model, student)
