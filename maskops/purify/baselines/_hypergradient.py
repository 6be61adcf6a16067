"""The gradient through the solution of an inner problem: Grazzi et al. 2020, by fixed-point steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Objective = Callable[[Tensor], Tensor]


def hypergradient(
    outer: Objective, inner: Objective, solution: Tensor, parameters: list[Tensor], terms: int, step_size: float
) -> tuple[Tensor, list[Tensor]]:
    """The outer loss at an inner solution δ, and its gradient in θ through δ(θ), a fixed point of φ = δ - s·dg/dδ.

        dO/dθ + (dφ/dθ)ᵀ v,  v = Σ over k < K: (dφ/dδ)ᵀᵏ dO/dδ

    outer, inner: O and g as functions of δ, over parameters that require gradients
    solution:     δ; no gradient reaches it
    terms, step_size: K and s
    returns:      O, detached, and a gradient for each parameter

    >>> theta, half = torch.tensor(1.0, requires_grad=True), torch.tensor(0.5)
    >>> inner = lambda delta: (delta - theta * half).square() / 2  # δ(θ) = θ / 2
    >>> loss, (gradient,) = hypergradient(lambda delta: delta**2, inner, half, [theta], 50, 0.5)
    >>> gradient  # of θ² / 4
    tensor(0.5000)
    """
    solution = solution.detach().requires_grad_()
    loss = outer(solution)
    in_solution, *direct = torch.autograd.grad(loss, [solution, *parameters], materialize_grads=True)
    (slope,) = torch.autograd.grad(inner(solution), solution, create_graph=True)
    moved = solution - step_size * slope
    v = torch.zeros_like(solution)
    for _ in range(terms):
        v = torch.autograd.grad(moved, solution, v, retain_graph=True)[0] + in_solution
    through = torch.autograd.grad(moved, parameters, v, materialize_grads=True)
    return loss.detach(), [a + b for a, b in zip(direct, through, strict=True)]
