"""The ops as CUDA kernels of the compiled module ``maskops._C``, for CUDA devices."""

from maskops.backends.cuda._module import EMULATED, build_info, kernel_attributes
from maskops.backends.cuda._module import ops as _ops
from maskops.backends.cuda.frozen import conv_input_grad, conv_relu, relu_backward
from maskops.backends.cuda.images import prepare_images
from maskops.backends.cuda.layers import (
    dual_masked_conv,
    dual_masked_conv_backward,
    dual_masked_linear,
    dual_masked_linear_backward,
    masked_conv,
    masked_conv_backward,
    masked_conv_relu,
    masked_linear,
    masked_linear_backward,
)
from maskops.backends.cuda.serving import describe, unless_asked, why_not

effective_weight = _ops.effective_weight.default
effective_weight_backward = _ops.effective_weight_backward.default
effective_weights = _ops.effective_weights.default
effective_weights_backward = _ops.effective_weights_backward.default
arena_effective_weight_ = _ops.arena_effective_weight_.default
arena_mask_grad = _ops.arena_mask_grad.default
mask_adam_step_ = _ops.mask_adam_step_.default
mask_adam8bit_step_ = _ops.mask_adam8bit_step_.default
mask_sgd_step_ = _ops.mask_sgd_step_.default
noise_step_ = _ops.noise_step_.default
rescale_to_l1_ball = _ops.rescale_to_l1_ball.default
project_onto_l1_ball = _ops.project_onto_l1_ball.default
relu_bits = _ops.relu_bits.default
relu_bits_ = _ops.relu_bits_.default
affine_relu_bits_ = _ops.affine_relu_bits_.default
relu_bits_backward = _ops.relu_bits_backward.default
max_pool_winners = _ops.max_pool_winners.default
max_pool_winners_backward = _ops.max_pool_winners_backward.default
prepare_images_backward = _ops.prepare_images_backward.default
trigger_step_ = _ops.trigger_step_.default

__all__ = [
    "EMULATED",
    "affine_relu_bits_",
    "arena_effective_weight_",
    "arena_mask_grad",
    "build_info",
    "conv_input_grad",
    "conv_relu",
    "describe",
    "dual_masked_conv",
    "dual_masked_conv_backward",
    "dual_masked_linear",
    "dual_masked_linear_backward",
    "effective_weight",
    "effective_weight_backward",
    "effective_weights",
    "effective_weights_backward",
    "kernel_attributes",
    "mask_adam8bit_step_",
    "mask_adam_step_",
    "mask_sgd_step_",
    "masked_conv",
    "masked_conv_backward",
    "masked_conv_relu",
    "masked_linear",
    "masked_linear_backward",
    "max_pool_winners",
    "max_pool_winners_backward",
    "noise_step_",
    "prepare_images",
    "prepare_images_backward",
    "project_onto_l1_ball",
    "relu_backward",
    "relu_bits",
    "relu_bits_",
    "relu_bits_backward",
    "rescale_to_l1_ball",
    "trigger_step_",
    "unless_asked",
    "why_not",
]
