"""What the baselines share: batches, SGD on all weights, and the accuracy on images that are held out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from maskops.purify._loop import NonFiniteError, Purification, Run
from maskops.purify._options import number
from maskops.purify._pruning import THRESHOLDS, apply_masks, kept
from maskops.purify._working import PixelModel


def check_training(method: str, options: Any) -> None:
    """Check the fields of options that train weights by SGD."""
    for name in ("lr", "weight_decay"):
        number(method, options, name, float, 0)
    number(method, options, "momentum", float, 0, 1)
    for name in ("epochs", "batch_size"):
        number(method, options, name, int, 1)


def sgd(model: nn.Module, options: Any) -> torch.optim.SGD:
    """SGD on all weights, with the options' lr, momentum and weight_decay."""
    return torch.optim.SGD(
        model.parameters(), lr=options.lr, momentum=options.momentum, weight_decay=options.weight_decay
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    optimizer.param_groups[0]["lr"] = lr


def cosine(step: int, steps: int) -> float:
    """The factor on a learning rate that falls from 1 to 0 along half a cosine."""
    return (1 + math.cos(math.pi * step / steps)) / 2


def one_pass(run: Run, batch_size: int) -> Iterator[Tensor]:
    """As :meth:`Run.one_pass`, without a last batch of one image, of which batch norms know no variance."""
    whole = min(batch_size, len(run.images))
    return (batch for batch in run.one_pass(batch_size) if len(batch) > 1 or whole == 1)


def train(
    run: Run,
    model: PixelModel,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Tensor],
    after_step: Callable[[], None] | None = None,
    note: str = "loss",
) -> None:
    """One step down the cross entropy of each batch."""
    for batch in batches:
        images, labels = run.sample(batch)
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if after_step is not None:
            after_step()
        run.note(note, loss)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> float:
    """Of a model on pixels, in eval mode."""
    training = model.training
    model.eval()
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    # a model may write to its input: it gets copies
    hits = sum((model(part.clone()).argmax(1) == label).sum() for part, label in parts)
    model.train(training)
    return int(hits) / len(labels)


def threshold_on(
    run: Run, original: nn.Module, scores: Mapping[str, Tensor], images: Tensor, labels: Tensor, budget: float
) -> float:
    """The largest of THRESHOLDS up to which pruning costs a model at most ``budget`` of its held-out accuracy.

    -1, which prunes nothing, where even the smallest costs more.
    """

    def accuracy_of(network: nn.Module) -> float:
        return accuracy(PixelModel(network, run.mean, run.std, run.low_dtype), images, labels)

    chosen, least = -1.0, accuracy_of(original) - budget
    for threshold in THRESHOLDS:
        if accuracy_of(apply_masks(original, kept(scores, threshold=threshold))) < least:
            break
        chosen = threshold
    return chosen


def finish(run: Run, options: Any, model: PixelModel, **results: Any) -> Purification:
    """The result of a run that changed a model's weights, once they are known to be numbers."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise NonFiniteError(f"{run.method}: a weight became nan or infinite; the model is left as it was")
    return run.finish(options, model.network, **results)
