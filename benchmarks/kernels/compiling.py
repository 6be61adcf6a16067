"""Kernels compiled, not launched, for GPUs that are not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from benchmarks.kernels import sass
from benchmarks.kernels.cases import Case
from benchmarks.kernels.table import SHARED_MEMORY, Row, kernel_names
from benchmarks.measure import first_line
from benchmarks.results import say
from maskops.backends.triton import _launch, blocks


class _AbsentGPU:
    """As much of a driver as compiling asks for."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        # what is compiled for one device is not taken for another
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0


class Compiler:
    """Compiles what cases launch, and keeps one row for each binary, and what went wrong.

    kernels: names of those to compile; all of them without any
    first:   only the first case of each
    """

    def __init__(self, capability: int, kernels: list[str], first: bool, sources: str) -> None:
        self.capability, self.first, self.sources = capability, first, sources
        self.rows: list[Row] = []
        self.failures: list[str] = []
        self._wanted = set(kernels or kernel_names())
        self._seen: set[str] = set()

    def compile(self, cases: Iterator[Case]) -> None:
        """Call the cases. This process launches no kernel on a GPU any more."""
        driver.set_active(_AbsentGPU(self.capability))
        capability = divmod(self.capability, 10)
        with (
            patch.object(_launch, "launch", self._launch),
            patch.object(blocks, "capability", lambda device: capability),
            # else most layers would be computed by torch's own kernels
            patch.dict(os.environ, MASKOPS_LAYERS="fused"),
        ):
            for case in cases:
                if self._wanted:
                    self._call(case)

    def _call(self, case: Case) -> None:
        self._case = case
        try:
            case.call()
        except Exception as error:  # one kernel that can't be compiled hides no other
            self.failures.append(f"sm_{self.capability}, {case.dtype}, {case.words}: {first_line(error)}")
            say(self.failures[-1])

    def _launch(self, kernel: Any, grid: tuple[int, ...], arguments: tuple, options: dict[str, Any]) -> None:
        name = f"{kernel.fn.__module__.rsplit('.', 1)[-1]}.{kernel.fn.__name__}"
        if name not in self._wanted:
            return
        try:
            compiled = kernel.run(*arguments, grid=grid, warmup=True, **options)
            compiled = compiled.result() if hasattr(compiled, "result") else compiled
            if compiled.hash in self._seen:
                return
            self._seen.add(compiled.hash)
            binary = sass.read(compiled.asm["cubin"])
        except Exception as error:
            raise RuntimeError(f"{name}: {first_line(error)}") from error
        if self.first:
            self._wanted.remove(name)
        metadata = compiled.metadata
        limits = self._limits(binary, metadata)
        if limits:
            say(f"sm_{self.capability}, {self._case.dtype}, {self._case.words}: {name}: {limits}")
        self.rows.append(
            Row(
                *(name, str(self.capability), self._case.dtype, self._case.words),
                *(str(number) for number in (metadata.num_warps, metadata.num_stages, *binary[:3])),
                *(str(metadata.shared), binary.matrix, *(str(number) for number in binary[4:])),
                limits,
                *(triton.__version__, self.sources),
            )
        )

    def _limits(self, binary: sass.Binary, metadata: Any) -> str:
        """What a launch would run into, and where the compiler had no register left."""
        most = min(255, 65536 // (32 * metadata.num_warps))
        reached = {
            "spills": binary.stack > 0 or binary.local > 0,
            "shared memory": metadata.shared > SHARED_MEMORY[self.capability],
            "all registers": binary.registers >= most,
        }
        return ", ".join(what for what, is_so in reached.items() if is_so)
