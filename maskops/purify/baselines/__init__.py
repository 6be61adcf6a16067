"""The defences that the papers compare theirs with, for any classifier, in the calling convention of the others.

CBD and ABL, which are in such comparisons too, are not here: they change how a model is trained on poisoned images,
which the defender of a downloaded model doesn't control.
"""

from maskops.purify.baselines.fine_pruning import FinePruningOptions, fine_pruning
from maskops.purify.baselines.ft import FTOptions, ft
from maskops.purify.baselines.ft_sam import FTSAMOptions, ft_sam
from maskops.purify.baselines.ibau import IBAUOptions, ibau
from maskops.purify.baselines.mcr import MCROptions, mcr
from maskops.purify.baselines.nad import NADOptions, nad
from maskops.purify.baselines.rnp import RNPOptions, rnp

__all__ = [
    "FTOptions",
    "FTSAMOptions",
    "FinePruningOptions",
    "IBAUOptions",
    "MCROptions",
    "NADOptions",
    "RNPOptions",
    "fine_pruning",
    "ft",
    "ft_sam",
    "ibau",
    "mcr",
    "nad",
    "rnp",
]
