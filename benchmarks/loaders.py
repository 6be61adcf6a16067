"""How the published procedures get their batches: torch's DataLoader in the same process, image by image."""

from __future__ import annotations

import random
from collections.abc import Iterator
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from benchmarks.problem import Problem


def why_not(method: str) -> str | None:
    """Why the method's loader can't be timed, or None."""
    return None if method == "awm" or find_spec("PIL") else "its loader needs Pillow, which is not installed"


def batches(problem: Problem, count: int) -> Iterator[list[Tensor]]:
    """So many batches, drawn with replacement, on the device: AWM's from tensors, the others' augmented by Pillow."""
    images, labels = problem.images.cpu(), problem.labels.cpu()
    dataset = TensorDataset(images, labels) if problem.method == "awm" else Augmented(images, labels)
    size = problem.indices.shape[1]
    sampler = RandomSampler(dataset, replacement=True, num_samples=count * size)
    for batch in DataLoader(dataset, batch_size=size, sampler=sampler, num_workers=0):
        yield [tensor.to(problem.device) for tensor in batch]


class Augmented(Dataset):
    """Images padded, cropped, mirrored and turned into tensors one by one, as torchvision's transforms do it."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = (255 * images.permute(0, 2, 3, 1)).to(torch.uint8).numpy()
        self.labels = labels.tolist()
        self.padding = images.shape[2] // 8

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image, ImageOps

        image = Image.fromarray(self.images[index])
        width, height = image.size
        left, top = (random.randint(0, 2 * self.padding) for _ in range(2))
        image = ImageOps.expand(image, self.padding).crop((left, top, left + width, top + height))
        if random.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)
        return pixels.sub(0.5).div(0.25), self.labels[index]
