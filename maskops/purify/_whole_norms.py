"""Batch norms over a batch that is spread over several processes."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode


class Adds(Protocol):
    """What sums over the processes."""

    rank: int
    size: int

    def add(self, *tensors: Tensor) -> None: ...


class WholeBatchNorms(TorchFunctionMode):
    """Within, batch norms on the statistics of their batch compute with those of the rows of all processes.

    The running statistics follow as they would in one process with the whole batch. In the backward too, every process
    must come by: each batch norm sums over all of them, forwards and backwards.

    team:   the processes
    count:  of the images in the whole batch
    counts: whether this process's rows are among these
    """

    def __init__(self, team: Adds, count: int, counts: bool) -> None:
        super().__init__()
        self._team, self._count, self._counts = team, count, counts

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._normalise(func, *args, **kwargs)
        if func is torch.batch_norm:
            return self._normalise_by_torch(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _normalise(
        self, plain, input, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5
    ):
        if not training:
            return plain(input, running_mean, running_var, weight, bias, training, momentum, eps)
        if self._count == 1 and input.numel() == input.shape[1]:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {input.size()}")
        return _BatchNorm.apply(input, weight, bias, running_mean, running_var, momentum, eps, self._team, self._counts)

    def _normalise_by_torch(
        self, plain, input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled
    ):
        if not training:
            return plain(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn_enabled)
        return self._normalise(plain, input, running_mean, running_var, weight, bias, training, momentum, eps)


class _BatchNorm(torch.autograd.Function):
    """``weight * (input - mean) / sqrt(var + eps) + bias`` with mean and variance over the rows of all processes."""

    @staticmethod
    def forward(ctx, input, weight, bias, running_mean, running_var, momentum, eps, team, counts):
        wide = torch.promote_types(input.dtype, torch.float32)
        mean, var, count = _statistics(input, wide, team, counts)
        if running_mean is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (count / (count - 1))).to(running_var.dtype), momentum)
        scale = torch.ones_like(mean) if weight is None else weight.to(wide)
        shift = None if bias is None else bias.to(wide)
        ctx.save_for_backward(input, scale, mean, var, count)
        ctx.eps, ctx.team, ctx.counts = eps, team, counts
        ctx.dtypes = [None if each is None else each.dtype for each in (weight, bias)]
        return torch.batch_norm(input, scale, shift, mean, var, False, 0.0, eps, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        input, scale, mean, var, count = ctx.saved_tensors
        unused = mean.new_empty(0)
        of_input, of_scale, of_shift = torch.ops.aten.native_batch_norm_backward(
            grad, input, scale, mean, var, unused, unused, False, ctx.eps, [True, True, True]
        )
        # of a frozen norm too: the input moves the statistics
        sums = torch.cat((of_scale, of_shift))
        ctx.team.add(sums)
        if ctx.counts:  # otherwise the statistics don't know of these rows
            of_all_scale, of_all_shift = sums.chunk(2)
            inverse = torch.rsqrt(var + ctx.eps)
            factor = scale * inverse / count
            channels = (1, -1, *(1,) * (input.dim() - 2))
            slope, offset, centre = (
                value.view(channels) for value in (factor * inverse * of_all_scale, factor * of_all_shift, mean)
            )
            of_input = (of_input - offset).addcmul_(input - centre, slope, value=-1).to(input.dtype)
        of_weight, of_bias = (
            value.to(dtype) if dtype is not None and needed else None
            for value, dtype, needed in zip((of_scale, of_shift), ctx.dtypes, ctx.needs_input_grad[1:3], strict=True)
        )
        return of_input, of_weight, of_bias, *[None] * 6


def _statistics(input: Tensor, wide: torch.dtype, team: Adds, counts: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of each channel's values, over the rows of all processes."""
    channels = input.shape[1]
    var, mean = torch.var_mean(input.to(wide), [0, *range(2, input.dim())], correction=0)
    of_all = mean.new_zeros(team.size, 2 * channels + 1)
    if counts:
        of_all[team.rank, :channels] = mean
        of_all[team.rank, channels:-1] = var
        of_all[team.rank, -1] = input.numel() // channels
    team.add(of_all)
    means, variances, share = of_all[:, :channels], of_all[:, channels:-1], of_all[:, -1:] / of_all[:, -1].sum()
    mean = (share * means).sum(0)
    return mean, (share * (variances + (means - mean).square())).sum(0), of_all[:, -1].sum()
