"""The kernels of many masks over one weight: every tile of θ is read once for all masks of a block of masks.

    forward          yⱼᵀ[O, pixels] = (θ ⊙ (mⱼ + δⱼ))[O, taps·C] @ im2col(xⱼ)ᵀ[taps·C, pixels]
    input gradient   the same with the kernel turned over; of one input for all masks the sum over j

A program holds one tile of the results of each of MASKS masks, and multiplies once per mask: so every masked weight is
a left operand of two dimensions, which goes from registers into the matrix unit as in ``convolution``, where sm_90 has
no product of three dimensions. ``apart`` is how far apart the masks' tensors are: (result, activation, mask, noise).
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskops.backends.triton.convolution import (
    effective_tile,
    load_factors,
    phase_pixels,
    phase_taps,
    reached_by,
    step_of_sum,
)
from maskops.backends.triton.weights import only_if


@triton.jit
def many_forward(
    output, input, weight, masks, noise, bias,
    output_strides, input_strides, weight_strides, mask_strides, noise_strides, apart, count,
    images, rows, columns, input_rows, input_columns, group_out, group_in, stride, padding, dilation,
    R: tl.constexpr, S: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, PER_NEURON: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
    MASKS: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles of (output channels, pixels) of MASKS masks. Strides: (image, channel, row, column)."""
    group = tl.program_id(1)
    first = tl.program_id(2) * MASKS
    out_tiles = tl.cdiv(group_out, BLOCK_O)
    out = (tl.program_id(0) % out_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    pixel = (tl.program_id(0) // out_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    column, row, image = pixel % columns, pixel // columns % rows, (pixel // columns // rows).to(tl.int64)
    real_out, real_pixel = out < group_out, pixel < images * rows * columns
    kind: tl.constexpr = input.dtype.element_ty

    out_at = (group * group_out + out).to(tl.int64)
    top, left = row * stride[0] - padding[0], column * stride[1] - padding[1]
    corner = image * input_strides[0] + top * input_strides[2] + left * input_strides[3]
    corner += group.to(tl.int64) * group_in * input_strides[1]
    weight_at = (out_at * weight_strides[0])[:, None]

    # one number per neuron multiplies the sum as well, and of one input the sum is then the same for all masks
    products: tl.constexpr = 1 if PER_NEURON and SHARED else MASKS
    totals = ()
    for _ in tl.static_range(products):
        totals += (tl.zeros((BLOCK_O, BLOCK_P), tl.float32),)
    for step in range(tl.cdiv(R * S * group_in, BLOCK_C) if FLAT else R * S * tl.cdiv(group_in, BLOCK_C)):
        channel, real_k, r, s, down, right = step_of_sum(step, group_in, dilation, R, S, FLAT, BLOCK_C)
        real_weight = real_out[:, None] & real_k[None, :]
        at = channel[None, :] * weight_strides[1] + r * weight_strides[2] + s * weight_strides[3]
        value = tl.load(weight + weight_at + at, mask=real_weight, other=0).to(tl.float32)
        at_input = corner[None, :] + (channel * input_strides[1])[:, None]
        real_input = real_k[:, None] & real_pixel[None, :]
        if not POINTWISE:
            below, across = top[None, :] + down, left[None, :] + right
            real_input &= (below >= 0) & (below < input_rows) & (across >= 0) & (across < input_columns)
            at_input += down * input_strides[2] + right * input_strides[3]
        if SHARED:
            patch = tl.load(input + at_input, mask=real_input, other=0)
        sums = ()
        for m in tl.static_range(products):
            j = (first + m).to(tl.int64)
            there = first + m < count
            factor = tl.full((1, 1), 1.0, tl.float32)
            if not PER_NEURON:
                factor = _factor(
                    masks, noise, j, apart, out_at[:, None], channel[None, :], r, s, mask_strides, noise_strides,
                    only_if(real_weight, there),
                )  # fmt: skip
            if not SHARED:
                patch = tl.load(input + j * apart[1] + at_input, mask=only_if(real_input, there), other=0)
            effective = effective_tile(value, factor, kind, PRECISION)
            sums += (tl.dot(effective, patch, totals[m], input_precision=PRECISION),)
        totals = sums

    pixel_at = image * output_strides[0] + row * output_strides[2] + column * output_strides[3]
    at = pixel_at[None, :] + out_at[:, None] * output_strides[1]
    real = real_out[:, None] & real_pixel[None, :]
    for m in tl.static_range(MASKS):
        j = (first + m).to(tl.int64)
        there = first + m < count
        total = totals[m % products]
        if PER_NEURON:
            total *= _factor(
                masks,
                noise,
                j,
                apart,
                out_at[:, None],
                0,
                0,
                0,
                mask_strides,
                noise_strides,
                only_if(real_out[:, None], there),
            )
        if bias is not None:
            total += tl.load(bias + out_at, mask=real_out, other=0).to(tl.float32)[:, None]
        tl.store(output + j * apart[0] + at, total.to(kind), mask=only_if(real, there))


@triton.jit
def many_input_grad(
    grad_input, grad, weight, masks, noise,
    grad_input_strides, grad_strides, weight_strides, mask_strides, noise_strides, apart, count,
    images, rows, columns, input_rows, input_columns, group_out, group_in, stride, padding, dilation, tap_step,
    R: tl.constexpr, S: tl.constexpr, POINTWISE: tl.constexpr, PER_NEURON: tl.constexpr,
    SHARED: tl.constexpr, PRECISION: tl.constexpr,
    MASKS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Tiles of (input channels, pixels of one phase, as in ``conv_input_grad``) of MASKS masks, or of their sum."""
    group = tl.program_id(1)
    phase = tl.program_id(2) % (stride[0] * stride[1])
    phase_row, phase_column = phase // stride[1], phase % stride[1]
    in_tiles = tl.cdiv(group_in, BLOCK_C)
    channel = (tl.program_id(0) % in_tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    pixel = (tl.program_id(0) // in_tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    image, row, column = phase_pixels(pixel, phase_row, phase_column, input_rows, input_columns, stride)
    real_channel = channel < group_in
    real_pixel = (image < images) & (row < input_rows) & (column < input_columns)
    kind: tl.constexpr = grad.dtype.element_ty
    image_at = image * grad_strides[0] + group.to(tl.int64) * group_out * grad_strides[1]

    first_r, count_r = phase_taps(phase_row + padding[0], stride[0], dilation[0], R)
    first_s, count_s = phase_taps(phase_column + padding[1], stride[1], dilation[1], S)
    out_blocks = tl.cdiv(group_out, BLOCK_O)
    # the sum goes over all masks here, else a program has its own
    mask_blocks = tl.cdiv(count, MASKS) if SHARED else 1
    own_first = tl.program_id(2) // (stride[0] * stride[1]) * MASKS
    totals = ()
    for _ in tl.static_range(1 if SHARED else MASKS):
        totals += (tl.zeros((BLOCK_C, BLOCK_P), tl.float32),)
    for step in range(count_r * count_s * out_blocks * mask_blocks):
        first = own_first + step % mask_blocks * MASKS
        out = step // mask_blocks % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        real_out = out < group_out
        tap = step // mask_blocks // out_blocks
        r = first_r + tap // count_s * tap_step[0]
        s = first_s + tap % count_s * tap_step[1]
        real_weight = real_channel[:, None] & real_out[None, :]
        out_at = (group * group_out + out).to(tl.int64)
        at = (channel * weight_strides[1] + r * weight_strides[2] + s * weight_strides[3])[:, None]
        value = tl.load(weight + at + (out_at * weight_strides[0])[None, :], mask=real_weight, other=0).to(tl.float32)
        from_row, from_column, real_grad = row, column, real_pixel
        if not POINTWISE:
            from_row, from_column, reached = reached_by(row, column, r, s, rows, columns, stride, padding, dilation)
            real_grad &= reached
        at_grad = image_at + from_row * grad_strides[2] + from_column * grad_strides[3]
        at_grad = at_grad[None, :] + (out * grad_strides[1])[:, None]
        real = real_out[:, None] & real_grad[None, :]
        sums = ()
        total = totals[0]
        for m in tl.static_range(MASKS):
            j = (first + m).to(tl.int64)
            there = first + m < count
            if PER_NEURON:
                factor = _factor(
                    masks, noise, j, apart, out_at[None, :], 0, 0, 0, mask_strides, noise_strides,
                    only_if(real_out[None, :], there),
                )  # fmt: skip
            else:
                factor = _factor(
                    masks, noise, j, apart, out_at[None, :], channel[:, None], r, s, mask_strides, noise_strides,
                    only_if(real_weight, there),
                )  # fmt: skip
            incoming = tl.load(grad + j * apart[1] + at_grad, mask=only_if(real, there), other=0)
            if not SHARED:
                total = totals[m]
            effective = effective_tile(value, factor, kind, PRECISION)
            total = tl.dot(effective, incoming, total, input_precision=PRECISION)
            if not SHARED:
                sums += (total,)
        totals = (total,) if SHARED else sums

    pixel_at = image * grad_input_strides[0] + row * grad_input_strides[2] + column * grad_input_strides[3]
    channel_at = group.to(tl.int64) * group_in + channel
    at = pixel_at[None, :] + channel_at[:, None] * grad_input_strides[1]
    real = real_channel[:, None] & real_pixel[None, :]
    for m in tl.static_range(1 if SHARED else MASKS):
        j = (own_first + m).to(tl.int64)
        tl.store(grad_input + j * apart[0] + at, totals[m].to(kind), mask=only_if(real, own_first + m < count))


@triton.jit
def _factor(masks, noise, j, apart, row, column, r, s, mask_strides, noise_strides, inside):
    """What the weights (row: out, column: in) are multiplied by under mask j."""
    own_noise = noise
    if noise is not None:
        own_noise = noise + j * apart[3]
    factor, _ = load_factors(
        masks + j * apart[2], own_noise, row, column, r, s, mask_strides, noise_strides, inside, False
    )
    return factor
