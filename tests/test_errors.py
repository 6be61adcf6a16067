"""What the public functions refuse, each in one line: the function, what was expected, what came."""

import re

import pytest
import torch
from helpers import DEVICE, rand
from torch import Tensor

from maskops import explain, functional, why_not
from maskops.functional import (
    clip_mask_,
    dual_masked_conv2d,
    dual_masked_linear,
    effective_weight,
    masked_batch_norm,
    masked_conv1d,
    masked_conv2d,
    masked_conv3d,
    masked_conv_transpose2d,
    masked_layer_norm,
    masked_linear,
    project_onto_l1_ball,
    rescale_to_l1_ball,
)


def zeros(*size, dtype=None):
    return torch.zeros(size, dtype=dtype)


def refuses(op, arguments, error, message):
    arguments = {name: v.to(DEVICE) if isinstance(v, Tensor) else v for name, v in arguments.items()}
    with pytest.raises(error, match=f"^{re.escape(op.__name__ + ': ' + message)}$"):
        op(**arguments)


NO_METAL = r"^backend: expected one of cuda, triton, reference; got 'metal'$"


def named(change):
    return ", ".join(change) if isinstance(change, dict) else ""


FACTORS = [
    ({"mask": zeros(6, 4, 3, 2)}, ValueError, "mask must broadcast to weight (6, 4, 3, 3); got mask (6, 4, 3, 2)"),
    (
        {"mask": zeros(1, 6, 4, 3, 3)},
        ValueError,
        "mask must broadcast to weight (6, 4, 3, 3); got mask (1, 6, 4, 3, 3)",
    ),
    ({"mask": zeros(1, dtype=torch.bool)}, TypeError, "mask must be a floating dtype; got torch.bool"),
    ({"noise": zeros(5, 1, 1, 1)}, ValueError, "noise must broadcast to weight (6, 4, 3, 3); got noise (5, 1, 1, 1)"),
    ({"noise": zeros(1, dtype=torch.int32)}, TypeError, "noise must be a floating dtype; got torch.int32"),
]
CONV = [
    ({"input": zeros(4, 5)}, ValueError, "input must have 4 dimensions, or 3 for one image; got (4, 5)"),
    (
        {"input": zeros(1, 3, 5, 5)},
        ValueError,
        "input must have 4 channels for weight (6, 4, 3, 3) and groups 1; got (1, 3, 5, 5)",
    ),
    (
        {"input": zeros(1, 4, 2, 5)},
        ValueError,
        "padding (0, 0) and dilation (1, 1) must leave an output; got input (1, 4, 2, 5) and weight (6, 4, 3, 3)",
    ),
    (
        {"input": zeros(4, 5, 5), "dilation": 3},
        ValueError,
        "padding (0, 0) and dilation (3, 3) must leave an output; got input (4, 5, 5) and weight (6, 4, 3, 3)",
    ),
    ({"input": zeros(1, 4, 5, 5, dtype=torch.int64)}, TypeError, "input must be a floating dtype; got torch.int64"),
    (
        {"input": zeros(1, 4, 5, 5, dtype=torch.cfloat)},
        TypeError,
        "input must be a floating dtype; got torch.complex64",
    ),
    (
        {"input": zeros(1, 4, 5, 5).double()},
        TypeError,
        "input and weight must have one dtype; got torch.float64 and torch.float32",
    ),
    ({"weight": zeros(6, 4, 3)}, ValueError, "weight must have 4 dimensions; got (6, 4, 3)"),
    ({"weight": zeros(6, 4, 0, 3)}, ValueError, "weight must have a kernel of at least 1; got (6, 4, 0, 3)"),
    (
        {"weight": zeros(6, 4, 3, 3, dtype=torch.cfloat)},
        TypeError,
        "weight must be a floating dtype; got torch.complex64",
    ),
    *FACTORS,
    ({"bias": zeros(4)}, ValueError, "bias must have shape (6,); got (4,)"),
    ({"bias": zeros(6).double()}, TypeError, "input and bias must have one dtype; got torch.float32 and torch.float64"),
    ({"stride": 0}, ValueError, "stride must be at least 1; got 0"),
    ({"stride": (1, 1, 1)}, ValueError, "stride must be an int or 2 ints; got (1, 1, 1)"),
    ({"stride": 1.5}, ValueError, "stride must be an int or 2 ints; got 1.5"),
    ({"padding": (-1, 0)}, ValueError, "padding must be at least 0; got (-1, 0)"),
    ({"padding": "reflect"}, ValueError, "padding must be ints, 'same' or 'valid'; got 'reflect'"),
    ({"padding": "same", "stride": 2}, ValueError, "padding 'same' needs stride 1; got stride (2, 2)"),
    ({"dilation": (1, 0)}, ValueError, "dilation must be at least 1; got (1, 0)"),
    ({"groups": 0}, ValueError, "groups must be at least 1; got 0"),
    (
        {"groups": 4, "input": zeros(1, 16, 5, 5)},
        ValueError,
        "weight's first dimension must be divisible by groups 4; got (6, 4, 3, 3)",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), CONV, ids=named)
@pytest.mark.parametrize("op", [masked_conv2d, dual_masked_conv2d], ids=lambda op: op.__name__)
def test_masked_conv2d_refuses_in_one_line(op, change, error, message):
    refuses(op, {"input": rand(1, 4, 5, 5), "weight": rand(6, 4, 3, 3), "mask": rand(1)} | change, error, message)


@pytest.mark.parametrize(("op", "dims"), [(masked_conv1d, 1), (masked_conv3d, 3)])
def test_masked_conv1d_and_3d_name_themselves_and_their_dimensions(op, dims):
    ones = (1,) * dims
    arguments = {"input": rand(1, 1, *ones), "weight": rand(1, 1, *ones), "mask": rand(1)}
    stride = (*ones, 1)
    message = f"weight must have {dims + 2} dimensions; got (1, 1, 1, 1)"
    refuses(op, arguments | {"weight": rand(1, 1, 1, 1)}, ValueError, message)
    refuses(op, arguments | {"stride": stride}, ValueError, f"stride must be an int or {dims} ints; got {stride}")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_padding": 1}, "output_padding must be smaller than stride or dilation; got (1, 1)"),
        ({"output_padding": (2, 0), "stride": 2}, "output_padding must be smaller than stride or dilation; got (2, 0)"),
        ({"output_padding": -1}, "output_padding must be at least 0; got -1"),
        ({"padding": "same"}, "padding must be an int or 2 ints; got 'same'"),
        ({"groups": 3}, "weight's first dimension must be divisible by groups 3; got (4, 6, 3, 3)"),
        (
            {"input": zeros(1, 6, 5, 5)},
            "input must have 4 channels for weight (4, 6, 3, 3) and groups 1; got (1, 6, 5, 5)",
        ),
        (
            {"padding": 4},
            "padding (4, 4) and dilation (1, 1) must leave an output; got input (1, 4, 5, 5) and weight (4, 6, 3, 3)",
        ),
        ({"bias": zeros(4)}, "bias must have shape (6,); got (4,)"),
    ],
    ids=named,
)
def test_masked_conv_transpose2d_refuses_in_one_line(change, message):
    arguments = {"input": rand(1, 4, 5, 5), "weight": rand(4, 6, 3, 3), "mask": rand(1)} | change
    refuses(masked_conv_transpose2d, arguments, ValueError, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"input": zeros(2, 4)}, ValueError, "input must end in 3 features for weight (5, 3); got (2, 4)"),
        ({"input": zeros()}, ValueError, "input must end in 3 features for weight (5, 3); got ()"),
        ({"input": zeros(2, 3, dtype=torch.int8)}, TypeError, "input must be a floating dtype; got torch.int8"),
        ({"weight": zeros(3)}, ValueError, "weight must have 2 dimensions; got (3,)"),
        (
            {"weight": zeros(5, 3).double()},
            TypeError,
            "input and weight must have one dtype; got torch.float32 and torch.float64",
        ),
        ({"mask": zeros(5)}, ValueError, "mask must broadcast to weight (5, 3); got mask (5,)"),
        ({"noise": zeros(2, 3)}, ValueError, "noise must broadcast to weight (5, 3); got noise (2, 3)"),
        ({"bias": zeros(1)}, ValueError, "bias must have shape (5,); got (1,)"),
    ],
    ids=named,
)
@pytest.mark.parametrize("op", [masked_linear, dual_masked_linear], ids=lambda op: op.__name__)
def test_masked_linear_refuses_in_one_line(op, change, error, message):
    refuses(op, {"input": rand(2, 3), "weight": rand(5, 3), "mask": rand(1)} | change, error, message)


@pytest.mark.parametrize(
    ("op", "arguments"),
    [
        (dual_masked_conv2d, {"input": zeros(1, 4, 5, 5), "weight": zeros(6, 4, 3, 3), "mask": zeros(1)}),
        (dual_masked_linear, {"input": zeros(2, 3), "weight": zeros(5, 3), "mask": zeros(1)}),
    ],
)
def test_dual_ops_refuse_a_perturbed_input_unlike_the_input(op, arguments):
    shape, device = tuple(arguments["input"].shape), torch.zeros(1, device=DEVICE).device
    for other, error, message in (
        (zeros(7, *shape[1:]), ValueError, f"have the input's shape {shape}; got {(7, *shape[1:])}"),
        (zeros(*shape).half(), TypeError, "have the input's dtype torch.float32; got torch.float16"),
    ):
        refuses(op, arguments | {"perturbed_input": other}, error, f"perturbed_input must {message}")
    on_device = {name: tensor.to(DEVICE) for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=f"perturbed_input must be on the input's device {device}; got meta"):
        op(**on_device, perturbed_input=torch.empty(shape, device="meta"))


@pytest.mark.parametrize("name", ["input", "mask", "noise", "bias"])
def test_masked_conv2d_refuses_tensors_of_another_device(name):
    arguments = {"input": rand(1, 4, 5, 5), "weight": rand(6, 4, 3, 3), "mask": rand(1)}
    here = arguments["weight"].device
    arguments[name] = torch.empty({"input": (1, 4, 5, 5), "bias": (6,)}.get(name, (1,)), device="meta")
    message = {
        "input": f"weight must be on the input's device meta; got {here}",
        "bias": f"bias must be on the input's device {here}; got meta",
    }.get(name, f"{name} must be on the weight's device {here}; got meta")
    with pytest.raises(ValueError, match=f"^masked_conv2d: {message}$"):
        masked_conv2d(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        *FACTORS,
        ({"weight": zeros(2, dtype=torch.int64)}, TypeError, "weight must be a floating dtype; got torch.int64"),
        ({"dtype": torch.int8}, TypeError, "dtype must be floating; got torch.int8"),
    ],
    ids=named,
)
def test_effective_weight_refuses_in_one_line(change, error, message):
    refuses(effective_weight, {"weight": rand(6, 4, 3, 3), "mask": rand(1)} | change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"mask": zeros(1, dtype=torch.int64)}, TypeError, "mask must be a floating dtype; got torch.int64"),
        ({"lower": 2.0}, ValueError, "lower must not be above upper; got lower 2.0 and upper 1.0"),
        ({"lower": zeros(4)}, ValueError, "lower must broadcast to mask (3,); got (4,)"),
        ({"lower": zeros(2, 3)}, ValueError, "lower must broadcast to mask (3,); got (2, 3)"),
    ],
    ids=named,
)
def test_clip_mask_refuses_in_one_line(change, error, message):
    refuses(clip_mask_, {"mask": rand(3)} | change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": zeros(4)}, ValueError, "weight must have one value per channel; got (4,) for input (2, 3, 5)"),
        ({"input": zeros(3)}, ValueError, "weight must have one value per channel; got (3,) for input (3,)"),
        ({"input": zeros(2, 3, dtype=torch.int64)}, TypeError, "input must be a floating dtype; got torch.int64"),
        ({"mask": zeros(2)}, ValueError, "mask must broadcast to weight (3,); got mask (2,)"),
        ({"noise": zeros(3, 1)}, ValueError, "noise must broadcast to weight (3,); got noise (3, 1)"),
        ({"noise_bias": zeros(2)}, ValueError, "noise_bias must broadcast to bias (3,); got noise_bias (2,)"),
        ({"noise_bias": zeros(3, dtype=torch.int8)}, TypeError, "noise_bias must be a floating dtype; got torch.int8"),
        (
            {"noise_bias": zeros(3), "bias": None},
            ValueError,
            "noise_bias needs a bias to act on; got noise_bias (3,) and no bias",
        ),
    ],
    ids=named,
)
def test_masked_batch_norm_refuses_in_one_line(change, error, message):
    arguments = {"input": rand(2, 3, 5), "weight": rand(3), "mask": rand(3), "bias": rand(3)}
    arguments |= {"running_mean": None, "running_var": None, "training": True}
    refuses(masked_batch_norm, arguments | change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": zeros(4)}, ValueError, "weight must have shape (3,); got (4,)"),
        ({"input": zeros(2, 4)}, ValueError, "input must end in (3,); got (2, 4)"),
        ({"input": zeros(2, 3, dtype=torch.int64)}, TypeError, "input must be a floating dtype; got torch.int64"),
        ({"mask": zeros(2)}, ValueError, "mask must broadcast to weight (3,); got mask (2,)"),
        ({"noise_bias": zeros(2)}, ValueError, "noise_bias must broadcast to bias (3,); got noise_bias (2,)"),
    ],
    ids=named,
)
def test_masked_layer_norm_refuses_in_one_line(change, error, message):
    arguments = {"input": rand(2, 3), "normalized_shape": [3], "weight": rand(3), "mask": rand(3), "bias": rand(3)}
    refuses(masked_layer_norm, arguments | change, error, message)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"radius": -1.0}, ValueError, "radius must be finite and not negative; got -1.0"),
        ({"radius": float("inf")}, ValueError, "radius must be finite and not negative; got inf"),
        ({"radius": float("nan")}, ValueError, "radius must be finite and not negative; got nan"),
        ({"batch_dims": 3}, ValueError, "batch_dims must be between 0 and 2 for input (2, 3); got 3"),
        ({"batch_dims": -1}, ValueError, "batch_dims must be between 0 and 2 for input (2, 3); got -1"),
        ({"input": zeros(2, dtype=torch.int64)}, TypeError, "input must be a floating dtype; got torch.int64"),
    ],
    ids=named,
)
@pytest.mark.parametrize("op", [rescale_to_l1_ball, project_onto_l1_ball], ids=lambda op: op.__name__)
def test_l1_ball_refuses_in_one_line(op, change, error, message):
    refuses(op, {"input": rand(2, 3), "radius": 1.0} | change, error, message)


@pytest.mark.parametrize("name", [name for name in functional.__all__ if name not in ("clip_mask_", "mask_to_bytes")])
def test_every_function_refuses_a_backend_that_does_not_exist(name):
    arguments = {"masked_batch_norm": (rand(2, 1), None, None, rand(1), rand(1), None, True)}
    arguments |= {"masked_layer_norm": (rand(2, 1), [1], rand(1), rand(1))}
    arguments |= dict.fromkeys(("masked_linear", "dual_masked_linear"), (rand(1, 1),) * 3)
    arguments |= dict.fromkeys(("rescale_to_l1_ball", "project_onto_l1_ball"), (rand(2), 1.0))
    arguments |= {"effective_weight": (rand(2), rand(2)), "masked_conv1d": (rand(1, 1, 1),) * 3}
    arguments |= {"masked_conv3d": (rand(1, 1, 1, 1, 1),) * 3}
    arguments |= {"many_masked_conv2d": (rand(1, 1, 1, 1), rand(1, 1, 1, 1), rand(1, 1, 1, 1, 1))}
    arguments |= {"many_masked_linear": (rand(1, 1), rand(1, 1), rand(1, 1, 1))}
    arguments |= {"affine_relu_": (rand(1, 1), rand(1))}
    arguments |= {"prepare_images": (rand(1, 1, 1, 1),), "trigger_step_": (rand(1, 1, 1, 1), rand(1, 1, 1, 1), 0.1)}
    with pytest.raises(ValueError, match=NO_METAL):
        getattr(functional, name)(*arguments.get(name, (rand(1, 1, 1, 1),) * 3), backend="metal")


def test_why_not_and_explain_refuse_what_does_not_exist():
    with pytest.raises(ValueError, match=NO_METAL):
        why_not("metal", "masked_conv")
    with pytest.raises(ValueError, match=r"^explain: expected one of effective_weight, .*; got 'conv'$"):
        explain("conv")
