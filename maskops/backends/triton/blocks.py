"""Block sizes: a table per architecture and a plain function of the shape."""

from __future__ import annotations

from typing import NamedTuple

import torch

from maskops.backends.triton._launch import cdiv, power_of_two

_H100_PROCESSORS = 132


class Blocks(NamedTuple):
    """A tile of (left, right) entries of a matrix product, ``inner`` entries of the sum at a time."""

    left: int
    right: int
    inner: int
    warps: int
    stages: int


_SMALL = {  # shared memory of 99 KiB: sm_86, sm_89
    2: {1: Blocks(64, 128, 32, 4, 3), 2: Blocks(64, 64, 32, 4, 3)},
    4: {1: Blocks(64, 64, 32, 4, 2), 2: Blocks(64, 32, 32, 4, 2)},
}
_LARGE = {  # shared memory of 163 KiB: sm_80
    2: {1: Blocks(128, 128, 32, 8, 3), 2: Blocks(64, 128, 32, 8, 3)},
    4: {1: Blocks(64, 128, 32, 8, 3), 2: Blocks(64, 64, 32, 8, 3)},
}
_HOPPER = {  # 227 KiB, and wgmma, which takes its left operand from registers in 64 rows per four warps
    2: {1: Blocks(128, 128, 64, 8, 3), 2: Blocks(128, 64, 64, 8, 3)},
    4: {1: Blocks(128, 64, 32, 8, 3), 2: Blocks(64, 64, 32, 4, 3)},
}
TABLE = {(8, 0): _LARGE, (8, 6): _SMALL, (8, 9): _SMALL, (9, 0): _HOPPER}
"""Compute capability -> bytes of an entry -> branches -> blocks. Others take those of the next smaller capability."""


def table_entry(capability: tuple[int, int], dtype: torch.dtype, branches: int) -> Blocks:
    """The full tile for an architecture, before it is fitted to a shape."""
    known = max((key for key in TABLE if key <= capability), default=(8, 6))
    return TABLE[known][dtype.itemsize][branches]


def blocks(left: int, right: int, inner: int, dtype: torch.dtype, branches: int, device: torch.device) -> Blocks:
    """The tile for a product (left, inner) @ (inner, right): the table's, smaller for small shapes."""
    tile = table_entry(capability(device), dtype, branches)
    left_block, right_block = power_of_two(left, 16, tile.left), power_of_two(right, 16, tile.right)
    warps = min(tile.warps, max(1, left_block * right_block // 1024))
    return Blocks(left_block, right_block, power_of_two(inner, 16, tile.inner), warps, tile.stages)


def variants(tile: Blocks) -> list[Blocks]:
    """The tile, and others that may be faster on a device or shape that the table knows little of."""
    half_left = tile._replace(left=max(tile.left // 2, 16), warps=max(tile.warps // 2, 1))
    half_right = tile._replace(right=max(tile.right // 2, 16), warps=max(tile.warps // 2, 1))
    deeper = [tile._replace(inner=inner) for inner in (tile.inner * 2, max(tile.inner // 2, 16))]
    staged = [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1)]
    spread = tile._replace(warps=8 if tile.warps == 4 else 4)
    return list(dict.fromkeys([tile, half_left, half_right, *deeper, *staged, spread]))


def occupy(tile: Blocks, left: int, right: int, device: torch.device) -> Blocks:
    """A tile with fewer columns where there would be fewer tiles than processors."""
    columns = tile.right
    while columns > 32 and cdiv(left, tile.left) * cdiv(right, columns) < processors(device):
        columns //= 2
    return tile._replace(right=columns, warps=min(tile.warps, max(1, tile.left * columns // 1024)))


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; elsewhere than on a GPU that of the largest table entry."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a device; those of an H100 for a GPU that isn't there, one for the CPU."""
    if device.type != "cuda":
        return 1 if device.type == "cpu" else _H100_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
