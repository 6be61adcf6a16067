"""Triggers that are learned and depend on the image. Each learner's settings are the paper's, its networks ours."""

from maskops.backdoor.generators._campaign import Batch, Campaign, JointLearner, Learner, PerBatch, Shares
from maskops.backdoor.generators._networks import LearnedTrigger
from maskops.backdoor.generators.iab import IAB, IABTrigger
from maskops.backdoor.generators.issba import ISSBA, ISSBATrigger
from maskops.backdoor.generators.lira import LIRA, LIRATrigger

__all__ = [
    "IAB",
    "ISSBA",
    "LIRA",
    "Batch",
    "Campaign",
    "IABTrigger",
    "ISSBATrigger",
    "JointLearner",
    "LIRATrigger",
    "LearnedTrigger",
    "Learner",
    "PerBatch",
    "Shares",
]
