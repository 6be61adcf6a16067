"""Made-up results of purifications, and a reader of the page about them."""

from html.parser import HTMLParser

import torch
from torch import nn

from maskops.backdoor import Metrics
from maskops.purify import Purification

VOID = {"img", "meta"}


def metrics(acc, asr=None, classes=10):
    per_class = torch.linspace(0, 1, classes).double()
    return Metrics(acc, asr, asr, None if asr is None else 1 - asr, per_class, None if asr is None else per_class)


def masks(layers=3, per_weight=True, name="features.{}"):
    generator = torch.Generator().manual_seed(0)
    shape = (8, 2, 3, 3) if per_weight else (8,)
    kind = "mask" if per_weight else "neuron_mask"
    return {f"{name.format(layer)}.{kind}": torch.rand(shape, generator=generator) for layer in range(layers)}


def made_up(**changed):
    """What AWM might return."""
    given = {
        "model": nn.Linear(2, 2),
        "masks": masks(),
        "trigger": torch.linspace(-0.5, 0.5, 3 * 8 * 8).view(1, 3, 8, 8),
        "history": {"inner loss": [90.0, 9.0, 1.0], "clean loss": [0.3, 0.2, 0.1], "perturbed loss": [3.0, 2.0, 1.0]},
        "timings": {"inner": 1.0, "outer": 2.0, "total": 3.5, "peak_bytes": 3 << 20},
        "options": {"method": "awm", "device": "cpu", "alpha": 0.8, "gamma": 1e-8, "epochs": 3, "beta": 0.2},
        "execution": {"inner": "eager: CUDA graphs need a GPU"},
    }
    return Purification(**{**given, **changed})


class Page(HTMLParser):
    """A page as a browser would see it: every tag is closed in its turn, or reading it fails.

    tags:       all of them, and those of one name with their attributes by :meth:`of`
    words:      what is read, without styles
    """

    def __init__(self, html):
        super().__init__()
        self.html, self.open, self.tags, self.words = html, [], [], ""
        assert html.startswith("<!doctype html>\n")
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes), "an attribute twice"
        self.tags.append((tag, dict(attributes), tuple(self.open)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words += data

    def of(self, name):
        return [attributes for tag, attributes, _ in self.tags if tag == name]
