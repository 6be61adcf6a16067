"""What the baselines share: batches, SGD on all weights, running statistics, images that are held out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from maskops._state import eval_mode
from maskops.purify._loop import Run
from maskops.purify._options import number
from maskops.purify._result import Purification
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


def one_pass(run: Run, batch_size: int) -> Iterator[Tensor]:
    """As :meth:`Run.one_pass`, without a last batch of one image, of which batch norms know no variance."""
    return run.one_pass(batch_size, least=min(2, batch_size, len(run.images)))


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
def hits(run: Run, network: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> int:
    """How many images the network classifies rightly, in eval mode."""
    model = PixelModel(network, run.mean, run.std, run.low_dtype)
    parts = zip(images.split(batch_size), labels.split(batch_size), strict=True)
    with eval_mode(model):
        return int(sum((model(part).argmax(1) == label).sum() for part, label in parts))


@torch.no_grad()
def measure_statistics(model: PixelModel, images: Tensor, batch_size: int) -> None:
    """Give batch norms, batch by batch, the running statistics that the model has on the images."""
    norms = [each for each in model.modules() if isinstance(each, _BatchNorm) and each.track_running_stats]
    momenta = [norm.momentum for norm in norms]
    with eval_mode(model):
        for norm in norms:
            norm.train().reset_running_stats()
        seen = 0
        for batch in images.split(batch_size) if norms else ():
            if len(batch) > 1 or batch_size == 1:
                seen += len(batch)
                for norm in norms:
                    norm.momentum = len(batch) / seen  # the mean over all images
                model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def finish(run: Run, options: Any, model: PixelModel, **results: Any) -> Purification:
    """The result of a run that changed a model's weights, once they are known to be numbers."""
    if not all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters()):
        raise run.failed("a weight became nan or infinite")
    return run.finish(options, model.network, **results)
