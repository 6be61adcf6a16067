"""Several triggers at once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskops.backdoor.triggers._base import Trigger, check_for


@dataclass(frozen=True)
class Several:
    """Several triggers of one attack with one target.

    Called, it stamps all of them, one after the other. In training, ``poison`` and ``poison_clean_label`` divide the
    poisoned images among them instead (``divide``). ``evaluate_several`` measures each alone, any, and all stamped.

    triggers: at least one
    source: AWM, supplement, Table 10 (5 % in total) and NFT, supplement, Table 12 (10 %, "an equal share" each)

    >>> from maskops.backdoor.triggers import BadNetsSquare
    >>> both = Several((BadNetsSquare(size=1, margin=0), BadNetsSquare(size=1, margin=1)))
    >>> both(torch.zeros(1, 1, 2, 2))[0, 0]
    tensor([[1., 0.],
            [0., 1.]])
    """

    triggers: tuple[Trigger, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.triggers, tuple) or not all(callable(trigger) for trigger in self.triggers):
            raise TypeError(f"Several: triggers must be a tuple of triggers; got {self.triggers!r}")
        if not self.triggers:
            raise ValueError("Several: at least one trigger expected; got none")

    def __call__(self, images: Tensor) -> Tensor:
        check_for(self, images)
        for trigger in self.triggers:
            images = trigger(images)
        return images

    def divide(self, images: Tensor, generator: Generator) -> Tensor:
        """Images with one trigger each, drawn at random; the shares are equal, or differ by one image."""
        check_for(self, images)
        order = torch.randperm(len(images), generator=generator, device=generator.device).to(images.device)
        triggered = images.clone()
        for first, trigger in enumerate(self.triggers):
            rows = order[first :: len(self.triggers)]
            triggered[rows] = trigger(images[rows])
        return triggered
