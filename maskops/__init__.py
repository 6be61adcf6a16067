"""maskops: masked layers, fused operators and the purification loops AWM, ANP and NFT."""

from maskops import _ops as _ops
from maskops._dispatch import explain, why_not
from maskops._version import __version__
from maskops.convert import fold_, mask_, masked_layers, masks
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

__all__ = [
    "MaskedBatchNorm1d",
    "MaskedBatchNorm2d",
    "MaskedConv1d",
    "MaskedConv2d",
    "MaskedConv3d",
    "MaskedConvTranspose2d",
    "MaskedLayerNorm",
    "MaskedLinear",
    "__version__",
    "explain",
    "fold_",
    "mask_",
    "masked_layers",
    "masks",
    "why_not",
]
