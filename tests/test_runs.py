"""What any run that learns masks promises about models, precision and errors, shown by AWM's."""

import copy
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import InfiniteSlope, tiny_network
from torch import nn

from maskops.purify import NonFiniteError, awm


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


def test_a_loss_that_is_no_number_stops_with_one_line(clean_data):
    model = tiny_network()
    before = copy.deepcopy(model.state_dict())
    beyond = {"mean": (0.0, 0.0), "std": (1e-308, 1e-308)}
    with pytest.raises(NonFiniteError, match=r"^awm: the inner loss became nan in the inner phase of epoch 1, .*\Z"):
        awm(model, clean_data, epochs=1, progress=False, **beyond)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_unknown_options_name_the_known_ones(clean_data):
    with pytest.raises(TypeError, match=r"^awm: no option tow; there are alpha, batch_size, .*"):
        awm(tiny_network(), clean_data, tow=3)


def test_other_precisions_are_refused(clean_data):
    with pytest.raises(
        TypeError, match=r"^awm: dtype must be the model's torch.float64, or bfloat16 over float32; got torch.float16$"
    ):
        awm(tiny_network(), clean_data, dtype=torch.float16, progress=False)


def test_unusable_devices_are_one_line(clean_data):
    with pytest.raises(ValueError, match=r"^awm: device 'cud': [^\n]*\Z"):
        awm(tiny_network(), clean_data, device="cud", progress=False)


def test_numpy_numbers_become_plain_ones(clean_data):
    options = {"tau": np.float32(3), "batch_size": np.int64(4), "mean": np.zeros(2), "std": np.ones(2)}
    result = awm(tiny_network(), clean_data, epochs=1, progress=False, **options)
    assert json.loads(json.dumps(result.options)) == result.options


def test_labels_beyond_the_classes_are_refused(clean_data):
    images, labels = clean_data
    with pytest.raises(ValueError, match="awm: labels must be below the model's 3 classes; got 7"):
        awm(tiny_network(), (images, labels + 5), progress=False)


class Awkward(nn.Module):
    """A weight that two layers share, a parameter that is also in a list, and an input that is overwritten."""

    def __init__(self):
        super().__init__()
        self.first, self.a, self.b = (nn.Conv2d(2, 2, 3, padding=1) for _ in range(3))
        self.b.weight = self.a.weight
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.everywhere = [self.scale]
        self.head = nn.Linear(2, 3)

    def forward(self, x):
        x.sub_(0.5)
        x = F.relu(self.first(x)) * self.everywhere[0]
        return self.head(self.b(F.relu(self.a(x))).mean((2, 3)))


def test_tied_weights_stay_tied_and_references_follow(clean_data):
    model = Awkward().double()
    results = [awm(model, clean_data, epochs=2, progress=False, folded=folded) for folded in (True, False)]
    for result in results:
        purified = result.model
        assert sorted(result.masks) == ["a.mask", "first.mask"]
        assert purified.a.weight is purified.b.weight and purified.everywhere[0] is purified.scale
        assert purified.scale is not model.scale and model.scale.grad is None
    assert len(list(results[0].model.parameters())) == len(list(model.parameters()))
    assert results[1].model.a.mask is results[1].model.b.mask


def test_a_model_that_overwrites_its_input_changes_nobodys_images(clean_data):
    images, labels = clean_data
    images = images.contiguous(memory_format=torch.channels_last)
    before = images.clone()
    awm(Awkward(), (images, labels), epochs=1, preset="official", progress=False)
    assert torch.equal(images, before)


def test_layers_that_no_forward_uses_are_refused_by_name(clean_data):
    model = tiny_network()
    model.add_module("head", nn.Identity())
    model.head.auxiliary = nn.Conv2d(2, 2, 1).double()
    with pytest.raises(ValueError, match=r"^awm: the model's forward doesn't use head.auxiliary; use exclude=$"):
        awm(model, clean_data, progress=False)
    assert "head.auxiliary.mask" not in awm(model, clean_data, epochs=1, exclude="head*", progress=False).masks


def test_a_closure_over_the_model_is_refused(clean_data):
    model = tiny_network()
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with pytest.raises(ValueError, match=r"^awm: the model's forward doesn't use 0, 3.conv, 5; use exclude=$"):
        awm(model, clean_data, progress=False)


def test_outputs_that_are_no_logits_are_refused(clean_data):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(0))
    with pytest.raises(
        TypeError, match=r"^awm: the model must return logits \(images, classes\), .*; got shape \(216,\)$"
    ):
        awm(model, clean_data, progress=False)


def test_masks_that_are_no_numbers_stop_the_run(clean_data):
    with pytest.raises(NonFiniteError, match=r"^awm: a mask became nan or infinite; the model is left as it was$"):
        awm(InfiniteSlope(), clean_data, epochs=1, inner_steps=1, outer_steps=1, tau=0.0, progress=False)


def test_ambient_modes_of_torch_do_not_matter(clean_data):
    model = tiny_network().float()
    expected = awm(model, clean_data, epochs=2, progress=False).masks
    with torch.no_grad(), torch.autocast("cpu"):
        found = awm(model, clean_data, epochs=2, progress=False).masks
    assert all(torch.equal(mask, found[name]) for name, mask in expected.items())
    with torch.inference_mode(), pytest.raises(RuntimeError, match=r"^awm: a purification needs gradients, .*"):
        awm(model, clean_data, progress=False)


def test_the_model_given_to_on_epoch_stays_in_eval_mode_and_computes_in_the_runs_precision(clean_data):
    def measure(epoch, model):
        training = model.training
        model.eval()(clean_data[0])
        model.train(training)

    model = nn.Sequential(tiny_network().float()[:-1], nn.Dropout(0.9), nn.Linear(6, 3))
    kinds = {"layers": "conv", "epochs": 2, "progress": False}
    for dtype in (None, torch.bfloat16):
        plain, measured = (awm(model, clean_data, dtype=dtype, on_epoch=f, **kinds) for f in (None, measure))
        assert all(torch.equal(mask, measured.masks[name]) for name, mask in plain.masks.items())


def test_norm_masks_stay_wide_under_sixteen_bit_activations(clean_data):
    model = tiny_network().float()
    exact = awm(model, clean_data, layers="norm", epochs=2, progress=False)
    coarse = awm(model, clean_data, layers="norm", epochs=2, dtype=torch.bfloat16, progress=False)
    for name, mask in exact.masks.items():
        assert coarse.masks[name].dtype == torch.float32
        torch.testing.assert_close(coarse.masks[name], mask, rtol=0, atol=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_normalisation_follows_the_models_dtype(clean_data, dtype):
    result = awm(tiny_network().to(dtype), clean_data, epochs=1, mean=(0.4, 0.5), std=(0.2, 0.3), progress=False)
    assert result.model[0].weight.dtype == dtype
