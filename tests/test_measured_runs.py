"""Backwards that are none of the steps' change nothing."""

import pytest
import torch
from helpers_resume import images, network
from test_working import with_statistics

from maskops.purify import awm, nft
from maskops.purify._working import WorkingModel


@pytest.mark.parametrize("options", [{}, {"step_in_backward": True}, {"method": "nft", "tune_bias": True}])
def test_measurements_with_a_backward_change_nothing(options):
    def measure(epoch, model):
        shown = images()[0].requires_grad_()
        model(shown).sum().backward()

    options = {"epochs": 2, "batch_size": 8, "progress": False, **options}
    method = {"awm": awm, "nft": nft}[options.pop("method", "awm")]
    torch.manual_seed(0)
    model = with_statistics(network()).float()
    measured, expected = (method(model, images(), on_epoch=on_epoch, **options) for on_epoch in (measure, None))
    for name, value in expected.model.state_dict().items():
        assert torch.equal(measured.model.state_dict()[name], value), name


def test_adversarial_images_leave_no_gradient_of_biases(monkeypatch):
    options = {"epochs": 2, "steps": 3, "batch_size": 8, "progress": False, "tune_bias": True}
    options |= {"augmentation": "adversarial", "statistics": "running"}
    torch.manual_seed(0)
    model = with_statistics(network()).double()
    taped = nft(model, images(), **options)
    monkeypatch.setattr(WorkingModel, "make_tape", lambda *_: None)
    plain = nft(model, images(), **options)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(taped.model.state_dict()[name], value)
