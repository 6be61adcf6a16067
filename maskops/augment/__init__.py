"""Random augmentations of batches of images (N, C, H, W) in pixel space [0, 1], on any device.

All random numbers come from a ``torch.Generator`` on the CPU, so that a seed gives the same augmentation on every
device. Images are never modified; results have their dtype, device and memory format, and carry no gradient. The range
of the pixels isn't checked, which would have to wait for the device.
"""

from maskops.augment.basic import Mixed, adversarial, cutmix, cutout, mixup, random_crop, random_flip
from maskops.augment.chains import augmix, randaugment

__all__ = [
    "Mixed",
    "adversarial",
    "augmix",
    "cutmix",
    "cutout",
    "mixup",
    "randaugment",
    "random_crop",
    "random_flip",
]
