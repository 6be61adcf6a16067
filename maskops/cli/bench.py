"""Measure speed and memory on this machine, as the benchmarks of a checkout do (the options are theirs)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import maskops._version

_ROOT = Path(maskops._version.__file__).parent.parent


def run(argv: Sequence[str]) -> int:
    """Run ``python -m benchmarks`` with these arguments; returns its exit code, or 2 where there is no checkout."""
    if not (_ROOT / "benchmarks" / "__main__.py").is_file():
        print(
            "maskops bench: the benchmarks are in the repository, not in the installed package: run"
            " python -m benchmarks in a checkout of it",
            file=sys.stderr,
        )
        return 2
    paths = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmarks", *argv]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, check=False).returncode
