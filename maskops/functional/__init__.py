"""The public functions: what each computes, on what, with which gradients."""

from maskops.functional.conv import (
    dual_masked_conv2d,
    masked_conv1d,
    masked_conv2d,
    masked_conv2d_relu,
    masked_conv3d,
    masked_conv_transpose2d,
)
from maskops.functional.images import prepare_images
from maskops.functional.l1_ball import project_onto_l1_ball, rescale_to_l1_ball
from maskops.functional.linear import dual_masked_linear, masked_linear
from maskops.functional.many import many_masked_conv2d, many_masked_linear
from maskops.functional.norm import affine_relu_, masked_batch_norm, masked_layer_norm
from maskops.functional.trigger import trigger_step_
from maskops.functional.weight import clip_mask_, effective_weight, effective_weights, mask_to_bytes

__all__ = [
    "affine_relu_",
    "clip_mask_",
    "dual_masked_conv2d",
    "dual_masked_linear",
    "effective_weight",
    "effective_weights",
    "many_masked_conv2d",
    "many_masked_linear",
    "mask_to_bytes",
    "masked_batch_norm",
    "masked_conv1d",
    "masked_conv2d",
    "masked_conv2d_relu",
    "masked_conv3d",
    "masked_conv_transpose2d",
    "masked_layer_norm",
    "masked_linear",
    "prepare_images",
    "project_onto_l1_ball",
    "rescale_to_l1_ball",
    "trigger_step_",
]
