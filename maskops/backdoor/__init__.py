"""Attacks to measure a purification against: triggers, poisoning and metrics. No defence imports this."""

from maskops.backdoor.metrics import Metrics, der, evaluate, removed
from maskops.backdoor.poison import Poisoned, poison, target_labels
from maskops.backdoor.triggers import (
    TRIGGERS,
    Additive,
    BadNetsCheckerboard,
    BadNetsSquare,
    Blend,
    L0Inv,
    Trigger,
    parse,
    pattern_from_file,
)

__all__ = [
    "TRIGGERS",
    "Additive",
    "BadNetsCheckerboard",
    "BadNetsSquare",
    "Blend",
    "L0Inv",
    "Metrics",
    "Poisoned",
    "Trigger",
    "der",
    "evaluate",
    "parse",
    "pattern_from_file",
    "poison",
    "removed",
    "target_labels",
]
