"""The tape: a network's forward and backward as one function of autograd."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from maskops.purify._tape import segments
from maskops.purify._tape.call import Call, CallPlan, Casts, Remade
from maskops.purify._tape.graph import RefusedError, draws, traced
from maskops.purify._tape.segments import Segment
from maskops.purify._tape.steps import Conv, plan
from maskops.purify._tape.trace import Builder


class Tape:
    """The logits of a network whose parameters are frozen, but for those that require gradients.

    The gradients of these are added to their ``.grad`` in the backward itself, whatever inputs that was asked for:
    ``torch.autograd.grad`` doesn't return them, and hooks on them don't run. Gradients of images, and of a summand
    that they share, are autograd's as ever, but can't be differentiated again.

    Which parameters require gradients is looked up in each call, and so are the parameters themselves: another may
    have taken the place of one that is there. All else, such as the layers' modes, is as it was when the tape was
    made; ``fits`` says whether it still is.
    """

    def __init__(
        self,
        network: nn.Module,
        example: Tensor,
        dtype: torch.dtype | None = None,
        gate: str = "auto",
        changing: Sequence[Parameter] = (),
        recompute: bool = False,
    ) -> None:
        """Of the network in its present modes.

        example:  (B, C, H, W), what the network is called with; it is run on this once
        dtype:    of layers and activations, as by autocast; None for the network's own
        gate:     what a ReLU keeps: its ``"output"``, which takes fewer launches, or ``"bits"``, one per element;
                  ``"auto"`` is the output on a GPU
        changing: parameters that change from call to call, also while they require no gradient
        recompute: keep only what lies between a few segments of the network, and run each of them once more for its
                  backward: less memory, and a forward's time more. Not for networks that draw or track statistics
        errors:   RefusedError, which says why there can be none
        """
        self._device = example.device.type
        precision = partial(torch.autocast, self._device, dtype=dtype, enabled=dtype is not None, cache_enabled=False)
        built = Builder(traced(network, example, precision), precision)
        if recompute and draws(network, example, precision):
            raise RefusedError("it draws random numbers, of which a segment that runs again would draw others")
        self._modes = [(module, module.training) for module in network.modules()]
        self._steps, self._slots, self._logits, self._values = built.steps, built.slots, built.logits, built.values
        self._bits = gate == "bits" or (gate == "auto" and self._device != "cuda")
        self._casts = Casts(dtype, changing)
        counts = Counter(value for step in self._steps for value in step.reads) + Counter([self._logits])
        self._readers = [counts[value] for value in range(self._values)]
        first = [step for step in self._steps if 0 in step.reads]
        self._linear_first = len(first) == 1 and isinstance(first[0], Conv) and first[0].reads == (0,)
        self.on_gradient: Callable[[Parameter, Tensor], None] | None = None
        """Takes the gradient of a parameter once it is complete and nobody needs the parameter any more; None adds it
        to the parameter's own."""
        self.remade: Remade | None = None
        """Asked for the parameters of each step before it runs, and again before its backward; None keeps them all."""
        self._sizes = built.sizes if recompute else None
        self._plans: dict[tuple[bool, ...], tuple[CallPlan, list[Segment]]] = {}

    @classmethod
    def of(cls, *arguments: Any, **options: Any) -> Tape | str:
        """A tape, or a sentence that says why there can be none."""
        try:
            return cls(*arguments, **options)
        except RefusedError as error:
            return str(error)

    def fits(self) -> bool:
        """Whether every layer is in the mode that the tape was made in, without hooks, which the tape wouldn't run."""
        return all(
            module.training is training and not module._forward_hooks and not module._forward_pre_hooks
            for module, training in self._modes
        )

    def uses(self) -> list[list[Tensor]]:
        """The parameters of each step."""
        found = [[self._slots[slot].get() for slot in step.slots] for step in self._steps]
        return [[parameter for parameter in of_step if parameter is not None] for of_step in found]

    def __call__(self, images: Tensor, shared: Tensor | None = None) -> Tensor:
        """The logits of images.

        shared: (1, C, H, W), a summand that every image already contains, for the sake of its gradient
        """
        parameters = [slot.get() for slot in self._slots]
        learned = [parameter is not None and parameter.requires_grad for parameter in parameters]
        needs_shared = shared is not None and shared.requires_grad
        with torch.autocast(self._device, enabled=False):
            if not torch.is_grad_enabled() or not (images.requires_grad or needs_shared or any(learned)):
                with torch.no_grad():
                    return self._forward(self._call(*self._nothing, parameters, False), images)
            plan, cut = self._plan(images.requires_grad, needs_shared, learned)
            call = self._call(plan, cut, parameters, self._bits)
            if self.on_gradient is not None:
                used = [step.slots for step in self._steps if any(plan.needs[value] for value in step.writes)]
                call.expect(self.on_gradient, chain.from_iterable(used))
            watched = {id(p): p for p, is_learned in zip(parameters, learned, strict=True) if is_learned}
            return _Taped.apply(self, call, images, shared, *watched.values())

    def _call(self, plan: CallPlan, cut: list[Segment], parameters: list[Tensor | None], bits: bool) -> Call:
        return Call(plan, cut, parameters, self._casts, self._readers, bits, self.remade)

    def _plan(self, needs_images: bool, needs_shared: bool, learned: list[bool]) -> tuple[CallPlan, list[Segment]]:
        """What a call keeps and computes, and the segments that it runs in."""
        key = needs_images, needs_shared, *learned
        if key not in self._plans:
            early = needs_shared and self._linear_first
            how = {"needs_images": needs_images, "shared": needs_shared, "early": early}
            found = plan(self._steps, self._values, learned, **how)
            whole = self._sizes is None or not any(key)
            self._plans[key] = found, segments.whole(self._steps) if whole else self._cut(found)
        return self._plans[key]

    def _cut(self, plan: CallPlan) -> list[Segment]:
        return segments.cut(self._steps, self._sizes, plan, self._bits)

    @property
    def _nothing(self) -> tuple[CallPlan, list[Segment]]:
        """For a call without a backward."""
        return self._plan(False, False, [False] * len(self._slots))

    def _forward(self, call: Call, images: Tensor) -> Tensor:
        values = call.values
        values[0] = images
        *early, last = call.segments
        for number, segment in enumerate(early):
            call.inputs[number] = [values[value] for value in segment.inputs]
            with call.planned(self._nothing[0]):
                _run(segment, call)
        _run(last, call)
        logits, values[self._logits] = values[self._logits], None
        return logits.to(images.dtype)

    def _backward(self, call: Call, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of the images and of what they share."""
        plan = call.plan
        call.deliver(self._logits, grad)
        for number, segment in reversed(list(enumerate(call.segments))):
            if number in call.inputs:
                self._run_again(segment, call, call.inputs.pop(number))
            for step in reversed(segment.steps):
                if any(plan.needs[value] for value in step.writes):
                    call.make(step.slots)
                    step.backward(call)
                    call.hand_over(step.slots)
        call.flush()
        of_images = call.take(0)
        if plan.shared and not plan.early and of_images is not None:
            call.shared_grad = of_images.sum(0, keepdim=True)
        return of_images, call.shared_grad

    def _run_again(self, segment: Segment, call: Call, inputs: list[Tensor]) -> None:
        for value, tensor in zip(segment.inputs, inputs, strict=True):
            call.values[value] = tensor
        _run(segment, call)
        call.values = [None] * self._values


def _run(segment: Segment, call: Call) -> None:
    for step in segment.steps:
        call.make(step.slots)
        step.forward(call)
        for value in step.frees:
            call.values[value] = None


class _Taped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tape, call, images, shared, *learned):
        ctx.tape, ctx.call = tape, call
        # autograd complains when they have changed before the backward
        ctx.save_for_backward(*learned)
        logits = tape._forward(call, images)
        ctx.dtypes = images.dtype, None if shared is None else shared.dtype
        return logits.clone() if logits is images else logits

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            raise RuntimeError("the tape's gradients can't be differentiated: create_graph=True is not supported")
        learned = ctx.saved_tensors
        call, ctx.call = ctx.call, None
        if call is None:
            raise RuntimeError("the tape's backward can't run a second time: what it kept is gone")
        with torch.autocast(ctx.tape._device, enabled=False):
            of_images, of_shared = ctx.tape._backward(call, grad)
        of_images = of_images if ctx.needs_input_grad[2] else None
        casts = [
            None if grad is None else grad.to(dtype)
            for grad, dtype in zip((of_images, of_shared), ctx.dtypes, strict=True)
        ]
        return None, None, *casts, *[None] * len(learned)
