"""The flat buffers of one run: θ, m, δ, effective weights and gradients, of which the layers' tensors are views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.parameter import Parameter

from maskops._flat import collapse, pack, pack_parts, padded_length, place_of, shaped, side_by_side, views_of
from maskops._memory import OnDevice

_ops = torch.ops.maskops


class MaskArena:
    """Weights, masks, effective weights and gradients of many layers in one buffer each.

    A layer that computes with ``effective_weights[name]``, a leaf of the graph, needs nothing of masks: its gradient
    accumulates in the arena, and the mask step of :class:`maskops.optim.MaskAdam` or :class:`maskops.optim.MaskSGD`,
    one launch over the buffers, turns it into new masks and new effective weights.

    Noise δ on the masks is the adversary's: it is there from the first :meth:`draw_noise` on, and the effective weights
    have it in them between :meth:`perturb` and the next :meth:`refresh`. Both branches of a loss thus use one buffer,
    one after the other, and their gradients add up in it.

    An arena that keeps no effective weights has room for those alone that are needed at one time, and whoever needs
    some has them made (:meth:`make`) just before, for the backward too. That they changed between the two is found as
    ever: their versions are those that they would have if all were kept.

    weights: name -> θ of any shape, all of one dtype and device; 4-D and 5-D weights are kept in channels_last order
    masks:   name -> m, broadcastable to its weight; their values are copied, their dtypes promoted to one
    dtype:   dtype of the effective weights; the weights' by default
    weight_dtype: the one that θ is kept in; the weights' by default
    keep:    whether all effective weights are kept, or each is made when it is needed
    learn:   whether gradients are kept; not for who steps the masks layer by layer
    memory:  where θ and m lie; by default on the weights' device. If each process has its part of them, ``weights`` and
             ``masks`` are flat parts
    errors:  ValueError when the names differ, when there are none, and for weights of several dtypes or devices

    >>> arena = MaskArena({"conv": torch.full((2, 3), 2.0)}, {"conv": torch.full((2, 1), 0.5)})
    >>> arena.effective_weights["conv"]
    Parameter containing:
    tensor([[1., 1., 1.],
            [1., 1., 1.]], requires_grad=True)
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
        *,
        weight_dtype: torch.dtype | None = None,
        keep: bool = True,
        learn: bool = True,
        memory: OnDevice | None = None,
    ) -> None:
        if not weights or weights.keys() != masks.keys():
            raise ValueError(
                f"MaskArena: expected one mask per weight; got weights {list(weights)} and masks {list(masks)}"
            )
        kinds = {(weight.dtype, weight.device) for weight in weights.values()}
        if len(kinds) > 1:
            found = ", ".join(sorted({f"{weight_dtype} on {device}" for weight_dtype, device in kinds}))
            raise ValueError(f"MaskArena: the weights must have one dtype and device; got {found}")
        dtype = next(iter(weights.values())).dtype if dtype is None else dtype
        self._elementwise = all(masks[name].shape == weights[name].shape for name in weights)
        self.memory = OnDevice(next(iter(weights.values())).device) if memory is None else memory
        self._lengths = {name: self.memory.length(weight.numel()) for name, weight in weights.items()}
        self.weight, self.weights = pack(weights, self.memory, weight_dtype)
        spread = self.memory.parts > 1
        self._like = {name: weight.to("meta") for name, weight in weights.items()} if spread else self.weights
        mask, self.masks = pack(masks, self.memory)
        self.mask = Parameter(mask)
        self._layers, self._table = self._described(self.weights)
        # what isn't kept begins side by side with nothing
        self._starts = None if keep else dict.fromkeys(weights, 0)
        self._tables = {} if keep else {name: self._described([name]) for name in weights}
        self.effective = self._room(dtype)
        self._all = self.effective if keep else None
        self.effective_weights = {name: Parameter(view) for name, view in self._effective_views().items()}
        self.grad = self.memory.zeros(len(self.weight), dtype) if learn else None
        if learn:
            for name, grad in views_of(self.grad, weights).items():
                self.effective_weights[name].grad = grad
        self._names = {id(weight): name for name, weight in self.effective_weights.items()}
        self.noise: Tensor | None = None
        self._perturbed = False
        self.refresh()

    def _described(self, names: Collection[str]) -> tuple[list[int], Tensor]:
        """These layers as ``arena_effective_weight_`` and ``arena_mask_grad`` take them: as numbers, and as a table.

        One alone is as it lies in the buffers from where it begins; all are as they lie in the whole of them.
        """
        layers, width = self._describe_layers(names)
        return layers, torch.tensor(layers, dtype=torch.int64, device=self.memory.device).view(-1, width)

    def _describe_layers(self, names: Collection[str]) -> tuple[list[int], int]:
        alone = len(names) == 1
        if self._elementwise:  # one layer, so that a kernel need not look for it
            length = sum(padded_length(self.weights[name]) for name in names)
            return [0, length, 0, length, length, 1], 6
        rows = []
        for name in names:
            weight, mask = self.weights[name], self.masks[name]
            starts = (0, 0) if alone else (weight.storage_offset(), mask.storage_offset())
            where = starts[0], weight.numel(), starts[1], mask.numel()
            if weight.numel():
                rows.append((where, collapse(weight, mask.expand(weight.shape))))
        dims = max((len(space) for _, space in rows), default=1)
        padded = ([*where, *itertools.chain(*space), *(1, 0) * (dims - len(space))] for where, space in rows)
        return list(itertools.chain(*padded)), 4 + 2 * dims

    def share_weight(self, other: MaskArena) -> None:
        """Use another arena's θ in place of one's own, which is then freed; only if they are equal."""
        if torch.equal(self.weight, other.weight):
            self.weight, self.weights = other.weight, other.weights

    @torch.no_grad()
    def refresh(self) -> None:
        """Effective weights ``weight * mask``; the mask step does this by itself."""
        self._write_effective(None)
        self._perturbed = False

    def refresh_if_perturbed(self) -> None:
        """Effective weights without noise, written only if they have it."""
        if self._perturbed:
            self.refresh()

    @torch.no_grad()
    def perturb(self) -> None:
        """Effective weights ``weight * (mask + noise)``."""
        self._write_effective(self.noise)
        self._perturbed = True

    def _write_effective(self, noise: Tensor | None) -> None:
        if self._all is None:
            self._changed()
        else:
            _ops.arena_effective_weight_(self._all, self.weight, self.mask, noise, self._table, self._layers)

    def _changed(self) -> None:
        torch.autograd.graph.increment_version(list(self.effective_weights.values()))

    def lay_out(self, together: Iterable[Iterable[Tensor]]) -> None:
        """Have room for those effective weights alone that are needed at one time, in an arena that keeps none.

        together: for each time tensors, of which those that are effective weights are needed
        """
        groups = [{name for tensor in tensors if (name := self._names.get(id(tensor)))} for tensors in together]
        self._starts = side_by_side(self._lengths, groups)
        self.effective = self._room(self.effective.dtype)
        self._point_to(self._effective_views())

    def _room(self, dtype: torch.dtype) -> Tensor:
        if self._starts is None:
            length = sum(self._lengths.values())
        else:
            length = max(self._starts[name] + length for name, length in self._lengths.items())
        return torch.zeros(length, dtype=dtype, device=self.memory.device)

    def _effective_views(self) -> dict[str, Tensor]:
        return views_of(self.effective, self._like, self._starts)

    def _point_to(self, views: Mapping[str, Tensor]) -> None:
        for name, view in views.items():
            self.effective_weights[name].data = view

    @torch.no_grad()
    def make(self, tensors: Iterable[Tensor]) -> None:
        """Write those effective weights that are among these tensors, unless all are kept."""
        if self._all is not None:
            return
        for tensor in tensors:
            name = self._names.get(id(tensor))
            if name is not None:
                # the buffer's version is none of its parameters'
                self._make(name, self.effective, self._starts[name])

    def _make(self, name: str, into: Tensor, start: int) -> None:
        weight, mask, (layers, table) = self.weights[name], self.masks[name], self._tables[name]
        if not weight.numel():
            return
        at, of_mask = place_of(weight), place_of(mask)
        noises = [self.noise[of_mask]] if self._perturbed else []
        of_weight, factor, *noise = self.memory.fetch([self.weight[at], self.mask[of_mask], *noises])
        effective = into[start : start + self._lengths[name]]
        own = self.memory.part(effective)
        _ops.arena_effective_weight_(own, of_weight, factor, noise[0] if noise else None, table, layers)
        self.memory.assemble(effective)

    def is_effective(self, tensor: Tensor) -> bool:
        """Whether a tensor is one of the effective weights."""
        return id(tensor) in self._names

    def lends(self, tensor: Tensor) -> bool:
        """Whether a tensor lies in the memory that effective weights share."""
        return self._all is None and tensor.untyped_storage()._cdata == self.effective.untyped_storage()._cdata

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Within, all effective weights are there, whether they are kept or not."""
        if self._all is not None:
            yield
            return
        ends = itertools.accumulate(self._lengths.values(), initial=0)
        starts = dict(zip(self._lengths, ends, strict=False))
        length = sum(self._lengths.values())
        self._all = torch.zeros(length, dtype=self.effective.dtype, device=self.memory.device)
        with torch.no_grad():
            for name, start in starts.items():
                self._make(name, self._all, start)
        self._point_to(views_of(self._all, self._like, starts))
        try:
            yield
        finally:
            self._all = None
            self._point_to(self._effective_views())

    @torch.no_grad()
    def draw_noise(self, bound: float, generator: torch.Generator) -> None:
        """Noise, uniform in [-bound, bound], from a generator on the masks' device."""
        if self.noise is None:
            self.noise = torch.empty_like(self.mask, requires_grad=False)
        self.noise.uniform_(-bound, bound, generator=generator)

    @torch.no_grad()
    def ascend_noise(self, step_size: float, bound: float | None) -> None:
        """``noise + step_size * sign(gradient)``, into [-bound, bound] unless that is None; gradients are then zero."""
        bound = math.inf if bound is None else bound
        if self._elementwise:
            _ops.noise_step_(self.noise, self.grad, self.weight, step_size, bound)
        else:
            _ops.noise_step_(self.noise, self.mask_grad(), None, step_size, bound)
        self.grad.zero_()

    @property
    def elementwise(self) -> bool:
        """Whether each mask has its weight's shape."""
        return self._elementwise

    def layer(self, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """Masks, weights and, where they are kept, effective weights of a layer, flat; its masks have its shape."""
        place = self.place(name)
        # in the midst of a backward: autograd is told of the change when all of them are stepped
        return self.mask[place], self.weight[place], None if self._all is None else self._all.data[place]

    def place(self, name: str) -> slice:
        """Where a layer lies in the flat buffers, if the masks have the shapes of their weights."""
        start = self.masks[name].storage_offset()
        return slice(start, start + self.masks[name].numel())

    @torch.no_grad()
    def whole_masks(self) -> dict[str, Tensor]:
        """The masks in the shapes that they were given in, also if each process has its part of them."""
        if self.memory.parts == 1:
            return self.masks
        found = {}
        for name, like in self._like.items():
            whole = torch.zeros(self._lengths[name], dtype=self.mask.dtype, device=self.memory.device)
            self.memory.part(whole).copy_(self.masks[name])
            self.memory.assemble(whole)
            found[name] = shaped(whole[: like.numel()], like.shape)
        return found

    @torch.no_grad()
    def mask_in_one(self) -> Tensor:
        """The flat masks as they lie where no other process has parts of them."""
        return self.mask if self.memory.parts == 1 else pack(self.whole_masks(), OnDevice(self.memory.device))[0]

    @torch.no_grad()
    def take_masks(self, flat: Tensor) -> None:
        """Go on with these masks, as :meth:`mask_in_one` gives them."""
        if self.memory.parts == 1:
            self.mask.copy_(flat)
        else:
            pack_parts(self.mask, views_of(flat, self._like), self.memory)

    def entries(self, name: str) -> int:
        """How many entries a layer's weight has."""
        return self._like[name].numel()

    def per_mask(self, values: Mapping[str, float]) -> Tensor:
        """One number per layer as a tensor that broadcasts to the flat masks, such as NFT's lower bounds μ(l)."""
        flat = torch.zeros_like(self.mask, requires_grad=False)
        for name, view in views_of(flat, self.masks).items():
            view.fill_(values[name])
        return flat

    def step_arguments(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What a mask step works on: masks and gradient; θ and effective weight too where the masks have its shape."""
        if self._elementwise:
            return self.mask, self.grad, self.weight, self._all
        return self.mask, self.mask_grad(), None, None

    def mask_grad(self) -> Tensor:
        """The gradient of the flat masks, and of the noise: ``grad * weight``, reduced to the masks' shapes."""
        return _ops.arena_mask_grad(self.grad, self.weight, self.mask, self._table, self._layers)

    def finish_step(self) -> None:
        """After a mask step: effective weights that the step didn't write, and gradients of zero."""
        if not self._elementwise:
            self.refresh()
        elif self._all is None or self.grad is None:
            self._changed()
        self._perturbed = False
        self.zero_grad()

    def zero_grad(self) -> None:
        if self.grad is not None:
            self.grad.zero_()
