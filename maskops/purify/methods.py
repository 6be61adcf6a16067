"""The methods by name: what the command line, tests and benchmarks choose from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from maskops.purify._options import Preset
from maskops.purify._result import Purification
from maskops.purify.anp import PRESETS as ANP_PRESETS
from maskops.purify.anp import anp
from maskops.purify.awm import PRESETS as AWM_PRESETS
from maskops.purify.awm import awm
from maskops.purify.baselines.fine_pruning import PRESETS as FINE_PRUNING_PRESETS
from maskops.purify.baselines.fine_pruning import fine_pruning
from maskops.purify.baselines.ft import PRESETS as FT_PRESETS
from maskops.purify.baselines.ft import ft
from maskops.purify.baselines.ft_sam import PRESETS as FT_SAM_PRESETS
from maskops.purify.baselines.ft_sam import ft_sam
from maskops.purify.baselines.ibau import PRESETS as IBAU_PRESETS
from maskops.purify.baselines.ibau import ibau
from maskops.purify.baselines.mcr import PRESETS as MCR_PRESETS
from maskops.purify.baselines.mcr import mcr
from maskops.purify.baselines.nad import PRESETS as NAD_PRESETS
from maskops.purify.baselines.nad import nad
from maskops.purify.baselines.rnp import PRESETS as RNP_PRESETS
from maskops.purify.baselines.rnp import rnp
from maskops.purify.nft import PRESETS as NFT_PRESETS
from maskops.purify.nft import nft
from maskops.purify.swm import PRESETS as SWM_PRESETS
from maskops.purify.swm import swm


@dataclass(frozen=True)
class Method:
    """A way to purify a model.

    run:     ``run(model, clean_data, *, preset, on_epoch, checkpoint, resume, **options)``, which returns a
             :class:`Purification`
    presets: name -> where its options and setting begin
    title:   what it is, in a few words
    splits:  whether the processes of a group split its batches
    """

    run: Callable[..., Purification]
    presets: Mapping[str, Preset]
    title: str
    splits: bool = False


METHODS = {
    "awm": Method(awm, AWM_PRESETS, "Adversarial Weight Masking (Chai & Chen 2022)", splits=True),
    "swm": Method(swm, SWM_PRESETS, "Soft Weight Masking (Chai & Chen 2022, Eq. 4.1)", splits=True),
    "anp": Method(anp, ANP_PRESETS, "Adversarial Neuron Pruning (Wu & Wang 2021)", splits=True),
    "nft": Method(nft, NFT_PRESETS, "Neural mask Fine-Tuning (Karim et al. 2024)", splits=True),
    "ft": Method(ft, FT_PRESETS, "Fine-tuning"),
    "fine_pruning": Method(fine_pruning, FINE_PRUNING_PRESETS, "Fine-Pruning (Liu et al. 2018)"),
    "ibau": Method(ibau, IBAU_PRESETS, "Implicit Backdoor Adversarial Unlearning (Zeng et al. 2022)"),
    "rnp": Method(rnp, RNP_PRESETS, "Reconstructive Neuron Pruning (Li et al. 2023)"),
    "ft_sam": Method(ft_sam, FT_SAM_PRESETS, "Fine-tuning with Sharpness-Aware Minimization (Zhu et al. 2023)"),
    "nad": Method(nad, NAD_PRESETS, "Neural Attention Distillation (Li et al. 2021)"),
    "mcr": Method(mcr, MCR_PRESETS, "Mode Connectivity Repair (Zhao et al. 2020)"),
}
