"""Show versions, the GPU, and which backend can compute what here."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence

import torch

from maskops import report
from maskops._dispatch import BACKENDS, OPS, _load, why_not
from maskops.cli.options import best_device


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """None: there is nothing to choose."""


def run(arguments: argparse.Namespace) -> None:
    for name, version in report.versions().items():
        print(f"{name:<9} {version}")
    print(f"{'triton':<9} {_triton()}")
    print(f"{'cuda':<9} {_gpu()}")
    print(f"{'kernels':<9} {_kernels()}")
    for backend in BACKENDS:
        print(f"{'backend':<9} {backend}: {_served(backend)}")
    print(f"{'forced':<9} {_forced()}")


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "not installed"
    return triton.__version__


def _gpu() -> str:
    if torch.version.cuda is None:
        return "this torch has none"
    if not torch.cuda.is_available():
        return f"{torch.version.cuda}, but torch sees no GPU"
    major, minor = torch.cuda.get_device_capability()
    return f"{torch.version.cuda}, {torch.cuda.get_device_name()} (compute capability {major}.{minor})"


def _kernels() -> str:
    """What the CUDA kernels were built with, or why they are not there."""
    backend = _load("cuda")
    if isinstance(backend, str):
        return backend
    info = backend.build_info()
    architectures = ", ".join(f"sm_{name}" for name in info["architectures"].split())
    return f"{architectures} by {info['compiler']} at revision {info['revision']}"


def _served(backend: str) -> str:
    """How many ops the backend serves on this machine's best device, and the commonest reason against the others."""
    example = torch.zeros(1, device=best_device())
    reasons = Counter(why_not(backend, op, example) for op in OPS)
    served = reasons.pop(None, 0)
    text = f"{served} of {len(OPS)} ops"
    return f"{text}; {reasons.most_common(1)[0][0]}" if reasons else text


def _forced() -> str:
    forced = os.environ.get("MASKOPS_BACKEND")
    if not forced:
        return "none (MASKOPS_BACKEND is not set)"
    return f"MASKOPS_BACKEND={forced}" + ("" if forced in BACKENDS else f", which is none of {', '.join(BACKENDS)}")
