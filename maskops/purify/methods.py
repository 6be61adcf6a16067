"""The methods by name: what the command line, tests and benchmarks choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maskops.purify._loop import Purification
from maskops.purify._options import Preset
from maskops.purify.anp import PRESETS as ANP_PRESETS
from maskops.purify.anp import anp
from maskops.purify.awm import PRESETS as AWM_PRESETS
from maskops.purify.awm import awm
from maskops.purify.nft import PRESETS as NFT_PRESETS
from maskops.purify.nft import nft
from maskops.purify.swm import PRESETS as SWM_PRESETS
from maskops.purify.swm import swm


@dataclass(frozen=True)
class Method:
    """A way to purify a model.

    run:     ``run(model, clean_data, *, preset, on_epoch, **options)``, which returns a :class:`Purification`
    presets: name -> where its options and setting begin
    title:   what it is, in a few words
    """

    run: Callable[..., Purification]
    presets: Mapping[str, Preset]
    title: str


METHODS = {
    "awm": Method(awm, AWM_PRESETS, "Adversarial Weight Masking (Chai & Chen 2022)"),
    "swm": Method(swm, SWM_PRESETS, "Soft Weight Masking (Chai & Chen 2022, Eq. 4.1)"),
    "anp": Method(anp, ANP_PRESETS, "Adversarial Neuron Pruning (Wu & Wang 2021)"),
    "nft": Method(nft, NFT_PRESETS, "Neural mask Fine-Tuning (Karim et al. 2024)"),
}
