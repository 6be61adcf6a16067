"""The CUDA kernels built for the CPU: ``load()`` makes them the backend ``cuda`` of this process."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / f"emulated-{sys.implementation.cache_tag}"


def load() -> str | None:
    """Build what has changed, and import it as ``maskops._C``; or one sentence that says why that can't be done."""
    # pytest's first process has built it when it starts others
    reason = None if "PYTEST_XDIST_WORKER" in os.environ else _build()
    module = FOLDER / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    if reason or not module.exists():
        return reason or f"there is no {module}"
    import torch  # noqa: F401  its libraries must be there when the module is loaded

    spec = importlib.util.spec_from_file_location("maskops._C", module)
    sys.modules["maskops._C"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["maskops._C"])
    return None


def _build() -> str | None:
    tools = [tool for tool in ("cmake", "ninja") if shutil.which(tool, path=_path()) is None]
    if tools:
        return f"the CUDA emulator is built with {', '.join(tools)}: not installed"
    options = ["-DMASKOPS_EMULATED=ON", "-DCMAKE_BUILD_TYPE=Release", f"-DPython_EXECUTABLE={sys.executable}"]
    steps = [
        ["cmake", "-S", str(ROOT), "-B", str(FOLDER), "-G", "Ninja", *options],
        ["cmake", "--build", str(FOLDER)],
    ]
    if (FOLDER / "build.ninja").exists():
        del steps[0]
    for step in steps:
        run = subprocess.run(step, capture_output=True, text=True, env={**os.environ, "PATH": _path()})
        if run.returncode:
            lines = [line for line in (run.stdout + run.stderr).splitlines() if "rror" in line]
            return f"the CUDA emulator was not built: {(lines or [f'{step[0]} failed'])[0].strip()}"
    return None


def _path() -> str:
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
