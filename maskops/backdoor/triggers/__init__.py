"""Triggers: transforms of images in pixel space, each a frozen dataclass that is called with a batch.

``TRIGGERS`` names them; ``parse`` makes one from a command-line text.
"""

from maskops.backdoor.triggers._base import DecoyTrigger, Trigger
from maskops.backdoor.triggers._parse import TRIGGERS, parse
from maskops.backdoor.triggers.colours import BPPA, StyleStandIn
from maskops.backdoor.triggers.patches import (
    CHECKERBOARD,
    CORNERS,
    L0_INV_PIXELS,
    BadNetsCheckerboard,
    BadNetsSquare,
    FourCorners,
    L0Inv,
)
from maskops.backdoor.triggers.patterns import (
    SIG,
    Additive,
    Blend,
    BlendNoise,
    SIGWrapped,
    pattern_from_file,
    uniform_noise_pattern,
)
from maskops.backdoor.triggers.several import Several
from maskops.backdoor.triggers.warps import WaNet

__all__ = [
    "BPPA",
    "CHECKERBOARD",
    "CORNERS",
    "L0_INV_PIXELS",
    "SIG",
    "TRIGGERS",
    "Additive",
    "BadNetsCheckerboard",
    "BadNetsSquare",
    "Blend",
    "BlendNoise",
    "DecoyTrigger",
    "FourCorners",
    "L0Inv",
    "SIGWrapped",
    "Several",
    "StyleStandIn",
    "Trigger",
    "WaNet",
    "parse",
    "pattern_from_file",
    "uniform_noise_pattern",
]
