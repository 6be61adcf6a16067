"""What the machine code of one kernel says about it."""

from __future__ import annotations

import re
import subprocess
import tempfile
from typing import NamedTuple

import triton

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+([^;]*?)\s*;")
_BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")

_LOCAL = re.compile(r"\b(LDL|STL)\b")
_STORE = re.compile(r"\bSTSM?\b")


class Binary(NamedTuple):
    """What one binary takes and has.

    registers:   per thread
    stack:       bytes per thread of memory that the compiler took for itself
    local:       loads and stores of such memory: registers are spilled, or indexed at run time
    matrix:      ``HGMMA register A``, ``HGMMA shared A``, ``HMMA``, or nothing
    loop_stores: stores to shared memory in the loops around the matrix instructions; copies of global memory aren't any
    loads:       of global memory
    wide_loads:  those of 128 bits
    """

    registers: int
    stack: int
    local: int
    matrix: str
    loop_stores: int
    loads: int
    wide_loads: int


def read(cubin: bytes) -> Binary:
    """Disassemble a kernel with the tool that Triton brings along."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", "-sass", file.name]
        return parse(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def parse(text: str) -> Binary:
    """What ``cuobjdump --dump-resource-usage -sass`` printed of one kernel."""
    used = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    code = [(int(address, 16), instruction) for address, instruction in _INSTRUCTION.findall(text)]
    loads = [instruction for _, instruction in code if re.search(r"\b(LDG|LDGSTS)\.", instruction)]
    matrix = [(address, kind) for address, instruction in code if (kind := _matrix(instruction))]
    kinds = sorted({kind for _, kind in matrix})
    loops = _loops(code, [address for address, _ in matrix])
    return Binary(
        registers=int(used["REG"]),
        stack=int(used["STACK"]) + int(used["LOCAL"]),
        local=_count(code, _LOCAL),
        matrix=", ".join(kinds),
        loop_stores=_count(code, _STORE, loops),
        loads=len(loads),
        wide_loads=sum(".128" in instruction for instruction in loads),
    )


def _matrix(instruction: str) -> str | None:
    found = re.search(r"\b(HGMMA|HMMA)\.\S+ R\d+, (\S+),", instruction)
    if found is None:
        return None
    name, left = found.groups()
    return name if name == "HMMA" else f"HGMMA {'register' if left.startswith('R') else 'shared'} A"


def _loops(code: list[tuple[int, str]], matrix: list[int]) -> set[tuple[int, int]]:
    """First and last address of the innermost loops around ``matrix``; where there is none, of all before its last."""
    branches = [(int(to[1], 16), address) for address, instruction in code if (to := _BRANCH.search(instruction))]
    loops = [(first, last) for first, last in branches if first < last]
    spans = set()
    for address in matrix:
        around = [(first, last) for first, last in loops if first <= address <= last]
        if around:
            spans.add(min(around, key=lambda span: span[1] - span[0]))
    return spans or ({(0, matrix[-1])} if matrix else set())


def _count(
    code: list[tuple[int, str]], instructions: re.Pattern[str], spans: set[tuple[int, int]] | None = None
) -> int:
    """How many of these instructions there are, within the spans where some are given."""
    found = [address for address, instruction in code if instructions.search(instruction)]
    return sum(spans is None or any(first <= address <= last for first, last in spans) for address in found)
