"""Show versions, the GPU, and which backend can compute what here."""

from __future__ import annotations

import argparse
import os
from collections import Counter
from collections.abc import Sequence

import torch

from maskops import report
from maskops._dispatch import BACKENDS, OPS, _load, why_not
from maskops.cli import output
from maskops.cli.options import best_device


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """There is nothing to choose but how it is said."""
    output.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    found = {**report.versions(), "triton": _triton(), "cuda": _gpu(), "kernels": _kernels()}
    backends, forced = served(best_device()), _forced()
    arguments.result = {**found, "backends": backends, "forced": forced}
    for name, text in found.items():
        print(f"{name:<9} {text}")
    for name, text in backends.items():
        print(f"{'backend':<9} {name}: {text}")
    print(f"{'forced':<9} {forced}")


def served(device: torch.device) -> dict[str, str]:
    """For each backend how many ops it serves on a device, and the commonest reason against the others."""
    return {backend: _served(backend, torch.zeros(1, device=device)) for backend in BACKENDS}


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


def _served(backend: str, example: torch.Tensor) -> str:
    reasons = Counter(why_not(backend, op, example) for op in OPS)
    served = reasons.pop(None, 0)
    text = f"{served} of {len(OPS)} ops"
    return f"{text}; {reasons.most_common(1)[0][0]}" if reasons else text


def _forced() -> str:
    forced = os.environ.get("MASKOPS_BACKEND")
    if not forced:
        return "none (MASKOPS_BACKEND is not set)"
    return f"MASKOPS_BACKEND={forced}" + ("" if forced in BACKENDS else f", which is none of {', '.join(BACKENDS)}")
