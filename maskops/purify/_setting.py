"""Where and on what a run works: settings that methods have in common."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from maskops.nn import GRANULARITIES
from maskops.purify._options import Auto, choice, number, optional

LAYERS, NOISE = 1 << 20, 1 << 21
"""Added to the seed for what layers draw, and for noise: streams of their own."""


@dataclass(frozen=True)
class Setting:
    """Where and on what a run works; the same for every method.

    device:    None for the model's
    dtype:     None for the model's own; torch.bfloat16 for 16-bit activations under wider masks and weights
    mean, std: per channel, what the model expects its images to be normalised by; None for models on pixels in [0, 1]
    crop:      augment every batch: zeros of that many pixels around each image, then a random window of its size; 0 for
               none; ``"auto"`` is an eighth of the height, the usual 4 of 32
    flip:      augment every batch: mirror every other image, at random
    graphs:    on a GPU, record the steps of AWM, SWM, ANP and NFT as CUDA graphs, which is faster and computes the same
    tf32:      whether float32 layers on a GPU compute in TF32; None as torch is set: by default convolutions alone
    seed:      of everything that a run draws
    progress:  show a progress bar
    """

    device: str | torch.device | None = None
    dtype: torch.dtype | None = None
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop: int | Auto = 0
    flip: bool = False
    graphs: bool = True
    tf32: bool | None = None
    seed: int = 0
    progress: bool = True

    def __post_init__(self) -> None:
        number("purify", self, "seed", int, 0, 2**63 - 2 * NOISE)
        number("purify", self, "crop", int, 0, auto=True)
        for name in ("flip", "graphs", "progress"):
            choice("purify", self, name, (True, False))
        choice("purify", self, "tf32", (None, True, False))
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values is not None:
                object.__setattr__(self, name, _channel_values(name, values))
        if (self.mean is None) != (self.std is None):
            raise ValueError("purify: mean and std must be given together")


@dataclass(frozen=True)
class MaskSetting(Setting):
    """What is masked, and how the result comes; for the methods that learn masks, beside :class:`Setting`.

    layers:      as in :func:`maskops.mask_`; or ``"auto"``: the batch norms of a model that has any, otherwise its
                 convolutions, linear layers and layer norms; of either, those that can be masked
    include, exclude, granularity: as in :func:`maskops.mask_`
    gate:        what each ReLU keeps for its backward: its ``"output"``, which takes fewer launches, or ``"bits"``, one
                 per element; ``"auto"`` is the output on a GPU and bits on a CPU
    recompute:   keep only what lies between a few segments of the network, and run each once more for its backward:
                 less memory for up to a forward's time more, and the same result; for networks that a tape can run, in
                 eval mode
    remake_weights: keep no effective weights, but make each layer's anew before its forward and again before its
                 backward, in memory that they share: the same result for two launches more per layer; for networks that
                 a tape can run. For ``on_epoch`` all are there
    micro_batch_size: compute the batch of a step in parts of at most so many images, whose gradients add up: less
                 memory and the same result but for rounding, for networks that treat images one by one; None for whole
                 batches until memory runs out, and then halves, quarters and so on
    weight_dtype: torch.bfloat16 keeps θ in 16 bits: exact only if they are numbers of that kind; None as they are.
                 Masks are float32 then
    folded:      return plain layers with the masks folded in; otherwise masked layers
    """

    layers: str | Sequence[str] = "conv"
    include: str | Sequence[str] = "*"
    exclude: str | Sequence[str] = ()
    granularity: str = "weight"
    gate: str = "auto"
    recompute: bool = False
    remake_weights: bool = False
    micro_batch_size: int | None = None
    weight_dtype: torch.dtype | None = None
    folded: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        choice("purify", self, "granularity", GRANULARITIES)
        choice("purify", self, "gate", ("auto", "output", "bits"))
        optional("purify", self, "micro_batch_size", int, 1)
        choice("purify", self, "weight_dtype", (None, torch.bfloat16))
        for name in ("recompute", "remake_weights", "folded"):
            choice("purify", self, name, (True, False))


def _channel_values(name: str, values: Sequence[float]) -> tuple[float, ...]:
    try:
        floats = tuple(float(value) for value in values)
    except (TypeError, ValueError):
        floats = ()
    if not floats or not all(math.isfinite(value) and (name == "mean" or value > 0) for value in floats):
        kind = "finite" if name == "mean" else "positive"
        raise ValueError(f"purify: {name} must be {kind} numbers, one per channel; got {values!r}")
    return floats
