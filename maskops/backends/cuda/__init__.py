"""The ops as CUDA kernels of the compiled module ``maskops._C``, for CUDA devices."""

from maskops.backends.cuda._module import EMULATED
from maskops.backends.cuda._module import ops as _ops
from maskops.backends.cuda.layers import (
    dual_masked_conv,
    dual_masked_conv_backward,
    dual_masked_linear,
    dual_masked_linear_backward,
    masked_conv,
    masked_conv_backward,
    masked_linear,
    masked_linear_backward,
)
from maskops.backends.cuda.serving import unless_asked, why_not

effective_weight = _ops.effective_weight.default
effective_weight_backward = _ops.effective_weight_backward.default
effective_weights = _ops.effective_weights.default
effective_weights_backward = _ops.effective_weights_backward.default
arena_effective_weight_ = _ops.arena_effective_weight_.default
arena_mask_grad = _ops.arena_mask_grad.default
noise_step_ = _ops.noise_step_.default

__all__ = [
    "EMULATED",
    "arena_effective_weight_",
    "arena_mask_grad",
    "dual_masked_conv",
    "dual_masked_conv_backward",
    "dual_masked_linear",
    "dual_masked_linear_backward",
    "effective_weight",
    "effective_weight_backward",
    "effective_weights",
    "effective_weights_backward",
    "masked_conv",
    "masked_conv_backward",
    "masked_linear",
    "masked_linear_backward",
    "noise_step_",
    "unless_asked",
    "why_not",
]
