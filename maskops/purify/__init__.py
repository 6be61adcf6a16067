"""Purification: the papers' loops. They see the model and clean images, never a real trigger."""

from maskops.purify._plan import Plan, plan
from maskops.purify._pruning import prune
from maskops.purify._result import NonFiniteError, Purification
from maskops.purify._setting import MaskSetting, Setting
from maskops.purify._sweep import sweep
from maskops.purify.anp import ANPOptions, anp
from maskops.purify.awm import AWMOptions, awm
from maskops.purify.baselines import (
    FinePruningOptions,
    FTOptions,
    FTSAMOptions,
    IBAUOptions,
    MCROptions,
    NADOptions,
    RNPOptions,
    fine_pruning,
    ft,
    ft_sam,
    ibau,
    mcr,
    nad,
    rnp,
)
from maskops.purify.nft import NFTOptions, nft
from maskops.purify.swm import SWMOptions, swm

__all__ = [
    "ANPOptions",
    "AWMOptions",
    "FTOptions",
    "FTSAMOptions",
    "FinePruningOptions",
    "IBAUOptions",
    "MCROptions",
    "MaskSetting",
    "NADOptions",
    "NFTOptions",
    "NonFiniteError",
    "Plan",
    "Purification",
    "RNPOptions",
    "SWMOptions",
    "Setting",
    "anp",
    "awm",
    "fine_pruning",
    "ft",
    "ft_sam",
    "ibau",
    "mcr",
    "nad",
    "nft",
    "plan",
    "prune",
    "rnp",
    "sweep",
    "swm",
]
