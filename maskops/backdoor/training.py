"""A short recipe that trains a network under an attack: backdoored models to try a purification on."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from maskops._state import seeded_layers
from maskops.augment import random_crop, random_flip
from maskops.backdoor.attacks import Attack
from maskops.backdoor.composite import Composite
from maskops.backdoor.generators import Campaign
from maskops.backdoor.triggers import Trigger
from maskops.data import as_tensors

OPTIMIZERS = ("sgd", "adam")
_PIECE = 8192  # images that are augmented at a time


@dataclass(frozen=True)
class Trained:
    """What ``train_backdoored`` returns.

    model:   the trained network, in eval mode, on the device of the training
    trigger: what to measure it with: the attack's (a ``Composite``, if that is it), or the one that was learned
    indices: which images of the poisoned set are poisoned, ascending, on the CPU; None where they were drawn per batch
    losses:  mean loss of each epoch under the attack
    seconds: of the whole call
    """

    model: nn.Module
    trigger: Trigger | Composite
    indices: Tensor | None
    losses: list[float]
    seconds: float


def train_backdoored(
    model: nn.Module,
    train_data: Any,
    attack: Attack,
    *,
    epochs: int = 15,
    lr: float = 0.1,
    batch_size: int = 128,
    seed: int = 0,
    optimizer: str = "sgd",
    weight_decay: float = 5e-4,
    crop: int = 0,
    flip: bool = False,
    num_classes: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Trained:
    """Train a copy of a network as the attacker does: one cycle of the learning rate, the data resident on the device.

    The cycle is torch's OneCycleLR: up to lr over the first 30 % of the steps, down to nearly 0 over the others, the
    momentum the other way round. The last images of an epoch that fill no batch sit it out. Poisons of a fixed set are
    stamped before images are cropped and flipped, those of a training-controlled attack after (the codes of WaNet and
    BPPA crop after the stamp too). Two more trainings may go ahead, by the same recipe and without an attack: of a
    surrogate, where the attack perturbs images adversarially, and of the network itself, where it then freezes layers
    (``attack.frozen_convs``).

    model:        where training starts; takes pixels in [0, 1] and isn't changed. Fresh layers are the caller's to seed
    train_data:   what :func:`maskops.data.as_tensors` takes
    lr:           the highest
    optimizer:    "sgd" (Nesterov momentum) or "adam", which suits small networks with lr 0.01 and weight_decay 0
    crop:         pixels of zero padding for random crops; 0 for none. 4 is usual for 32 x 32
    flip:         mirror half of the images
    num_classes:  default: the highest label + 1
    device:       default: the model's
    dtype:        torch.float32, or torch.bfloat16 for autocast. Default: bfloat16 on a GPU, and on a CPU with AMX
    returns:      Trained
    reproducible: the same seed gives the same network on the same CPU; a GPU needs torch's deterministic algorithms
    errors:       ValueError, TypeError for data and settings; RuntimeError where the loss isn't finite

    >>> from maskops.backdoor.attacks import ATTACKS
    >>> network = nn.Sequential(nn.Flatten(), nn.Linear(64, 2))
    >>> data = (torch.rand(40, 1, 8, 8), torch.arange(40) % 2)
    >>> attack = ATTACKS["badnets"]((1, 8, 8), 2, target=1, rate=0.25)
    >>> trained = train_backdoored(network, data, attack, epochs=2, batch_size=20)
    >>> len(trained.indices), len(trained.losses), trained.model.training
    (10, 2, False)
    """
    start = time.perf_counter()
    if torch.is_inference_mode_enabled():
        raise RuntimeError("train_backdoored: training needs gradients, which torch.inference_mode() forbids")
    device = _device(model, device)
    recipe = _Recipe(
        epochs, lr, batch_size, optimizer, weight_decay, crop, flip, dtype or _fast_dtype(device), progress
    )
    images, labels = (tensor.to(device) for tensor in as_tensors(train_data))
    images = images.contiguous(memory_format=torch.channels_last)
    num_classes = int(labels.max()) + 1 if num_classes is None else num_classes
    if int(labels.max()) >= num_classes:
        raise ValueError(f"train_backdoored: labels must be below num_classes {num_classes}; got {int(labels.max())}")
    generator = torch.Generator().manual_seed(seed)

    def fresh() -> nn.Module:
        return copy.deepcopy(model).to(device, memory_format=torch.channels_last)

    def clean() -> nn.Module:
        network = fresh()
        _train(network, Campaign(images, labels, _no_trigger), recipe, generator, "clean training")
        return network.eval()

    with torch.enable_grad(), seeded_layers(seed, device):
        campaign = attack.prepare(images, labels, num_classes, generator, surrogate=clean)
        network = clean() if attack.frozen_convs else fresh()
        frozen = _last_convs(network, attack.frozen_convs)
        trained = [parameter for parameter in frozen.parameters() if parameter.requires_grad]
        frozen.requires_grad_(False)
        losses = _train(network, campaign, recipe, generator, attack.name)
        for parameter in trained:
            parameter.requires_grad_(True)
    indices = None if campaign.indices is None else campaign.indices.cpu()
    network.to(memory_format=torch.contiguous_format).eval()
    return Trained(network, campaign.finish(), indices, losses, time.perf_counter() - start)


@dataclass(frozen=True)
class _Recipe:
    epochs: int
    lr: float
    batch_size: int
    optimizer: str
    weight_decay: float
    crop: int
    flip: bool
    dtype: torch.dtype
    progress: bool

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("batch_size", 2), ("crop", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"train_backdoored: {name} must be at least {least}; got {getattr(self, name)}")
        if not (self.lr > 0 and math.isfinite(self.lr)):
            raise ValueError(f"train_backdoored: lr must be finite and above 0; got {self.lr}")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"train_backdoored: optimizer must be one of {', '.join(OPTIMIZERS)}; got {self.optimizer!r}"
            )
        if self.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"train_backdoored: dtype must be torch.float32 or torch.bfloat16; got {self.dtype}")

    def optimizer_for(self, model: nn.Module) -> torch.optim.Optimizer:
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if self.optimizer == "adam":
            return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, momentum=0.9, nesterov=True, weight_decay=self.weight_decay)

    def augmented(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """All images of an epoch at once: nothing has to wait for a draw in the middle of it."""
        if not (self.crop or self.flip):
            return images
        result = torch.empty_like(images)
        for piece, into in zip(images.split(_PIECE), result.split(_PIECE), strict=True):
            piece = random_crop(piece, self.crop, generator) if self.crop else piece
            into.copy_(random_flip(piece, generator) if self.flip else piece)
        return result


def _train(model: nn.Module, campaign: Campaign, recipe: _Recipe, generator: torch.Generator, name: str) -> list[float]:
    """Train the model in place; the mean loss of each epoch."""
    labels = campaign.labels
    batch_size = min(recipe.batch_size, len(labels))
    batches = len(labels) // batch_size
    optimizer = recipe.optimizer_for(model)
    schedule = OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * batches)
    sums = torch.zeros(recipe.epochs, device=labels.device)
    # draws inside an epoch are made where they are used
    draws = torch.Generator(labels.device).manual_seed(int(torch.randint(2**62, (), generator=generator)))

    def forward(images: Tensor) -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=recipe.dtype == torch.bfloat16):
            return model(images).float()

    model.train()
    for epoch in _shown(range(recipe.epochs), name, recipe.progress):
        images = recipe.augmented(campaign.images, generator)
        order = torch.randperm(len(labels), generator=generator).to(labels.device)
        for rows in order[: batches * batch_size].view(batches, batch_size):
            batch = campaign.batch(forward, images[rows], labels[rows], draws)
            loss = F.cross_entropy(forward(batch.images), batch.labels)
            optimizer.zero_grad()
            (loss if batch.penalty is None else loss + batch.penalty).backward()
            optimizer.step()
            schedule.step()
            campaign.step()
            sums[epoch] += loss.detach()
        campaign.end_epoch((epoch + 1) / recipe.epochs)
    losses = (sums / batches).tolist()
    for epoch, loss in enumerate(losses):
        if not math.isfinite(loss):
            raise RuntimeError(f"train_backdoored: {name}: the loss is {loss} in epoch {epoch}; try a lower lr")
    return losses


def _last_convs(model: nn.Module, count: int) -> nn.ModuleList:
    """The last convolutions in the order of ``model.modules()``, shortcuts included."""
    convs = [module for module in model.modules() if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))]
    if count >= max(len(convs), 1):
        raise ValueError(
            f"train_backdoored: {count} frozen convolutions leave none to learn; the network has {len(convs)}"
        )
    return nn.ModuleList(convs[len(convs) - count :])


def _device(model: nn.Module, device: str | torch.device | None) -> torch.device:
    if device is None:
        device = next((parameter.device for parameter in model.parameters()), "cpu")
    # "cuda" is another device than "cuda:0" until a tensor is there
    return torch.empty(0, device=device).device


def _fast_dtype(device: torch.device) -> torch.dtype:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    # without AMX, 16 bits are slower than 32 on small networks
    amx = device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("amx_bf16", False)
    return torch.bfloat16 if amx else torch.float32


def _no_trigger(images: Tensor) -> Tensor:
    return images


def _shown(epochs: Iterable[int], name: str, progress: bool) -> Iterable[int]:
    if not progress:
        return epochs
    try:
        from tqdm import tqdm
    except ImportError as error:
        raise ImportError("train_backdoored: progress needs tqdm; install it or give progress=False") from error
    return tqdm(epochs, desc=name, unit="epoch")
