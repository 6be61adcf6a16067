"""A frozen classifier as a tape: a list of steps that run forwards and backwards without autograd between them."""

from maskops.purify._tape.graph import untouched
from maskops.purify._tape.tape import Tape

__all__ = ["Tape", "untouched"]
