"""The table of compiled kernels, and what it has to be complete and current against: the kernels' sources."""

from __future__ import annotations

import ast
import csv
import hashlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from benchmarks import results

SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}
"""Compute capability -> bytes that one program may have."""
FOLDER = results.FOLDER / "kernels"
PACKAGE = results.ROOT / "maskops" / "backends" / "triton"


@dataclass(frozen=True)
class Row:
    """One binary; what :class:`benchmarks.kernels.sass.Binary` says of it, and what it was compiled from.

    dtype:   of the activations, or of what else the kernel works on
    shared:  bytes of shared memory
    limits:  what it runs into
    sources: hash of the backend's sources
    """

    kernel: str
    capability: str
    dtype: str
    case: str
    warps: str
    stages: str
    registers: str
    stack: str
    local: str
    shared: str
    matrix: str
    loop_stores: str
    loads: str
    wide_loads: str
    limits: str
    triton: str
    sources: str


COLUMNS = [column.name for column in fields(Row)]


def sources_hash() -> str:
    """Of the text of all the backend's modules: how a kernel is compiled, its launch decides as much as itself."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE.glob("*.py")):
        digest.update(f"{path.name}\n{path.read_text()}\n".encode())
    return digest.hexdigest()[:16]


def kernel_names() -> list[str]:
    """``module.function`` of each function under ``triton.jit`` that no other one calls."""
    jitted, called = set(), set()
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text())
        home = {
            alias.asname or alias.name: f"{node.module.rsplit('.', 1)[-1]}.{alias.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module
            for alias in node.names
        }
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_jitted(node)]
        jitted |= {f"{path.stem}.{function.name}" for function in functions}
        for function in functions:
            calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
            names = (call.id for call in calls if isinstance(call, ast.Name))
            called |= {home.get(name, f"{path.stem}.{name}") for name in names}
    return sorted(jitted - called)


def _is_jitted(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.jit") for decorator in function.decorator_list)


def read(path: Path = FOLDER / "kernels.csv") -> list[Row]:
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(COLUMNS)}; got {reader.fieldnames}")
        return [Row(**row) for row in reader]


def replace(rows: Iterable[Row], replaced: set[tuple[str, str]], folder: Path) -> None:
    """Write ``kernels.csv`` and ``kernels.md``, with what they had of others than the replaced (kernel, capability)."""
    folder.mkdir(parents=True, exist_ok=True)
    path, names = folder / "kernels.csv", kernel_names()
    before = read(path) if path.exists() else []
    kept = [row for row in before if row.kernel in names and (row.kernel, row.capability) not in replaced]
    rows = sorted([*kept, *rows], key=lambda row: (row.kernel, row.capability))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
    (folder / "kernels.md").write_text(markdown(rows))


def markdown(rows: list[Row]) -> str:
    """The worst of each kernel on each architecture, and what multiplies its matrices."""
    kernels = sorted({row.kernel for row in rows})
    capabilities = sorted({row.capability for row in rows})
    title = "| kernel | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |"
    rule = "|---" * (1 + len(capabilities)) + "|"
    lines = [
        "# Every Triton kernel, compiled for each architecture",
        "",
        f"Made by `python -m benchmarks kernels` with Triton {', '.join(sorted({row.triton for row in rows}))}, on no "
        f"GPU: {len(rows)} binaries. Of each kernel's cases the most registers per thread; the most shared memory, "
        "from 1 KiB on; and the most bytes of spilled registers, where there are any.",
        *("", title, rule),
    ]
    for kernel in kernels:
        cells = [_worst([row for row in rows if (row.kernel, row.capability) == (kernel, c)]) for c in capabilities]
        lines.append(f"| {kernel} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Matrix instructions, and in brackets the most stores to shared memory in the loop around them. HGMMA reads its"
        " left operand from registers (register A) or from shared memory (shared A); FMA stands for neither.",
        *("", title.replace("kernel |", "kernel | dtype |", 1), f"|---{rule}"),
    ]
    multiplying = {row.kernel for row in rows if row.matrix}
    for kernel, dtype in sorted({(row.kernel, row.dtype) for row in rows if row.kernel in multiplying}):
        of = [row for row in rows if (row.kernel, row.dtype) == (kernel, dtype)]
        cells = [_instructions([row for row in of if row.capability == c]) for c in capabilities]
        lines.append(f"| {kernel} | {dtype} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _worst(rows: list[Row]) -> str:
    if not rows:
        return ""
    names = "registers", "shared", "stack"
    registers, shared, stack = (max(int(getattr(row, name)) for row in rows) for name in names)
    memory = f", {shared / 1024:.0f} KiB" if shared >= 1024 else ""
    return f"{registers}{memory}" + (f", **{stack} bytes spilled**" if stack else "")


def _instructions(rows: list[Row]) -> str:
    kinds = sorted({row.matrix for row in rows}, reverse=True)
    stores = {kind: max(int(row.loop_stores) for row in rows if row.matrix == kind) for kind in kinds}
    return "; ".join(f"{kind} ({stores[kind]})" if kind else "FMA" for kind in kinds)
