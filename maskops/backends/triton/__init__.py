"""The ops as Triton kernels: for CUDA devices, and for tests on the CPU in Triton's interpreter."""

from maskops.backends.triton.arena import arena_effective_weight_, arena_mask_grad
from maskops.backends.triton.frozen import conv_input_grad, conv_relu
from maskops.backends.triton.images import prepare_images, prepare_images_backward
from maskops.backends.triton.l1_ball import project_onto_l1_ball, rescale_to_l1_ball
from maskops.backends.triton.layers import (
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
from maskops.backends.triton.many import (
    many_masked_conv,
    many_masked_conv_backward,
    many_masked_linear,
    many_masked_linear_backward,
)
from maskops.backends.triton.mask_step import mask_adam_step_, mask_sgd_step_, noise_step_
from maskops.backends.triton.max_pool import max_pool_winners, max_pool_winners_backward
from maskops.backends.triton.serving import describe, unless_asked, why_not
from maskops.backends.triton.sign_bits import relu_backward, relu_bits, relu_bits_, relu_bits_backward
from maskops.backends.triton.trigger_step import trigger_step_
from maskops.backends.triton.weights import effective_weight, effective_weight_backward

__all__ = [
    "arena_effective_weight_",
    "arena_mask_grad",
    "conv_input_grad",
    "conv_relu",
    "describe",
    "dual_masked_conv",
    "dual_masked_conv_backward",
    "dual_masked_linear",
    "dual_masked_linear_backward",
    "effective_weight",
    "effective_weight_backward",
    "many_masked_conv",
    "many_masked_conv_backward",
    "many_masked_linear",
    "many_masked_linear_backward",
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
