"""Masks of a byte an entry, for evaluation: the floating masks that they were rounded to."""

import copy
import io
from functools import partial

import pytest
import torch
from helpers import DEVICE, rand
from test_nn import LAYERS, image, mask_of
from torch import nn
from torch.nn.parameter import Parameter

from maskops import MaskAdam, MaskSGD, fold_, mask_, masked_layers, masks
from maskops.checkpoint import load_masks, save_masks
from maskops.functional import mask_to_bytes
from maskops.nn import MASKED

GRANULARITIES = ("weight", "kernel", "neuron")
KINDS = ("conv", "linear", "norm")
ON_TRITON = ("Conv2d", "Conv2d without bias", "Linear", "BatchNorm2d", "LayerNorm")


def pair(case, granularity):
    """A layer with a mask of bytes, and one with the same as floats."""
    plain_class, args, kwargs, _ = LAYERS[case]
    if granularity == "neuron" and plain_class is nn.ConvTranspose2d:
        kwargs = {**kwargs, "groups": 1}
    plain = plain_class(*args, **kwargs).to(DEVICE).eval()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    of_bytes, floating = (MASKED[plain_class].from_module(plain, granularity, dtype) for dtype in (torch.uint8, None))
    mask_of(of_bytes).copy_(torch.randint(256, mask_of(of_bytes).shape))
    mask_of(floating).data = mask_of(of_bytes).float() / 255
    return of_bytes, floating


@pytest.mark.parametrize("case", LAYERS)
def test_layers_compute_with_bytes_what_they_do_with_floats(case, backend, monkeypatch):
    if backend != "reference" and case not in ON_TRITON:
        pytest.skip(f"{backend} has no kernel of its own for {case}")
    monkeypatch.setenv("MASKOPS_BACKEND", backend)
    # a kernel may sum in another order for masks of another dtype
    same = torch.equal if backend == "reference" else partial(torch.allclose, rtol=1e-4, atol=1e-5)
    for granularity in GRANULARITIES:
        of_bytes, floating = pair(case, granularity)
        x = image(case).requires_grad_()
        outputs = [layer(x) for layer in (of_bytes, floating)]
        assert same(*outputs)
        gradients = [torch.autograd.grad(output.square().sum(), (x, floating.weight)) for output in outputs]
        assert all(same(*each) for each in zip(*gradients, strict=True))
        of_bytes.register_parameter(of_bytes.noise_names[0], Parameter(torch.rand_like(mask_of(floating))))
        floating.register_parameter(of_bytes.noise_names[0], getattr(of_bytes, of_bytes.noise_names[0]))
        assert same(of_bytes(x), floating(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_model_with_bytes_folds_to_what_the_rounded_masks_do(granularity, tmp_path):
    plain = tiny()
    floating = mask_(copy.deepcopy(plain), granularity, layers=KINDS)
    for mask in masks(floating).values():
        mask.data.uniform_()
    of_bytes = mask_(copy.deepcopy(plain), granularity, layers=KINDS, dtype=torch.uint8)
    before = sum(mask.nbytes for mask in masks(floating).values())
    assert sum(mask.nbytes for mask in masks(of_bytes).values()) == before / 4
    save_masks(tmp_path / "masks.safetensors", masks(floating), {}, torch.uint8)
    save_masks(tmp_path / "floats.safetensors", masks(floating), {})
    for file in ("masks", "floats"):  # rounded when they are saved, or when they are loaded
        found, _ = load_masks(tmp_path / f"{file}.safetensors")
        assert not of_bytes.load_state_dict(found, strict=False).unexpected_keys
    found, _ = load_masks(tmp_path / "masks.safetensors")
    assert all(torch.equal(mask, found[name]) for name, mask in masks(of_bytes).items())
    for name, mask in masks(floating).items():
        rounded = found[name].float() / 255
        assert (mask - rounded).abs().max() <= 1 / 510 + 1e-7
        mask.data = rounded
    loaded = mask_(copy.deepcopy(plain), granularity, layers=KINDS)
    loaded.load_state_dict(found, strict=False)
    assert all(torch.equal(mask, masks(floating)[name]) for name, mask in masks(loaded).items())
    expected = fold_(floating).state_dict()
    fold_(of_bytes)
    assert of_bytes.state_dict().keys() == expected.keys() == plain.state_dict().keys()
    assert all(torch.equal(value, expected[name]) for name, value in of_bytes.state_dict().items())


def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 5)).eval().to(DEVICE)


def test_bytes_begin_as_ones_and_stay_bytes_whatever_the_model_becomes():
    plain, x = tiny(), rand(2, 3, 6, 6)
    model = mask_(copy.deepcopy(plain), layers=KINDS, dtype=torch.uint8)
    assert torch.equal(model(x), plain(x))
    assert not any(name.endswith("mask") for name, _ in model.named_parameters())
    for changed in (model.half(), model.bfloat16(), model.to(torch.float64), copy.deepcopy(model).float()):
        assert {mask.dtype for mask in masks(changed).values()} == {torch.uint8}
    assert model(x.double()).dtype == torch.float64
    again = mask_(tiny(), layers=KINDS, dtype=torch.uint8)
    for mask in masks(again).values():
        mask.zero_()
    again.load_state_dict(plain.state_dict())  # a plain checkpoint: masks of ones
    assert torch.equal(again(x), plain(x))


def test_bytes_go_through_a_state_dict():
    model = mask_(tiny(), layers=KINDS, dtype=torch.uint8)
    for mask in masks(model).values():
        mask.copy_(torch.randint(256, mask.shape))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = mask_(tiny(), layers=KINDS, dtype=torch.uint8)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = rand(2, 3, 6, 6)
    assert torch.equal(other(x), model(x))
    assert all(torch.equal(mask, masks(model)[name]) for name, mask in masks(other).items())
    noisy = {**model.state_dict(), "0.noise": torch.full((4, 3, 3, 3), 0.5)}
    other.load_state_dict(noisy)
    assert other[0].noise.dtype == torch.float32 and not torch.equal(other(x), model(x))


def test_layers_that_share_a_weight_share_their_bytes():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    mask_(model, layers="linear", dtype=torch.uint8)
    assert list(masks(model)) == ["0.mask"] and model[1].mask is model[0].mask
    model._apply(torch.clone)  # as when the model is moved to another device
    assert model[1].mask is model[0].mask and model[1].weight is model[0].weight
    model.load_state_dict({"0.mask": torch.zeros(4, 4, dtype=torch.uint8)}, strict=False)
    assert not model[1].mask.any()
    assert copy.deepcopy(model).to("meta")[1].mask.is_meta
    assert fold_(model)[1].weight is model[0].weight


def test_bytes_are_not_learned():
    model = mask_(tiny(), layers=KINDS, dtype=torch.uint8)
    for optimizer in (MaskAdam, MaskSGD):
        with pytest.raises(
            TypeError, match=rf"^{optimizer.__name__}: masks that are learned must be floating; got tor"
        ):
            optimizer(masks(model).values())
    with pytest.raises(RuntimeError, match="floating point"):
        model[0].mask.requires_grad_()
    with pytest.raises(ValueError, match="is masked already"):
        mask_(model)
    learned = MaskAdam([Parameter(torch.ones(2))])
    with pytest.raises(TypeError, match="MaskAdam: masks that are learned"):
        learned.add_param_group({"params": [model[0].mask]})
    assert len(learned.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masks_of_zeros_and_ones_are_exact_as_bytes(dtype):
    mask = torch.tensor([0.0, 1.0, 0.5, 1 / 255], dtype=dtype)
    assert mask_to_bytes(mask).tolist() == [0, 255, 128, 1]
    assert torch.equal(mask_to_bytes(mask_to_bytes(mask)), mask_to_bytes(mask))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ([0.5, 1.25], ValueError, "mask_to_bytes: mask must be in [0, 1]; got values from 0.5 to 1.25"),
        ([0.5, float("nan")], ValueError, "mask_to_bytes: mask must be in [0, 1]; got values from nan to nan"),
        ([1, 0], TypeError, "mask_to_bytes: mask must be a floating dtype; got torch.int64"),
    ],
)
def test_what_is_no_mask_does_not_become_bytes(values, error, message, tmp_path):
    mask = torch.tensor(values)
    with pytest.raises(error) as caught:
        mask_to_bytes(mask)
    assert str(caught.value) == message
    with pytest.raises(error):
        save_masks(tmp_path / "masks.safetensors", {"mask": mask}, {}, torch.uint8)
    model = mask_(nn.Linear(2, 1), layers="linear", dtype=torch.uint8)
    with pytest.raises(error) as caught:
        model.load_state_dict({"mask": mask[None]}, strict=False)
    assert str(caught.value) == f"load_state_dict: mask: {message}"
    assert model.mask.tolist() == [[255, 255]] and not list(tmp_path.iterdir())


def test_other_dtypes_of_masks_are_refused(tmp_path):
    model = tiny()
    with pytest.raises(TypeError, match=r"^MaskedConv2d: dtype must be None or torch.uint8; got torch.int8$"):
        mask_(model, dtype=torch.int8)
    assert not masked_layers(model)
    with pytest.raises(TypeError, match=r"^save_masks: dtype must be None or torch.uint8; got torch.float16$"):
        save_masks(tmp_path / "masks.safetensors", {"mask": torch.ones(1)}, {}, torch.float16)
