"""Every public function under gradcheck, torch.func, autocast and torch.compile."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from helpers import DEVICE, largest, plain_dual, plain_layer, rand
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.utils.checkpoint import checkpoint

from maskops import functional
from maskops.functional import (
    affine_relu_,
    clip_mask_,
    dual_masked_conv2d,
    dual_masked_linear,
    effective_weight,
    effective_weights,
    many_masked_conv2d,
    many_masked_linear,
    masked_batch_norm,
    masked_conv1d,
    masked_conv2d,
    masked_conv2d_relu,
    masked_conv3d,
    masked_conv_transpose2d,
    masked_layer_norm,
    masked_linear,
    prepare_images,
    project_onto_l1_ball,
    rescale_to_l1_ball,
)

SAME = {"padding": "same", "groups": 2}
TRANSPOSED = {"stride": 2, "padding": 1, "output_padding": 1}


def batch_norm(training, input, weight, mask, bias=None, noise=None, noise_bias=None):
    running = (None, None) if training else (torch.full_like(weight, 0.5).detach(), torch.full_like(weight, 2).detach())
    shifted = {"noise": noise, "noise_bias": noise_bias}
    return masked_batch_norm(input, *running, weight, mask, bias, training=training, **shifted)


def layer_norm(input, weight, mask, bias=None, noise=None, noise_bias=None):
    return masked_layer_norm(input, [3], weight, mask, bias, noise=noise, noise_bias=noise_bias)


def layer(input, weight, mask=None, bias=None, perturbed=False):
    shapes = {"input": input, "weight": weight, "mask": mask or weight, "noise": mask or weight}
    shapes |= {"bias": bias} if bias else {}
    return shapes | ({"perturbed_input": input} if perturbed else {})


def many(input, weight, mask=None):
    """Two masks, with inputs of their own or with one."""
    factors = dict.fromkeys(("masks", "noise"), (2, *(mask or weight)))
    return {"input": input, "weight": weight, **factors, "bias": weight[:1]}


def plain_many(layer, input, masks, noise, **others):
    inputs = input if input.dim() > others["weight"].dim() else [input] * len(masks)
    return torch.stack(
        [plain_layer(layer, input=x, mask=m, noise=n, **others) for x, m, n in zip(inputs, masks, noise, strict=True)]
    )


def conv_block(input, weight, mask, noise, bias, residual):
    scale = torch.tensor([0.5, 2.0], dtype=weight.dtype, device=weight.device)
    return masked_conv2d_relu(input, weight, mask, bias, noise=noise, scale=scale, shift=-scale, residual=residual)


def affine_relu(input, residual):
    scale = torch.tensor([0.5, -2.0], dtype=input.dtype, device=input.device)
    return affine_relu_(input * 1, scale, scale + 1, residual, 2.0)


def two_layers(mask, noise):
    weight = torch.linspace(-1, 1, 12, dtype=mask.dtype, device=mask.device).view(3, 2, 2)
    scales = [weight[:, 0, 0], weight[:, 1, 1]]
    clean, perturbed = effective_weights([weight, weight.flip(0)], [mask, 2 * mask], [noise, noise + 1], scales)
    return torch.stack(clean + perturbed)


def plain_block(input, residual, **layer):
    output = plain_layer(F.conv2d, input, **layer)
    scale = torch.tensor([0.5, 2.0], dtype=output.dtype, device=output.device).view(-1, 1, 1)
    return (output * scale - scale + residual).to(output.dtype).relu()


def norm(input, channels=3):
    return {"input": input} | dict.fromkeys(("weight", "mask", "noise", "bias", "noise_bias"), (channels,))


def perturbed_images(trigger):
    images = torch.linspace(0, 1, 36, dtype=trigger.dtype, device=trigger.device).view(2, 2, 3, 3)
    std = torch.tensor([0.5, 2.0], dtype=trigger.dtype, device=trigger.device)
    return prepare_images(images, None, trigger, low=0.1, high=0.9, std=std)


# function, shapes of its tensors
CASES = {
    "affine_relu_": (affine_relu, {"input": (2, 2, 3, 3), "residual": (2, 2, 3, 3)}),
    "effective_weight": (effective_weight, {"weight": (3, 2, 2), "mask": (3, 2, 2), "noise": (3, 1, 1)}),
    "effective_weights": (two_layers, {"mask": (3, 2, 2), "noise": (3, 1, 1)}),
    "masked_conv1d": (partial(masked_conv1d, stride=2, padding=1), layer((2, 2, 5), (3, 2, 3), bias=(3,))),
    "masked_conv2d": (partial(masked_conv2d, **SAME), layer((2, 4, 3, 3), (2, 2, 2, 3), (2, 2, 1, 1), (2,))),
    "masked_conv2d of an image": (masked_conv2d, layer((2, 4, 4), (3, 2, 3, 3), (3, 1, 1, 1))),
    "masked_conv2d_relu": (
        conv_block,
        layer((2, 2, 4, 3), (2, 2, 2, 2), (2, 1, 1, 1), (2,)) | {"residual": (2, 2, 3, 2)},
    ),
    "masked_conv3d": (masked_conv3d, layer((1, 2, 3, 3, 3), (2, 2, 2, 2, 2), bias=(2,))),
    "masked_conv_transpose2d": (
        partial(masked_conv_transpose2d, **TRANSPOSED),
        layer((2, 2, 3, 3), (2, 2, 3, 3), bias=(2,)),
    ),
    "masked_linear": (masked_linear, layer((2, 2, 3), (4, 3), bias=(4,))),
    "dual_masked_conv2d": (partial(dual_masked_conv2d, padding=1), layer((2, 2, 3, 3), (3, 2, 3, 3), bias=(3,))),
    "dual_masked_conv2d of two": (dual_masked_conv2d, layer((2, 2, 3, 3), (3, 2, 2, 2), None, (3,), True)),
    "dual_masked_linear": (dual_masked_linear, layer((4, 3), (2, 3), (2, 1), (2,))),
    "dual_masked_linear of two": (dual_masked_linear, layer((4, 3), (2, 3), None, (2,), True)),
    "many_masked_conv2d": (partial(many_masked_conv2d, **SAME), many((2, 2, 4, 3, 3), (2, 2, 2, 3), (2, 2, 1, 1))),
    "many_masked_conv2d of one": (many_masked_conv2d, many((1, 2, 3, 3), (3, 2, 2, 2))),
    "many_masked_linear": (many_masked_linear, many((2, 4, 3), (2, 3), (2, 1))),
    "many_masked_linear of one": (many_masked_linear, many((4, 3), (2, 3))),
    "masked_batch_norm train": (partial(batch_norm, True), norm((5, 3, 2))),
    "masked_batch_norm eval": (partial(batch_norm, False), norm((4, 3))),
    "masked_layer_norm": (layer_norm, norm((4, 3))),
    "prepare_images": (perturbed_images, {"trigger": (1, 2, 3, 3)}),
    "rescale_to_l1_ball": (partial(rescale_to_l1_ball, radius=3.0, batch_dims=1), {"input": (4, 5)}),
    "rescale_to_l1_ball inside": (partial(rescale_to_l1_ball, radius=99.0), {"input": (4, 5)}),
    "project_onto_l1_ball": (partial(project_onto_l1_ball, radius=3.0, batch_dims=1), {"input": (4, 5)}),
    "project_onto_l1_ball inside": (partial(project_onto_l1_ball, radius=99.0), {"input": (4, 5)}),
}
EVERY = pytest.mark.parametrize("case", CASES)


def prepared(case, dtype=torch.float32, grad=False):
    """The function of a case over positional tensors, and its tensors."""
    function, shapes = CASES[case]
    tensors = tuple(rand(*shape, dtype=dtype, grad=grad) for shape in shapes.values())
    return lambda *tensors: function(**dict(zip(shapes, tensors, strict=True))), tensors


def total(outputs):
    """A number that depends on every output in its own way."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    return sum((weight + 1) * output.float().square().sum() for weight, output in enumerate(outputs))


def leaves(outputs):
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def close(value, expected, relative=1e-5):
    return largest(value - expected) <= relative * (largest(expected) + 1e-6)


def test_every_function_has_a_case():
    covered = {case.split()[0] for case in CASES} | {"clip_mask_", "trigger_step_", "mask_to_bytes"}
    assert covered == set(functional.__all__)


@EVERY
def test_gradients_are_those_of_finite_differences(case):
    function, tensors = prepared(case, torch.float64, grad=True)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=case.startswith("masked_conv3d"))


@EVERY
def test_second_gradients_are_those_of_finite_differences(case):
    function, tensors = prepared(case, torch.float64, grad=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True)


@EVERY
def test_second_gradients_with_one_input_asked_for(case):
    """What the first backward didn't keep isn't missed by the second."""
    function, tensors = prepared(case, torch.float64)
    for index in range(len(tensors)):
        wanted = [tensor.detach().requires_grad_(position == index) for position, tensor in enumerate(tensors)]
        assert torch.autograd.gradgradcheck(function, wanted, fast_mode=True)


@EVERY
def test_func_grad_is_the_gradient(case):
    function, tensors = prepared(case, grad=True)
    expected = torch.autograd.grad(total(function(*tensors)), tensors)
    detached = [tensor.detach() for tensor in tensors]
    every = tuple(range(len(tensors)))
    actual = torch.func.grad(lambda *tensors: total(function(*tensors)), argnums=every)(*detached)
    assert all(close(one, other) for one, other in zip(actual, expected, strict=True))


@EVERY
def test_func_jvp_is_the_transpose_of_the_gradient(case):
    function, tensors = prepared(case, torch.float64)
    directions = tuple(torch.randn_like(tensor) for tensor in tensors)
    outputs, tangents = torch.func.jvp(function, tensors, directions)
    upstream = [torch.randn_like(output) for output in leaves(outputs)]
    inputs = [tensor.requires_grad_() for tensor in tensors]
    gradients = torch.autograd.grad(leaves(function(*inputs)), inputs, upstream)
    forward = sum((one * other).sum() for one, other in zip(upstream, leaves(tangents), strict=True))
    backward = sum((one * other).sum() for one, other in zip(gradients, directions, strict=True))
    assert close(forward, backward, 1e-9)


@EVERY
def test_vmap_is_a_loop(case):
    function, _ = prepared(case)
    stacks = [torch.stack(tensors) for tensors in zip(*(prepared(case)[1] for _ in range(3)), strict=True)]
    batched = leaves(torch.vmap(function)(*stacks))
    looped = [leaves(function(*tensors)) for tensors in zip(*stacks, strict=True)]
    for value, expected in zip(batched, map(torch.stack, zip(*looped, strict=True)), strict=True):
        assert close(value, expected)


def test_vmap_over_masks_alone_is_an_ensemble_over_one_weight():
    x, weight, masks = rand(2, 3, 5, 5), rand(4, 3, 3, 3), rand(6, 4, 3, 3, 3)

    def loss(mask):
        return masked_conv2d(x, weight, mask).square().sum()

    values, gradients = torch.vmap(torch.func.grad_and_value(loss))(masks)[::-1]
    for mask, value, gradient in zip(masks, values, gradients, strict=True):
        mask = mask.clone().requires_grad_()
        expected = loss(mask)
        assert close(value, expected.detach())
        assert close(gradient, torch.autograd.grad(expected, mask)[0])


def autocast_plain(case):
    """The same in plain torch; None for what autocast leaves alone."""
    layers = {"masked_conv1d": F.conv1d, "masked_conv3d": F.conv3d, "masked_linear": F.linear}
    layers |= {"masked_conv2d": F.conv2d, "masked_conv2d of an image": F.conv2d}
    layers |= {"masked_conv_transpose2d": F.conv_transpose2d}
    duals = {"dual_masked_conv2d": F.conv2d, "dual_masked_conv2d of two": F.conv2d}
    duals |= {"dual_masked_linear": F.linear, "dual_masked_linear of two": F.linear}
    if case == "masked_conv2d_relu":
        return plain_block
    if case.startswith("many"):
        layer = F.linear if "linear" in case else F.conv2d
        return partial(plain_many, layer, **getattr(CASES[case][0], "keywords", {}))
    if case in layers:
        return partial(plain_layer, layers[case], **getattr(CASES[case][0], "keywords", {}))
    return partial(plain_dual, duals[case], **getattr(CASES[case][0], "keywords", {}))


LAYERS = [case for case in CASES if ("conv" in case or "linear" in case)]


@pytest.mark.parametrize("case", LAYERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_gives_what_plain_torch_gives(case, dtype):
    function, shapes = CASES[case]
    inputs = {name: rand(*shape, grad=True) for name, shape in shapes.items()}

    def run(function):
        with torch.autocast(DEVICE, dtype=dtype):
            outputs = leaves(function(**inputs))
        return outputs, torch.autograd.grad(total(outputs), tuple(inputs.values()))

    (ours, our_gradients), (plains, plain_gradients) = run(function), run(autocast_plain(case))
    for one, other in zip(ours, plains, strict=True):
        assert one.dtype == other.dtype == dtype
        assert close(one, other, 2 * torch.finfo(dtype).eps)
    for name, one, other in zip(inputs, our_gradients, plain_gradients, strict=True):
        assert one.dtype == torch.float32
        assert close(one, other, 4 * torch.finfo(dtype).eps), name


@pytest.mark.parametrize("case", LAYERS)
def test_autocast_leaves_float64_alone(case):
    function, tensors = prepared(case, torch.float64)
    expected = leaves(function(*tensors))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = leaves(function(*tensors))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@pytest.mark.parametrize("case", [case for case in CASES if case not in LAYERS])
def test_autocast_changes_nothing_but_layers(case):
    function, tensors = prepared(case, grad=True)
    expected = function(*tensors)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        actual = function(*tensors)
    assert actual.dtype == torch.float32
    assert close(actual, expected)


@pytest.mark.parametrize("case", LAYERS)
def test_autocast_of_a_16_bit_model_casts_to_autocast_s_dtype(case):
    function, tensors = prepared(case, torch.float16)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        outputs = leaves(function(*tensors))
    assert all(output.dtype == torch.bfloat16 for output in outputs)


@EVERY
def test_compiled_without_a_graph_break_equals_eager(case):
    function, tensors = prepared(case, grad=True)
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def run(function):
        outputs = leaves(function(*tensors))
        return *outputs, *torch.autograd.grad(total(outputs), tensors)

    assert all(close(one, other) for one, other in zip(run(compiled), run(function), strict=True))


def test_compiled_layer_with_dynamic_sizes_and_under_autocast():
    torch.compiler.reset()
    weight, mask, noise = rand(4, 3, 3, 3), rand(4, 3, 3, 3, grad=True), rand(4, 1, 1, 1)

    def convolve(x):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            return masked_conv2d(x, weight, mask, padding="same", noise=noise)

    compiled = torch.compile(convolve, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in (5, 6, 9):
        x = rand(2, 3, size, size + 1)
        assert torch.equal(compiled(x), convolve(x))


def test_compiled_clip_mask_clips_in_place():
    torch.compiler.reset()
    mask = 3 * rand(20)
    expected = mask.clamp(0, 1)
    torch.compile(clip_mask_, fullgraph=True, backend="aot_eager")(mask)
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("case", LAYERS)
def test_compiled_backward_is_the_lean_op(case):
    """The reference formulas are differentiable torch, but they are for second gradients alone."""
    torch.compiler.reset()
    graphs = []

    def record(graph, inputs):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    function, tensors = prepared(case)
    tensors[0].requires_grad_()
    compiled = torch.compile(function, fullgraph=True, backend=aot_autograd(fw_compiler=record, bw_compiler=record))
    total(compiled(*tensors)).backward()
    for graph, suffix in zip(graphs, ("", "_backward"), strict=True):
        assert any(target.endswith(f"{suffix}.default") and target.startswith("maskops.") for target in graph)
        assert not any("convolution" in target or "mm" in target for target in graph)


@EVERY
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=lambda mode: mode.__name__)
def test_without_gradients_the_values_are_the_same_and_no_graph_is_made(case, mode):
    function, tensors = prepared(case, grad=True)
    expected = leaves(function(*tensors))
    with mode():
        actual = leaves(function(*tensors))
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
    assert not any(output.requires_grad for output in actual)


@EVERY
def test_checkpointing_recomputes_the_same(case):
    function, tensors = prepared(case, grad=True)
    expected = torch.autograd.grad(total(function(*tensors)), tensors)
    outputs = checkpoint(function, *tensors, use_reentrant=False)
    actual = torch.autograd.grad(total(outputs), tensors)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
