"""The formulas in plain torch: the definition of right, in every floating dtype, on every device."""

from torch import Tensor

from maskops.backends.reference.arena import arena_effective_weight_, arena_mask_grad
from maskops.backends.reference.effective_weights import effective_weights, effective_weights_backward
from maskops.backends.reference.frozen import conv_input_grad, conv_relu, relu_backward
from maskops.backends.reference.images import prepare_images, prepare_images_backward
from maskops.backends.reference.l1_ball import project_onto_l1_ball, rescale_to_l1_ball
from maskops.backends.reference.layers import (
    dual_masked_conv,
    dual_masked_conv_backward,
    dual_masked_linear,
    dual_masked_linear_backward,
    effective_weight,
    effective_weight_backward,
    masked_conv,
    masked_conv_backward,
    masked_conv_relu,
    masked_linear,
    masked_linear_backward,
)
from maskops.backends.reference.many import (
    many_masked_conv,
    many_masked_conv_backward,
    many_masked_linear,
    many_masked_linear_backward,
)
from maskops.backends.reference.mask_adam8bit import mask_adam8bit_step_
from maskops.backends.reference.mask_step import mask_adam_step_, mask_sgd_step_, noise_step_
from maskops.backends.reference.sign_bits import (
    affine_relu_bits_,
    max_pool_winners,
    max_pool_winners_backward,
    relu_bits,
    relu_bits_,
    relu_bits_backward,
)
from maskops.backends.reference.trigger_step import trigger_step_

__all__ = [
    "affine_relu_bits_",
    "arena_effective_weight_",
    "arena_mask_grad",
    "conv_input_grad",
    "conv_relu",
    "dual_masked_conv",
    "dual_masked_conv_backward",
    "dual_masked_linear",
    "dual_masked_linear_backward",
    "effective_weight",
    "effective_weight_backward",
    "effective_weights",
    "effective_weights_backward",
    "many_masked_conv",
    "many_masked_conv_backward",
    "many_masked_linear",
    "many_masked_linear_backward",
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
    "why_not",
]


def why_not(op: str, *tensors: Tensor) -> str | None:
    """The reference serves everything."""
    return None
