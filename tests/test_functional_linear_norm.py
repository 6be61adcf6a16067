from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, Calls, check, plain_dual, plain_layer, plain_weight, poisoned, rand, saved_for_backward

from maskops.functional import dual_masked_linear, masked_batch_norm, masked_layer_norm, masked_linear

LINEAR = {
    "batch": ((4, 6), (5, 6)),
    "vector": ((6,), (5, 6)),
    "sequence": ((2, 3, 6), (5, 6)),
    "many dimensions": ((2, 1, 2, 3, 6), (5, 6)),
    "no row": ((0, 6), (5, 6)),
    "no row of a sequence": ((2, 0, 6), (5, 6)),
    "no input feature": ((4, 0), (5, 0)),
    "no output feature": ((4, 6), (0, 6)),
    "one": ((1, 1), (1, 1)),
}
MASKS = {"weight": (5, 6), "neuron": (5, 1), "input feature": (6,), "number": ()}


def linear_tensors(input, weight, dtype=torch.float32, weight_dtype=None, mask=None, noise=None, bias=True):
    weight_dtype = weight_dtype or dtype
    made = {"input": rand(*input, dtype=dtype), "weight": rand(*weight, dtype=weight_dtype)}
    made["mask"] = rand(*(weight if mask is None else mask), dtype=weight_dtype)
    if noise is not None:
        made["noise"] = rand(*noise, dtype=weight_dtype)
    if bias:
        made["bias"] = rand(weight[0], dtype=weight_dtype)
    return made


@pytest.mark.parametrize("case", LINEAR)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_linear_is_linear_of_the_effective_weight(case, dtype, backend):
    input, weight = LINEAR[case]
    check(masked_linear, partial(plain_layer, F.linear), linear_tensors(input, weight, dtype, noise=weight), backend)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("noise", [None, *MASKS])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_masked_linear_takes_every_mask_that_broadcasts(mask, noise, bias, backend):
    inputs = linear_tensors((4, 6), (5, 6), mask=MASKS[mask], noise=noise and MASKS[noise], bias=bias)
    check(masked_linear, partial(plain_layer, F.linear), inputs, backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", ["weight", "neuron"])
def test_masked_linear_mixes_16_bit_and_float32(dtype, weight_dtype, mask, backend):
    inputs = linear_tensors((4, 6), (5, 6), dtype, weight_dtype, MASKS[mask], MASKS[mask])
    inputs["mask"] = inputs["mask"].float()
    check(masked_linear, partial(plain_layer, F.linear), inputs, backend)


@pytest.mark.parametrize("two_inputs", [False, True], ids=["one input", "two inputs"])
@pytest.mark.parametrize("noise", [None, "weight", "neuron"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dual_masked_linear_is_two_single_calls(two_inputs, noise, dtype, backend):
    inputs = linear_tensors((2, 3, 6), (5, 6), dtype, noise=noise and MASKS[noise])
    if two_inputs:
        inputs["perturbed_input"] = rand(2, 3, 6, dtype=dtype)
    check(dual_masked_linear, partial(plain_dual, F.linear), inputs, backend)


@pytest.mark.parametrize("used", [0, 1], ids=["clean", "perturbed"])
@pytest.mark.parametrize("two_inputs", [False, True], ids=["one input", "two inputs"])
def test_dual_masked_linear_with_one_branch_in_the_loss(used, two_inputs, backend):
    inputs = linear_tensors((4, 6), (5, 6), noise=(5, 6))
    if two_inputs:
        inputs["perturbed_input"] = rand(4, 6)

    def one(dual, **arguments):
        return dual(**arguments)[used]

    check(partial(one, dual_masked_linear), partial(one, partial(plain_dual, F.linear)), inputs, backend)


@pytest.mark.parametrize("layout", ["transposed input", "transposed weight", "strided", "expanded"])
@pytest.mark.parametrize("summed", [False, True], ids=["random gradient", "expanded gradient"])
def test_masked_linear_takes_every_layout(layout, summed, backend):
    inputs = linear_tensors((3, 4, 6), (5, 6))
    if layout == "transposed input":
        inputs["input"] = rand(4, 3, 6).transpose(0, 1)
    if layout == "transposed weight":
        inputs["weight"] = rand(6, 5).t()
    if layout == "strided":
        inputs["input"], inputs["mask"] = rand(6, 4, 12)[::2, :, ::2], rand(10, 12)[::2, 1::2]
    if layout == "expanded":
        inputs["input"], inputs["mask"] = rand(1, 4, 1).expand(3, 4, 6), rand(5, 1).expand(5, 6)

    def layer(function, **arguments):
        return function(**arguments).sum() if summed else function(**arguments)

    check(partial(layer, masked_linear), partial(layer, partial(plain_layer, F.linear)), inputs, backend)


@pytest.mark.parametrize("wanted", ["input", "weight", "mask", "noise", "bias"])
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
def test_masked_linear_keeps_the_input_for_the_factors_alone(wanted, dual):
    inputs = linear_tensors((4, 6), (5, 6), noise=(5, 6))
    leaves = {name: tensor.requires_grad_(name == wanted) for name, tensor in inputs.items()}
    layer = dual_masked_linear if dual else masked_linear
    saved = [tensor.data_ptr() for tensor in saved_for_backward(lambda: layer(**leaves))]
    assert saved.count(inputs["input"].data_ptr()) == (wanted in ("mask", "noise", "weight"))
    assert set(saved) <= {tensor.data_ptr() for tensor in inputs.values()}
    with Calls() as calls:
        outputs = layer(**leaves)
        (sum(output.sum() for output in outputs) if dual else outputs.sum()).backward()
    name = "dual_masked_linear_backward" if dual else "masked_linear_backward"
    ((*_, needs),) = calls.arguments(f"maskops::{name}")
    order = ("input", "perturbed_input", "weight", "mask", "noise", "bias") if dual else tuple(leaves)
    assert [name for name, need in zip(order, needs, strict=True) if need] == [wanted]


def test_masked_linear_fills_every_output_and_repeats_itself(backend):
    inputs = linear_tensors((4, 6), (5, 6), noise=(5, 6))
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run():
        output = masked_linear(**inputs, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    with poisoned():
        first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def plain_shift(bias, noise_bias):
    return bias if noise_bias is None else bias * (1 + noise_bias)


def plain_batch_norm(input, weight, mask, noise=None, bias=None, noise_bias=None, running=(None, None), training=True):
    scale, shift = plain_weight(weight, mask, noise), plain_shift(bias, noise_bias)
    mean, var = (statistic if statistic is None else statistic.to(weight.dtype) for statistic in running)
    return F.batch_norm(input, mean, var, scale, shift, training)


def our_batch_norm(input, weight, mask, running=(None, None), training=True, **factors):
    mean, var = running
    return masked_batch_norm(input, mean, var, weight, mask, training=training, **factors)


def norm_tensors(input, weight, dtype, factors, weight_dtype=None):
    made = {"input": rand(*input, dtype=dtype)}
    for name in ("weight", "mask", *factors):
        made[name] = rand(*weight, dtype=weight_dtype or dtype)
    return made


FACTORS = [(), ("bias",), ("noise",), ("noise", "bias"), ("noise", "bias", "noise_bias")]


@pytest.mark.parametrize("factors", FACTORS, ids=lambda names: "+".join(names) or "scale")
@pytest.mark.parametrize("input", [(6, 3), (4, 3, 5), (2, 3, 4, 5)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_batch_norm_is_batch_norm_with_a_masked_scale(factors, input, training, dtype, backend):
    running = (None, None) if training else (rand(3, dtype=dtype), rand(3, dtype=dtype).abs() + 0.5)
    bound = {"running": running, "training": training}
    inputs = norm_tensors(input, (3,), dtype, factors)
    check(partial(our_batch_norm, **bound), partial(plain_batch_norm, **bound), inputs, backend)


def test_masked_batch_norm_16_bit_input_over_float32_scale(backend):
    inputs = norm_tensors((4, 3, 5), (3,), torch.bfloat16, ("bias", "noise", "noise_bias"), torch.float32)
    check(our_batch_norm, plain_batch_norm, inputs, backend)


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0])
def test_masked_batch_norm_updates_the_running_statistics_as_torch_does(momentum):
    ours, torchs = ([torch.zeros(3), torch.ones(3)] for _ in range(2))
    x, ones = torch.randn(8, 3), torch.ones(3)
    masked_batch_norm(x, *ours, ones, rand(3), training=True, momentum=momentum)
    F.batch_norm(x, *torchs, ones, None, True, momentum)
    assert all(torch.equal(one, other) for one, other in zip(ours, torchs, strict=True))


@pytest.mark.parametrize("factors", FACTORS, ids=lambda names: "+".join(names) or "scale")
@pytest.mark.parametrize("normalized", [(5,), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_layer_norm_is_layer_norm_with_a_masked_scale(factors, normalized, dtype, backend):
    def plain(input, weight, mask, noise=None, bias=None, noise_bias=None):
        return F.layer_norm(input, normalized, plain_weight(weight, mask, noise), plain_shift(bias, noise_bias))

    def ours(input, weight, mask, **rest):
        return masked_layer_norm(input, list(normalized), weight, mask, **rest)

    check(ours, plain, norm_tensors((2, 3, 5), normalized, dtype, factors), backend)


def test_masked_norms_take_a_mask_of_one_number(backend):
    inputs = norm_tensors((2, 3, 5), (3,), torch.float32, ("bias", "noise", "noise_bias"))
    inputs |= {"mask": rand(1), "noise": rand(), "noise_bias": rand(1)}
    check(our_batch_norm, plain_batch_norm, inputs, backend)


def test_masked_norms_use_the_backend_that_is_forced_for_scale_and_shift():
    inputs = norm_tensors((2, 3), (3,), torch.float32, ("bias", "noise_bias"))
    with Calls() as calls:
        our_batch_norm(**inputs, backend="reference")
        masked_layer_norm(inputs.pop("input"), [3], **inputs, backend="reference")
    assert len(calls.arguments("maskops::effective_weight")) == 4
    assert calls.backends("maskops::effective_weight") == ["reference"] * 4
