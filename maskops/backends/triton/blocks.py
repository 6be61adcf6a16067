"""Block sizes: a table per architecture and a plain function of the shape."""

from __future__ import annotations

from functools import cache, lru_cache
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


_SMALL = {  # shared memory of 99 KiB: sm_86, sm_89, sm_120
    "half": {1: Blocks(64, 128, 32, 4, 3), 2: Blocks(64, 64, 32, 4, 3), 4: Blocks(64, 64, 32, 8, 3)},
    "tf32": {1: Blocks(64, 64, 32, 4, 2), 2: Blocks(64, 32, 32, 4, 2), 4: Blocks(64, 32, 32, 8, 2)},
    "ieee": {1: Blocks(64, 64, 16, 4, 3), 2: Blocks(64, 32, 16, 4, 2), 4: Blocks(16, 32, 16, 8, 2)},
}
_LARGE = {  # shared memory of 163 KiB: sm_80
    "half": {1: Blocks(128, 128, 32, 8, 3), 2: Blocks(64, 128, 32, 8, 3), 4: Blocks(64, 64, 32, 8, 3)},
    "tf32": {1: Blocks(64, 128, 32, 8, 3), 2: Blocks(64, 64, 32, 8, 3), 4: Blocks(64, 32, 32, 8, 3)},
    "ieee": {1: Blocks(64, 64, 16, 4, 3), 2: Blocks(64, 32, 16, 4, 2), 4: Blocks(16, 32, 16, 8, 3)},
}
_HOPPER = {  # 227 KiB, and wgmma, which takes its left operand from registers in 64 rows per four warps
    "half": {1: Blocks(128, 128, 64, 8, 3), 2: Blocks(128, 64, 64, 8, 3), 4: Blocks(128, 64, 32, 8, 3)},
    "tf32": {1: Blocks(128, 64, 32, 8, 3), 2: Blocks(64, 64, 32, 4, 3), 4: Blocks(64, 64, 32, 8, 3)},
    "ieee": {1: Blocks(64, 64, 16, 4, 3), 2: Blocks(64, 32, 16, 4, 2), 4: Blocks(16, 32, 16, 8, 3)},
}
TABLE = {(8, 0): _LARGE, (8, 6): _SMALL, (8, 9): _SMALL, (9, 0): _HOPPER, (12, 0): _SMALL}
"""Compute capability -> kind of product -> branches, or masks over one weight -> blocks.

Other capabilities take the next smaller one. ``"ieee"`` multiplies float32 without the matrix unit.
"""


_SHARED = {(8, 0): 160 << 10, (8, 6): 96 << 10, (8, 9): 96 << 10, (9, 0): 224 << 10, (12, 0): 96 << 10}
"""Bytes of shared memory for the factors; three KiB are left for the rest."""


def _known(capability: tuple[int, int]) -> tuple[int, int]:
    return max((key for key in TABLE if key <= capability), default=(8, 6))


def kind_of_product(dtype: torch.dtype, precision: str) -> str:
    """``"half"`` for 16-bit factors, else how float32 is multiplied: ``"tf32"`` or ``"ieee"``."""
    return "half" if dtype.itemsize == 2 else precision


def table_entry(capability: tuple[int, int], kind: str, branches: int) -> Blocks:
    """The full tile for an architecture, before it is fitted to a shape."""
    return TABLE[_known(capability)][kind][power_of_two(branches, 1, 4)]


def blocks(
    sizes: tuple[int, int, int],
    entry_bytes: tuple[int, int],
    kind: str,
    branches: int,
    device: torch.device,
    scattered: bool = False,
) -> Blocks:
    """The tile for a product (left, inner) @ (inner, right): the table's, smaller for small shapes and wide entries.

    sizes:       left, right, inner
    entry_bytes: what is loaded for an entry of the left and of the right factor, over all branches
    scattered:   entries are loaded one by one, or lie in many places: every thread then holds more addresses
    """
    left, right, inner = sizes
    tile = table_entry(capability(device), kind, branches)
    if scattered and kind == "ieee":
        tile = Blocks(32, min(tile.right, 64), 16, 4, 2)
    elif scattered:
        tile = Blocks(min(tile.left, 64), min(tile.right, 64), min(tile.inner, 32), 8, tile.stages)
    tile = _resized(tile, power_of_two(left, 16, tile.left), power_of_two(right, 16, tile.right))
    tile = tile._replace(inner=power_of_two(inner, 16, tile.inner))
    while shared_bytes(tile, entry_bytes) > _SHARED[_known(capability(device))] and tile.inner > 16:
        tile = tile._replace(stages=tile.stages - 1) if tile.stages > 2 else tile._replace(inner=tile.inner // 2)
    return tile


def shared_bytes(tile: Blocks, entry_bytes: tuple[int, int]) -> int:
    """At most so much shared memory does a tile take: every stage of the right factor, all but one of the left."""
    left_bytes, right_bytes = entry_bytes
    left, right = tile.left * left_bytes * (tile.stages - 1), tile.right * right_bytes * tile.stages
    return tile.inner * (left + right)


@lru_cache(maxsize=4096)
def variants(tile: Blocks, entry_bytes: tuple[int, int], device: torch.device) -> tuple[Blocks, ...]:
    """The tile, and others that fit and may be faster on a device or shape that the table knows little of."""
    half_left = _resized(tile, max(tile.left // 2, 16), tile.right)
    half_right = _resized(tile, tile.left, max(tile.right // 2, 16))
    deeper = [tile._replace(inner=inner) for inner in (tile.inner * 2, max(tile.inner // 2, 16))]
    staged = [tile._replace(stages=stages) for stages in (tile.stages - 1, tile.stages + 1)]
    spread = tile._replace(warps=8 if tile.warps == 4 else 4)
    others = [half_left, half_right, *deeper, *staged, spread]
    room = _SHARED[_known(capability(device))]
    return tuple(dict.fromkeys([tile, *(other for other in others if shared_bytes(other, entry_bytes) <= room)]))


def occupy(tile: Blocks, left: int, right: int, device: torch.device) -> Blocks:
    """A tile with fewer columns where there would be fewer tiles than processors."""
    columns = tile.right
    while columns > 32 and cdiv(left, tile.left) * cdiv(right, columns) < processors(device):
        columns //= 2
    return _resized(tile, tile.left, columns)


def _resized(tile: Blocks, left: int, right: int) -> Blocks:
    """The tile in another size, with as many warps for as many entries; wgmma's 64 rows take four of them at least."""
    warps = tile.warps * left * right // (tile.left * tile.right)
    return tile._replace(left=left, right=right, warps=max(warps, 4 if left >= 64 else 1))


def registers(programs: int | None, warps: int) -> int | None:
    """How many registers a thread may have where so many programs share a processor; without a number, None.

    Said aloud, ptxas makes do with them; left to itself, it may aim at more programs than fit, and spill for that.
    """
    return None if programs is None else min(255, 65536 // (32 * warps * programs) // 8 * 8)


def has_wgmma(device: torch.device) -> bool:
    """Whether tiles are made for wgmma; ptxas needs to be told about registers more often where they aren't."""
    return TABLE[_known(capability(device))] is _HOPPER


def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of a device; elsewhere than on a GPU that of the largest table entry."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


@cache
def processors(device: torch.device) -> int:
    """The streaming multiprocessors of a device; those of an H100 for a GPU that isn't there, one for the CPU."""
    if device.type != "cuda":
        return 1 if device.type == "cpu" else _H100_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
