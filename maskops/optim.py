"""The mask step: optimiser, L1 term, bounds and effective weights in one op."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from maskops._memory import OnDevice
from maskops.arena import MaskArena

_ops = torch.ops.maskops

_BLOCK = 256
"""Entries that share a scale in states of eight bits."""

EIGHT_BITS = {"exp_avg": torch.uint8, "exp_avg_scale": torch.float32}
EIGHT_BITS |= {"exp_avg_sq": torch.uint8, "exp_avg_sq_scale": torch.float32}
"""Adam's moments in eight bits, and what they are multiplied by."""

_ZERO = 127
"""The first moment's code of 0; the second's is 0."""


class _MaskOptimizer(torch.optim.Optimizer):
    def __init__(self, masks: Iterable[Any] | MaskArena, defaults: dict[str, Any]) -> None:
        self._arena = masks if isinstance(masks, MaskArena) else None
        super().__init__([masks.mask] if self._arena else masks, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add masks with options of their own; what isn't given is as for the others."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        wrong = [mask.dtype for mask in self.param_groups[-1]["params"] if not mask.is_floating_point()]
        if wrong:
            del self.param_groups[-1]
            raise TypeError(f"{type(self).__name__}: masks that are learned must be floating; got {wrong[0]}")

    def _check(self, group: dict[str, Any]) -> None:
        name = type(self).__name__
        for option in ("lr", "l1"):
            if not group[option] >= 0:
                raise ValueError(f"{name}: {option} must be a number >= 0; got {group[option]}")
        lower, upper = group["lower"], group["upper"]
        if not isinstance(lower, Tensor) and not lower <= upper:
            raise ValueError(f"{name}: lower must not be above upper; got lower {lower} and upper {upper}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Step every mask that has a gradient; an arena's effective weights are then new and its gradients zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for mask in group["params"]:
                if self._arena is not None:
                    if self._arena.grad is not None:  # otherwise each layer is stepped by itself
                        self._step(group, mask, *self._arena.step_arguments())
                    self._arena.finish_step()
                elif mask.grad is not None:
                    self._step(group, mask, mask, mask.grad, None, None)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the masks' gradients; an arena's are zeroed, because the layers' gradients are views of it."""
        if self._arena is None:
            super().zero_grad(set_to_none)
        else:
            self._arena.zero_grad()

    def take_up(self, mask: Tensor, name: str, value: Tensor) -> None:
        """Go on with this value as the part of a mask's state that has this name."""
        if self._arena is None:
            self.state[mask][name] = value.to(mask.device, copy=True)
            return
        memory = self._arena.memory
        unit = 1 if name.endswith("_scale") else _BLOCK
        nothing = _ZERO if value.dtype == torch.uint8 and name.endswith("exp_avg") else 0
        part = memory.split(value, unit, nothing) if value.dim() else value
        self.state[mask][name] = memory.keep(part)

    def state_in_one(self, mask: Tensor) -> dict[str, Tensor]:
        """A mask's state, with the parts of it that other processes have."""
        state = self.state.get(mask, {})
        if self._arena is None or self._arena.memory.parts == 1:
            return state
        return {name: self._in_one(name, value) for name, value in state.items()}

    def _in_one(self, name: str, value: Tensor) -> Tensor:
        if not value.dim():
            return value
        entries = self._arena.entries(name.rpartition(".")[0])
        return self._arena.memory.joined(value, -(-entries // _BLOCK) if name.endswith("_scale") else entries)

    def _step(self, group, key, mask, grad, weight, effective) -> None:
        raise NotImplementedError


def _number(value: float | Tensor) -> Tensor:
    """A number as a 0-d tensor. On the CPU it also serves a mask on another device, without a copy that would wait."""
    return value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64, device="cpu")


class MaskAdam(_MaskOptimizer):
    """Adam on masks, with the L1 subgradient inside and the masks clipped after every step.

        g = dL/dm + l1 * sign(m - toward);  m <- clip(m - lr * m̂1 / (sqrt(m̂2) + eps), lower, upper)

    masks:      an iterable of masks or parameter groups, as torch's optimisers take them, or a :class:`MaskArena`,
                whose effective weights are then written in the same op
    lr, betas, eps: as in :class:`torch.optim.Adam`; lr may be a 0-d tensor
    l1, toward: γ, the weight of sum|m - toward| in the loss; the sum itself must then not be added to the loss
    lower, upper: bounds of the masks; lower may be a tensor that broadcasts to each mask of its group
    capturable: keep the step count on the masks' device, so that a step can be captured in a CUDA graph; give lr as a
                tensor on that device when it changes, and lower too
    state_bits: 8 keeps both moments in eight bits and a float32 scale for every 256 entries: 2.03 bytes a mask entry
                instead of the 8 of float32. A gradient that isn't finite makes its 256 entries NaN at the next step
    dtypes:     masks of any floating dtype. Those of bfloat16 have float32 moments and are rounded by chance, up or
                down by how near each is: on average they move as float32 masks do, where rounding to the nearest would
                lose all steps below 0.001. The chance is a hash of the step's count and the entry's place
    errors:     ValueError, also for a group, for negative lr or l1, for lower > upper and for other state_bits than 8
                and 32; in a step with 8 or on bfloat16, for a mask that doesn't fill its memory, such as a slice
    source:     AWM's outer step as published: Adam (Kingma & Ba 2015) and ``clamp_(0, 1)``; its Algorithm 1, lines 12
                and 13, writes plain gradient steps. Eight bits: block-wise dynamic quantisation (Dettmers et al. 2022),
                but with blocks of 256 entries where the paper has 2048, and no second moment above 0 becomes 0.
                Rounding by chance: Gupta et al. 2015, Deep Learning with Limited Numerical Precision, section 2.1

    >>> mask = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = MaskAdam([mask], lr=0.1)
    >>> (mask * torch.tensor([1.0, -1.0])).sum().backward()
    >>> _ = optimizer.step()
    >>> mask.data
    tensor([0.9000, 1.0000])
    """

    def __init__(
        self,
        masks: Iterable[Any] | MaskArena,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        l1: float = 0.0,
        toward: float = 0.0,
        lower: float | Tensor = 0.0,
        upper: float = 1.0,
        capturable: bool = False,
        state_bits: int = 32,
    ) -> None:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"MaskAdam: betas must be in [0, 1); got {betas}")
        options = {"lr": lr, "betas": betas, "eps": eps, "l1": l1, "toward": toward, "lower": lower, "upper": upper}
        super().__init__(masks, {**options, "capturable": capturable, "state_bits": state_bits})

    def _check(self, group: dict[str, Any]) -> None:
        super()._check(group)
        if group["state_bits"] not in (8, 32):
            raise ValueError(f"MaskAdam: state_bits must be 8 or 32; got {group['state_bits']}")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict()`` of an optimiser over the same masks gave, with as many bits as that one."""
        super().load_state_dict(state_dict)
        saved = itertools.chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        masks = itertools.chain.from_iterable(group["params"] for group in self.param_groups)
        for key, mask in zip(saved, masks, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():  # which torch has cast to the mask's dtype
                self.state[mask][name] = value.to(self.state[mask][name].device, copy=True)

    @torch.no_grad()
    def step_layer(self, name: str, grad: Tensor) -> None:
        """Step the masks of one layer of an arena by the gradient of its effective weight, which is then written anew.

        Layer by layer it computes what :meth:`step` does for all, so that no gradient but one layer's need exist.

        errors: ValueError for an arena with masks of other shapes than their weights'
        """
        arena, (group,) = self._arena, self.param_groups
        if arena is None or not arena.elementwise:
            raise ValueError("MaskAdam: step_layer needs an arena whose masks have the shapes of their weights")
        mask, weight, effective = arena.layer(name)
        # a layer has states of its own: blocks of entries in eight bits don't reach into the next
        *state, step = self._state(group, arena.mask, mask, f"{name}.")
        flat = arena.memory.part_of_sum((grad.movedim(1, -1) if grad.dim() in (4, 5) else grad).reshape(-1))
        lower = _number(group["lower"])
        place = arena.place(name)
        lower = lower.expand_as(arena.mask)[place] if lower.dim() else lower
        changed = [mask, *state]
        *fetched, weight = arena.memory.fetch([*changed, weight])
        self._compute(group, (fetched[0], flat, weight, effective), [*fetched[1:], step], lower, place.start)
        arena.memory.put_back(fetched, changed)

    def _step(self, group, key, mask, grad, weight, effective) -> None:
        tensors, lower = (mask, grad, weight, effective), _number(group["lower"])
        if group["state_bits"] == 8 or _is_rounded_by_chance(mask):
            *tensors, lower_of_each = _flattened(*tensors, lower if lower.dim() else None)
            lower = lower if lower_of_each is None else lower_of_each
        self._compute(group, tensors, self._state(group, key, mask), lower)

    def _state(self, group: dict[str, Any], key: Tensor, mask: Tensor, prefix: str = "") -> list[Tensor]:
        """The moments of a mask, and its count of steps."""
        state, eight_bits = self.state[key], group["state_bits"] == 8
        if f"{prefix}step" not in state:
            memory = OnDevice(mask.device) if self._arena is None else self._arena.memory
            made = _moments_of_eight_bits(mask, memory) if eight_bits else _moments(mask, memory)
            device = memory.device if group["capturable"] else "cpu"
            made["step"] = torch.zeros((), dtype=torch.float32, device=device)
            state.update({f"{prefix}{name}": value for name, value in made.items()})
        names = EIGHT_BITS if eight_bits else ("exp_avg", "exp_avg_sq")
        return [state[f"{prefix}{name}"] for name in (*names, "step")]

    def _compute(
        self, group: dict[str, Any], tensors: Sequence[Any], state: list[Tensor], lower: Tensor, first_entry: int = 0
    ) -> None:
        if state[-1].device.type == "cpu" and tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("MaskAdam: a step in a CUDA graph counts on the device; give capturable=True")
        op = _ops.mask_adam8bit_step_ if group["state_bits"] == 8 else _ops.mask_adam_step_
        op(
            *(*tensors, *state, _number(group["lr"]), *group["betas"], group["eps"]),
            *(group["l1"], group["toward"], lower, group["upper"]),
            stochastic_from=first_entry if _is_rounded_by_chance(tensors[0]) else None,
        )


def _is_rounded_by_chance(mask: Tensor) -> bool:
    return mask.dtype == torch.bfloat16


def _moments(mask: Tensor, memory: OnDevice) -> dict[str, Tensor]:
    names = "exp_avg", "exp_avg_sq"
    if memory.elsewhere or _is_rounded_by_chance(mask):
        dtype = torch.float32 if _is_rounded_by_chance(mask) else mask.dtype
        return {name: memory.zeros(mask.numel(), dtype) for name in names}
    return {name: torch.zeros_like(mask, memory_format=torch.preserve_format) for name in names}


def _moments_of_eight_bits(mask: Tensor, memory: OnDevice) -> dict[str, Tensor]:
    entries = {torch.uint8: mask.numel(), torch.float32: -(-mask.numel() // _BLOCK)}
    return {name: memory.zeros(entries[dtype], dtype) for name, dtype in EIGHT_BITS.items()}


def _flattened(mask: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The mask as it lies in memory, and the others in that order of entries; Nones are as they were."""
    order = sorted(range(mask.dim()), key=lambda d: (mask.stride(d), mask.shape[d]), reverse=True)
    if not mask.permute(order).is_contiguous():
        raise ValueError(
            "MaskAdam: a mask of bfloat16, or with state_bits=8, must fill its memory; "
            f"got shape {tuple(mask.shape)} and strides {mask.stride()}"
        )
    return [
        None if tensor is None else tensor.expand(mask.shape).permute(order).reshape(-1) for tensor in (mask, *others)
    ]


class MaskSGD(_MaskOptimizer):
    """SGD with momentum on masks, with the L1 subgradient inside and the masks clipped after every step.

        g = dL/dm + l1 * sign(m - toward);  v <- momentum * v + g;  m <- clip(m - lr * v, lower, upper)

    momentum: 0 for plain gradient steps, which keep no state
    all else: as in :class:`MaskAdam`
    source:   ANP and NFT as published; AWM Algorithm 1, lines 12 and 13, with momentum 0

    >>> mask = torch.nn.Parameter(torch.ones(2))
    >>> optimizer = MaskSGD([mask], lr=0.1)
    >>> (mask * torch.tensor([1.0, -1.0])).sum().backward()
    >>> _ = optimizer.step()
    >>> mask.data
    tensor([0.9000, 1.0000])
    """

    def __init__(
        self,
        masks: Iterable[Any] | MaskArena,
        lr: float | Tensor = 1e-2,
        momentum: float = 0.0,
        *,
        l1: float = 0.0,
        toward: float = 0.0,
        lower: float | Tensor = 0.0,
        upper: float = 1.0,
    ) -> None:
        if not 0 <= momentum < 1:
            raise ValueError(f"MaskSGD: momentum must be in [0, 1); got {momentum}")
        options = {"lr": lr, "momentum": momentum, "l1": l1, "toward": toward, "lower": lower, "upper": upper}
        super().__init__(masks, options)

    def _step(self, group, key, mask, grad, weight, effective) -> None:
        buffer = None
        if group["momentum"]:
            state = self.state[key]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(mask, memory_format=torch.preserve_format)
            buffer = state["momentum_buffer"]
        _ops.mask_sgd_step_(
            *(mask, grad, weight, effective, buffer, _number(group["lr"]), group["momentum"]),
            *(group["l1"], group["toward"], _number(group["lower"]), group["upper"]),
        )
