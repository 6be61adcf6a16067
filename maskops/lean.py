"""A mode in which frozen ops save only what their backward needs, and a counter of what is saved."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ContextDecorator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

from maskops import _ops as _ops
from maskops.backends import reference
from maskops.functional._autograd import ReLUBackward, may_overwrite

aten = torch.ops.aten


class lean_autograd(ContextDecorator, TorchFunctionMode):  # noqa: N801
    """A context, or a decorator, in which any model's frozen ops save only what the gradient of their input needs.

    ================================  =================================  ==========================================
    op                                plain torch saves                  in this mode
    ================================  =================================  ==========================================
    relu, relu6, hardtanh(0, upper)   the output or the input            1 bit per element
    elu with alpha >= 0               the input                          the output, which a next layer may save too
    max_pool2d                        the input, 8 bytes per window      1 byte per window
    avg_pool2d, adaptive_avg_pool2d   the input                          nothing
    batch_norm in eval mode           the input                          nothing
    conv1d-3d, conv_transpose1d-3d    the input                          nothing
    ================================  =================================  ==========================================

    "Nothing" is beside the model's own weights and statistics. The model is not changed; its outputs are plain torch's,
    bit for bit, and so are the gradients: where plain torch reads no more than the shape of what it saved, the same
    backward runs on uninitialised memory of that shape. Two exceptions: elu's gradient is rounded otherwise, to within
    ``alpha * eps``, and an output of elu that is modified in place before the backward raises autograd's error, as in
    plain torch after an in-place elu; relu6's and hardtanh's gradient passes at NaN, where plain torch's CPU kernel
    stops it in whole vectors only.

    relu_bits: False keeps the outputs of relu, relu6 and hardtanh instead of bits. That is faster, and costs nothing
    where the next layer saves its input, this very output, anyway: where its weight is learned.

    Plain torch serves everything else: other ops (a linear layer with a frozen weight saves nothing anyway; gelu and
    layer_norm need the input that they save), a layer whose weight or bias requires grad, training mode, an input that
    doesn't require grad, ``no_grad``, pooling windows of more than 256 places, ``return_indices``, an ``upper`` that is
    not a whole number up to 256, asymmetric ``"same"`` padding, convolution without a batch dimension, tensor
    subclasses, forward-mode differentiation, ``torch.jit.trace``.

    Under autocast layers compute in the dtype that they do without the mode, and keep no copy of a weight in that
    dtype. ``create_graph=True`` and ``torch.func`` work. ``torch.compile`` traces through the mode, without graph
    breaks, if the compiled model is called inside it. A function that is checkpointed (``torch.utils.checkpoint``)
    runs again during the backward, outside the mode: let it enter the mode itself.

    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.MaxPool2d(2))
    >>> model = model.requires_grad_(False)
    >>> x = torch.randn(1, 3, 18, 18, requires_grad=True)
    >>> saved_bytes(lambda: model(x), exclude=model.parameters())
    16176
    >>> with lean_autograd():
    ...     saved_bytes(lambda: model(x), exclude=model.parameters())
    768
    """

    def __init__(self, relu_bits: bool = True) -> None:
        super().__init__()
        self._lean = _LEAN if relu_bits else _LEAN_WITHOUT_BITS

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        lean = self._lean.get(func)
        if lean is not None and _worthwhile(args[0] if args else kwargs.get("input")):
            output = lean(func, *args, **kwargs)
            if output is not None:
                return output
        return func(*args, **kwargs)


def saved_bytes(function: Callable[[], Any], exclude: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward while ``function`` runs, each storage counted once.

    exclude: tensors whose storages don't count, such as a model's parameters and buffers

    >>> x = torch.randn(10, requires_grad=True)
    >>> saved_bytes(lambda: x.exp().exp())
    80
    """
    saved: dict[int, torch.UntypedStorage] = {}  # holding the storages keeps their addresses from being used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    for tensor in exclude:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


class _ShapeOnly(torch.autograd.Function):
    """``forward(input, bias, *state)``, whose ``backward(grad, input, *state)`` reads only the shape of input."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input, bias, forward, backward, *state):
        return forward(input, bias, *state)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, _, _, ctx.of_plain_torch, *state = inputs
        ctx.layout = input.shape, input.stride()
        ctx.save_for_backward(*state)

    @staticmethod
    def backward(ctx, grad):
        stand_in = grad.new_empty_strided(*ctx.layout)
        state = ctx.saved_tensors
        return ctx.of_plain_torch(grad, stand_in, *state), None, None, None, *[None] * len(state)


class _ReLU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, upper, inplace):
        if inplace:
            return input, torch.ops.maskops.relu_bits_(input, upper)
        return torch.ops.maskops.relu_bits(input, upper)

    @staticmethod
    def setup_context(ctx, inputs, output):
        result, bits = output
        if inputs[2]:
            ctx.mark_dirty(inputs[0])
        ctx.mark_non_differentiable(bits)
        ctx.save_for_backward(bits)
        ctx.strides = result.stride()

    @staticmethod
    def backward(ctx, grad, _):
        return ReLUBackward.apply(grad, *ctx.saved_tensors, ctx.strides, None), None, None


class _ELU(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, alpha):
        return F.elu(input, alpha)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, ctx.alpha = inputs
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx, grad):
        (output,) = ctx.saved_tensors
        return aten.elu_backward(grad, ctx.alpha, 1, 1, True, output), None


class _MaxPool2d(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input, kernel_size, stride, padding, dilation, ceil_mode):
        return torch.ops.maskops.max_pool_winners(input, kernel_size, stride, padding, dilation, ceil_mode)

    @staticmethod
    def setup_context(ctx, inputs, output):
        input, *window, _ = inputs
        ctx.geometry = [list(input.shape), *window]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        ops = reference if torch.is_grad_enabled() else torch.ops.maskops  # the reference can be differentiated
        return ops.max_pool_winners_backward(grad, *ctx.saved_tensors, *ctx.geometry), *[None] * 5


def _worthwhile(input: Any) -> bool:
    return (
        _is_plain(input)
        and input.requires_grad
        and torch.is_grad_enabled()
        and input.is_floating_point()
        and input.layout == torch.strided
        and not input.is_meta
        and not torch.jit.is_tracing()
        and forward_ad._current_level < 0
    )


def _is_plain(tensor: Any) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _frozen(*tensors: Tensor | None) -> bool:
    return all(tensor is None or (_is_plain(tensor) and not tensor.requires_grad) for tensor in tensors)


def _list(value: int | Sequence[int], length: int) -> list[int]:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    return values * length if len(values) == 1 else values


# A lean op takes the plain op, and the arguments as the plain op does. It returns None where plain torch must serve.


def _relu(plain, input, inplace=False, upper=math.inf):
    if inplace and not may_overwrite(input):
        return input.copy_(_ReLU.apply(input, upper, False)[0])
    return _ReLU.apply(input, upper, inplace)[0]


def _hardtanh(plain, input, min_val=-1.0, max_val=1.0, inplace=False):
    if min_val != 0 or not 1 <= max_val <= 256 or max_val != int(max_val):  # whole numbers are exact in every dtype
        return None
    return _relu(plain, input, inplace, upper=float(max_val))


def _elu(plain, input, alpha=1.0, inplace=False):
    return None if inplace or alpha < 0 else _ELU.apply(input, alpha)


def _max_pool2d(plain, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    kernel_size = _list(kernel_size, 2)
    if return_indices or math.prod(kernel_size) > 256:
        return None
    stride = kernel_size if stride is None or stride in ([], ()) else _list(stride, 2)
    return _MaxPool2d.apply(input, kernel_size, stride, _list(padding, 2), _list(dilation, 2), ceil_mode)[0]


def _avg_pool2d(
    plain, input, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True, divisor_override=None
):
    stride = [] if stride is None else _list(stride, 2)
    arguments = _list(kernel_size, 2), stride, _list(padding, 2), ceil_mode, count_include_pad, divisor_override

    def backward(grad, input):
        return aten.avg_pool2d_backward(grad, input, *arguments)

    return _ShapeOnly.apply(input, None, lambda input, bias: plain(input, *arguments), backward)


def _adaptive_avg_pool2d(plain, input, output_size):
    if output_size in (1, (1, 1), [1, 1]):
        return None  # a mean: plain torch saves nothing
    backward = aten._adaptive_avg_pool2d_backward
    return _ShapeOnly.apply(input, None, lambda input, bias: plain(input, output_size), backward)


def _batch_norm(
    plain, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
):
    if training or running_mean is None or running_var is None or not _frozen(running_mean, running_var, weight, bias):
        return None

    def forward(input, bias, weight, running_mean, running_var):
        return plain(input, running_mean, running_var, weight, bias, False, momentum, eps)

    def backward(grad, input, weight, running_mean, running_var):
        unused = running_var.new_empty(0)
        return aten.native_batch_norm_backward(
            grad, input, weight, running_mean, running_var, unused, unused, False, eps, [True, False, False]
        )[0]

    return _ShapeOnly.apply(input, bias, forward, backward, weight, running_mean, running_var)


def _conv(plain, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    amount = 0 if padding == "valid" else padding
    if padding == "same":
        both_sides = [gap * (size - 1) for gap, size in zip(_list(dilation, 3), weight.shape[2:], strict=False)]
        if any(both % 2 for both in both_sides):
            return None
        amount = [both // 2 for both in both_sides]
    geometry = stride, amount, dilation, False, 0, groups
    return _any_conv(plain, input, weight, bias, (stride, padding, dilation, groups), geometry)


def _conv_transpose(plain, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    geometry = stride, padding, dilation, True, output_padding, groups
    return _any_conv(plain, input, weight, bias, (stride, padding, output_padding, groups, dilation), geometry)


def _any_conv(plain, input, weight, bias, arguments, geometry):
    if not _frozen(weight, bias) or input.dim() != weight.dim():
        return None
    stride, padding, dilation, transposed, output_padding, groups = geometry
    sizes = [_list(value, weight.dim() - 2) for value in (stride, padding, dilation)]
    geometry = *sizes, transposed, _list(output_padding, weight.dim() - 2), groups

    def forward(input, bias, weight):
        return plain(input, weight, bias, *arguments)

    def backward(grad, input, weight):
        weight = weight.to(grad.dtype)  # under autocast
        return aten.convolution_backward(grad, input, weight, None, *geometry, [True, False, False])[0]

    return _ShapeOnly.apply(input, bias, forward, backward, weight)


_BITS: dict[Any, Callable[..., Tensor | None]] = {
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(_relu, inplace=True)),
    F.relu6: partial(_relu, upper=6.0),
    F.hardtanh: _hardtanh,
    F.hardtanh_: partial(_hardtanh, inplace=True),
}
_LEAN_WITHOUT_BITS: dict[Any, Callable[..., Tensor | None]] = {
    F.elu: _elu,
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool2d),
    F.avg_pool2d: _avg_pool2d,
    F.adaptive_avg_pool2d: _adaptive_avg_pool2d,
    F.batch_norm: _batch_norm,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _conv),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _conv_transpose),
}
_LEAN = {**_BITS, **_LEAN_WITHOUT_BITS}
