"""The ops: their schemas, their shapes under fake tensors, and the choice of a backend inside each.

An op takes plain tensors and numbers, computes no gradient of its own and checks nothing: the public functions do. Its
result has the shape, dtype and strides of the reference's, whichever backend computes it, so that the reference run on
fake tensors describes every backend to torch.compile. No two results share memory, nor does one with an input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from maskops import _dispatch
from maskops.backends import reference

_LIBRARY = torch.library.Library("maskops", "DEF")

_GEOMETRY = (
    "SymInt[] stride, SymInt[] padding, SymInt[] dilation, bool transposed, SymInt[] output_padding, SymInt groups"
)
_GEOMETRY_2D = "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, SymInt groups"
_LAYER = "Tensor weight, Tensor mask, Tensor? noise"
_LAYERS = "Tensor[] weights, Tensor[] masks, Tensor[] noises, Tensor[] scales"
_MANY = "Tensor weight, Tensor masks, Tensor? noise"
_BRANCHES = "Tensor? grad, Tensor? perturbed_grad, Tensor? input, Tensor? perturbed_input, bool one_input"

_SCHEMAS = (
    f"effective_weight({_LAYER}, ScalarType dtype) -> Tensor",
    f"effective_weight_backward(Tensor grad, {_LAYER}, bool[3] needs) -> Tensor[]",
    f"effective_weights({_LAYERS}, ScalarType dtype) -> Tensor[]",
    f"effective_weights_backward(Tensor[] grads, {_LAYERS}) -> Tensor[]",
    f"masked_conv(Tensor input, {_LAYER}, Tensor? bias, {_GEOMETRY}) -> Tensor",
    f"masked_conv_backward(Tensor grad, Tensor? input, {_LAYER}, SymInt[] input_size, {_GEOMETRY}, bool[5] needs) "
    "-> Tensor[]",
    f"masked_conv_relu(Tensor input, {_LAYER}, Tensor? bias, Tensor? scale, Tensor? shift, Tensor? residual, "
    f"{_GEOMETRY_2D}) -> (Tensor, Tensor)",
    f"masked_linear(Tensor input, {_LAYER}, Tensor? bias) -> Tensor",
    f"masked_linear_backward(Tensor grad, Tensor? input, {_LAYER}, SymInt[] input_size, bool[5] needs) -> Tensor[]",
    f"dual_masked_conv(Tensor input, Tensor? perturbed_input, {_LAYER}, Tensor? bias, {_GEOMETRY}) -> (Tensor, Tensor)",
    f"dual_masked_conv_backward({_BRANCHES}, {_LAYER}, SymInt[] input_size, {_GEOMETRY}, bool[6] needs) -> Tensor[]",
    f"dual_masked_linear(Tensor input, Tensor? perturbed_input, {_LAYER}, Tensor? bias) -> (Tensor, Tensor)",
    f"dual_masked_linear_backward({_BRANCHES}, {_LAYER}, SymInt[] input_size, bool[6] needs) -> Tensor[]",
    f"many_masked_conv(Tensor input, {_MANY}, Tensor? bias, {_GEOMETRY_2D}) -> Tensor",
    f"many_masked_conv_backward(Tensor grad, Tensor? input, {_MANY}, SymInt[] input_size, {_GEOMETRY_2D}, "
    "bool[5] needs) -> Tensor[]",
    f"many_masked_linear(Tensor input, {_MANY}, Tensor? bias) -> Tensor",
    f"many_masked_linear_backward(Tensor grad, Tensor? input, {_MANY}, SymInt[] input_size, bool[5] needs) -> Tensor[]",
    "rescale_to_l1_ball(Tensor input, float radius) -> Tensor",
    "project_onto_l1_ball(Tensor input, float radius) -> Tensor",
    "mask_adam_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_sq, Tensor(e!) step, Tensor lr, float beta1, float beta2, float eps, float l1, float toward, "
    "Tensor lower, float upper, Tensor(f!)? totals=None, int? stochastic_from=None) -> ()",
    "mask_adam8bit_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!) exp_avg, "
    "Tensor(d!) exp_avg_scale, Tensor(e!) exp_avg_sq, Tensor(f!) exp_avg_sq_scale, Tensor(g!) step, Tensor lr, "
    "float beta1, float beta2, float eps, float l1, float toward, Tensor lower, float upper, "
    "Tensor(h!)? totals=None, int? stochastic_from=None) -> ()",
    "mask_sgd_step_(Tensor(a!) mask, Tensor grad, Tensor? weight, Tensor(b!)? effective, Tensor(c!)? momentum_buffer, "
    "Tensor lr, float momentum, float l1, float toward, Tensor lower, float upper, Tensor(d!)? totals=None) -> ()",
    f"arena_effective_weight_(Tensor(a!) effective, {_LAYER}, Tensor table, int[] layers) -> ()",
    "arena_mask_grad(Tensor grad, Tensor weight, Tensor mask, Tensor table, int[] layers) -> Tensor",
    "noise_step_(Tensor(a!) noise, Tensor grad, Tensor? weight, float step_size, float bound) -> ()",
    "relu_bits(Tensor input, float upper) -> (Tensor, Tensor)",
    "relu_bits_(Tensor(a!) input, float upper) -> Tensor",
    "affine_relu_bits_(Tensor(a!) input, Tensor? scale, Tensor? shift, Tensor? residual, float upper) -> Tensor",
    "relu_bits_backward(Tensor grad, Tensor bits) -> Tensor",
    f"conv_relu(Tensor input, Tensor weight, Tensor? bias, Tensor? residual, {_GEOMETRY_2D}, float upper) -> Tensor",
    "conv_input_grad(Tensor grad, Tensor weight, Tensor? gate, Tensor? addend, SymInt[] input_size, "
    f"{_GEOMETRY_2D}, float upper) -> Tensor",
    "relu_backward(Tensor grad, Tensor gate, Tensor? addend, float upper) -> Tensor",
    "max_pool_winners(Tensor input, SymInt[2] kernel_size, SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation, "
    "bool ceil_mode) -> (Tensor, Tensor)",
    "max_pool_winners_backward(Tensor grad, Tensor winners, SymInt[] input_size, SymInt[2] kernel_size, "
    "SymInt[2] stride, SymInt[2] padding, SymInt[2] dilation) -> Tensor",
    "prepare_images(Tensor images, Tensor? index, Tensor? trigger, float? low, float? high, Tensor? mean, Tensor? std, "
    "ScalarType dtype) -> Tensor",
    "prepare_images_backward(Tensor grad, Tensor? images, Tensor? index, Tensor trigger, float? low, float? high, "
    "Tensor? std) -> Tensor",
    "trigger_step_(Tensor(a!) trigger, Tensor grad, float step_size, float? radius, float? low, float? high) -> ()",
)


def _register(schema: str) -> None:
    name = schema[: schema.index("(")]
    arguments, result = schema.rsplit(") -> ", 1)
    _LIBRARY.define(f"{arguments}, *, str? backend=None) -> {result}")
    _LIBRARY.impl(name, _implementation(name), "CompositeExplicitAutograd")
    torch.library.register_fake(f"maskops::{name}", _fake(name), lib=_LIBRARY)
    _dispatch.OPS.append(name)


def _implementation(name: str) -> Callable[..., Any]:
    op = getattr(torch.ops.maskops, name).default
    written = [i for i, argument in enumerate(op._schema.arguments) if argument.alias_info is not None]

    def implementation(*arguments: Any, backend: str | None = None) -> Any:
        function = _dispatch.choose(name, arguments, backend)
        # the dtypes are the caller's: the functions have cast under autocast already
        with torch._C._DisableAutocast():
            result = function(*arguments)
        if written and function is not getattr(reference, name):
            # torch's own ops do this themselves; autograd finds overwritten tensors by it
            tensors = [arguments[i] for i in written if i < len(arguments) and arguments[i] is not None]
            torch.autograd.graph.increment_version(tensors)
        return result

    return implementation


def _fake(name: str) -> Callable[..., Any]:
    returns = getattr(torch.ops.maskops, name).default._schema.returns

    def fake(*arguments: Any, backend: str | None = None) -> Any:
        if not returns:  # what is written in place is there already
            return None
        with torch._C._DisableAutocast():
            return getattr(reference, name)(*arguments)

    return fake


for _schema in _SCHEMAS:
    _register(_schema)
