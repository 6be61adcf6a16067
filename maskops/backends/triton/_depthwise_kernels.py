"""The kernels of masked depthwise convolution.

A program owns a block of channels and a block of lanes; a tile is (lanes, channels).

walk:   stride and dilation 1. A lane is a strip of neighbouring columns of one image; the program walks down the rows,
        loads each row of its input once, and adds it to all the output rows that it belongs to. Their sums and the
        effective weights stay in registers.
gather: any stride and dilation. A lane is one pixel, which gathers the input of each tap.
"""

from __future__ import annotations

import triton
import triton.language as tl

from maskops.backends.triton.sign_bits import finished
from maskops.backends.triton.weights import load_factor, only_if


@triton.jit
def _taps(
    factors, channel, known, noisy, NOISY: tl.constexpr, FLIPPED: tl.constexpr,
    R: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The effective weights of the channels, one tile per tap."""
    taps = ()
    for k in tl.static_range(R * S):
        tap = R * S - 1 - k if FLIPPED else k
        taps += (tl.broadcast_to(_tap(factors, channel, known, noisy, tap, NOISY, S), (LANES, CHANNELS)),)
    return taps


@triton.jit
def _tap(factors, channel, known, noisy, tap, NOISY: tl.constexpr, S: tl.constexpr):
    """One tap of ``weight * (mask + noise)``; without ``NOISY`` of ``weight * mask``, without a mask of ``weight``."""
    weight, mask, noise, weight_strides, mask_strides, noise_strides = factors
    r = tap // S
    s = tap % S
    at = channel * weight_strides[0] + r * weight_strides[1] + s * weight_strides[2]
    value = tl.load(weight + at, mask=known, other=0).to(tl.float32)
    if mask is not None:
        factor = load_factor(mask + (channel * mask_strides[0] + r * mask_strides[1] + s * mask_strides[2]), known)
        if NOISY and noise is not None:
            at_noise = channel * noise_strides[0] + r * noise_strides[1] + s * noise_strides[2]
            factor += load_factor(noise + at_noise, noisy)
        value *= factor
    return value


@triton.jit
def _columns(column, stride, width, inside, COUNT: tl.constexpr):
    """Of ``COUNT`` neighbouring columns, the offset of each and where it is inside of the image."""
    columns = ()
    for k in tl.static_range(COUNT):
        columns += (k * stride, inside & (column + k >= 0) & (column + k < width))
    return columns


@triton.jit
def _load_row(pointer, columns, COUNT: tl.constexpr):
    """The columns of a row as float32, one tile each; those outside of the image are 0."""
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles += (tl.load(pointer + columns[2 * k], mask=columns[2 * k + 1], other=0).to(tl.float32),)
    return tiles


@triton.jit
def _add_row(sums, row, taps, fresh, SHIFT: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr):
    """Add an input row to the ``R`` output rows that it belongs to, whose sums have moved up by ``SHIFT`` rows."""
    added = ()
    for d in tl.static_range(R):
        for j in tl.static_range(COLUMNS):
            if d + SHIFT < R:
                total = sums[(d + SHIFT) * COLUMNS + j]
            else:
                total = fresh
            for s in tl.static_range(S):
                total = tl.fma(row[j + s], taps[(R - 1 - d) * S + s], total)
            added += (total,)
    return added


@triton.jit
def _shift(sums, fresh, R: tl.constexpr, COLUMNS: tl.constexpr):
    """The sums moved up by one row, with ``fresh`` at the end."""
    shifted = ()
    for k in tl.static_range((R - 1) * COLUMNS):
        shifted += (sums[k + COLUMNS],)
    return shifted + _repeat(fresh, COLUMNS)


@triton.jit
def _repeat(tile, COUNT: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(COUNT):
        tiles += (tile,)
    return tiles


@triton.jit
def _load_bias(bias, stride, channel, inside, LANES: tl.constexpr, CHANNELS: tl.constexpr):
    tile = tl.zeros((LANES, CHANNELS), tl.float32)
    if bias is not None:
        tile += tl.load(bias + channel * stride, mask=inside, other=0).to(tl.float32)
    return tile


@triton.jit
def _store_row(
    output, second_output, offset, columns, sums, second_sums, finish,
    RELU: tl.constexpr, OUTPUTS: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    addend, gate, upper = finish
    for k in tl.static_range(COUNT):
        at = offset + columns[2 * k]
        total = finished(sums[k], at, columns[2 * k + 1], addend, gate, upper, RELU)
        tl.store(output + at, total.to(output.dtype.element_ty), mask=columns[2 * k + 1])
        if OUTPUTS == 2:
            tl.store(second_output + at, second_sums[k].to(output.dtype.element_ty), mask=columns[2 * k + 1])


@triton.jit
def walk(
    output, second_output, source, second_source, weight, mask, noise, bias, addend, gate, upper,
    output_strides, source_strides, second_source_strides, weight_strides, mask_strides, noise_strides, bias_stride,
    lanes, strips, channels, channel_blocks, output_size, size, first, rows,
    FLIPPED: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
    OUTPUTS: tl.constexpr, SOURCES: tl.constexpr, BRANCHES: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // channel_blocks * LANES + tl.arange(0, LANES)[:, None]
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    noisy = known
    if BRANCHES == 2:
        second = tl.program_id(2) == 1
        source = tl.where(second, second_source, source)
        output = tl.where(second, second_output, output)
        noisy = only_if(known, second)
    factors = (weight, mask, noise, weight_strides, mask_strides, noise_strides)
    taps = _taps(factors, channel, known, noisy, OUTPUTS + SOURCES == 2, FLIPPED, R, S, LANES, CHANNELS)
    second_taps = taps
    if OUTPUTS + SOURCES == 3:
        second_taps = _taps(factors, channel, known, noisy, True, FLIPPED, R, S, LANES, CHANNELS)
    inside = known & (lane < lanes)
    image = (lane // strips).to(tl.int64)
    at = lane % strips * COLUMNS
    column = at + first[1]
    place = image * output_strides[0] + channel * output_strides[1] + at * output_strides[3]
    source += image * source_strides[0] + channel * source_strides[1] + column * source_strides[3]
    second_source += image * second_source_strides[0] + channel * second_source_strides[1]
    second_source += column * second_source_strides[3]
    output_columns = _columns(at, output_strides[3], output_size[1], inside, COLUMNS)
    columns = _columns(column, source_strides[3], size[1], inside, COLUMNS + S - 1)
    second_columns = _columns(column, second_source_strides[3], size[1], inside, COLUMNS + S - 1)
    fresh = _load_bias(bias, bias_stride, channel, known, LANES, CHANNELS)
    sums = _repeat(fresh, R * COLUMNS)
    second_sums = sums
    finish = (addend, gate, upper)
    begin = tl.program_id(1) * rows
    end = tl.minimum(begin + rows, output_size[0])
    # output row t needs the input rows from t + first to t + last; at the top of a large padding, none is there
    last = first[0] + R - 1
    for t in range(begin, tl.minimum(end, -last)):
        offset = place + t * output_strides[2]
        _store_row(output, second_output, offset, output_columns, sums, second_sums, finish, RELU, OUTPUTS, COLUMNS)
    for i in range(tl.maximum(begin + first[0], 0), tl.minimum(end + last, size[0])):
        row = _load_row(source + i * source_strides[2], columns, COLUMNS + S - 1)
        if OUTPUTS == 2:
            second_sums = _add_row(second_sums, row, second_taps, fresh, 1, R, S, COLUMNS)
        sums = _add_row(sums, row, taps, fresh, 1, R, S, COLUMNS)
        if SOURCES == 2:
            row = _load_row(second_source + i * second_source_strides[2], second_columns, COLUMNS + S - 1)
            sums = _add_row(sums, row, second_taps, fresh, 0, R, S, COLUMNS)
        if i - last >= begin:
            offset = place + (i - last) * output_strides[2]
            _store_row(output, second_output, offset, output_columns, sums, second_sums, finish, RELU, OUTPUTS, COLUMNS)
    for i in range(tl.maximum(begin + first[0], size[0]), end + last):
        sums = _shift(sums, fresh, R, COLUMNS)
        if OUTPUTS == 2:
            second_sums = _shift(second_sums, fresh, R, COLUMNS)
        if i - last >= begin:
            offset = place + (i - last) * output_strides[2]
            _store_row(output, second_output, offset, output_columns, sums, second_sums, finish, RELU, OUTPUTS, COLUMNS)


@triton.jit
def _load_pixel(source, strides, rows, columns, size, inside):
    """The pixel of each lane as float32; 0 where it lies outside of the image."""
    here = inside & (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    return tl.load(source + rows * strides[2] + columns * strides[3], mask=here, other=0).to(tl.float32)


@triton.jit
def _gather_tap(
    sums, sources, size, factors, channel, known, noisy, inside, y, x, vertical, horizontal, tap,
    FLIPPED: tl.constexpr, R: tl.constexpr, S: tl.constexpr, OUTPUTS: tl.constexpr, SOURCES: tl.constexpr,
):  # fmt: skip
    """Add what one tap gives each pixel to the sums, as many as outputs."""
    total, second_total = sums
    source, second_source, strides, second_strides = sources
    row = y * vertical[0] + tap // S * vertical[1] + vertical[2]
    column = x * horizontal[0] + tap % S * horizontal[1] + horizontal[2]
    whole = inside & (row % vertical[3] == 0) & (column % horizontal[3] == 0) & (row >= 0) & (column >= 0)
    row = row // vertical[3]
    column = column // horizontal[3]
    pixel = _load_pixel(source, strides, row, column, size, whole)
    at = R * S - 1 - tap if FLIPPED else tap
    total += pixel * _tap(factors, channel, known, noisy, at, OUTPUTS + SOURCES == 2, S)
    if OUTPUTS + SOURCES == 3:
        value = _tap(factors, channel, known, noisy, at, True, S)
        if OUTPUTS == 2:
            second_total += pixel * value
        else:
            total += _load_pixel(second_source, second_strides, row, column, size, whole) * value
    return total, second_total


@triton.jit
def gather(
    output, second_output, source, second_source, weight, mask, noise, bias, addend, gate, upper,
    output_strides, source_strides, second_source_strides, weight_strides, mask_strides, noise_strides, bias_stride,
    lanes, channels, channel_blocks, output_size, size, vertical, horizontal,
    FLIPPED: tl.constexpr, RELU: tl.constexpr, R: tl.constexpr, S: tl.constexpr, UNROLLED: tl.constexpr,
    OUTPUTS: tl.constexpr, SOURCES: tl.constexpr, BRANCHES: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0) // channel_blocks * LANES + tl.arange(0, LANES)[:, None]
    channel = tl.program_id(0) % channel_blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    noisy = known
    if BRANCHES == 2:
        second = tl.program_id(2) == 1
        source = tl.where(second, second_source, source)
        output = tl.where(second, second_output, output)
        noisy = only_if(known, second)
    inside = known & (lane < lanes)
    x = lane % output_size[1]
    y = lane // output_size[1] % output_size[0]
    image = (lane // output_size[1] // output_size[0]).to(tl.int64)
    source += image * source_strides[0] + channel * source_strides[1]
    second_source += image * second_source_strides[0] + channel * second_source_strides[1]
    total = _load_bias(bias, bias_stride, channel, known, LANES, CHANNELS)
    sums = (total, total)
    factors = (weight, mask, noise, weight_strides, mask_strides, noise_strides)
    sources = (source, second_source, source_strides, second_source_strides)
    if UNROLLED:
        for tap in tl.static_range(R * S):
            sums = _gather_tap(
                sums, sources, size, factors, channel, known, noisy, inside, y, x, vertical, horizontal, tap,
                FLIPPED, R, S, OUTPUTS, SOURCES,
            )  # fmt: skip
    else:
        for tap in range(R * S):
            sums = _gather_tap(
                sums, sources, size, factors, channel, known, noisy, inside, y, x, vertical, horizontal, tap,
                FLIPPED, R, S, OUTPUTS, SOURCES,
            )  # fmt: skip
    place = image * output_strides[0] + channel * output_strides[1] + y * output_strides[2] + x * output_strides[3]
    total = finished(sums[0], place, inside, addend, gate, upper, RELU)
    tl.store(output + place, total.to(output.dtype.element_ty), mask=inside)
    if OUTPUTS == 2:
        tl.store(second_output + place, sums[1].to(output.dtype.element_ty), mask=inside)


@triton.jit
def _store_parts(
    parts, slice, channel, channels, known, sums, tap, R: tl.constexpr, S: tl.constexpr, COUNT: tl.constexpr
):
    """The sums over the lanes of ``COUNT`` taps from ``tap`` on."""
    place = parts + (slice * (R * S) + tap).to(tl.int64) * channels + channel
    for k in tl.static_range(COUNT):
        total = tl.sum(sums[k], 0, keep_dims=True)
        tl.store(place + k * channels, total, mask=known & (tl.zeros_like(channel) + tap + k < R * S))


@triton.jit
def _add(tiles, others, COUNT: tl.constexpr):
    total = ()
    for k in tl.static_range(COUNT):
        total += (tiles[k] + others[k],)
    return total


@triton.jit
def _push(rows, row, COUNT: tl.constexpr, COLUMNS: tl.constexpr):
    """The new row before the others, of which the last one falls out."""
    pushed = row
    for k in tl.static_range((COUNT - 1) * COLUMNS):
        pushed += (rows[k],)
    return pushed


@triton.jit
def walk_weight_grad(
    parts, grad, added, second_grad, source, second_source,
    grad_strides, added_strides, source_strides, branch_stride,
    lanes, strips, channels, grad_size, size, first, per_slice, rows, splits,
    R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr, BRANCHES: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    if BRANCHES == 2:
        second = tl.program_id(2) == 1
        source = tl.where(second, second_source, source)
        grad = tl.where(second, second_grad, grad)
        parts += tl.program_id(2).to(tl.int64) * branch_stride
    zero = tl.zeros((LANES, CHANNELS), tl.float32)
    sums = _repeat(zero, R * S)
    start = tl.program_id(1) // splits * per_slice
    begin = tl.program_id(1) % splits * rows
    end = tl.minimum(begin + rows, size[0])
    for block in range(start, tl.minimum(start + per_slice, lanes), LANES):
        lane = block + tl.arange(0, LANES)[:, None]
        inside = known & (lane < lanes)
        image = (lane // strips).to(tl.int64)
        at = lane % strips * COLUMNS
        column = at + first[1]
        grad_place = image * grad_strides[0] + channel * grad_strides[1] + at * grad_strides[3]
        added_place = image * added_strides[0] + channel * added_strides[1] + at * added_strides[3]
        place = source + image * source_strides[0] + channel * source_strides[1] + column * source_strides[3]
        grad_columns = _columns(at, grad_strides[3], grad_size[1], inside, COLUMNS)
        added_columns = _columns(at, added_strides[3], grad_size[1], inside, COLUMNS)
        columns = _columns(column, source_strides[3], size[1], inside, COLUMNS + S - 1)
        # gradients of the output rows that an input row belongs to, the latest first
        grads = _repeat(zero, R * COLUMNS)
        for i in range(begin - R + 1, end):
            t = i - first[0]
            fresh = _repeat(zero, COLUMNS)
            if (t >= 0) & (t < grad_size[0]):
                fresh = _load_row(grad + grad_place + t * grad_strides[2], grad_columns, COLUMNS)
                if added is not None:
                    more = _load_row(added + added_place + t * added_strides[2], added_columns, COLUMNS)
                    fresh = _add(fresh, more, COLUMNS)
            grads = _push(grads, fresh, R, COLUMNS)
            if i >= begin:
                row = _load_row(place + i * source_strides[2], columns, COLUMNS + S - 1)
                sums = _add_products(sums, grads, row, R, S, COLUMNS)
    _store_parts(parts, tl.program_id(1), channel, channels, known, sums, 0, R, S, R * S)


@triton.jit
def _add_products(sums, grads, row, R: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr):
    added = ()
    for r in tl.static_range(R):
        for s in tl.static_range(S):
            total = sums[r * S + s]
            for j in tl.static_range(COLUMNS):
                total = tl.fma(grads[r * COLUMNS + j], row[j + s], total)
            added += (total,)
    return added


@triton.jit
def gather_weight_grad(
    parts, grad, added, second_grad, source, second_source,
    grad_strides, added_strides, source_strides, branch_stride,
    lanes, channels, grad_size, size, vertical, horizontal, per_slice, groups,
    R: tl.constexpr, S: tl.constexpr, TAPS: tl.constexpr, BRANCHES: tl.constexpr,
    LANES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    channel = tl.program_id(0) // groups * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    known = channel < channels
    if BRANCHES == 2:
        second = tl.program_id(2) == 1
        source = tl.where(second, second_source, source)
        grad = tl.where(second, second_grad, grad)
        parts += tl.program_id(2).to(tl.int64) * branch_stride
    first_tap = tl.program_id(0) % groups * TAPS
    sums = _repeat(tl.zeros((LANES, CHANNELS), tl.float32), TAPS)
    start = tl.program_id(1) * per_slice
    for block in range(start, tl.minimum(start + per_slice, lanes), LANES):
        lane = block + tl.arange(0, LANES)[:, None]
        inside = known & (lane < lanes)
        x = lane % grad_size[1]
        y = lane // grad_size[1] % grad_size[0]
        image = (lane // grad_size[1] // grad_size[0]).to(tl.int64)
        grad_pixel = _load_pixel(
            grad + image * grad_strides[0] + channel * grad_strides[1], grad_strides, y, x, grad_size, inside
        )
        if added is not None:
            here = added + image * added_strides[0] + channel * added_strides[1]
            grad_pixel += _load_pixel(here, added_strides, y, x, grad_size, inside)
        place = source + image * source_strides[0] + channel * source_strides[1]
        summed = ()
        for k in tl.static_range(TAPS):
            tap = first_tap + k
            row = y * vertical[0] + tap // S * vertical[1] + vertical[2]
            column = x * horizontal[0] + tap % S * horizontal[1] + horizontal[2]
            pixel = _load_pixel(place, source_strides, row, column, size, inside)
            summed += (sums[k] + grad_pixel * pixel,)
        sums = summed
    _store_parts(parts, tl.program_id(1), channel, channels, known, sums, first_tap, R, S, TAPS)
