"""Where a tape is cut into segments, of which all but one at a time are run anew for their backward."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

from maskops.purify._tape.call import CallPlan
from maskops.purify._tape.steps import Step


class Segment(NamedTuple):
    """Consecutive steps, and the values from before them that they read."""

    steps: Sequence[Step]
    inputs: tuple[int, ...]


def whole(steps: Sequence[Step]) -> list[Segment]:
    """One segment, of which nothing is run anew."""
    return [Segment(steps, (0,))]


def cut(steps: Sequence[Step], sizes: Sequence[int], plan: CallPlan, bits: bool) -> list[Segment]:
    """The segments that need the least memory: what lies between them, and the largest of them.

    One segment where several would save less than a fifth: what autograd keeps isn't known before.

    sizes: bytes of each value
    """
    crossing, possible = _crossing(steps), places(steps)
    held = {value for step in steps if any(plan.needs[v] for v in step.writes) for value in step.holds(plan, bits)}
    made = [sum(sizes[value] for value in step.writes if value in held) for step in steps]
    before = [0, *accumulate(made)]  # bytes that are made before each step

    def peak(cuts: Sequence[int]) -> int:
        ends = [*cuts, len(steps)]
        largest = max(before[end] - before[start] for start, end in zip([0, *cuts], ends, strict=True))
        return largest + sum(sizes[value] for place in cuts for value in crossing[place])

    best: list[int] = []
    for parts in range(2, len(possible) + 2):
        cuts = _filled(possible, before, before[-1] / parts)
        if peak(cuts) < peak(best):
            best = cuts
    return at(steps, best if peak(best) < 0.8 * peak([]) else [])


def places(steps: Sequence[Step]) -> list[int]:
    """The numbers of steps that a segment can begin with."""
    crossing = _crossing(steps)
    return [place for place in range(1, len(steps)) if _is_safe(steps[place:], crossing[place])]


def at(steps: Sequence[Step], cuts: Sequence[int]) -> list[Segment]:
    """The segments that begin with the first step and with these."""
    crossing = _crossing(steps)
    bounds = zip([0, *cuts], [*cuts, len(steps)], strict=True)
    return [Segment(steps[start:end], crossing[start] if start else (0,)) for start, end in bounds]


def _crossing(steps: Sequence[Step]) -> list[tuple[int, ...]]:
    """For each step the values that are there before it and read by it or later."""
    found: list[tuple[int, ...]] = []
    read: set[int] = set()
    for step in reversed(steps):
        read = (read - set(step.writes)) | set(step.reads)
        found.append(tuple(sorted(read)))
    return found[::-1]


def _is_safe(later: Sequence[Step], crossing: tuple[int, ...]) -> bool:
    """Whether none of the values is overwritten by the steps that read them."""
    return not any(step.overwrites in crossing for step in later)


def _filled(possible: Sequence[int], before: Sequence[int], most: float) -> list[int]:
    """Cuts that make segments of at most so many bytes, where the possible places allow it."""
    cuts: list[int] = []
    start = 0
    for place, following in zip(possible, [*possible[1:], len(before) - 1], strict=True):
        if before[following] - before[start] > most:
            cuts.append(place)
            start = place
    return cuts
