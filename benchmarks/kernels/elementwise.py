"""Everything that is no layer: effective weights, steps, images, activations and the L1 ball."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.kernels.cases import LAST, Case, empty
from maskops.backends import triton as ops
from maskops.backends.triton import sign_bits

WEIGHT = (128, 64, 3, 3)


def all_cases() -> Iterator[Case]:
    for cases in (_weights, _activations, _images, _arena):
        yield from cases(torch.bfloat16)
        yield from cases(torch.float32)
        # what is special doesn't depend on which two bytes an entry has
        yield from _first_of_each_op(cases(torch.float16))
    yield from _steps(torch.float32)
    yield from _first_of_each_op(_steps(torch.bfloat16))
    yield from _balls()


def _first_of_each_op(cases: Iterator[Case]) -> Iterator[Case]:
    seen = set()
    for case in cases:
        if case.call.func not in seen:
            seen.add(case.call.func)
            yield case


def _case(dtype: torch.dtype, words: str, op: str, *arguments) -> Case:
    return Case(str(dtype).removeprefix("torch."), words, partial(getattr(ops, op), *arguments))


def _weights(dtype: torch.dtype) -> Iterator[Case]:
    weight, factor, neuron = empty(*WEIGHT, dtype=dtype), empty(*WEIGHT), empty(WEIGHT[0], 1, 1, 1)
    for words, mask, noise in (
        ("effective weight", factor, None),
        ("effective weight with noise", factor, factor.clone()),
        ("effective weight, mask per neuron", neuron, None),
        ("effective weight, mask in bytes", factor.byte(), None),
        ("effective weight, mask in another layout", factor.contiguous(memory_format=LAST), None),
    ):
        yield _case(dtype, words, "effective_weight", weight, mask, noise, dtype)
    for words, mask, needs in (
        ("gradient of the mask", factor, [False, True, False]),
        ("gradient of the weight and factors", factor, [True, True, True]),
        ("gradient of the mask, per neuron", neuron, [False, True, False]),
        ("gradient of the factors, per number", empty(), [False, True, True]),
    ):
        noise = mask.clone() if needs[2] else None
        yield _case(dtype, words, "effective_weight_backward", weight.clone(), weight, mask, noise, needs)


def _activations(dtype: torch.dtype) -> Iterator[Case]:
    for words, layout in (("channels last", LAST), ("contiguous", torch.contiguous_format)):
        images = empty(128, 64, 32, 32, dtype=dtype, memory_format=layout)
        pooled = empty(128, 64, 16, 16, dtype=dtype, memory_format=layout)
        for pool in (([2, 2], [2, 2], [0, 0], [1, 1]), ([3, 3], [2, 2], [1, 1], [1, 1])):
            size = "x".join(map(str, pool[0]))
            yield _case(dtype, f"max pool {size}, {words}", "max_pool_winners", images, *pool, False)
            gradient = pooled, pooled.byte(), list(images.shape), *pool
            yield _case(dtype, f"max pool {size} backward, {words}", "max_pool_winners_backward", *gradient)
    bits = empty(images.numel() // 8, dtype=torch.uint8)
    yield _case(dtype, "relu", "relu_bits", images, math.inf)
    yield _case(dtype, "relu6", "relu_bits", images, 6.0)
    yield _case(dtype, "relu backward", "relu_bits_backward", images, bits)
    yield _case(dtype, "relu backward, addend", "relu_backward", images, bits, images, math.inf)
    yield _case(dtype, "relu6 backward, from the output", "relu_backward", images, images, None, 6.0)
    add_relu_ = partial(sign_bits.add_relu_, images, images, 6.0)
    yield Case(str(dtype).removeprefix("torch."), "residual and relu6", add_relu_)


def _images(dtype: torch.dtype) -> Iterator[Case]:
    shape = 128, 3, 32, 32
    stored, index = empty(50000, *shape[1:], dtype=torch.uint8), empty(128, dtype=torch.int64)
    trigger, three = empty(1, *shape[1:]), empty(3)
    for words, layout in (("channels last", LAST), ("contiguous", torch.contiguous_format)):
        grad = empty(*shape, dtype=dtype, memory_format=layout)
        source = stored.contiguous(memory_format=layout)
        prepared = (source, index, trigger, 0.0, 1.0, three, three, dtype)
        yield _case(dtype, f"images from bytes, {words}", "prepare_images", *prepared)
        back = (grad, source, index, trigger, 0.0, 1.0, three)
        yield _case(dtype, f"gradient of the trigger, {words}", "prepare_images_backward", *back)
    yield _case(dtype, "images as they are", "prepare_images", grad, *(None,) * 6, dtype)
    back = grad, None, None, trigger, None, None, None
    yield _case(dtype, "gradient of the trigger, no clamp", "prepare_images_backward", *back)
    large = empty(1, 3, 224, 224)
    batch = empty(128, 3, 224, 224, dtype=dtype)
    for words, over, grads, radius in (
        ("trigger step", trigger, grad, None),
        ("trigger step into the ball, few", trigger, grad[:4], 2.0),
        ("trigger step into the ball", trigger, grad, 2.0),
        ("trigger step into the ball, large", large, batch, 2.0),
    ):
        yield _case(dtype, words, "trigger_step_", over, grads, 0.1, radius, 0.0, 1.0)


def _arena(dtype: torch.dtype) -> Iterator[Case]:
    entries, layers = 1 << 20, 20
    weight, effective = empty(entries, dtype=dtype), empty(entries, dtype=dtype)
    for words, count in (("per weight", entries), ("per neuron", entries // 576), ("per kernel", entries // 9)):
        mask, table = empty(count), empty(layers, 8, dtype=torch.int64)
        for noise in (None, mask.clone()):
            arguments = effective, weight, mask, noise, table, []
            also = "" if noise is None else " with noise"
            yield _case(dtype, f"arena, mask {words}{also}", "arena_effective_weight_", *arguments)
        yield _case(dtype, f"arena's gradient, mask {words}", "arena_mask_grad", effective, weight, mask, table, [])


def _steps(dtype: torch.dtype) -> Iterator[Case]:
    """Steps on a flat arena of this dtype with everything stored on the device, and on a lone mask with nothing."""
    flat, mask = empty(1 << 20, dtype=dtype), empty(128, 64, 1, 1, dtype=dtype)
    number, host = empty(), torch.ones(())
    betas, totals = (0.9, 0.999, 1e-8), empty(3)
    lower = empty(1 << 20)
    for words, m, w, step, l1, low, total in (
        ("on the device, with totals", flat, flat.clone(), number, 0.01, host, totals),
        ("on the host", flat, flat.clone(), host, 0.01, host, None),
        ("bounds per entry, no weight", flat, None, number, 0.0, lower, totals),
        ("of a lone mask", mask, None, host, 0.0, host, None),
    ):
        effective = None if w is None else w.clone()
        given = m, m.clone(), w, effective
        adam = m.clone(), m.clone(), step.clone(), step, *betas, l1, 1.0, low, 1.0, total
        yield _case(dtype, f"Adam {words}", "mask_adam_step_", *given, *adam)
        if dtype == torch.bfloat16:
            adam = m.float(), m.float(), *adam[2:], 0
            yield _case(dtype, f"Adam {words}, rounded by chance", "mask_adam_step_", *given, *adam)
        momentum = None if l1 == 0.0 else m.clone()
        sgd = momentum, step, 0.9, l1, 1.0, low, 1.0, total
        yield _case(dtype, f"SGD {words}", "mask_sgd_step_", *given, *sgd)
    for words, weight, bound in (("bounded, with weights", flat.clone(), 0.4), ("free", None, math.inf)):
        yield _case(dtype, f"step of the noise, {words}", "noise_step_", flat, flat.clone(), weight, 0.1, bound)


def _balls() -> Iterator[Case]:
    for op in ("rescale_to_l1_ball", "project_onto_l1_ball"):
        for words, dtype, entries in (
            ("3072 entries", torch.float32, 3072),
            ("3072 entries", torch.bfloat16, 3072),
            ("3072 entries", torch.float16, 3072),
            ("16384 entries", torch.float32, 16384),
            ("150528 entries", torch.float32, 150528),
        ):
            yield _case(dtype, f"{op.replace('_', ' ')}, {words}", op, empty(1, entries, dtype=dtype), 1.0)
