"""Adversarial Weight Masking: Chai & Chen 2022, "One-shot Neural Backdoor Erasing via Adversarial Weight Masking"."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from maskops.functional import project_onto_l1_ball, rescale_to_l1_ball, trigger_step_
from maskops.optim import MaskAdam
from maskops.purify._algorithm import Algorithm, complete
from maskops.purify._distributed import ALONE, Team
from maskops.purify._draws import Batch
from maskops.purify._images import CleanImages
from maskops.purify._loop import OnEpoch
from maskops.purify._masks import MaskRun
from maskops.purify._options import Auto, Preset, choice, number
from maskops.purify._phase import Phase
from maskops.purify._result import Purification
from maskops.purify._setting import MaskSetting


@dataclass(frozen=True)
class AWMOptions:
    """The hyper-parameters of AWM, under the names of Algorithm 1. The defaults are the paper's.

    alpha, beta:   weights of the clean and the perturbed loss; beta ``"auto"`` is 1 - alpha
    gamma:         γ, weight of ‖m‖₁
    tau:           τ, radius of the trigger's ball in pixel units; ``"auto"`` is 1000 for 3x32x32, scaled by image size
    epochs:        E
    inner_steps, outer_steps: T; ``"auto"`` is five passes over the clean images
    batch_size:    b, at most n; ``"auto"`` is the paper's Table 7: 16 below 100 images, 32 below 500, else 128 (for the
                   one-shot set, which counts 100 with its augmented copies, give 16)
    inner_lr:      η₁ of gradient ascent on the trigger
    lr:            η₂ of Adam on the masks
    lr_decay:      factor on lr, once every ``lr_decay_epochs`` epochs
    inner_labels:  ``"true"``, or ``"predicted"``: the masked model's answers to the clean images, once per phase
    projection:    ``"rescale"`` (along the ray into the L1 ball, the paper's), ``"project"`` (nearest point of the L1
                   ball), ``"l2"`` (along the ray into the L2 ball, ablation D.5), ``"none"`` (D.2)
    project_every_step: after every ascent step; otherwise once, after the last
    trigger_penalty: weight of -‖Δ‖₂ in the inner objective (D.6, which prints a plus: that would reward large triggers)
    clamp:         clamp x + Δ to [0, 1] in the outer phase
    mask_bits:     32, or 16 for masks in bfloat16, rounded by chance in each step: see :class:`maskops.optim.MaskAdam`
    state_bits:    32, or 8 for Adam's moments in eight bits each: see :class:`maskops.optim.MaskAdam`
    step_in_backward: step each layer's masks in the backward itself, as soon as their gradient is complete, so that no
                   gradient of the whole model exists; for masks of weights and branches as one batch; same result
    offload:       keep θ, masks and Adam's state in the host's memory, and copy those of a layer to the device when it
                   is computed and stepped, which takes as long as the bus does: of a model whose activations alone fit.
                   With ``remake_weights`` and ``step_in_backward``; same result, which is where the model is
    shard:         of several processes each keeps its part of θ, masks and Adam's state of every layer, which is put
                   together when it is computed; with the same two options; same result
    branches:      the two losses of line 11 one after the other, ``"sequential"`` (half the activations), or as one
                   batch, ``"concatenated"`` (fewer, larger launches); ``"auto"`` is sequential on the CPU, and on a GPU
                   concatenated for as long as its memory suffices
    """

    alpha: float = 0.9
    beta: float | Auto = "auto"
    gamma: float = 1e-8
    tau: float | Auto = "auto"
    epochs: int = 100
    inner_steps: int | Auto = 10
    outer_steps: int | Auto = 10
    batch_size: int | Auto = "auto"
    inner_lr: float = 10.0
    lr: float = 0.01
    lr_decay: float = 0.1
    lr_decay_epochs: int = 50
    inner_labels: str = "true"
    projection: str = "rescale"
    project_every_step: bool = False
    trigger_penalty: float = 0.0
    clamp: bool = False
    mask_bits: int = 32
    state_bits: int = 32
    step_in_backward: bool = False
    offload: bool = False
    shard: bool = False
    branches: str = "auto"

    def __post_init__(self) -> None:
        number("awm", self, "alpha", float, 0, 1)
        for name in ("gamma", "inner_lr", "lr", "lr_decay", "trigger_penalty"):
            number("awm", self, name, float, 0)
        for name in ("beta", "tau"):
            number("awm", self, name, float, 0, auto=True)
        for name in ("epochs", "lr_decay_epochs"):
            number("awm", self, name, int, 1)
        for name in ("inner_steps", "outer_steps", "batch_size"):
            number("awm", self, name, int, 1, auto=True)
        choice("awm", self, "mask_bits", (16, 32))
        choice("awm", self, "state_bits", (8, 32))
        choice("awm", self, "inner_labels", ("true", "predicted"))
        choice("awm", self, "projection", ("rescale", "project", "l2", "none"))
        choice("awm", self, "branches", ("auto", "sequential", "concatenated"))
        if self.offload and self.shard:
            raise ValueError("awm: offload=True and shard=True exclude each other")
        if self.step_in_backward and self.branches == "sequential":
            raise ValueError("awm: step_in_backward=True takes one backward: branches='concatenated'")
        for name in ("project_every_step", "clamp", "step_in_backward", "offload", "shard"):
            choice("awm", self, name, (True, False))

    def for_images(self, images: Tensor | CleanImages) -> AWMOptions:
        """The same options with every ``"auto"`` replaced by what it stands for on these images."""
        count, *size = images.shape
        batch_size = 16 if count < 100 else 32 if count < 500 else 128
        batch_size = min(batch_size if self.batch_size == "auto" else self.batch_size, count)
        five_passes = 5 * (count // batch_size)
        return replace(
            self,
            beta=1 - self.alpha if self.beta == "auto" else self.beta,
            tau=1000.0 * math.prod(size) / (3 * 32 * 32) if self.tau == "auto" else self.tau,
            batch_size=batch_size,
            inner_steps=five_passes if self.inner_steps == "auto" else self.inner_steps,
            outer_steps=five_passes if self.outer_steps == "auto" else self.outer_steps,
            branches=self._branches_on(images.device),
        )

    def _branches_on(self, device: torch.device) -> str:
        if self.branches == "auto" and self.step_in_backward:
            return "concatenated"
        return "sequential" if self.branches == "auto" and device.type == "cpu" else self.branches


PRESETS = {
    "paper": Preset(AWMOptions(), MaskSetting()),
    "official": Preset(
        AWMOptions(
            tau=1000.0,
            epochs=20,
            inner_steps="auto",
            outer_steps="auto",
            batch_size=128,
            lr_decay=1.0,
            inner_labels="predicted",
            clamp=True,
        ),
        MaskSetting(),
    ),
    "swm_atr": Preset(AWMOptions(gamma=0.0), MaskSetting()),
}
"""``paper``: Algorithm 1, Appendix A and Table 7. ``official``: the published ``main.py`` with its defaults.
``swm_atr``: soft weight masks and trigger recovery without the L1 term (Eq. 4.3, the third column of Table 4)."""


@torch.enable_grad()
def awm(
    model: nn.Module,
    clean_data: Any,
    *,
    preset: str = "paper",
    on_epoch: OnEpoch | None = None,
    checkpoint: str | os.PathLike | None = None,
    resume: bool = False,
    **options: Any,
) -> Purification:
    """Purify a model by masks on its weights, learned against a universal trigger that is learned in turn.

        min over m in [0, 1]: α·E L(f(x; m⊙θ), y) + β·max over ‖Δ‖₁ <= τ: E L(f(x + Δ; m⊙θ), y) + γ·‖m‖₁

    model:      any nn.Module that maps images to logits (a tensor, or an object with ``.logits``); it runs in eval mode
                and isn't changed
    clean_data: (images, labels): images (N, C, H, W) float in [0, 1] or uint8, labels (N,); or a map-style Dataset
    preset:     ``"paper"``, ``"official"`` or ``"swm_atr"``: see :data:`PRESETS`
    on_epoch:   called after every epoch with its number and the model as it then is, for measurements: on images in
                pixel space, which that model normalises itself. Of a run that goes on, the last epoch may be seen again
    checkpoint: a .safetensors file for the state of the run, written after phases (but for 5 % of the time at most) and
                in one piece; None for none
    resume:     go on from the state in that file, in this or another process, to the same result: bit for bit where
                torch is deterministic. Without such a file the run begins
    options:    single fields of :class:`AWMOptions` and :class:`maskops.purify.MaskSetting`, such as ``tau=200`` or
                ``device="cuda"``
    returns:    a :class:`maskops.purify.Purification`; ``.model`` is the purified model
    errors:     ValueError and TypeError, one line, for options or data out of range; NonFiniteError when a loss is no
                number; CheckpointError for a checkpoint that can't be read or written, ValueError for one of another
                model, other images or options. In each case the model is as it was
    processes:  those of torch.distributed's default group, if it is there, split every batch: all call this alike and
                get the same result; RuntimeError when another is gone
    measured:   on the demo's digits with 100 clean images (seeds 0 to 2; ACC 98 to 99 %, asr_all 100 % before):
                97.2 / 9, 97.4 / 13, 96.8 / 15
    source:     Eq. 4.4 and Algorithm 1, whose lines are marked in the code. Deviations: lines 7 and 12 print the signs
                of the steps the wrong way round; the outer step is Adam, as in Appendix A

    >>> images, labels = torch.rand(8, 1, 8, 8), torch.arange(8) % 2
    >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    >>> result = awm(net, (images, labels), epochs=1, progress=False)
    >>> sorted(result.masks), tuple(result.trigger.shape)
    (['0.mask'], (1, 1, 8, 8))
    """
    return complete(AWM(model, clean_data, preset, on_epoch, options), checkpoint, resume)


class AWM(Algorithm):
    """Algorithm 1, whose lines are marked."""

    method, presets = "awm", PRESETS

    def prepare(self, model: nn.Module, clean_data: Any, options: AWMOptions, setting: MaskSetting) -> None:
        for name in ("offload", "shard"):
            if getattr(options, name) and not (options.step_in_backward and setting.remake_weights):
                raise ValueError(f"awm: {name}=True takes step_in_backward=True and remake_weights=True")
        how = {name: getattr(options, name) for name in ("mask_bits", "step_in_backward", "offload", "shard")}
        self.run = MaskRun("awm", model, clean_data, setting, **how)
        self.options = options.for_images(self.run.images)
        self.lr = self.run.varying(options.lr)
        how = {"l1": options.gamma, "capturable": True, "state_bits": options.state_bits}
        self.masks = MaskAdam(self.run.arena, self.lr, **how)  # line 1: every mask is 1
        self.optimizers = [self.masks]
        if options.step_in_backward:
            self.run.step_in_backward(self.masks)
        self.trigger = self.run.new_trigger()
        self.inner_labels = self.run.labels.clone()
        self.predictions = self.run.predictions(self.inner_labels, self.options.batch_size)

    def phases(self) -> Iterator[Phase]:
        run, options = self.run, self.options
        once = {"before": self.begin, "after": self.project, "around": run.frozen_masks}
        inner = run.steps("inner", self.inner, options.inner_steps, options.batch_size, **once)
        outer = run.steps("outer", self.outer, options.outer_steps, options.batch_size, shrink=self.part)
        for epoch in run.epochs(options.epochs):  # line 2
            yield inner
            yield outer
            if (epoch + 1) % options.lr_decay_epochs == 0:
                self.lr *= options.lr_decay
            run.report(self.on_epoch, epoch, run.model)

    @torch.no_grad()
    def begin(self) -> None:
        self.trigger.zero_()  # line 3
        if self.options.inner_labels == "predicted":
            self.predictions.run()
            self.run.execution["predictions"] = self.predictions.execution

    def inner(self, batch: Batch) -> dict[str, Tensor]:  # lines 4, 5
        images = self.run.sample_images(batch)
        labels = self.inner_labels.index_select(0, batch.index)
        loss, gradient = self.run.losses.trigger_gradient(images, labels, self.trigger)  # line 6
        ascend(self.trigger, gradient, self.options, self.run.team)  # line 7
        return {"inner loss": loss}

    def project(self) -> None:
        project(self.trigger, self.options)  # line 9

    def outer(self, batch: Batch) -> dict[str, Tensor]:  # line 10
        options, trigger = self.options, self.trigger.detach()
        clean, labels = self.run.sample(batch)
        perturbed = (clean + trigger).clamp(0, 1) if options.clamp else clean + trigger
        # line 11; the gradient of γ‖m‖₁ is part of the mask step
        branches = (options.alpha, clean, labels), (options.beta, perturbed, labels)
        clean_loss, perturbed_loss = self.run.descend(*branches, together=self.together)
        self.masks.step()  # lines 12, 13
        return {"clean loss": clean_loss, "perturbed loss": perturbed_loss}

    def together(self) -> bool:
        return self.options.branches != "sequential"

    def part(self) -> bool:
        """Run the branches one after the other from now on; returns whether that is a change, and ours to make."""
        if self.options.branches != "auto":
            return False
        self.options = replace(self.options, branches="sequential")
        return True

    def tensors(self) -> dict[str, Tensor]:
        return {"trigger": self.trigger}

    def result(self) -> Purification:
        return self.run.finish(self.options, trigger=self.trigger)


def ascend(trigger: Tensor, gradient: Tensor, options: AWMOptions, team: Team = ALONE) -> None:
    """One step of the trigger up the loss, of whose gradient each process has a summand, in place."""
    team.add(gradient)
    if options.trigger_penalty:
        (of_penalty,) = torch.autograd.grad(-options.trigger_penalty * trigger.norm(), trigger)
        gradient = gradient + of_penalty
    trigger_step_(trigger, gradient, options.inner_lr)
    if options.project_every_step:
        project(trigger, options)


@torch.no_grad()
def project(trigger: Tensor, options: AWMOptions) -> None:
    """The trigger brought into its ball, in place."""
    if options.projection == "rescale":
        trigger.copy_(rescale_to_l1_ball(trigger, options.tau))
    elif options.projection == "project":
        trigger.copy_(project_onto_l1_ball(trigger, options.tau))
    elif options.projection == "l2":
        trigger.mul_(options.tau / trigger.norm().clamp_min(options.tau))
