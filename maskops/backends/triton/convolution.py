"""Masked convolution as a matrix product whose operands are made on the way in (implicit GEMM).

    forward          yᵀ[O, pixels] = (θ ⊙ (m + δ))[O, taps·C] @ im2col(x)ᵀ[taps·C, pixels]
    input gradient   the same with the kernel turned over
    weight gradient  dW[O, taps·C] = gᵀ[O, pixels] @ im2col(x)[pixels, taps·C]

The masked weight is always the left operand, so that it goes from registers into the matrix unit (on sm_90: wgmma with
A in registers) and the effective weight never exists in memory. The weight gradient comes in parts, each over a slice
of the pixels, which a later kernel adds up in a fixed order.

Without a mask the weight is the effective weight already. Either product ends in what comes next in a network: forward
a residual and the ReLU, backward a second gradient and the ReLU that came before.

A linear layer is a convolution of 1x1 over one pixel per row: POINTWISE leaves out all arithmetic on taps.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskops.backends.triton.sign_bits import finished
from maskops.backends.triton.weights import load_factor


@triton.jit
def load_factors(mask, noise, row, column, r, s, mask_strides, noise_strides, inside, TWO: tl.constexpr):
    """What the weights (row: out, column: in) are multiplied by in each branch; only one branch: twice the same."""
    at = row * mask_strides[0] + (column * mask_strides[1] + r * mask_strides[2] + s * mask_strides[3])
    clean = load_factor(mask + at, inside)
    perturbed = clean
    if noise is not None:
        at = row * noise_strides[0] + (column * noise_strides[1] + r * noise_strides[2] + s * noise_strides[3])
        perturbed = clean + load_factor(noise + at, inside)
        if not TWO:
            clean = perturbed
    return clean, perturbed


@triton.jit
def effective_tile(value, factor, kind: tl.constexpr, PRECISION: tl.constexpr):
    """A tile of effective weights as the matrix unit takes it."""
    return left_factor(value * factor, kind, PRECISION)


@triton.jit
def left_factor(tile, kind: tl.constexpr, PRECISION: tl.constexpr):
    """A tile as the matrix unit takes it: rounded once, also to TF32, to which it would cut it off."""
    if kind == tl.float32 and PRECISION == "tf32":
        tile = tile.to(tl.float32)
        rounded = ((tile.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        tile = tl.where(tile == tile, rounded, tile)  # the sum would turn some NaN into zero
    return tile.to(kind)


@triton.jit
def step_of_sum(step, group_in, dilation, R: tl.constexpr, S: tl.constexpr, FLAT: tl.constexpr, BLOCK_C: tl.constexpr):
    """Input channels of a step of the forward sum, which of them are there, their taps, and where these lie.

    FLAT: a step runs over the channels of several taps: they are rows, and where they lie is a column
    """
    if FLAT:
        k = step * BLOCK_C + tl.arange(0, BLOCK_C)
        channel, tap = k % group_in, k // group_in
        real = k < R * S * group_in
        r, s = (tap // S)[None, :], (tap % S)[None, :]
        down, right = (tap // S * dilation[0])[:, None], (tap % S * dilation[1])[:, None]
    else:
        channel_blocks = tl.cdiv(group_in, BLOCK_C)
        channel = step % channel_blocks * BLOCK_C + tl.arange(0, BLOCK_C)
        tap = step // channel_blocks
        real = channel < group_in
        r, s = tap // S, tap % S
        down, right = r * dilation[0], s * dilation[1]
    return channel, real, r, s, down, right


@triton.jit
def conv_forward(
    output, perturbed_output, input, perturbed_input, weight, mask, noise, bias, scale, shift, residual, bits, upper,
    output_strides, input_strides, weight_strides, mask_strides, noise_strides,
    images, rows, columns, input_rows, input_columns, group_out, group_in, stride, padding, dilation,
    R: tl.constexpr, S: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, PER_NEURON: tl.constexpr,
    TWO: tl.constexpr, ONE_INPUT: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tiles of (output channels, pixels). Strides: (image, channel, row, column) and (out, in, row, column)."""
    group = tl.program_id(1)
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
    if mask is not None and PER_NEURON:
        clean, perturbed = load_factors(
            mask, noise, out_at[:, None], 0, 0, 0, mask_strides, noise_strides, real_out[:, None], TWO
        )

    total = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    perturbed_total = tl.zeros((BLOCK_O, BLOCK_P), tl.float32)
    for step in range(tl.cdiv(R * S * group_in, BLOCK_C) if FLAT else R * S * tl.cdiv(group_in, BLOCK_C)):
        channel, real_k, r, s, down, right = step_of_sum(step, group_in, dilation, R, S, FLAT, BLOCK_C)
        real_weight = real_out[:, None] & real_k[None, :]
        at = channel[None, :] * weight_strides[1] + r * weight_strides[2] + s * weight_strides[3]
        value = tl.load(weight + weight_at + at, mask=real_weight, other=0)
        if mask is not None:
            value = value.to(tl.float32)
            if not PER_NEURON:
                clean, perturbed = load_factors(
                    mask, noise, out_at[:, None], channel[None, :], r, s, mask_strides, noise_strides, real_weight, TWO
                )
        at = corner[None, :] + (channel.to(tl.int64) * input_strides[1])[:, None]
        real_input = real_k[:, None] & real_pixel[None, :]
        if not POINTWISE:
            below, across = top[None, :] + down, left[None, :] + right
            real_input &= (below >= 0) & (below < input_rows) & (across >= 0) & (across < input_columns)
            at += down * input_strides[2] + right * input_strides[3]
        patch = tl.load(input + at, mask=real_input, other=0)
        if mask is None:
            effective = left_factor(value, kind, PRECISION)
        else:
            effective = effective_tile(value, clean, kind, PRECISION)
        total = tl.dot(effective, patch, total, input_precision=PRECISION)
        if TWO:
            if not ONE_INPUT:
                patch = tl.load(perturbed_input + at, mask=real_input, other=0)
            effective = effective_tile(value, perturbed, kind, PRECISION)
            perturbed_total = tl.dot(effective, patch, perturbed_total, input_precision=PRECISION)

    if bias is not None:
        offset = tl.load(bias + out_at, mask=real_out, other=0).to(tl.float32)[:, None]
        total += offset
        perturbed_total += offset
    if scale is not None:
        total *= tl.load(scale + out_at, mask=real_out, other=0).to(tl.float32)[:, None]
    if shift is not None:
        total += tl.load(shift + out_at, mask=real_out, other=0).to(tl.float32)[:, None]
    pixel_at = image * output_strides[0] + row * output_strides[2] + column * output_strides[3]
    at = pixel_at[None, :] + out_at[:, None] * output_strides[1]
    real = real_out[:, None] & real_pixel[None, :]
    result = finished(total, at, real, residual, None, upper, RELU).to(kind)
    tl.store(output + at, result, mask=real)
    if bits is not None:
        # eight neighbours in memory, which are eight output channels, make a byte
        passes = tl.reshape((result != 0).to(tl.int32), (BLOCK_O // 8, 8, BLOCK_P))
        packed = tl.sum(passes << tl.arange(0, 8)[None, :, None], 1)
        byte = (tl.program_id(0) % out_tiles) * (BLOCK_O // 8) + tl.arange(0, BLOCK_O // 8)
        at_byte = pixel_at[None, :] // 8 + byte[:, None]
        tl.store(bits + at_byte, packed.to(tl.uint8), mask=(byte < group_out // 8)[:, None] & real_pixel[None, :])
    if TWO:
        tl.store(perturbed_output + at, perturbed_total.to(kind), mask=real)


@triton.jit
def conv_input_grad(
    grad_input, perturbed_grad_input, grad, perturbed_grad, weight, mask, noise, bias, addend, gate, upper,
    grad_input_strides, grad_strides, weight_strides, mask_strides, noise_strides,
    images, rows, columns, input_rows, input_columns, group_out, group_in, stride, padding, dilation, tap_step,
    R: tl.constexpr, S: tl.constexpr, POINTWISE: tl.constexpr, PER_NEURON: tl.constexpr, TWO: tl.constexpr,
    ONE_INPUT: tl.constexpr, PACKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Tiles of (input channels, pixels of one phase). PACKED: a byte of the gate's bits is of eight input channels.

    With a stride, an input pixel is reached by those taps alone that agree with its row and column modulo the stride.
    Pixels of one residue, one phase, have the same taps: first[i], first[i] + tap_step[i], ….
    """
    group = tl.program_id(1)
    phase = tl.program_id(2)
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
    total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    perturbed_total = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for step in range(count_r * count_s * out_blocks):
        out = step % out_blocks * BLOCK_O + tl.arange(0, BLOCK_O)
        real_out = out < group_out
        tap = step // out_blocks
        r = first_r + tap // count_s * tap_step[0]
        s = first_s + tap % count_s * tap_step[1]
        real_weight = real_channel[:, None] & real_out[None, :]
        out_at = (group * group_out + out).to(tl.int64)
        at = (channel * weight_strides[1] + r * weight_strides[2] + s * weight_strides[3])[:, None]
        value = tl.load(weight + at + (out_at * weight_strides[0])[None, :], mask=real_weight, other=0)
        if mask is not None:
            value = value.to(tl.float32)
            if PER_NEURON:
                clean, perturbed = load_factors(
                    mask, noise, out_at[None, :], 0, 0, 0, mask_strides, noise_strides, real_out[None, :], TWO
                )
            else:
                clean, perturbed = load_factors(
                    mask, noise, out_at[None, :], channel[:, None], r, s, mask_strides, noise_strides, real_weight, TWO
                )
        from_row, from_column, real_grad = row, column, real_pixel
        if not POINTWISE:
            from_row, from_column, reached = reached_by(row, column, r, s, rows, columns, stride, padding, dilation)
            real_grad &= reached
        at_grad = image_at + from_row * grad_strides[2] + from_column * grad_strides[3]
        at_grad = at_grad[None, :] + (out.to(tl.int64) * grad_strides[1])[:, None]
        real = real_out[:, None] & real_grad[None, :]
        incoming = tl.load(grad + at_grad, mask=real, other=0)
        if mask is None:
            effective = left_factor(value, kind, PRECISION)
        else:
            effective = effective_tile(value, clean, kind, PRECISION)
        total = tl.dot(effective, incoming, total, input_precision=PRECISION)
        if TWO:
            incoming = tl.load(perturbed_grad + at_grad, mask=real, other=0)
            effective = effective_tile(value, perturbed, kind, PRECISION)
            if ONE_INPUT:
                total = tl.dot(effective, incoming, total, input_precision=PRECISION)
            else:
                perturbed_total = tl.dot(effective, incoming, perturbed_total, input_precision=PRECISION)

    pixel_at = image * grad_input_strides[0] + row * grad_input_strides[2] + column * grad_input_strides[3]
    channel_at = group.to(tl.int64) * group_in + channel
    if bias is not None:
        shift = tl.load(bias + channel_at, mask=real_channel, other=0).to(tl.float32)[:, None]
        total += shift
        perturbed_total += shift
    at = pixel_at[None, :] + channel_at[:, None] * grad_input_strides[1]
    real = real_channel[:, None] & real_pixel[None, :]
    if PACKED:
        if addend is not None:
            total += tl.load(addend + at, mask=real, other=0).to(tl.float32)
        byte = (tl.program_id(0) % in_tiles) * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)
        at_byte = ((pixel_at + group * group_in) // 8)[None, :] + byte[:, None]
        packed = tl.load(gate + at_byte, mask=(byte < group_in // 8)[:, None] & real_pixel[None, :], other=0)
        lets_pass = packed.to(tl.int32)[:, None, :] >> tl.arange(0, 8)[None, :, None] & 1
        total = tl.where(tl.reshape(lets_pass, (BLOCK_C, BLOCK_P)) != 0, total, 0.0)
    else:
        total = finished(total, at, real, addend, gate, upper, False)
    tl.store(grad_input + at, total.to(grad_input.dtype.element_ty), mask=real)
    if TWO and not ONE_INPUT:
        tl.store(perturbed_grad_input + at, perturbed_total.to(kind), mask=real)


@triton.jit
def phase_pixels(pixel, phase_row, phase_column, input_rows, input_columns, stride):
    """Image, row and column of the pixels of one phase, some of which may lie outside."""
    rows, columns = tl.cdiv(input_rows, stride[0]), tl.cdiv(input_columns, stride[1])
    column = pixel % columns * stride[1] + phase_column
    row = pixel // columns % rows * stride[0] + phase_row
    return (pixel // columns // rows).to(tl.int64), row, column


@triton.jit
def reached_by(row, column, r, s, rows, columns, stride, padding, dilation):
    """The output pixels in whose sums input pixels are under the tap (r, s), and whether there are any such."""
    below, across = row + padding[0] - r * dilation[0], column + padding[1] - s * dilation[1]
    from_row, from_column = below // stride[0], across // stride[1]
    reached = (below >= 0) & (from_row < rows) & (across >= 0) & (from_column < columns)
    return from_row, from_column, reached


@triton.jit
def phase_taps(place, stride, dilation, TAPS: tl.constexpr):
    """The first tap t with (place - t * dilation) % stride == 0, and how many there are."""
    first = TAPS
    count = 0
    for back in tl.static_range(TAPS):
        agrees = (place + (TAPS - 1 - back) * (stride - dilation % stride)) % stride == 0
        first = tl.where(agrees, TAPS - 1 - back, first)
        count += agrees.to(tl.int32)
    return first, count


@triton.jit
def conv_weight_grad(
    total_parts, perturbed_parts, grad, perturbed_grad, input, perturbed_input, weight,
    grad_strides, input_strides, weight_strides, images, rows, columns, input_rows, input_columns, group_out, group_in,
    stride, padding, dilation, part_pixels, part_size,
    R: tl.constexpr, S: tl.constexpr, POINTWISE: tl.constexpr, FLAT: tl.constexpr, TWO: tl.constexpr,
    ONE_INPUT: tl.constexpr, SEPARATE: tl.constexpr, PER_NEURON: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Tiles of (output channels, taps·C), each over ``part_pixels`` pixels; laid out (part, out, row, column, in).

    SEPARATE keeps the second branch's gradient apart; the total over both is then first + second. PER_NEURON multiplies
    each tile by θ and sums its rows: then the parts are laid out (part, tile, out).
    """
    group = tl.program_id(1)
    part = tl.program_id(2)
    out_tiles = tl.cdiv(group_out, BLOCK_O)
    out = (tl.program_id(0) % out_tiles) * BLOCK_O + tl.arange(0, BLOCK_O)
    tile = tl.program_id(0) // out_tiles
    if FLAT:
        k = tile * BLOCK_K + tl.arange(0, BLOCK_K)
        channel, tap = k % group_in, k // group_in
        real_k = k < R * S * group_in
        down, right = (tap // S * dilation[0])[None, :], (tap % S * dilation[1])[None, :]
    else:
        channel_blocks = tl.cdiv(group_in, BLOCK_K)
        channel = tile % channel_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = tile // channel_blocks
        real_k = channel < group_in
        down, right = tap // S * dilation[0], tap % S * dilation[1]
    real_out = out < group_out

    out_at = (group * group_out + out).to(tl.int64) * grad_strides[1]
    channel_at = (group * group_in + channel).to(tl.int64) * input_strides[1]
    first_pixel = part * part_pixels
    last_pixel = tl.minimum(first_pixel + part_pixels, images * rows * columns)
    total = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    perturbed_total = tl.zeros((BLOCK_O, BLOCK_K), tl.float32)
    for step in range(tl.cdiv(part_pixels, BLOCK_P)):
        pixel = first_pixel + step * BLOCK_P + tl.arange(0, BLOCK_P)
        real_pixel = pixel < last_pixel
        column, row, image = pixel % columns, pixel // columns % rows, (pixel // columns // rows).to(tl.int64)
        at_grad = image * grad_strides[0] + row * grad_strides[2] + column * grad_strides[3]
        at_grad = out_at[:, None] + at_grad[None, :]
        real = real_out[:, None] & real_pixel[None, :]
        real_input = real_pixel[:, None] & real_k[None, :]
        top, left = row * stride[0] - padding[0], column * stride[1] - padding[1]
        corner = image * input_strides[0] + top * input_strides[2] + left * input_strides[3]
        at_input = corner[:, None] + channel_at[None, :]
        if not POINTWISE:
            below, across = top[:, None] + down, left[:, None] + right
            real_input &= (below >= 0) & (below < input_rows) & (across >= 0) & (across < input_columns)
            at_input += down * input_strides[2] + right * input_strides[3]
        incoming = tl.load(grad + at_grad, mask=real, other=0)
        patch = tl.load(input + at_input, mask=real_input, other=0)
        total = tl.dot(incoming, patch, total, input_precision=PRECISION)
        if TWO:
            incoming = tl.load(perturbed_grad + at_grad, mask=real, other=0)
            if not ONE_INPUT:
                patch = tl.load(perturbed_input + at_input, mask=real_input, other=0)
            if SEPARATE:
                perturbed_total = tl.dot(incoming, patch, perturbed_total, input_precision=PRECISION)
            else:
                total = tl.dot(incoming, patch, total, input_precision=PRECISION)

    real = real_out[:, None] & real_k[None, :]
    if PER_NEURON:
        row = (part * tl.cdiv(tl.num_programs(0), out_tiles) + tile).to(tl.int64) * tl.num_programs(1) * group_out
        at = row + group * group_out + out
        at_weight = (channel * weight_strides[1] + tap // S * weight_strides[2] + tap % S * weight_strides[3])[None, :]
        at_weight += (group * group_out + out).to(tl.int64)[:, None] * weight_strides[0]
        value = tl.load(weight + at_weight, mask=real, other=0).to(tl.float32)
        if SEPARATE:
            tl.store(perturbed_parts + at, tl.sum(perturbed_total * value, 1), mask=real_out)
            total += perturbed_total
        tl.store(total_parts + at, tl.sum(total * value, 1), mask=real_out)
    else:
        at = part.to(tl.int64) * part_size + (group * group_out + out).to(tl.int64)[:, None] * (R * S * group_in)
        at += (tap * group_in + channel)[None, :]
        if SEPARATE:
            tl.store(perturbed_parts + at, perturbed_total, mask=real)
            total += perturbed_total
        tl.store(total_parts + at, total, mask=real)
