"""A convolution block: convolution, frozen batch norm, residual and ReLU in one pass."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers import Calls, check, plain_layer, rand, saved_for_backward

from maskops.functional import masked_conv2d_relu

# input, weight, options
BLOCKS = {
    "3x3": ((2, 4, 6, 5), (6, 4, 3, 3), {"padding": 1}),
    "packed bytes": ((2, 16, 5, 5), (8, 16, 3, 3), {"padding": 1, "stride": 2}),
    "1x1": ((2, 16, 3, 3), (24, 16, 1, 1), {}),
    "groups": ((2, 4, 6, 6), (8, 2, 3, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "same even": ((2, 3, 6, 7), (8, 3, 2, 4), {"padding": "same"}),
    "no image": ((0, 3, 6, 6), (8, 3, 3, 3), {}),
}


def plain_block(input, weight, mask, noise=None, bias=None, scale=None, shift=None, residual=None, **options):
    output = plain_layer(F.conv2d, input, weight, mask, noise, bias, **options)
    if scale is not None:
        output = output * scale.view(-1, 1, 1).to(output)
    if shift is not None:
        output = output + shift.view(-1, 1, 1).to(output)
    if residual is not None:
        output = output + residual
    return output.relu()


def tensors(case, dtype=torch.float32, channels_last=False):
    input, weight, options = BLOCKS[case]
    made = {"input": rand(*input, dtype=dtype), "weight": rand(*weight, dtype=dtype)}
    made |= {"mask": rand(*weight, dtype=dtype), "noise": rand(*weight, dtype=dtype)}
    made["bias"] = rand(weight[0], dtype=dtype)
    output = plain_block(**made, **options)
    made["residual"] = rand(*output.shape, dtype=dtype)
    if channels_last:
        for name in ("input", "residual"):
            made[name] = made[name].to(memory_format=torch.channels_last)
    frozen = {"scale": rand(weight[0], dtype=dtype), "shift": rand(weight[0], dtype=dtype)}
    return made, frozen, options


@pytest.mark.parametrize("case", BLOCKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels_last", [True, False], ids=["channels last", "contiguous"])
def test_a_block_is_its_parts(case, dtype, channels_last, backend):
    made, frozen, options = tensors(case, dtype, channels_last)

    def plain(**inputs):
        return plain_block(**inputs, **{name: value.to(inputs["input"]) for name, value in frozen.items()}, **options)

    check(partial(masked_conv2d_relu, **frozen, **options), plain, made, backend)


@pytest.mark.parametrize("parts", [(), ("scale",), ("shift",), ("residual",), ("bias", "shift")], ids=str)
def test_every_part_may_be_left_out(parts, backend):
    made, frozen, options = tensors("packed bytes", channels_last=True)
    made = {name: value for name, value in made.items() if name in ("input", "weight", "mask", *parts)}
    frozen = {name: value for name, value in frozen.items() if name in parts}
    check(partial(masked_conv2d_relu, **frozen, **options), partial(plain_block, **frozen, **options), made, backend)


def test_nothing_is_kept_but_bits_when_the_layer_is_frozen():
    made, frozen, options = tensors("packed bytes", channels_last=True)
    made["input"].requires_grad_()
    saved = saved_for_backward(lambda: masked_conv2d_relu(**made, **frozen, **options))
    kept = {tensor.data_ptr() for tensor in [made["weight"], made["mask"], made["noise"], frozen["scale"]]}
    others = [tensor for tensor in saved if tensor.data_ptr() not in kept]
    assert [tensor.dtype for tensor in others] == [torch.uint8]
    assert others[0].numel() == made["residual"].numel() // 8


def test_a_residual_alone_costs_no_convolution_backward():
    made, frozen, options = tensors("3x3")
    made["residual"].requires_grad_()
    output = masked_conv2d_relu(**made, **frozen, **options)
    with Calls() as calls:
        output.sum().backward()
    assert not calls.arguments("maskops::masked_conv_backward")
    assert torch.equal(made["residual"].grad, (output > 0).float())


def test_a_block_is_twice_differentiable():
    made, frozen, options = tensors("3x3", torch.float64)
    leaves = [made[name].requires_grad_() for name in ("input", "mask", "residual")]

    def block(input, mask, residual):
        changed = {**made, "input": input, "mask": mask, "residual": residual}
        return masked_conv2d_relu(**changed, **frozen, **options)

    assert torch.autograd.gradgradcheck(block, leaves)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.ones(5)}, r"^masked_conv2d_relu: scale must have shape \(6,\); got \(5,\)$"),
        ({"shift": torch.ones(6, 1)}, r"^masked_conv2d_relu: shift must have shape \(6,\); got \(6, 1\)$"),
        ({"scale": torch.ones(6, requires_grad=True)}, "^masked_conv2d_relu: scale must be frozen; got one that"),
        ({"residual": torch.ones(2, 6, 5, 5)}, r"residual must have the output's shape \(2, 6, 6, 5\); got"),
        ({"input": torch.ones(4, 6, 5)}, r"^masked_conv2d_relu: input must have 4 dimensions; got \(4, 6, 5\)$"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(changes, message):
    made, frozen, options = tensors("3x3")
    with pytest.raises(ValueError, match=message):
        masked_conv2d_relu(**{**made, **frozen, **changes}, **options)
