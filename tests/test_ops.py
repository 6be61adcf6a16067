"""The ops themselves, and the functions that are no layer: the effective weight and the clip."""

import math
from functools import partial

import pytest
import torch
from helpers import DEVICE, DTYPES, Calls, check, largest, plain_weight, rand
from torch.utils._pytree import tree_leaves

from maskops import _dispatch
from maskops.functional import clip_mask_, effective_weight

GRANULARITIES = {"weight": (6, 4, 3), "kernel": (6, 4, 1), "neuron": (6, 1, 1), "number": (), "column": (3,)}
GEOMETRY = ([2, 1], [1, 0], [1, 1], False, [0, 0], 2)
GEOMETRY_2D = ([2, 1], [1, 0], [1, 1], 2)
POINTWISE = ([1, 1], [0, 0], [1, 1], 1)
TRANSPOSED = ([2, 2], [1, 1], [1, 1], True, [1, 0], 2)


def layer(weight, *, bias=None, noise=True):
    """weight, mask, noise and, where asked for, bias."""
    made = rand(*weight), rand(*weight), rand(*weight) if noise else None
    return made if bias is None else (*made, rand(bias))


def eight_bits(entries):
    """Codes and scales of both moments."""
    codes, scales = torch.zeros(entries, dtype=torch.uint8, device=DEVICE), rand(-(-entries // 256)).abs()
    return codes, scales, codes.clone(), scales.clone()


def op_arguments():
    """At least one call of every op."""
    x, two, grad = rand(2, 4, 5, 5), rand(2, 4, 5, 5), rand(2, 6, 3, 3)
    conv, transposed, linear = (6, 2, 3, 3), (4, 3, 3, 3), (3, 4)
    one, rows, lr = torch.ones((), device=DEVICE), rand(5, 4), torch.tensor(0.1, device=DEVICE)
    adam = (0.9, 0.999, 1e-8, 0.01, 1.0, torch.zeros((), device=DEVICE), 1.0)
    table = torch.tensor([[0, 12, 0, 4, 3, 0, 4, 1], [16, 30, 16, 5, 5, 1, 6, 0]], device=DEVICE)
    layers = table, table.flatten().tolist()
    images, pool = rand(1, 2, 6, 6), ([2, 2], [2, 2], [0, 0], [1, 1])
    stored = (255 * torch.rand(4, 2, 3, 5, device=DEVICE)).byte().to(memory_format=torch.channels_last)
    many, many_grad = (rand(*conv), rand(3, *conv), rand(3, 6, 1, 1, 1)), rand(3, 2, 6, 3, 3)
    many_noise = [rand(6, 2, 1, 1), rand(3, 1)]
    many_linear = rand(*linear), rand(2, 3, 1), rand(2, *linear)
    index, trigger = torch.tensor([3, 0, 3], device=DEVICE), rand(1, 2, 3, 5)
    return {
        "effective_weight": [(*layer(linear), torch.float32), (*layer(linear, noise=False), torch.bfloat16)],
        "effective_weight_backward": [
            (rand(3, 4), *layer(linear), needs)
            for needs in ([True] * 3, [False, True, True], [False, True, False], [False, False, True])
        ],
        "effective_weights": [
            ([rand(*conv), rand(*linear)], [rand(6, 1, 1, 1), rand(*linear)], [], [], torch.float32),
            ([rand(*conv), rand(*linear)], [rand(*conv), rand(4)], many_noise, [rand(6), rand(3)], torch.bfloat16),
        ],
        "effective_weights_backward": [
            ([rand(*conv), rand(*linear)], [rand(*conv), rand(*linear)], [rand(6, 1, 1, 1), rand(4)], [], []),
            (
                [rand(*conv), rand(*linear), rand(*conv), rand(*linear)],
                *([rand(*conv), rand(*linear)], [rand(*conv), rand(4)], many_noise, [rand(6), rand(3)]),
            ),
        ],
        "masked_conv": [(x, *layer(conv, bias=6), *GEOMETRY), (x, *layer(transposed, bias=6), *TRANSPOSED)],
        "masked_conv_backward": [
            (grad, x, *layer(conv), x.shape, *GEOMETRY, [True] * 5),
            (grad, None, *layer(conv), x.shape, *GEOMETRY, [True, False, False, False, True]),
            (grad, x, *layer(conv, noise=False), x.shape, *GEOMETRY, [False, False, True, False, False]),
        ],
        "masked_conv_relu": [
            (x, *layer(conv, bias=6), rand(6), rand(6), rand(2, 6, 3, 3), [2, 1], [1, 0], [1, 1], 2),
            (x, *layer((8, 4, 1, 1), noise=False), *(None,) * 4, [1, 1], [0, 0], [1, 1], 1),
        ],
        "masked_linear": [(rows, *layer(linear, bias=3)), (rows, *layer(linear, noise=False), None)],
        "masked_linear_backward": [
            (rand(5, 3), rows, *layer(linear), rows.shape, [True] * 5),
            (rand(5, 3), None, *layer(linear), rows.shape, [True, False, False, False, True]),
        ],
        "dual_masked_conv": [(x, None, *layer(conv, bias=6), *GEOMETRY), (x, two, *layer(conv, bias=6), *GEOMETRY)],
        "dual_masked_conv_backward": [
            (grad, grad.clone(), x, two, False, *layer(conv), x.shape, *GEOMETRY, [True] * 6),
            (grad, grad.clone(), x, None, True, *layer(conv), x.shape, *GEOMETRY, [True, False, *[True] * 4]),
            (
                None,
                grad,
                None,
                None,
                False,
                *layer(conv),
                x.shape,
                *GEOMETRY,
                [False, True, False, False, False, False],
            ),
        ],
        "dual_masked_linear": [(rows, None, *layer(linear, bias=3)), (rows, rand(5, 4), *layer(linear, bias=3))],
        "dual_masked_linear_backward": [
            (rand(5, 3), rand(5, 3), rows, rows + 1, False, *layer(linear), rows.shape, [True] * 6),
            (rand(5, 3), None, rows, None, True, *layer(linear), rows.shape, [False, False, False, True, False, True]),
        ],
        "many_masked_conv": [
            (torch.stack([x, two, x]), *many, rand(6), *GEOMETRY_2D),
            (x.to(memory_format=torch.channels_last), many[0], many[1], None, None, *GEOMETRY_2D),
        ],
        "many_masked_conv_backward": [
            (many_grad, torch.stack([x, two, x]), *many, (3, *x.shape), *GEOMETRY_2D, [True] * 5),
            (many_grad, x, *many, x.shape, *GEOMETRY_2D, [True] * 5),
            (many_grad, None, *many, x.shape, *GEOMETRY_2D, [True, False, False, False, True]),
        ],
        "many_masked_linear": [(rand(2, 5, 4), *many_linear, rand(3)), (rows, *many_linear[:2], None, None)],
        "many_masked_linear_backward": [
            (rand(2, 5, 3), rand(2, 5, 4), *many_linear, (2, 5, 4), [True] * 5),
            (rand(2, 5, 3), rows, *many_linear, rows.shape, [True, False, True, False, False]),
        ],
        "rescale_to_l1_ball": [(rows, 1.0), (rows, 0.0)],
        "project_onto_l1_ball": [(rows, 1.0), (rows, 0.0)],
        "mask_adam_step_": [
            (rand(3, 4), rand(3, 4), rand(3, 4), rand(3, 4), rand(3, 4), rand(3, 4).abs(), one, lr, *adam),
            (rand(3, 4), rand(3, 4), None, None, rand(3, 4), rand(3, 4).abs(), one, lr, *adam, rand(3)),
            (rand(9), rand(9), rand(9), rand(9), rand(9), rand(9).abs(), one, lr, *adam, None, 16),
        ],
        "mask_adam8bit_step_": [
            (rand(300), rand(300), rand(300), rand(300), *eight_bits(300), one, lr, *adam),
            (rand(7), rand(7), None, None, *eight_bits(7), one, lr, *adam, rand(3)),
            (rand(7), rand(7), None, None, *eight_bits(7), one, lr, *adam, None, 16),
        ],
        "mask_sgd_step_": [
            (rand(3, 4), rand(3, 4), rand(3, 4), rand(3, 4), rand(3, 4), lr, 0.9, 0.01, 1.0, 0 * one, 1.0),
            (rand(3, 4), rand(3, 4), None, None, None, lr, 0.0, 0.0, 0.0, 0 * one, 1.0, None),
            (rand(3, 4), rand(3, 4), None, None, None, lr, 0.0, 0.0, 0.0, 0 * one, 1.0, rand(3)),
        ],
        "arena_effective_weight_": [
            (rand(48), rand(48), rand(32), rand(32), *layers),
            (rand(48).half(), rand(48), rand(32), None, *layers),
        ],
        "arena_mask_grad": [(rand(48), rand(48), rand(32), *layers)],
        "noise_step_": [(rand(3, 4), rand(3, 4), rand(3, 4), 0.4, 0.3), (rand(3, 4), rand(3, 4), None, 0.4, math.inf)],
        "relu_bits": [(images, math.inf), (images, 6.0)],
        "relu_bits_": [(images.clone(), math.inf)],
        "affine_relu_bits_": [
            (images.clone(), rand(2), rand(2), rand(1, 2, 6, 6), 6.0),
            (stored.to(torch.float16), rand(2).half(), None, rand(4, 2, 3, 5), math.inf),
            (images.bfloat16(), None, None, None, math.inf),
        ],
        "relu_bits_backward": [(rows, torch.ones(3, dtype=torch.uint8, device=DEVICE))],
        "conv_relu": [
            (x, rand(*conv), rand(6), rand(2, 6, 3, 3), *GEOMETRY_2D, math.inf),
            (x.to(memory_format=torch.channels_last), rand(8, 4, 1, 1), None, None, *POINTWISE, 6.0),
        ],
        "conv_input_grad": [
            (grad, rand(*conv), x.relu(), two, x.shape, *GEOMETRY_2D, math.inf),
            (
                *(two.to(memory_format=torch.channels_last), rand(4, 4, 1, 1)),
                *(torch.ones(25, dtype=torch.uint8, device=DEVICE), None, x.shape, *POINTWISE, 6.0),
            ),
            (grad, rand(*conv), None, two, x.shape, *GEOMETRY_2D, math.inf),
        ],
        "relu_backward": [
            (x, x.relu(), two, math.inf),
            (x, x.clamp(0, 1), None, 1.0),
            (rows, torch.ones(3, dtype=torch.uint8, device=DEVICE), rows + 1, math.inf),
        ],
        "max_pool_winners": [(images, *pool, False), (images, *pool, True)],
        "max_pool_winners_backward": [
            (rand(1, 2, 3, 3), torch.zeros(1, 2, 3, 3, dtype=torch.uint8, device=DEVICE), images.shape, *pool)
        ],
        "prepare_images": [
            (stored, index, trigger, 0.0, 1.0, rand(2), rand(2), torch.float32),
            (stored, None, None, None, None, None, None, torch.float16),
            (images, None, None, None, None, None, None, torch.float32),
            (images, index // 4, images[0], None, 1.0, None, rand(2), torch.float32),
        ],
        "prepare_images_backward": [
            (rand(3, 2, 3, 5), stored, index, trigger, 0.0, 1.0, rand(2)),
            (rand(4, 2, 3, 5).to(memory_format=torch.channels_last), stored, None, trigger[0], None, 1.0, None),
            (rand(4, 2, 3, 5), None, None, trigger.half(), None, None, None),
        ],
        "trigger_step_": [
            (rand(1, 2, 3, 5), rand(3, 2, 3, 5), 0.1, 2.0, -1.0, 1.0),
            (rand(2, 3, 5), rand(1, 2, 3, 5), 0.1, None, None, None),
        ],
    }


def test_every_op_is_checked():
    assert set(op_arguments()) == set(_dispatch.OPS)


@pytest.mark.parametrize("op", _dispatch.OPS)
@pytest.mark.filterwarnings("error:.*may not alias")
def test_op_is_sound(op, backend):
    """Schema (what is mutated and what aliases), fake tensors, and once the functionalisation for torch.compile."""
    first, *others = op_arguments()[op]
    if _dispatch.why_not(backend, op) == f"the {backend} backend has no {op}":
        pytest.skip(f"the {backend} backend doesn't serve {op}")
    check = partial(torch.library.opcheck, getattr(torch.ops.maskops, op).default, kwargs={"backend": backend})
    check(first)
    for arguments in others:
        check(arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", _dispatch.OPS)
def test_op_gives_the_same_on_every_backend_in_shape_dtype_and_strides(op, backend):
    for arguments in op_arguments()[op]:
        if _dispatch.why_not(backend, op, *(a for a in tree_leaves(arguments) if isinstance(a, torch.Tensor))):
            pytest.skip(f"the {backend} backend doesn't serve {op}")
        clones = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        expected = getattr(torch.ops.maskops, op)(*arguments, backend="reference")
        actual = getattr(torch.ops.maskops, op)(*clones, backend=backend)
        described = [
            [(t.shape, t.dtype, t.stride()) for t in tree_leaves(outputs) if isinstance(t, torch.Tensor)]
            for outputs in (actual, expected)
        ]
        assert described[0] == described[1]


@pytest.mark.parametrize("mask", GRANULARITIES)
@pytest.mark.parametrize("noise", [None, *GRANULARITIES])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_effective_weight_is_the_product(mask, noise, dtype, backend):
    inputs = {"weight": rand(6, 4, 3, dtype=dtype), "mask": rand(*GRANULARITIES[mask], dtype=dtype)}
    if noise:
        inputs["noise"] = rand(*GRANULARITIES[noise], dtype=dtype)
    # two roundings in any order of code: in float32 every backend agrees bit for bit
    check(effective_weight, plain_weight, inputs, backend, exact=dtype in (torch.float32, torch.float64))


@pytest.mark.parametrize("mask", ["weight", "neuron"])
@pytest.mark.parametrize("dtypes", [(w, m, d) for w in DTYPES for m in DTYPES for d in DTYPES if w != m], ids=str)
def test_effective_weight_mixes_every_dtype(mask, dtypes, backend):
    weight, factor, dtype = dtypes
    inputs = {"weight": rand(6, 4, 3, dtype=weight), "mask": rand(*GRANULARITIES[mask], dtype=factor)}
    inputs["noise"] = rand(*GRANULARITIES[mask], dtype=factor)
    check(partial(effective_weight, dtype=dtype), partial(plain_weight_in, dtype), inputs, backend)


def plain_weight_in(dtype, weight, mask, noise):
    # the truth is computed in float64 whatever the dtype of the result
    return plain_weight(weight, mask, noise, dtype if weight.dtype != torch.float64 else None).to(dtype)


@pytest.mark.parametrize("size", [0, 1, 63, 1023, 5000])
def test_effective_weight_of_any_size_is_exact(size, backend):
    check(effective_weight, plain_weight, {"weight": rand(size), "mask": rand(size)}, backend, exact=True)


def test_effective_weight_keeps_the_weight_s_layout(backend):
    weight = rand(6, 4, 3, 3).to(memory_format=torch.channels_last)
    for mask in (rand(6, 4, 3, 3), rand(6, 1, 1, 1), rand(4, 1, 1)):
        check(effective_weight, plain_weight, {"weight": weight, "mask": mask}, backend)
        assert effective_weight(weight, mask, backend=backend).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("wanted", ["weight", "mask", "noise"])
def test_effective_weight_computes_no_gradient_that_was_not_asked_for(wanted):
    inputs = {"weight": rand(6, 4, 3), "mask": rand(6, 4, 3), "noise": rand(6, 4, 3)}
    leaves = {name: tensor.requires_grad_(name == wanted) for name, tensor in inputs.items()}
    output = effective_weight(**leaves)
    with Calls() as calls:
        output.sum().backward()
    ((*_, needs),) = calls.arguments("maskops::effective_weight_backward")
    assert needs == [name == wanted for name in ("weight", "mask", "noise")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clip_mask_clips_in_place_and_is_idempotent(dtype):
    mask = (3 * rand(50, dtype=dtype)).requires_grad_()
    expected = mask.detach().clamp(0.25, 1)
    assert clip_mask_(mask, 0.25) is mask
    assert torch.equal(mask, expected)
    assert torch.equal(clip_mask_(mask, 0.25), expected)
    assert mask.requires_grad
    assert mask.grad_fn is None


@pytest.mark.parametrize("lower", [(), (6, 1, 1), (3,), (6, 4, 3)], ids=str)
def test_clip_mask_takes_a_tensor_of_lower_bounds(lower):
    mask, lower = 3 * rand(6, 4, 3), rand(*lower).abs().clamp(max=1)
    expected = torch.maximum(mask.clamp(max=1), lower)
    assert torch.equal(clip_mask_(mask, lower), expected)


def test_clip_mask_keeps_nan_and_strides():
    mask = torch.full((4, 6), math.nan, device=DEVICE)[:, ::2]
    assert clip_mask_(mask).isnan().all()
    bounds = clip_mask_(torch.tensor([-math.inf, math.inf]), -1.0, 2.0)
    assert largest(bounds - torch.tensor([-1.0, 2.0])) == 0
