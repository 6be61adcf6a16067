"""Attacks: a trigger, whom it hits, and how it gets into the training. ``ATTACKS`` names those of the papers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from maskops.backdoor.composite import Composite
from maskops.backdoor.generators import IAB, ISSBA, LIRA, Campaign, JointLearner, Learner, PerBatch, Shares
from maskops.backdoor.poison import RULES, poison, poison_clean_label, target_labels
from maskops.backdoor.triggers import (
    BPPA,
    SIG,
    Additive,
    BadNetsCheckerboard,
    BadNetsSquare,
    BlendNoise,
    DecoyTrigger,
    FourCorners,
    L0Inv,
    Several,
    SIGWrapped,
    StyleStandIn,
    Trigger,
    WaNet,
    pattern_from_file,
)

Shape = tuple[int, int, int]
"""(C, H, W) of the images."""


@dataclass(frozen=True)
class Perturbation:
    """Untargeted l_inf PGD on what is poisoned, against a network trained on the clean data.

    epsilon, step_size: in pixel units
    source: ANP and NFT (epsilon), BackdoorBox (the rest)
    """

    epsilon: float = 16 / 255
    steps: int = 100
    step_size: float = 1.5 / 255


@dataclass(frozen=True)
class Attack:
    """What an attacker does.

    name:         what tables and progress bars call it
    trigger:      a trigger, the settings of one that has to be learned (``generators``), or a ``Composite``
    target, rule: which label is wanted, see ``target_labels``
    rate:         share of the training set, or of each batch, that carries the trigger; of a clean-label attack: of the
                  target class
    decoy_rate:   share, of the same, that gets the trigger's decoys and keeps its label; of a ``Composite``: the
                  mixes of one class
    clean_label:  only images of the target class are poisoned, and no label changes
    perturbation: makes those hard to learn otherwise; for clean-label attacks
    per_batch:    training-controlled: victims are drawn anew for each batch, after augmentation. Triggers that are
                  learned together with the network always are
    frozen_convs: the network is first trained on clean data, and then under the attack with its last so many
                  convolutions frozen: the adaptive attack of NFT
    errors:       ValueError for rates, rules and combinations that mean nothing; TypeError for decoys that the trigger
                  doesn't have

    >>> attack = Attack("square", BadNetsSquare(size=2, margin=0), target=8, rate=0.25)
    >>> images, labels = torch.zeros(12, 1, 8, 8), torch.arange(12) % 10
    >>> campaign = attack.prepare(images, labels, 10, torch.Generator().manual_seed(0))
    >>> campaign.labels[campaign.indices]
    tensor([8, 8, 8])
    """

    name: str
    trigger: Trigger | Learner | Composite
    target: int | None
    rate: float
    rule: str = field(default="all_to_one", kw_only=True)
    decoy_rate: float = field(default=0.0, kw_only=True)
    clean_label: bool = field(default=False, kw_only=True)
    perturbation: Perturbation | None = field(default=None, kw_only=True)
    per_batch: bool = field(default=False, kw_only=True)
    frozen_convs: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if not (0 <= self.rate <= 1 and 0 <= self.decoy_rate <= 1 and self.rate + self.decoy_rate <= 1):
            raise ValueError(
                f"Attack: rate and decoy_rate must lie in [0, 1], together too; got {self.rate} and {self.decoy_rate}"
            )
        if self.rule not in RULES:
            raise ValueError(f"Attack: rule must be one of {', '.join(RULES)}; got {self.rule!r}")
        if (self.target is None) == (self.rule == "all_to_one"):
            raise ValueError(
                f"Attack: a target belongs to all_to_one and to no other; got {self.rule} and {self.target}"
            )
        drawn_per_batch = self.per_batch or isinstance(self.trigger, JointLearner)
        if self.clean_label and (self.rule != "all_to_one" or self.decoy_rate or drawn_per_batch):
            raise ValueError(f"Attack: clean_label goes with a fixed set, one target and no decoys; got {self.name!r}")
        if self.perturbation is not None and not self.clean_label:
            raise ValueError(f"Attack: a perturbation goes with clean_label; got {self.name!r} without it")
        if self.decoy_rate and not isinstance(self.trigger, (DecoyTrigger, IAB, Composite)):
            raise TypeError(f"Attack: decoy_rate needs a trigger with decoys, as WaNet and BPPA; got {self.trigger!r}")
        if isinstance(self.trigger, Composite) and (
            self.target != self.trigger.target or drawn_per_batch or self.clean_label
        ):
            raise ValueError(f"Attack: a Composite goes with a fixed set and its own target; got {self.name!r}")
        if self.frozen_convs < 0:
            raise ValueError(f"Attack: frozen_convs must be at least 0; got {self.frozen_convs}")

    def prepare(
        self,
        images: Tensor,
        labels: Tensor,
        num_classes: int,
        generator: torch.Generator,
        surrogate: Callable[[], nn.Module] | None = None,
    ) -> Campaign:
        """Learn what is learned beforehand, poison a fixed set: the hooks by which a training goes on.

        images, labels: the clean training set, (N, C, H, W) in [0, 1] and (N,); not modified
        generator:      on the CPU; decides the draws and what is learned
        surrogate:      trains a network on the clean set; needed for a perturbation
        """
        trigger = self.trigger
        targets = target_labels(torch.arange(num_classes), self.target, self.rule, num_classes).to(labels.device)
        shares = Shares(targets, self.rate, self.decoy_rate)
        if isinstance(trigger, JointLearner):
            return trigger.campaign(trigger.fit(images, generator), images, labels, shares)
        if isinstance(trigger, Learner):
            trigger = trigger.fit(images, generator)
        if self.per_batch:
            return PerBatch(images, labels, trigger, shares)
        if isinstance(trigger, Composite):
            poisoned = trigger.training_set(images, labels, self.rate, generator, same_rate=self.decoy_rate)
        elif self.clean_label:
            network, settings = self._surrogate(surrogate)
            poisoned = poison_clean_label(
                images, labels, trigger, self.target, self.rate, generator, network, **settings
            )
        else:
            rules = {"rule": self.rule, "num_classes": num_classes, "decoy_rate": self.decoy_rate}
            poisoned = poison(images, labels, trigger, self.target, self.rate, generator, **rules)
        return Campaign(poisoned.images, poisoned.labels, trigger, poisoned.indices)

    def _surrogate(self, train: Callable[[], nn.Module] | None) -> tuple[nn.Module | None, dict[str, Any]]:
        if self.perturbation is None:
            return None, {}
        if train is None:
            raise ValueError(f"Attack: {self.name!r} perturbs images and needs a surrogate; got none")
        return train(), vars(self.perturbation)


def _maker(
    name: str, trigger: Callable[..., Trigger | Learner], files: tuple[str, ...] = (), **settings: Any
) -> Callable[..., Attack]:
    """The function of ``ATTACKS`` for one attack; trigger takes the shape of the images, then the files' patterns."""

    def make(image_shape: Shape, num_classes: int, **changes: Any) -> Attack:
        if len(image_shape) != 3:
            raise ValueError(f"{name}: image_shape must be (C, H, W); got {tuple(image_shape)}")
        paths = {file: changes.pop(file) for file in files if file in changes}
        chosen = {"name": name, **settings, **changes}
        if "trigger" not in chosen:
            missing = [file for file in files if file not in paths]
            if missing:
                raise ValueError(f"{name}: the PNG of its trigger is needed, as in {missing[0]}='{missing[0]}.png'")
            chosen["trigger"] = trigger(image_shape, *(_fitting(name, paths[file], image_shape) for file in files))
        attack = Attack(**chosen)
        target_labels(torch.empty(0, dtype=torch.int64), attack.target, attack.rule, num_classes)
        return attack

    make.__name__ = make.__qualname__ = name
    return make


def _fitting(name: str, path: str, image_shape: Shape) -> Tensor:
    pattern = pattern_from_file(path)
    if pattern.shape[1:] != torch.Size(image_shape):
        raise ValueError(f"{name}: the pattern must be {tuple(image_shape)}; {path} is {tuple(pattern.shape[1:])}")
    return pattern


def _square(shape: Shape) -> BadNetsSquare:
    """4 x 4 pixels with a margin of 1 in 32 x 32; in proportion, but at least 2 x 2, in smaller images."""
    scale = min(1.0, min(shape[1:]) / 32)
    return BadNetsSquare(size=max(2, round(4 * scale)), margin=round(scale))


def _additive(shape: Shape, pattern: Tensor) -> Additive:
    return Additive(pattern)


def _issba(shape: Shape) -> ISSBA:
    return ISSBA(secret_size=max(1, min(20, shape[1] * shape[2] // 8)))


def _three(shape: Shape, trojan_wm: Tensor, l2_inv: Tensor) -> Several:
    return Several((_square(shape), Additive(trojan_wm), Additive(l2_inv)))


def _always(trigger: Callable[[], Trigger | Learner]) -> Callable[[Shape], Trigger | Learner]:
    return lambda shape: trigger()


_TO_ALL = {"target": None, "rule": "all_to_all"}
_PAPERS: dict[str, dict[str, Any]] = {
    "badnets": {"trigger": _square, "target": 8, "rate": 0.05},
    "badnets_checkerboard": {"trigger": _always(BadNetsCheckerboard), "target": 0, "rate": 0.05},
    "blend": {"trigger": _always(BlendNoise), "target": 0, "rate": 0.01},
    "trojan_sq": {"trigger": _additive, "files": ("pattern",), "target": 2, "rate": 0.05},
    "trojan_sq_all": {"trigger": _additive, "files": ("pattern",), **_TO_ALL, "rate": 0.05},
    "trojan_wm": {"trigger": _additive, "files": ("pattern",), "target": 2, "rate": 0.05},
    "l0_inv": {"trigger": _always(L0Inv), "target": 0, "rate": 0.05},
    "l2_inv": {"trigger": _additive, "files": ("pattern",), "target": 0, "rate": 0.05},
    "sig": {"trigger": _always(SIG), "target": 0, "rate": 0.8, "clean_label": True},
    "sig_wrapped": {"trigger": _always(SIGWrapped), "target": 0, "rate": 0.8, "clean_label": True},
    "clb": {
        "trigger": _always(FourCorners),
        "target": 0,
        "rate": 0.8,
        "clean_label": True,
        "perturbation": Perturbation(),
    },
    "wanet": {"trigger": _always(WaNet), "target": 0, "rate": 0.1, "decoy_rate": 0.2, "per_batch": True},
    "wanet_all": {"trigger": _always(WaNet), **_TO_ALL, "rate": 0.1, "decoy_rate": 0.2, "per_batch": True},
    "bppa": {"trigger": _always(BPPA), "target": 0, "rate": 0.1, "decoy_rate": 0.1, "per_batch": True},
    "iab": {"trigger": _always(IAB), "target": 0, "rate": 0.1, "decoy_rate": 0.1},
    "iab_all": {"trigger": _always(IAB), **_TO_ALL, "rate": 0.1, "decoy_rate": 0.1},
    "lira": {"trigger": _always(LIRA), "target": 0, "rate": 1.0},
    "issba": {"trigger": _issba, "target": 0, "rate": 0.1},
    "style": {"trigger": _always(StyleStandIn), "target": 0, "rate": 0.1},
    "composite": {"trigger": _always(lambda: Composite(0, 1, 2)), "target": 2, "rate": 0.1, "decoy_rate": 0.5},
    "several": {"trigger": _three, "files": ("trojan_wm", "l2_inv"), "target": 0, "rate": 0.05},
    "adaptive": {"trigger": _always(BadNetsCheckerboard), "target": 0, "rate": 0.5, "frozen_convs": 5},
}

ATTACKS: dict[str, Callable[..., Attack]] = {name: _maker(name, **settings) for name, settings in _PAPERS.items()}
"""Name -> ``make(image_shape, num_classes, **changes)``, an attack with the settings of its paper.

image_shape: (C, H, W)
changes:     fields of :class:`Attack` that are to differ; and the path of a PNG, (C, H, W), for triggers that are known
             by a file alone: ``pattern=`` for trojan_sq, trojan_sq_all, trojan_wm and l2_inv; ``trojan_wm=`` and
             ``l2_inv=`` for several

Targets and rates: AWM's for badnets, blend, trojan_*, l*_inv, wanet and several (one target for its three triggers:
the paper doesn't say theirs); ANP's for badnets_checkerboard; ANP's and NFT's for sig, sig_wrapped and clb; NFT's for
adaptive (50 % of the three rates that it tries) and style; the others' are their own papers'. LIRA attacks a copy of
each whole batch. A square in images below 32 x 32 is smaller in proportion, and ISSBA's secret has at most a bit per
8 pixels.
"""
