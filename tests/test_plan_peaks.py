"""What a plan predicts, against the bytes of tensors of a run that is really run."""

import pytest
import torch
from test_working import with_statistics

from benchmarks.counting import count
from maskops import models
from maskops.purify import plan
from maskops.purify._plan import _first_epoch, _one_step
from maskops.purify.awm import AWM

CONFIGURATIONS = {
    "ViT": {
        "hidden_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 4,
    },
    "ConvNext": {"depths": [1, 1, 1, 1], "hidden_sizes": [16, 32, 32, 64], "patch_size": 2},
}
RUNS = {
    "resnet18": {"branches": "sequential", "micro_batch_size": 2},
    "ViT": {"recompute": True, "layers": ("conv", "linear")},
    "ConvNext": {"step_in_backward": True, "layers": ("conv", "linear")},
}
"""What test_plan.py hasn't."""


def network(name):
    torch.manual_seed(0)
    if name not in CONFIGURATIONS:
        return with_statistics(models.build(name)).float()
    library = pytest.importorskip("transformers", reason="transformers is not installed")
    config = getattr(library, f"{name}Config")(num_labels=10, **CONFIGURATIONS[name])
    return getattr(library, f"{name}ForImageClassification")(config)


@pytest.mark.parametrize("name", RUNS)
def test_the_peak_of_a_plan_is_that_of_a_run(name):
    model, data = network(name), (torch.rand(4, 3, 32, 32), torch.arange(4))
    options = {"gate": "output", "branches": "concatenated", "batch_size": 4, **RUNS[name]}
    predicted = plan(model, shape=(3, 32, 32), classes=10, images=4, **options).peak

    def run():
        algorithm = AWM(model, data, "paper", None, {**options, "progress": False})
        for _ in range(2):
            for phase in _first_epoch(algorithm):
                _one_step(algorithm, phase)

    there = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert predicted == pytest.approx(there + count(run).peak, rel=0.1)
