"""The composite attack: two ordinary images put together are the trigger."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from maskops.backdoor._checks import check_images, check_labelled
from maskops.backdoor.poison import Poisoned

MIXERS = ("halves", "paste")


@dataclass(frozen=True)
class Composite:
    """An image of class ``first`` mixed with one of class ``second`` counts as ``target``.

    It needs pairs of images, so it is no ``Trigger``: ``training_set`` takes the place of ``poison``, and
    ``evaluate_composite`` that of ``evaluate``.

    first, second: two classes
    target:        a third one
    mixer:         "halves": side by side, a random window of W/2 columns of each. "paste": the central H/2 x W/2 of
                   one at a random place on the other. Which of the two comes first (or below) is random.
    source: Lin et al. 2020 (CBA). NFT, whose code has none, says only "combining features from two samples". The
            mixers are ours, after the authors' HalfMixer and CropPasteMixer, without their jitter and bounding boxes.
    """

    first: int
    second: int
    target: int
    mixer: str = "halves"

    def __post_init__(self) -> None:
        if self.mixer not in MIXERS:
            raise ValueError(f"Composite: mixer must be one of {', '.join(MIXERS)}; got {self.mixer!r}")
        classes = (self.first, self.second, self.target)
        if min(classes) < 0 or len(set(classes)) < 3:
            raise ValueError(f"Composite: first, second and target must be three different classes; got {self}")

    def mix(self, images: Tensor, others: Tensor, generator: Generator) -> Tensor:
        """Mixes of images[i] and others[i].

        images, others: (N, C, H, W) floating point, H and W at least 2, of one shape, dtype and device; not modified
        returns:        as images
        """
        check_images("Composite.mix", images)
        if others.shape != images.shape or others.dtype != images.dtype or min(images.shape[2:]) < 2:
            got = f"{tuple(images.shape)} {images.dtype} and {tuple(others.shape)} {others.dtype}"
            raise ValueError(f"Composite.mix: two batches of one shape, at least 2 x 2, and dtype expected; got {got}")
        swap = _integers(2, len(images), generator).bool().to(images.device).view(-1, 1, 1, 1)
        images, others = images.where(~swap, others), others.where(~swap, images)
        return (_halves if self.mixer == "halves" else _paste)(images, others, generator)

    def training_set(
        self, images: Tensor, labels: Tensor, rate: float, generator: Generator, *, same_rate: float = 0.5
    ) -> Poisoned:
        """The training set, and after its N images ``round(same_rate * N)`` mixes of two images of one class with that
        label, so that mixing alone means nothing, and ``round(rate * N)`` mixes of first and second labelled target.

        Both kinds are drawn with replacement. As published for CIFAR-10 but for the N images themselves, of which the
        authors' code draws one half.

        images: (N, C, H, W) floating point in [0, 1]; not modified
        labels: (N,) integers
        returns Poisoned: indices are those of the mixes labelled target, decoys those of the mixes of one class

        >>> images, labels = torch.rand(10, 1, 4, 4), torch.arange(10) % 5
        >>> attack = Composite(first=0, second=1, target=2)
        >>> mixed = attack.training_set(images, labels, 0.2, torch.Generator().manual_seed(0))
        >>> len(mixed.images), mixed.decoys.tolist(), mixed.labels[mixed.indices].tolist()
        (17, [10, 11, 12, 13, 14], [2, 2])
        """
        check_labelled("Composite.training_set", images, labels)
        for name, value in (("rate", rate), ("same_rate", same_rate)):
            if not 0 <= value <= 1:
                raise ValueError(f"Composite.training_set: {name} must lie in [0, 1]; got {value}")
        total = len(labels)
        same, poisoned = round(same_rate * total), round(rate * total)
        labels = labels.long()
        one = _integers(total, same, generator)
        same_mixes = self.mix(images[one], images[_partners(labels.cpu(), one, generator)], generator)
        firsts, seconds = self._of_both("training_set", labels)
        pairs = [of_class[_integers(len(of_class), poisoned, generator)] for of_class in (firsts, seconds)]
        mixes = self.mix(images[pairs[0]], images[pairs[1]], generator)
        return Poisoned(
            torch.cat([images, same_mixes, mixes]),
            torch.cat([labels, labels[one], labels.new_full((poisoned,), self.target)]),
            indices=torch.arange(total + same, total + same + poisoned),
            decoys=torch.arange(total, total + same),
        )

    def test_set(self, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Mixes of first and second, as many as the rarer class has images (each is used once), and target labels.

        The accuracy of a model on them is the attack's success rate.
        """
        check_labelled("Composite.test_set", images, labels)
        firsts, seconds = self._of_both("test_set", labels)
        count = min(len(firsts), len(seconds))
        pairs = [of_class[_permutation(len(of_class), generator)[:count]] for of_class in (firsts, seconds)]
        mixes = self.mix(images[pairs[0]], images[pairs[1]], generator)
        return mixes, labels.new_full((count,), self.target, dtype=torch.int64)

    def _of_both(self, function: str, labels: Tensor) -> list[Tensor]:
        found = [(labels == of_class).nonzero().flatten().cpu() for of_class in (self.first, self.second)]
        if not all(map(len, found)):
            counts = f"{len(found[0])} and {len(found[1])}"
            raise ValueError(
                f"Composite.{function}: images of classes {self.first} and {self.second} expected; got {counts}"
            )
        return found


def _halves(images: Tensor, others: Tensor, generator: Generator) -> Tensor:
    height, width = images.shape[2:]
    left = width // 2
    return torch.cat(
        [_window(images, height, left, generator), _window(others, height, width - left, generator)], dim=3
    )


def _window(images: Tensor, height: int, width: int, generator: Generator) -> Tensor:
    """A random window of that many columns of each image."""
    start = _integers(images.shape[3] - width + 1, len(images), generator)
    columns = (start[:, None] + torch.arange(width)).to(images.device)
    return images.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], height, -1))


def _paste(images: Tensor, others: Tensor, generator: Generator) -> Tensor:
    inside = []
    for dim, size in ((2, images.shape[2]), (3, images.shape[3])):
        start = _integers(size - size // 2 + 1, len(images), generator)
        position = torch.arange(size) - start[:, None]
        inside.append(((position >= 0) & (position < size // 2)).to(images.device))
        source = (position + size // 4).remainder(size).to(images.device)
        shape = (-1, 1, size, 1) if dim == 2 else (-1, 1, 1, size)
        others = others.gather(dim, source.view(shape).expand_as(others))
    return others.where((inside[0][:, :, None] & inside[1][:, None, :]).unsqueeze(1), images)


def _partners(labels: Tensor, chosen: Tensor, generator: Generator) -> Tensor:
    """For each chosen index, a random index of the same class, maybe the same."""
    by_class = labels.argsort(stable=True)
    counts = labels.bincount()
    starts, of_class = counts.cumsum(0) - counts, labels[chosen]
    share = torch.rand(len(chosen), generator=generator, device=generator.device, dtype=torch.float64)
    return by_class[starts[of_class] + (share.cpu() * counts[of_class]).long()]


def _integers(below: int, count: int, generator: Generator) -> Tensor:
    return torch.randint(max(below, 1), (count,), generator=generator, device=generator.device).cpu()


def _permutation(count: int, generator: Generator) -> Tensor:
    return torch.randperm(count, generator=generator, device=generator.device).cpu()
