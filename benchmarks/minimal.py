"""What steps take at least, and what the published ones take, by arithmetic and by counting: numbers to hold others to.

The least is that of 16-bit activations in channels_last, where a convolution reads its input once and writes its output
once, batch norms, biases, residuals and activations cost nothing beside it, and both branches are one batch. Counted is
the published code in float32 with torch 2.13, its optimiser over lists of tensors, on the usual batches.
"""

from __future__ import annotations

from typing import NamedTuple


class Amount(NamedTuple):
    """Launches, floating-point operations and bytes, both in 10⁹; None for what nobody has worked out."""

    launches: int
    gflop: float
    gb: float


LEAST: dict[tuple[str, str, str], Amount] = {
    ("awm", "small_vgg", "inner"): Amount(26, 19.8, 0.098),
    ("awm", "small_vgg", "outer"): Amount(35, 58.9, 0.306),
    ("awm", "resnet18", "inner"): Amount(48, 284, 0.70),
    ("awm", "resnet18", "outer"): Amount(71, 852, 2.53),
    ("awm", "resnet50", "inner"): Amount(116, 1047, 5.68),
    ("awm", "resnet50", "outer"): Amount(172, 3110, 18.0),
    ("awm", "convnext_l", "inner"): Amount(314, 4398, 14.6),
    ("awm", "convnext_l", "outer"): Amount(429, 13191, 48.6),
    ("awm", "vit_l", "inner"): Amount(348, 7879, 16.8),
    ("awm", "vit_l", "outer"): Amount(472, 23617, 58.8),
}
"""By method, network and phase."""

PUBLISHED: dict[tuple[str, str, str], Amount] = {
    ("awm", "small_vgg", "inner"): Amount(149, 39.6, 1.48),
    ("awm", "small_vgg", "outer"): Amount(285, 58.9, 2.18),
    ("awm", "resnet18", "inner"): Amount(398, 568.8, 9.05),
    ("awm", "resnet18", "outer"): Amount(763, 852.2, 14.26),
    ("anp", "resnet18", "step"): Amount(1433, 1278.3, 18.17),
    ("nft", "resnet18", "step"): Amount(661, 426.1, 6.07),
    ("awm", "resnet50", "inner"): Amount(1016, 2093.7, 75.9),
    ("awm", "resnet50", "outer"): Amount(1950, 3110.3, 111.0),
    ("anp", "resnet50", "step"): Amount(3725, 4665.4, 159.6),
    ("nft", "resnet50", "step"): Amount(1754, 1555.1, 53.5),
    ("awm", "convnext_l", "inner"): Amount(2016, 8796, 117),
    ("awm", "convnext_l", "outer"): Amount(4070, 13191, 197),
    ("awm", "vit_l", "inner"): Amount(1947, 15819, 162),
    ("awm", "vit_l", "outer"): Amount(3511, 23739, 271),
}
"""By method, network and phase: what an independent count of the published code found."""
