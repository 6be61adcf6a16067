"""maskops: masked layers, fused operators and the purification loops AWM, ANP and NFT."""

from maskops import _ops as _ops
from maskops import checkpoint, functional, purify
from maskops._dispatch import explain, why_not
from maskops._version import __version__
from maskops.arena import MaskArena
from maskops.convert import fold_, mask_, masked_layers, masks
from maskops.lean import lean_autograd
from maskops.nn import (
    MaskedBatchNorm1d,
    MaskedBatchNorm2d,
    MaskedConv1d,
    MaskedConv2d,
    MaskedConv3d,
    MaskedConvTranspose2d,
    MaskedLayerNorm,
    MaskedLinear,
)
from maskops.optim import MaskAdam, MaskSGD
from maskops.purify import plan

__all__ = [
    "MaskAdam",
    "MaskArena",
    "MaskSGD",
    "MaskedBatchNorm1d",
    "MaskedBatchNorm2d",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose2d",
    "MaskedLayerNorm",
    "MaskedLinear",
    "__version__",
    "checkpoint",
    "explain",
    "fold_",
    "functional",
    "lean_autograd",
    "mask_",
    "masked_layers",
    "masks",
    "plan",
    "purify",
    "why_not",
]
