"""Purification: the papers' loops. They see the model and clean images, never a real trigger."""

from maskops.purify._loop import NonFiniteError, Purification, Setting
from maskops.purify.awm import AWMOptions, awm

__all__ = ["AWMOptions", "NonFiniteError", "Purification", "Setting", "awm"]
