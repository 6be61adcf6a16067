"""Masked layers: the torch layers with the same constructors and state_dict keys, plus a mask, and noise where used.

A plain checkpoint loads into a masked layer and sets its mask to ones; a checkpoint with noise brings the noise along.
Masks of bytes count in steps of 1/255 and are buffers; floating masks that are loaded into them are rounded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parameter import Parameter

from maskops import functional

GRANULARITIES = ("weight", "kernel", "neuron")


class MaskedLayer:
    """What the masked layers share. The mask, a parameter or bytes, begins as ones; the noise as None."""

    plain: type[nn.Module]
    """The torch class that the layer is a masked version of."""
    mask_name = "mask"
    noise_names: tuple[str, ...] = ("noise",)
    out_dim = 0

    def __init__(self, *args: Any, granularity: str = "weight", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._check(self, granularity)
        self._add_mask(granularity)

    @classmethod
    def from_module(cls, module: nn.Module, granularity: str = "weight", dtype: torch.dtype | None = None) -> nn.Module:
        """A masked layer over the parameters and buffers of ``module`` themselves; the module stays as it is.

        granularity: ``"weight"`` (the weight's shape), ``"kernel"`` (out, in, 1, …) or ``"neuron"`` (out, 1, …)
        dtype:       None for a mask that is a parameter, torch.uint8 for a buffer of bytes, which isn't learned
        errors:      TypeError when module isn't exactly the torch layer and for other dtypes, ValueError for an unknown
                     granularity

        >>> conv = nn.Conv2d(1, 2, 3)
        >>> masked = MaskedConv2d.from_module(conv, "neuron")
        >>> masked.weight is conv.weight, tuple(masked.mask.shape)
        (True, (2, 1, 1, 1))
        """
        if type(module) is not cls.plain:
            raise TypeError(f"{cls.__name__}.from_module: expected {cls.plain.__name__}; got {type(module).__name__}")
        layer = copy.copy(module)
        # a shallow copy shares the containers: neither the mask nor a later hook must appear in the module
        for name, value in vars(module).items():
            if isinstance(value, (dict, set)):
                layer.__dict__[name] = copy.copy(value)
        return cls._become_masked(layer, granularity, dtype)

    @classmethod
    def _become_masked(cls, module: nn.Module, granularity: str, dtype: torch.dtype | None) -> nn.Module:
        cls._check(module, granularity, dtype)
        module.__class__ = cls
        module._add_mask(granularity, dtype)
        return module

    def _become_plain(self) -> nn.Module:
        for name in (self.mask_name, *self.noise_names):
            delattr(self, name)
        self.__class__ = self.plain
        return self

    @classmethod
    def _check(cls, module: nn.Module, granularity: str, dtype: torch.dtype | None = None) -> None:
        if dtype not in (None, torch.uint8):
            raise TypeError(f"{cls.__name__}: dtype must be None or torch.uint8; got {dtype}")
        if module.weight is None:
            raise ValueError(f"{cls.__name__}: the layer must have a weight to mask; got None")
        if granularity not in GRANULARITIES:
            raise ValueError(
                f"{cls.__name__}: granularity must be one of {', '.join(GRANULARITIES)}; got {granularity!r}"
            )

    def _mask_shape(self, granularity: str) -> tuple[int, ...]:
        shape = tuple(self.weight.shape)
        if granularity == "weight":
            return shape
        keep = (0, 1) if granularity == "kernel" else (self.out_dim,)
        return tuple(size if dim in keep else 1 for dim, size in enumerate(shape))

    def _add_mask(self, granularity: str, dtype: torch.dtype | None = None) -> None:
        shape, device = self._mask_shape(granularity), self.weight.device
        if dtype == torch.uint8:
            self.register_buffer(self.mask_name, torch.full(shape, 255, dtype=dtype, device=device))
        else:
            # a 16-bit mask couldn't hold the small steps that an optimiser takes
            dtype = torch.promote_types(self.weight.dtype, torch.float32)
            self.register_parameter(self.mask_name, Parameter(torch.ones(shape, dtype=dtype, device=device)))
        for name in self.noise_names:
            self.register_parameter(name, None)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        mask = self._buffers.get(self.mask_name)
        super()._apply(fn, recurse)
        if mask is not None:
            moved = self._buffers[self.mask_name]
            if torch._has_compatible_shallow_copy_type(mask, moved):  # as for parameters: what is shared stays shared
                mask.data = moved
                self._buffers[self.mask_name] = mask
        return self

    def effective_weight(self) -> Tensor:
        """``weight * mask``, or ``weight * (mask + noise)`` when the layer has noise."""
        mask, noise = getattr(self, self.mask_name), getattr(self, self.noise_names[0])
        return functional.effective_weight(self.weight, mask, noise)

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs) -> None:
        state_dict, name = dict(state_dict), prefix + self.mask_name
        mask, weight = getattr(self, self.mask_name), state_dict.get(prefix + "weight")
        of_bytes = mask.dtype == torch.uint8
        if weight is not None:
            state_dict.setdefault(name, torch.full_like(mask, 255 if of_bytes else 1, device=weight.device))
        found = state_dict.get(name)
        if found is not None and of_bytes != (found.dtype == torch.uint8):
            state_dict[name] = _rounded(name, found) if of_bytes else found.float() / 255
        for name in self.noise_names:
            found = state_dict.get(prefix + name)
            if found is not None and getattr(self, name) is None:
                dtype = found.dtype if of_bytes else mask.dtype
                self.register_parameter(name, Parameter(found.detach().to(mask.device, dtype, copy=True)))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mask={tuple(getattr(self, self.mask_name).shape)}"


def _rounded(name: str, mask: Tensor) -> Tensor:
    try:
        return functional.mask_to_bytes(mask)
    except (TypeError, ValueError) as error:
        raise type(error)(f"load_state_dict: {name}: {error}") from error


class _MaskedConv(MaskedLayer):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = 0
        return self._masked_conv(
            input, weight, self.mask, bias, self.stride, padding, self.dilation, self.groups, noise=self.noise
        )


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """:class:`torch.nn.Conv1d` with a masked weight: see :class:`MaskedConv2d`."""

    plain = nn.Conv1d
    _masked_conv = staticmethod(functional.masked_conv1d)


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """:class:`torch.nn.Conv2d` with a masked weight: ``conv2d(input, weight * mask, bias)``.

    Takes the arguments of ``nn.Conv2d`` and ``granularity`` (``"weight"``, ``"kernel"`` or ``"neuron"``). The
    state_dict has the keys of ``nn.Conv2d`` and ``mask``; with a parameter assigned to ``noise``, also ``noise``, and
    the layer then computes with ``weight * (mask + noise)``. See :func:`maskops.functional.masked_conv2d`.

    >>> layer = MaskedConv2d(3, 8, 3, padding=1)
    >>> plain = nn.Conv2d(3, 8, 3, padding=1)
    >>> _ = layer.load_state_dict(plain.state_dict())
    >>> x = torch.randn(1, 3, 4, 4)
    >>> torch.equal(layer(x), plain(x))
    True
    """

    plain = nn.Conv2d
    _masked_conv = staticmethod(functional.masked_conv2d)


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """:class:`torch.nn.Conv3d` with a masked weight: see :class:`MaskedConv2d`."""

    plain = nn.Conv3d
    _masked_conv = staticmethod(functional.masked_conv3d)


class MaskedConvTranspose2d(MaskedLayer, nn.ConvTranspose2d):
    """:class:`torch.nn.ConvTranspose2d` with a masked weight: see :class:`MaskedConv2d`.

    The weight is (in, out / groups, …), so a neuron's mask is (1, out, 1, 1), and needs ``groups=1``.
    """

    plain = nn.ConvTranspose2d
    out_dim = 1

    @classmethod
    def _check(cls, module: nn.Module, granularity: str, dtype: torch.dtype | None = None) -> None:
        super()._check(module, granularity, dtype)
        if granularity == "neuron" and module.groups > 1:
            raise ValueError(f"{cls.__name__}: granularity 'neuron' needs groups 1; got groups {module.groups}")

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        output_padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, 2, self.dilation
        )
        return functional.masked_conv_transpose2d(
            *(input, self.weight, self.mask, self.bias, self.stride, self.padding, output_padding, self.groups),
            self.dilation,
            noise=self.noise,
        )


class MaskedLinear(MaskedLayer, nn.Linear):
    """:class:`torch.nn.Linear` with a masked weight: ``linear(input, weight * mask, bias)``.

    See :class:`MaskedConv2d` and :func:`maskops.functional.masked_linear`.
    """

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        return functional.masked_linear(input, self.weight, self.mask, self.bias, noise=self.noise)


class _MaskedNorm(MaskedLayer):
    mask_name = "neuron_mask"
    noise_names = ("neuron_noise", "neuron_noise_bias")

    def _mask_shape(self, granularity: str) -> tuple[int, ...]:
        return tuple(self.weight.shape)


class _MaskedBatchNorm(_MaskedNorm):
    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        batch_statistics = self.training or self.running_mean is None
        tracked = not self.training or self.track_running_stats
        return functional.masked_batch_norm(
            input,
            self.running_mean if tracked else None,
            self.running_var if tracked else None,
            self.weight,
            self.neuron_mask,
            self.bias,
            batch_statistics,
            momentum,
            self.eps,
            noise=self.neuron_noise,
            noise_bias=self.neuron_noise_bias,
        )


class MaskedBatchNorm1d(_MaskedBatchNorm, nn.BatchNorm1d):
    """:class:`torch.nn.BatchNorm1d` with a masked scale: see :class:`MaskedBatchNorm2d`."""

    plain = nn.BatchNorm1d


class MaskedBatchNorm2d(_MaskedBatchNorm, nn.BatchNorm2d):
    """:class:`torch.nn.BatchNorm2d` with a masked scale: ``x̂ * weight * neuron_mask + bias``.

    With ``neuron_noise`` and ``neuron_noise_bias`` set: ``x̂ * weight * (neuron_mask + neuron_noise) + bias *
    (1 + neuron_noise_bias)``. The names are those of the published ANP and NFT checkpoints. One value per channel,
    whatever the granularity. See :func:`maskops.functional.masked_batch_norm`.
    """

    plain = nn.BatchNorm2d


class MaskedLayerNorm(_MaskedNorm, nn.LayerNorm):
    """:class:`torch.nn.LayerNorm` with a masked scale: see :class:`MaskedBatchNorm2d`."""

    plain = nn.LayerNorm

    def forward(self, input: Tensor) -> Tensor:
        return functional.masked_layer_norm(
            *(input, self.normalized_shape, self.weight, self.neuron_mask, self.bias, self.eps),
            noise=self.neuron_noise,
            noise_bias=self.neuron_noise_bias,
        )


CONVOLUTIONS = (MaskedConv1d, MaskedConv2d, MaskedConv3d, MaskedConvTranspose2d)
LINEAR = (MaskedLinear,)
NORMS = (MaskedBatchNorm1d, MaskedBatchNorm2d, MaskedLayerNorm)
MASKED: dict[type[nn.Module], type[MaskedLayer]] = {masked.plain: masked for masked in (*CONVOLUTIONS, *LINEAR, *NORMS)}
"""The masked class of each torch class."""
