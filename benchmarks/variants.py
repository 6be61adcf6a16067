"""Other ways of plain PyTorch to compute with masked weights: compiled, parametrised, functional, as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parameter import Parameter
from torch.nn.utils import parametrize

from benchmarks.floor import Floor
from benchmarks.problem import ROTATION, Problem
from benchmarks.published import Careful, Eager, adam_on_device

WARMUP = 3
"""Steps before a capture, in which libraries choose their ways and allocate what they keep."""
FOLD_NORMS = {"efficient_conv_bn_eval_fx_passes": True}
"""Inductor's option that folds batch norms in eval mode into convolutions, also under gradients; off by default."""
FOLD_NORMS_IN_GRAPHS = {**FOLD_NORMS, "triton.cudagraphs": True}


class Naive(Eager):
    """The published procedure over ``torch.compile``: what one line more brings. Adam is torch's fused one."""

    compiles = "compilation"
    counts_as = "official"
    retain_graph = False  # which a compiled backward can't, and nothing needs
    mode: str | None = None

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = compiled(super().logits, mode=self.mode)

    def _optimizer(self) -> torch.optim.Optimizer:
        return adam_on_device(self.masks.values(), self.problem)

    def _state(self, mask: Parameter) -> dict[str, Tensor]:
        return super()._state(mask) | {"step": torch.zeros((), device=mask.device)}

    def logits(self, images: Tensor) -> Tensor:
        return self.compiled(images)


class NaiveGraphs(Naive):
    """The same with torch's own CUDA graphs."""

    needs_cuda = True
    mode = "reduce-overhead"

    def inner(self, index: int = 0) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().inner(index)

    def outer(self, index: int = 0) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().outer(index)


class NaiveAutotune(NaiveGraphs):
    """The same with Inductor's choice among measured kernels, which takes long to compile."""

    mode = "max-autotune"


class Compiled(Careful):
    """The careful procedure over ``torch.compile`` with batch norms folded into convolutions: the one to beat."""

    compiles = "compilation"
    counts_as = "careful"
    options = FOLD_NORMS

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.compiled = compiled(super().logits, options=self.options)

    def logits(self, images: Tensor) -> Tensor:
        return self.compiled(images)


class CompiledGraphs(Compiled):
    """The same with torch's own CUDA graphs."""

    needs_cuda = True
    options = FOLD_NORMS_IN_GRAPHS

    def begin(self) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().begin()

    def inner(self, index: int = 0) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().inner(index)

    def outer(self, index: int = 0) -> None:
        torch.compiler.cudagraph_mark_step_begin()
        super().outer(index)


def compiled(function: Callable[..., Any], **how: Any) -> Callable[..., Any]:
    """``torch.compile``, of one function for contestant after contestant, each of which is a compilation of its own."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 256
    return torch.compile(function, dynamic=False, **how)


class Masked(nn.Module):
    """A mask as a parametrisation of a weight."""

    def __init__(self, mask: Parameter) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, weight: Tensor) -> Tensor:
        return self.mask * weight


class Parametrized(Careful):
    """Careful, with torch's parametrisation as the mask: the product whenever a layer asks for its weight."""

    needs_memory = True

    def _mask(self, layer: nn.Module) -> Parameter:
        mask = Parameter(torch.ones_like(layer.weight))
        parametrize.register_parametrization(layer, "weight", Masked(mask))
        return mask


class ParametrizedCached(Parametrized):
    """The same, with the product once per step."""

    def inner(self, index: int = 0) -> None:
        with parametrize.cached():
            super().inner(index)

    def outer(self, index: int = 0) -> None:
        with parametrize.cached():
            super().outer(index)


class Functional(Careful):
    """Careful, with effective weights once per step, handed to the plain network by ``functional_call``."""

    def _mask(self, layer: nn.Module) -> Parameter:
        return Parameter(torch.ones_like(layer.weight))

    def _multiply(self) -> None:
        self.effective = {
            f"{name}.weight": mask * self.model.get_submodule(name).weight for name, mask in self.masks.items()
        }

    def logits(self, images: Tensor) -> Tensor:
        dtype = self.problem.dtype
        with torch.autocast(images.device.type, dtype=dtype, enabled=dtype != torch.float32):
            return functional_call(self.model, self.effective, (images,)).float()

    def begin(self) -> None:
        self._train_masks(False)
        self._multiply()
        super().begin()

    def inner(self, index: int = 0) -> None:
        self._train_masks(False)
        self._multiply()
        super().inner(index)

    def outer(self, index: int = 0) -> None:
        self._train_masks(True)
        self._multiply()
        super().outer(index)


class _Graphs:
    """The steps of the class behind it as CUDA graphs, one for each step and batch."""

    needs_cuda = True
    compiles = "capture"

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        self.reset()
        self._graphs = capture(super().inner, super().outer, problem.device)

    def inner(self, index: int = 0) -> None:
        self._graphs["inner", index].replay()

    def outer(self, index: int = 0) -> None:
        self._graphs["outer", index].replay()


class Graphed(_Graphs, Careful):
    """The careful steps as CUDA graphs."""

    counts_as = "careful"

    def __init__(self, problem: Problem) -> None:
        self.labels = torch.zeros_like(problem.labels)
        super().__init__(problem)

    def begin(self) -> None:
        before = self.labels
        super().begin()
        self.labels = before.copy_(self.labels)


class FloorGraphed(_Graphs, Floor):
    """The floor as CUDA graphs."""

    counts_as = "floor"


def capture(
    inner: Callable[[int], None], outer: Callable[[int], None], device: torch.device
) -> dict[tuple[str, int], torch.cuda.CUDAGraph]:
    """A graph of each step on each batch, all in one pool: no step reads what another left there.

    The first batch's come last, so that what they leave in ``.grad`` is what Python finds there.
    """
    steps = {
        (phase, index): partial(step, index)
        for phase, step in (("inner", inner), ("outer", outer))
        for index in reversed(range(ROTATION))
    }
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(WARMUP):
            for step in steps.values():
                step()
    torch.cuda.current_stream(device).wait_stream(stream)
    pool = torch.cuda.graph_pool_handle()
    graphs = {}
    for key, step in steps.items():
        graphs[key] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[key], pool=pool):
            step()
    return graphs
