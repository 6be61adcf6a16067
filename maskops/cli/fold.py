"""Bake learned masks into the weights of a model, and write the plain model."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from maskops.checkpoint import TORCH_SUFFIXES, CheckpointError, load_masks, save_state_dict
from maskops.cli import models, output
from maskops.purify._pruning import apply_masks

_SUFFIXES = (".safetensors", *TORCH_SUFFIXES)


def add_arguments(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    inputs = parser.add_argument_group("the model and its masks")
    models.add_arguments(inputs)
    inputs.add_argument("--masks", required=True, metavar="FILE", help="masks.safetensors of a purification")
    written = parser.add_argument_group("output")
    text = f"where the model's state dict goes: a name in {', '.join(_SUFFIXES)}"
    written.add_argument("--out", required=True, type=Path, metavar="FILE", help=text)
    written.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    output.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    out = arguments.out
    if out.suffix not in _SUFFIXES:
        raise ValueError(f"--out must end in {' or '.join(_SUFFIXES)}; got {out}")
    if out.is_dir() or (out.exists() and not arguments.overwrite):
        raise ValueError(
            f"--out {out} is there already; name another file{'' if out.is_dir() else ', or give --overwrite'}"
        )
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    values, options = load_masks(arguments.masks)
    model = _folded(models.load(arguments), values, arguments.masks)
    try:
        save_state_dict(out, model.state_dict())
    except (CheckpointError, OSError) as error:  # the inputs were all right
        raise RuntimeError(str(error)) from error
    if reason := _beside_masks(options):
        output.note(f"warning: {reason}, which the masks don't hold: the run's own model.safetensors has it")
    zeros = sum(int((mask == 0).sum()) for mask in values.values())
    total = sum(mask.numel() for mask in values.values())
    arguments.result = {"out": str(out), "masks": len(values), "values": total, "zeros": zeros}
    print(f"written to {out}: {len(values)} masks in the weights; {zeros} of their {total} values are 0")


def _folded(model: nn.Module, values: Mapping[str, Tensor], file: str) -> nn.Module:
    layers = dict(model.named_modules())
    unknown = [name for name in values if not _has_weight(layers.get(name.rpartition(".")[0])) or not _is_mask(name)]
    if unknown:
        raise ValueError(f"{file} doesn't fit the model: {models.listed('it has no layer for', unknown)}")
    for name, mask in values.items():
        if not mask.is_floating_point() and mask.dtype != torch.uint8:
            raise ValueError(f"{file}: {name} must hold floating numbers or bytes; got {mask.dtype}")
        if not bool(torch.isfinite(mask).all()):
            raise ValueError(f"{file}: {name} must hold finite numbers; got NaN or infinite ones")
    try:
        return apply_masks(model, values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} doesn't fit the model: {str(error).removeprefix('prune: ')}") from error


def _has_weight(layer: nn.Module | None) -> bool:
    return isinstance(getattr(layer, "weight", None), Tensor)


def _is_mask(name: str) -> bool:
    return name.rpartition(".")[2] in ("mask", "neuron_mask")


def _beside_masks(options: Mapping[str, Any]) -> str | None:
    """What a run with these options changed beside the masks."""
    if options.get("method") != "nft":
        return None
    if options.get("tune_bias"):
        return "the run learned biases too"
    return "the run gave the batch norms new statistics" if options.get("statistics") == "batch" else None
