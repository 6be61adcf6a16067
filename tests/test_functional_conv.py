from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import DTYPES, Calls, check, plain_dual, plain_layer, poisoned, rand, saved_for_backward

from maskops.backends import reference
from maskops.functional import (
    dual_masked_conv2d,
    masked_conv1d,
    masked_conv2d,
    masked_conv3d,
    masked_conv_transpose2d,
)

# input, weight, arguments
CONV2D = {
    "3x3": ((2, 4, 6, 5), (6, 4, 3, 3), {}),
    "1x1": ((2, 4, 5, 5), (3, 4, 1, 1), {}),
    "stride": ((2, 3, 7, 8), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "stride pair": ((1, 3, 9, 8), (4, 3, 3, 2), {"stride": (3, 2), "padding": (0, 1)}),
    "list of one": ((1, 2, 6, 6), (2, 2, 3, 3), {"stride": [2], "padding": [1], "dilation": [1]}),
    "dilation": ((2, 3, 9, 9), (4, 3, 3, 3), {"dilation": (2, 3), "padding": 2}),
    "groups": ((2, 4, 6, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 5, 6, 6), (5, 1, 3, 3), {"groups": 5, "padding": 1}),
    "depthwise stride": ((2, 4, 7, 7), (4, 1, 3, 3), {"groups": 4, "padding": 1, "stride": 2}),
    "depthwise multiplier": ((2, 3, 6, 6), (6, 1, 5, 5), {"groups": 3, "padding": 2}),
    "same": ((2, 3, 6, 7), (4, 3, 3, 5), {"padding": "same"}),
    "same even": ((2, 3, 6, 7), (4, 3, 2, 4), {"padding": "same"}),
    "same even dilated": ((1, 2, 8, 9), (4, 2, 4, 2), {"padding": "same", "dilation": (1, 3)}),
    "same even groups": ((1, 4, 5, 5), (4, 2, 2, 3), {"padding": "same", "groups": 2}),
    "valid": ((2, 3, 6, 6), (4, 3, 3, 3), {"padding": "valid", "stride": 2}),
    "unbatched": ((3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
    "unbatched same even": ((3, 6, 6), (4, 3, 2, 2), {"padding": "same"}),
    "large padding": ((1, 2, 3, 3), (2, 2, 3, 3), {"padding": 4}),
    "one pixel": ((1, 1, 1, 1), (1, 1, 1, 1), {}),
    "no image": ((0, 3, 6, 6), (4, 3, 3, 3), {"padding": 1}),
}
TRANSPOSE2D = {
    "3x3": ((2, 4, 5, 4), (4, 3, 3, 3), {}),
    "stride": ((2, 4, 5, 5), (4, 3, 3, 3), {"stride": 2, "padding": 1}),
    "output_padding": ((1, 4, 4, 4), (4, 3, 3, 3), {"stride": (3, 2), "output_padding": (2, 1), "padding": 1}),
    "output_padding in dilation": ((1, 2, 4, 4), (2, 3, 3, 3), {"dilation": 3, "output_padding": 2}),
    "groups": ((2, 4, 4, 4), (4, 3, 3, 3), {"groups": 2, "stride": 2, "output_padding": 1}),
    "depthwise": ((2, 4, 4, 4), (4, 1, 2, 2), {"groups": 4, "stride": 2}),
    "unbatched": ((4, 5, 5), (4, 2, 3, 3), {"padding": 1, "dilation": 2}),
    "no image": ((0, 4, 5, 5), (4, 2, 3, 3), {}),
}
OTHERS = {
    "1d": (masked_conv1d, F.conv1d, (2, 4, 9), (6, 2, 3), {"groups": 2, "stride": 2, "padding": 1}),
    "1d same even": (masked_conv1d, F.conv1d, (2, 3, 9), (4, 3, 4), {"padding": "same", "dilation": 3}),
    "1d unbatched": (masked_conv1d, F.conv1d, (3, 9), (4, 3, 2), {}),
    "3d": (masked_conv3d, F.conv3d, (2, 2, 4, 5, 4), (4, 2, 3, 2, 1), {"padding": (1, 0, 0), "stride": (1, 2, 1)}),
    "3d same even": (masked_conv3d, F.conv3d, (1, 2, 4, 4, 5), (2, 1, 2, 3, 4), {"padding": "same", "groups": 2}),
    "3d unbatched": (masked_conv3d, F.conv3d, (2, 4, 4, 4), (3, 2, 2, 2, 2), {"dilation": 2}),
}
GRANULARITIES = {
    "weight": (6, 4, 3, 3),
    "kernel": (6, 4, 1, 1),
    "neuron": (6, 1, 1, 1),
    "number": (),
    "one": (1,),
    "input channel": (4, 1, 1),
    "pixel": (3, 3),
    "row": (6, 1, 3, 1),
}


def tensors(input, weight, mask=None, noise=None, bias=None, dtype=torch.float32, weight_dtype=None):
    """Random tensors of these shapes; the mask has the weight's shape unless told otherwise."""
    weight_dtype = weight_dtype or dtype
    made = {
        "input": rand(*input, dtype=dtype),
        "weight": rand(*weight, dtype=weight_dtype),
        "mask": rand(*(weight if mask is None else mask), dtype=weight_dtype),
    }
    if noise is not None:
        made["noise"] = rand(*noise, dtype=weight_dtype)
    if bias is not None:
        made["bias"] = rand(bias, dtype=weight_dtype)
    return made


@pytest.mark.parametrize("case", CONV2D)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_conv2d_is_conv2d_of_the_effective_weight(case, dtype, backend):
    input, weight, options = CONV2D[case]
    inputs = tensors(input, weight, noise=weight, bias=weight[0], dtype=dtype)
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), inputs, backend)


@pytest.mark.parametrize("case", TRANSPOSE2D)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_conv_transpose2d_is_conv_transpose2d_of_the_effective_weight(case, dtype, backend):
    input, weight, options = TRANSPOSE2D[case]
    bias = weight[1] * options.get("groups", 1)
    inputs = tensors(input, weight, noise=weight, bias=bias, dtype=dtype)
    plain = partial(plain_layer, F.conv_transpose2d, **options)
    check(partial(masked_conv_transpose2d, **options), plain, inputs, backend)


@pytest.mark.parametrize("case", OTHERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_conv1d_and_3d_are_their_plain_sisters(case, dtype, backend):
    masked, plain, input, weight, options = OTHERS[case]
    inputs = tensors(input, weight, noise=weight, bias=weight[0], dtype=dtype)
    check(partial(masked, **options), partial(plain_layer, plain, **options), inputs, backend)


@pytest.mark.parametrize("mask", GRANULARITIES)
@pytest.mark.parametrize("noise", [None, *GRANULARITIES])
def test_masked_conv2d_takes_every_mask_that_broadcasts(mask, noise, backend):
    shapes = (2, 4, 5, 5), (6, 4, 3, 3), GRANULARITIES[mask]
    inputs = tensors(*shapes, noise=None if noise is None else GRANULARITIES[noise])
    check(masked_conv2d, partial(plain_layer, F.conv2d), inputs, backend)


@pytest.mark.parametrize("noise", [None, (6, 4, 3, 3)], ids=["no noise", "noise"])
@pytest.mark.parametrize("bias", [None, 6], ids=["no bias", "bias"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masked_conv2d_mixes_16_bit_and_float32(noise, bias, dtype, weight_dtype, backend):
    inputs = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=noise, bias=bias, dtype=dtype, weight_dtype=weight_dtype)
    check(partial(masked_conv2d, padding=1), partial(plain_layer, F.conv2d, padding=1), inputs, backend)


@pytest.mark.parametrize("mask", ["weight", "neuron"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_masked_conv2d_float32_mask_over_16_bit_weight_keeps_its_gradient_in_float32(mask, dtype, backend):
    inputs = tensors((4, 4, 6, 6), (6, 4, 3, 3), dtype=dtype)
    inputs["mask"] = rand(*GRANULARITIES[mask])
    inputs["noise"] = rand(*GRANULARITIES[mask])
    check(masked_conv2d, partial(plain_layer, F.conv2d), inputs, backend)


@pytest.mark.parametrize("two_inputs", [False, True], ids=["one input", "two inputs"])
@pytest.mark.parametrize("noise", [None, (4, 2, 3, 2), (4, 1, 1, 1)], ids=["no noise", "noise", "neuron noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", [(2,), ()], ids=["batch", "image"])
def test_dual_masked_conv2d_is_two_single_calls(two_inputs, noise, dtype, batch, backend):
    options = {"padding": "same", "dilation": (2, 1), "groups": 2}
    inputs = tensors((*batch, 4, 6, 6), (4, 2, 3, 2), noise=noise, bias=4, dtype=dtype)
    if two_inputs:
        inputs["perturbed_input"] = rand(*batch, 4, 6, 6, dtype=dtype)
    check(partial(dual_masked_conv2d, **options), partial(plain_dual, F.conv2d, **options), inputs, backend)


@pytest.mark.parametrize("used", [0, 1], ids=["clean", "perturbed"])
@pytest.mark.parametrize("two_inputs", [False, True], ids=["one input", "two inputs"])
def test_dual_masked_conv2d_branch_outside_the_loss_costs_nothing(used, two_inputs, backend):
    inputs = tensors((2, 4, 5, 5), (6, 4, 3, 3), noise=(6, 4, 3, 3), bias=6)
    if two_inputs:
        inputs["perturbed_input"] = rand(2, 4, 5, 5)

    def one(dual, **arguments):
        return dual(**arguments)[used]

    check(partial(one, dual_masked_conv2d), partial(one, partial(plain_dual, F.conv2d)), inputs, backend)
    with Calls() as calls:
        leaves = {name: tensor.detach().requires_grad_() for name, tensor in inputs.items()}
        one(dual_masked_conv2d, **leaves, backend=backend).sum().backward()
    grads = calls.arguments("maskops::dual_masked_conv_backward")[0][:2]
    assert [grad is None for grad in grads] == [used == 1, used == 0]


@pytest.mark.parametrize("layout", ["channels_last input", "channels_last weight", "both", "strided", "expanded"])
@pytest.mark.parametrize("options", [{}, {"groups": 4}, {"padding": "same"}], ids=str)
@pytest.mark.parametrize("unbatched", [False, True], ids=["batch", "image"])
def test_masked_conv2d_returns_torch_s_layout(layout, options, unbatched, backend):
    inputs = tensors((2, 4, 6, 6), (8, 4 // options.get("groups", 1), 2, 3), bias=8)
    if layout in ("channels_last input", "both"):
        inputs["input"] = inputs["input"].to(memory_format=torch.channels_last)
    if layout in ("channels_last weight", "both"):
        inputs["weight"] = inputs["weight"].to(memory_format=torch.channels_last)
    if layout == "strided":
        inputs["input"] = rand(4, 4, 12, 12)[::2, :, 1::2, ::2]
        inputs["mask"] = rand(3, 2, *inputs["weight"].shape[1::-1]).permute(3, 2, 1, 0)
    if layout == "expanded":
        inputs["input"] = rand(1, 4, 1, 6).expand(2, 4, 6, 6)
        inputs["mask"] = rand(8, 1, 1, 1).expand(inputs["weight"].shape)
    if unbatched:
        inputs["input"] = inputs["input"][1]
    check(partial(masked_conv2d, **options), partial(plain_layer, F.conv2d, **options), inputs, backend)


@pytest.mark.parametrize("layout", ["input", "weight", "both", "neither"])
@pytest.mark.parametrize("frozen", [False, True], ids=["all wanted", "input alone wanted"])
def test_masked_conv2d_input_gradient_has_torch_s_layout(layout, frozen, backend):
    def gradient(layer, **options):
        x, weight, mask = rand(2, 4, 6, 6), rand(8, 4, 3, 3), rand(8, 4, 3, 3)
        if layout in ("input", "both"):
            x = x.to(memory_format=torch.channels_last)
        if layout in ("weight", "both"):
            weight = weight.to(memory_format=torch.channels_last)
        output = layer(x.requires_grad_(), weight, mask.requires_grad_(not frozen), **options)
        return torch.autograd.grad(output.square().sum(), x)[0]

    ours, plains = gradient(masked_conv2d, backend=backend), gradient(partial(plain_layer, F.conv2d))
    assert ours.stride() == plains.stride()


@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
def test_masked_conv2d_takes_an_expanded_gradient(dual, backend):
    def total(layer, **inputs):
        outputs = layer(**inputs)
        return sum(output.sum() for output in outputs) if dual else outputs.sum()

    masked, plain = (dual_masked_conv2d, plain_dual) if dual else (masked_conv2d, plain_layer)
    inputs = tensors((2, 3, 5, 5), (4, 3, 3, 3), noise=(4, 1, 1, 1), bias=4)
    check(partial(total, masked), partial(total, partial(plain, F.conv2d)), inputs, backend)


def test_masked_conv2d_fills_every_output_and_repeats_itself(backend):
    inputs = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=(6, 4, 3, 3), bias=6)
    leaves = [tensor.requires_grad_() for tensor in inputs.values()]

    def run():
        output = masked_conv2d(**inputs, padding=1, backend=backend)
        return output, *torch.autograd.grad(output.square().sum(), leaves)

    with poisoned():
        first, second = run(), run()
    for one, other in zip(first, second, strict=True):
        assert one.isfinite().all()
        assert torch.equal(one, other)


def keeps(function, inputs, wanted):
    """How often each tensor is kept by the graph, and how many others are, when the wanted gradients are asked for."""
    leaves = {name: tensor.detach().requires_grad_(name in wanted) for name, tensor in inputs.items()}
    saved = [tensor.data_ptr() for tensor in saved_for_backward(lambda: function(**leaves))]
    counts = {name: saved.count(tensor.data_ptr()) for name, tensor in leaves.items()}
    return counts, len(saved) - sum(counts.values())


@pytest.mark.parametrize("wanted", ["input", "mask", "noise", "weight", "bias"])
@pytest.mark.parametrize("dual", [False, True], ids=["single", "dual"])
def test_masked_conv2d_keeps_the_input_for_the_factors_alone_and_no_effective_weight(wanted, dual):
    inputs = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=(6, 4, 3, 3), bias=6)
    kept, others = keeps(dual_masked_conv2d if dual else masked_conv2d, inputs, {wanted})
    assert kept["input"] == (wanted in ("mask", "noise", "weight"))
    assert kept["bias"] == 0
    assert max(kept.values()) == 1
    assert others == 0


def test_dual_masked_conv2d_keeps_each_of_two_inputs_once():
    inputs = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=(6, 4, 3, 3))
    inputs["perturbed_input"] = rand(2, 4, 6, 6)
    kept, others = keeps(dual_masked_conv2d, inputs, {"mask"})
    assert (kept["input"], kept["perturbed_input"], others) == (1, 1, 0)
    kept, others = keeps(dual_masked_conv2d, inputs, {"input", "perturbed_input"})
    assert (kept["input"], kept["perturbed_input"], others) == (0, 0, 0)


@pytest.mark.parametrize("wanted", ["input", "weight", "mask", "noise", "bias"])
def test_masked_conv2d_computes_no_gradient_that_was_not_asked_for(wanted):
    inputs = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=(6, 4, 3, 3), bias=6)
    leaves = {name: tensor.requires_grad_(name == wanted) for name, tensor in inputs.items()}
    output = masked_conv2d(**leaves)
    with Calls() as calls:
        output.sum().backward()
    ((*_, needs),) = calls.arguments("maskops::masked_conv_backward")
    assert needs == [name == wanted for name in ("input", "weight", "mask", "noise", "bias")]
    assert [name for name, tensor in leaves.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("wanted", ["input", "weight", "mask", "noise", "bias"])
def test_masked_conv_backward_of_the_reference_asks_torch_for_one_gradient(wanted):
    made = tensors((2, 4, 6, 6), (6, 4, 3, 3), noise=(6, 4, 3, 3))
    needs = [name == wanted for name in ("input", "weight", "mask", "noise", "bias")]
    geometry = ((1, 1), (0, 0), (1, 1), False, (0, 0), 1)
    with Calls() as calls:
        grad = rand(2, 6, 4, 4)
        reference.masked_conv_backward(grad, *made.values(), made["input"].shape, *geometry, needs)
    ((*_, output_mask),) = calls.arguments("aten::convolution_backward")
    assert output_mask == [wanted == "input", wanted in ("weight", "mask", "noise"), wanted == "bias"]
