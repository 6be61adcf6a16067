"""Builds ``maskops._C``, the CUDA kernels, where an nvcc is found; everything else is in pyproject.toml.

MASKOPS_BUILD=auto (the default) builds it if there is an nvcc, =cuda insists on it, =none leaves it out.
TORCH_CUDA_ARCH_LIST says for which GPUs, CMAKE_ARGS adds options for CMake.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
WAY_ON = "or set MASKOPS_BUILD=none to install without the CUDA kernels"


def nvcc():
    """The compiler that CUDACXX names, that CUDA_HOME holds, or that is on the path."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    candidates = (os.environ.get("CUDACXX") or f"{home}/bin/nvcc", "nvcc")
    return next(filter(None, map(shutil.which, candidates)), None)


def wanted():
    choice = os.environ.get("MASKOPS_BUILD", "auto")
    if choice not in ("auto", "cuda", "none"):
        sys.exit(f"maskops: MASKOPS_BUILD: expected auto, cuda or none; got {choice!r}")
    if choice == "cuda" and not nvcc():
        sys.exit(f"maskops: MASKOPS_BUILD=cuda needs an nvcc: put it on the path or set CUDA_HOME, {WAY_ON}")
    return choice == "cuda" or (choice == "auto" and sys.platform == "linux" and nvcc() is not None)


class BuildWithCMake(build_ext):
    def build_extension(self, extension):
        missing = [module for module in ("torch", "pybind11") if importlib.util.find_spec(module) is None]
        # those of an environment that isn't activated, too
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        missing += [tool for tool in ("cmake", "ninja") if shutil.which(tool) is None]
        if missing:
            way = f"install it and run pip install --no-build-isolation, {WAY_ON}"
            sys.exit(f"maskops: building the CUDA kernels needs {', '.join(missing)}: {way}")
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        options = {
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_CUDA_COMPILER": nvcc(),
            "Python_EXECUTABLE": sys.executable,
            "MASKOPS_REVISION": revision(),
        }
        options = [f"-D{name}={value}" for name, value in options.items()] + os.environ.get("CMAKE_ARGS", "").split()
        self.call("cmake", "-S", ROOT, "-B", self.build_temp, "-G", "Ninja", *options)
        self.call("cmake", "--build", self.build_temp)

    def call(self, *command):
        if subprocess.run([str(part) for part in command]).returncode:
            sys.exit(f"maskops: {command[0]} could not build the CUDA kernels, for the reason above; mend it, {WAY_ON}")


def revision():
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


setup(
    ext_modules=[Extension("maskops._C", [])] if wanted() else [],
    cmdclass={"build_ext": BuildWithCMake},
)
