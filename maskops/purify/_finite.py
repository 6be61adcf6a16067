"""Numbers that aren't finite: refused before a run, and traced back to where they came from after one."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from maskops.purify._fake import has_data
from maskops.purify._working import PixelModel, shared_copy

_BATCH = 64


def check_model(method: str, model: nn.Module) -> None:
    """Raise ValueError that names the first of a model's parameters and saved buffers with a NaN or an infinity in it.

    Buffers that a model doesn't save are constants of its own, and -inf in a saved one is how attention is masked.
    """
    name = _first_in_model(model) if has_data() else None
    if name is not None:
        raise ValueError(f"{method}: {name} of the model has values that are nan or infinite")


def first_non_finite(tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with a NaN or an infinity in it; None where there is none."""
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    return next((name for name, value in pairs if not is_finite(value)), None)


@torch.no_grad()
def is_finite(value: Tensor, or_below: bool = False) -> bool:
    """Whether all numbers are finite, or, with ``or_below``, -inf."""
    if value.numel() == 0 or value.is_meta or not (value.is_floating_point() or value.is_complex()):
        return True
    value = torch.view_as_real(value) if value.is_complex() else value
    value = value.float() if value.element_size() == 1 else value
    low, high = (float(bound) for bound in value.detach().aminmax())
    return not math.isnan(low) and high < math.inf and (or_below or low > -math.inf)


def origin(run: Any, phase: str) -> str:
    """After a phase that ended with a number that isn't finite: where that began, as far as can be seen now.

    Eagerly, and on all clean images. In their order: a tensor of the user's model; what a layer of it answers before
    anything is learned; what the phase took over from those before it; what a layer answers now. Where the phase's own
    steps have already spread it, no more than that can be said.

    run:     a :class:`maskops.purify._loop.Run`
    returns: what follows ``"the inner loss became nan in the inner phase of epoch 3"``
    """
    try:
        with run.quiet(), torch.no_grad():
            return _in_model(run) or _in_state(run, phase)
    except Exception:  # such as no memory: the search must not take the place of what was found
        return ""


def _in_model(run: Any) -> str:
    name = _first_in_model(run.original)
    if name is not None:
        return f": first in {name} of the model"
    model = PixelModel(shared_copy(run.original).to(run.device), run.mean, run.std, run.low_dtype).eval()
    layer = _first_layer(model, run)
    return "" if layer is None else f": first in {layer}, before anything was learned"


def _in_state(run: Any, phase: str) -> str:
    model = getattr(run, "model", None)
    if model is None:  # what a baseline learns is all over by now
        return ""
    learned, others = _named(run), dict(run.beside())
    # the inner maximisation is of what is beside the masks, and every other phase of these
    before, after = (learned, others) if phase == "inner" else (others, learned)
    name = first_non_finite(before)
    if name is not None:
        return f": first in {name}"
    name = first_non_finite(after)
    if name is not None:
        return f", and has reached {name}"
    layer = _first_layer(model, run)
    if layer is None and "the trigger" in others:
        layer = _first_layer(model, run, others["the trigger"])
        return "" if layer is None else f": first in {layer}, for images with the trigger"
    return "" if layer is None else f": first in {layer}"


def _named(run: Any) -> dict[str, Tensor]:
    """What is learned beside the trigger, by names for people."""
    named = {f"the mask of {name}": mask for name, mask in run.arena.masks.items()}
    for name, value in run.tensors().items():
        kind, _, of = name.partition(" ")
        if of:
            named[f"the {kind} {of}" if kind == "buffer" else f"the tuned {kind} of {of}"] = value
    return named


def _first_in_model(model: nn.Module) -> str | None:
    for name, parameter in model.named_parameters():
        if not is_lazy(parameter) and not is_finite(parameter):
            return name
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            saved = name not in module._non_persistent_buffers_set
            if saved and not is_lazy(buffer) and not is_finite(buffer, or_below=True):
                return f"{prefix}.{name}" if prefix else name
    return None


def _first_layer(model: PixelModel, run: Any, trigger: Tensor | None = None) -> str | None:
    """The layer that first gives out, for clean images, what isn't finite; or else the loss, if that isn't."""
    found: list[str] = []
    handles = []
    for name, module in model.network.named_modules():

        def look(module: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
            if not found and isinstance(output, Tensor) and not is_finite(output, or_below=True):
                found.append(f"the output of {name}" if name else "the model's logits")

        handles.append(module.register_forward_hook(look))
    try:
        for images, labels in zip(run.images.split(_BATCH), run.labels.split(_BATCH), strict=True):
            logits = model(images if trigger is None else images + trigger)
            if not found and not is_finite(F.cross_entropy(logits, labels)):
                return "the loss, of logits that are finite"
            if found:
                return found[0]
    finally:
        for handle in handles:
            handle.remove()
    return None
