"""Several purifications of one model at once."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from maskops.purify._algorithm import complete_together
from maskops.purify._distributed import team_of
from maskops.purify._result import NonFiniteError, Purification
from maskops.purify.anp import ANP
from maskops.purify.awm import AWM
from maskops.purify.nft import NFT
from maskops.purify.swm import SWM

ALGORITHMS = {"awm": AWM, "swm": SWM, "anp": ANP, "nft": NFT}
"""The methods that learn masks, whose steps can be run side by side."""


@torch.enable_grad()
def sweep(
    method: str,
    model: nn.Module,
    clean_data: Any,
    runs: Sequence[Mapping[str, Any]],
    *,
    preset: str = "paper",
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> list[Purification | NonFiniteError]:
    """Purify one model several times, with other seeds or options each time, over one copy of its weights.

    A step of a small network leaves most of a GPU idle: there the runs are on streams of their own, side by side, and
    each is recorded as CUDA graphs. They come one after the other on a CPU, and where dropout is on, because torch has
    one generator for the layers of all runs. The result of a run doesn't depend on the others.

    method:     ``"awm"``, ``"swm"``, ``"anp"`` or ``"nft"``
    model, clean_data, preset: as in :func:`maskops.purify.awm`
    runs:       what each run has of its own, such as ``[{"seed": 0}, {"seed": 1}]``; at least one
    checkpoint, resume: as in :func:`maskops.purify.awm`, but a folder, with a file for each run
    options:    what all runs have in common
    returns:    a :class:`maskops.purify.Purification` for each run, or the NonFiniteError that ended it. Their total
                times begin when the first run's does; those of phases are those of all runs that were in it
    errors:     ValueError for a method that can't be swept, for no runs, and for runs on several devices or with
                several ``tf32``; TypeError for runs that are no mappings; otherwise as in the method

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> results = sweep("awm", net, (images, labels), [{"tau": 5.0}, {"tau": 10.0}], epochs=1, progress=False)
    >>> [result.options["tau"] for result in results]
    [5.0, 10.0]
    """
    if method not in tuple(ALGORITHMS):
        raise ValueError(f"sweep: method must be one of {', '.join(ALGORITHMS)}; got {method!r}")
    if team_of("sweep").size > 1:
        raise ValueError("sweep: the runs of a sweep aren't spread over processes: sweep outside of a process group")
    if not isinstance(runs, Sequence) or not all(isinstance(own, Mapping) for own in runs):
        raise TypeError(f"sweep: runs must be a list of options by name, such as [{{'seed': 0}}]; got {runs!r:.80}")
    if not runs:
        raise ValueError("sweep: expected at least one run; got none")
    for name in ("device", "tf32"):
        if any(name in own for own in runs):
            raise ValueError(f"sweep: all runs have one {name}: give it beside them")
    files = [None if checkpoint is None else Path(checkpoint, f"{number}.safetensors") for number in range(len(runs))]
    # found now, and not when the runs before have ended
    taken = next((file for file in files if file is not None and not resume and file.exists()), None)
    if taken is not None:
        raise ValueError(f"sweep: {taken} exists: give resume=True to go on from it, or another checkpoint=")
    algorithms: list[Any] = []
    for own in runs:
        # one progress bar stands for all
        shown = {"progress": False} if algorithms else {}
        algorithms.append(ALGORITHMS[method](model, clean_data, preset, None, {**options, **own, **shown}))
        algorithms[-1].run.arena.share_weight(algorithms[0].run.arena)
    return complete_together(algorithms, files, resume)
