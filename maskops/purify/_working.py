"""The network that a run works on: the user's structure over the user's tensors, made cheap by exact algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import Parameter

from maskops.arena import MaskArena
from maskops.lean import lean_autograd
from maskops.purify._at_hand import AtHand
from maskops.purify._fake import has_data
from maskops.purify._readers import BATCH_NORMS, CONVOLUTIONS, Readers
from maskops.purify._tape import Tape, untouched


def shared_copy(model: nn.Module) -> nn.Module:
    """A model of the same structure over new parameters that hold the same tensors. Buffers are copied.

    errors: TypeError for a model that Python can't copy
    """
    memo = {id(parameter): Parameter(parameter.detach(), parameter.requires_grad) for parameter in model.parameters()}
    memo |= {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
    try:
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"the model can't be copied: {str(error).splitlines()[0]}") from error


class PixelModel(nn.Module):
    """A classifier as a function from images in pixel space to logits.

    network:   any classifier, whose output is a tensor or has ``.logits``; it becomes part of this one
    mean, std: (C,), what the network expects its images to be normalised by; None for none
    dtype:     of activations, by autocast; None for the network's own
    """

    overwrites = True
    """Whether the network may write to its input, which then gets a copy."""

    def __init__(
        self,
        network: nn.Module,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dtype = dtype
        self.register_buffer("mean", None if mean is None else mean.view(-1, 1, 1))
        self.register_buffer("std", None if std is None else std.view(-1, 1, 1))
        self.network = network

    def normalise(self, images: Tensor) -> Tensor:
        if self.mean is not None:
            return (images - self.mean) / self.std
        return images.clone() if self.overwrites else images

    def forward(self, images: Tensor) -> Tensor:
        """Logits of images (B, C, H, W) in [0, 1], in the images' dtype."""
        with self._precision(images):
            return _logits(self.network(self.normalise(images))).to(images.dtype)

    def _precision(self, images: Tensor) -> torch.autocast:
        # no autocast, too, is set: one around the run would keep stale copies of effective weights
        # and none is kept from one forward to the next, whatever contexts are around
        return torch.autocast(images.device.type, dtype=self.dtype, enabled=self.dtype is not None, cache_enabled=False)


class WorkingModel(PixelModel):
    """A frozen model that computes the same logits from images in pixel space, with less work.

    A batch norm that follows a layer is folded into that layer's weight and bias, and the gradient of a trigger that
    the whole batch shares is summed over the batch before the first convolution's backward instead of after it:
    conv(x + Δ) = conv(x) + conv(Δ). Both need to know who reads what, which one forward of ``example`` shows; where the
    answer isn't certain, or the logits of the example come out otherwise, nothing is changed.

    In train mode, for runs on the statistics of their batches, nothing is folded.

    network:   as for :class:`PixelModel`; without gradients from now on
    example:   (B, C, H, W) images in pixel space on the network's device
    masked:    names of layers that are not to be folded away; those whose weight no forward reads are in ``unused``
    fold:      whether the algebra is allowed: not where what it folds is to be changed, and not for train mode
    track:     whether running statistics follow the batches of train mode
    all else:  as for :class:`PixelModel`
    """

    def __init__(
        self,
        network: nn.Module,
        example: Tensor,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        masked: Collection[str] = (),
        dtype: torch.dtype | None = None,
        fold: bool = True,
        track: bool = False,
    ) -> None:
        super().__init__(network.requires_grad_(False), mean, std, dtype)
        self._first: str | None = None
        self._tape: Tape | None = None
        self.remade: MaskArena | None = None
        """The arena of effective weights that are made before each use; None where all are kept."""
        self.relu_bits = True
        """Whether ReLUs keep bits where there is no tape. Layers whose weights are learned keep their inputs, which are
        outputs of ReLUs: bits would come on top."""
        self.tape_reason: str | None = "none was made"
        """Why the network runs under autograd; None where a tape takes its place."""
        self.eval()
        with torch.no_grad(), self._precision(example):
            seen = self.normalise(example).clone()
            before = seen.clone()
            with Readers() as readers:
                logits = _logits(readers.watch(self.network, seen))
        self.overwrites = has_data() and not torch.equal(seen, before)
        self.unused = [name for name in masked if not readers.reads(self.network.get_submodule(name).weight)]
        if not track:
            _keep_running_statistics(self.network)
        if not fold:
            return
        unfolded = shared_copy(self.network)
        _fold_batch_norms(self.network, readers, masked)
        if not self._agrees(logits, example):
            self.network = unfolded
            return
        self._first = _first_convolution(self.network, readers)
        trigger = 0.5 - example[:1]
        with torch.no_grad():
            perturbed = self(example + trigger)
        if not self._agrees(perturbed, example, trigger):
            self._first = None

    @torch.no_grad()
    def _agrees(self, expected: Tensor, images: Tensor, trigger: Tensor | None = None) -> bool:
        if not has_data():
            return True  # nothing can be compared
        difference = (self(images, trigger) - expected).abs().max()
        coarsest = images.dtype if self.dtype is None else self.dtype
        return bool(difference <= torch.finfo(coarsest).eps ** 0.5 * expected.abs().max().clamp_min(1))

    def make_tape(
        self, example: Tensor, changing: Collection[Parameter] = (), gate: str = "auto", recompute: bool = False
    ) -> None:
        """Run the network by a :class:`Tape` from now on, whenever it is in its present modes and has no hooks.

        Not done where ``tape_reason`` says why, such as when the logits of ``example`` come out otherwise. Gradients of
        parameters are then added to their ``.grad``, whatever a backward was asked for.

        changing: parameters that change from call to call, also while they require no gradient
        gate, recompute: as for :class:`Tape`
        """
        self._tape = None
        with torch.no_grad():
            images = self.normalise(example)
        found = Tape.of(self.network, images, self.dtype, gate, changing, recompute)
        if isinstance(found, str):
            self.tape_reason = found
            return
        if self.remade is not None:
            found.remade = self.remade
            self.remade.lay_out(found.uses())
        if not has_data():
            self._tape, self.tape_reason = found, None
            return
        expected = self._probe(self.plain, example)
        self._tape = found
        # what tracing can't see shows in one of the two; where a ReLU's input is 0 but for rounding, gradients part
        coarsest = example.dtype if self.dtype is None else self.dtype
        tolerances = torch.finfo(coarsest).eps ** 0.5, 0.5
        pairs = zip(self._probe(self, example), expected, tolerances, strict=True)
        agrees = all(bool((value - other).norm() <= most * other.norm()) for value, other, most in pairs)
        self.tape_reason = None if agrees else "its logits or their gradient come out otherwise"
        self._tape = found if agrees else None

    def hand_over_gradients(self, to: Callable[[Parameter, Tensor], None]) -> None:
        """Give the tape's gradients of parameters to a function, each when it is complete."""
        self._tape.on_gradient = to

    @contextmanager
    def handing_over(self, to: Callable[[Parameter, Tensor], None]) -> Iterator[None]:
        """Within, :meth:`hand_over_gradients`, where there is a tape that fits; otherwise they are added as ever."""
        tape = self._tape if self._tape is not None and self._tape.fits() else None
        if tape is not None:
            tape.on_gradient = to
        try:
            yield
        finally:
            if tape is not None:
                tape.on_gradient = None

    def _check_nobody_waits(self) -> None:
        """Raise where gradients of parameters would go elsewhere than to who they are handed over to."""
        waits = self._tape is not None and self._tape.on_gradient is not None and torch.is_grad_enabled()
        if waits and any(parameter.requires_grad for parameter in self.network.parameters()):
            raise RuntimeError("step_in_backward=True: a layer now has a hook or another mode than when the run began")

    def _probe(self, model: Callable[[Tensor], Tensor], example: Tensor) -> tuple[Tensor, Tensor]:
        """The logits of images and a gradient of theirs; the same random numbers are drawn each time."""
        learned = [parameter for parameter in self.network.parameters() if parameter.requires_grad]
        images = example.clone().requires_grad_()
        try:
            for parameter in learned:
                parameter.requires_grad_(False)
            with untouched(self.network, example.device), torch.enable_grad():
                logits = model(images)
                weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype, device=logits.device)
                total = (logits * weights.view_as(logits)).sum() + 0 * images.sum()
                return logits.detach(), torch.autograd.grad(total, images)[0]
        finally:
            for parameter in learned:
                parameter.requires_grad_()

    def __getstate__(self) -> dict[str, Any]:
        """What copies have: the tape knows the layers of this one alone, and weights that are remade are there."""
        state = {**super().__getstate__(), "_tape": None, "remade": None, "tape_reason": "this is a copy"}
        if self.remade is not None:
            with self.remade.whole():
                state["_modules"] = {**self._modules, "network": shared_copy(self.network)}
        return state

    def state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        with nullcontext() if self.remade is None else self.remade.whole():
            return super().state_dict(*arguments, **options)

    def forward(self, images: Tensor, trigger: Tensor | None = None) -> Tensor:
        """Logits of ``images + trigger``; a trigger has shape (1, C, H, W) and may require gradients."""
        if self._tape is None or not self._tape.fits():
            self._check_nobody_waits()
            with lean_autograd(self.relu_bits):
                return self.plain(images, trigger)
        shared = None
        if trigger is not None:
            images = images + trigger.detach()
            shared = trigger if self.std is None else trigger / self.std
        return self._tape(images if self.mean is None else (images - self.mean) / self.std, shared)

    def plain(self, images: Tensor, trigger: Tensor | None = None) -> Tensor:
        """The logits by the network's own forward, without the tape."""
        with self._precision(images), self._weights():
            return self._network_logits(images, trigger).to(images.dtype)

    def _weights(self) -> AbstractContextManager[object]:
        return nullcontext() if self.remade is None else AtHand(self.remade)

    def _network_logits(self, images: Tensor, trigger: Tensor | None) -> Tensor:
        if trigger is None:
            return _logits(self.network(self.normalise(images)))
        if self._first is None:
            return _logits(self.network(self.normalise(images + trigger)))
        trigger = trigger if self.std is None else trigger / self.std

        def add_trigger(convolution: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
            return _AddToAll.apply(output, convolution._conv_forward(trigger, convolution.weight, None))

        with self.network.get_submodule(self._first).register_forward_hook(add_trigger):
            return _logits(self.network(self.normalise(images)))


class _AddToAll(torch.autograd.Function):
    """``outputs + one``, for outputs (B, C, *) and one (1, C, *).

    The gradient of one is the sum over the batch, taken in the order of memory: on the CPU many times as fast as the
    sum that autograd would take over a channels_last tensor.
    """

    @staticmethod
    def forward(ctx, outputs, one):
        return outputs + one

    @staticmethod
    def backward(ctx, grad):
        return grad, grad.movedim(1, -1).sum(0, keepdim=True).movedim(-1, 1)


def _logits(output: Any) -> Tensor:
    """The logits of a model that returns a tensor, or an object that holds them, as transformers' models do."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        found = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(output).__name__
        raise TypeError(f"the model must return logits (images, classes), or an object with .logits; got {found}")
    return logits


def _fold_batch_norms(network: nn.Module, readers: Readers, masked: Collection[str]) -> None:
    """Fold each batch norm that alone reads a layer's output into that layer's weight and bias."""
    kept = {network.get_submodule(name) for name in masked}
    makers = {id(readers.sole_output(module)): module for module in readers.outputs if type(module) not in BATCH_NORMS}
    for norm in [module for module in readers.outputs if type(module) in BATCH_NORMS and module not in kept]:
        image = readers.sole_input(norm)
        layer = None if image is None else makers.get(id(image))
        if layer is None or norm.running_mean is None or (type(layer) is nn.Linear and image.dim() != 2):
            continue
        if any(readers.reads(parameter) != 1 for parameter in layer.parameters()):
            continue
        scale = torch.rsqrt(norm.running_var.double() + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        bias = -norm.running_mean if layer.bias is None else layer.bias - norm.running_mean
        bias = bias * scale if norm.bias is None else bias * scale + norm.bias
        dtype = layer.weight.dtype
        factor = scale.view(-1, *(1 for _ in layer.weight.shape[1:]))
        layer.weight = Parameter((layer.weight * factor).to(dtype), requires_grad=False)
        layer.bias = Parameter(bias.to(dtype), requires_grad=False)
        _replace(network, norm, nn.Identity().eval())


def _keep_running_statistics(network: nn.Module) -> None:
    """Batch norms use their batch's statistics in train mode and, as before, their running ones in eval mode."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.track_running_stats = False
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 0.0


def _first_convolution(network: nn.Module, readers: Readers) -> str | None:
    """The name of the convolution that alone reads the images, if there is one."""
    for name, module in network.named_modules():
        if type(module) in CONVOLUTIONS and readers.sole_input(module) is readers.images:
            return name
    return None


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
