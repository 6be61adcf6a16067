"""How float32 layers on a GPU round, and which of cuDNN's algorithms they take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_CUDNN, _PRODUCTS = torch.backends.cudnn, torch.backends.cuda.matmul


@contextmanager
def precision(tf32: bool | None) -> Iterator[None]:
    """Within, float32 convolutions and products are TF32, exact, or for None as torch is set.

    Convolutions take the fastest algorithm that cuDNN finds by trying, unless torch is set to be deterministic.
    """
    benchmark, of_products = _CUDNN.benchmark, _matmul_precision()
    convolutions, recurrent, products = _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision, _PRODUCTS.fp32_precision
    try:
        _CUDNN.benchmark = not (torch.are_deterministic_algorithms_enabled() or _CUDNN.deterministic)
        if tf32 is not None:
            _allow_tf32(tf32, tf32)
        yield
    finally:
        _CUDNN.benchmark = benchmark
        if tf32 is not None:
            _allow_tf32(convolutions == "tf32", products == "tf32")
            _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision = convolutions, recurrent
            _PRODUCTS.fp32_precision = products
            if of_products is not None:
                torch.set_float32_matmul_precision(of_products)


def _matmul_precision() -> str | None:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # torch's older and newer switches contradict each other
        return None


def _allow_tf32(convolutions: bool, products: bool) -> None:
    # torch's older switches set its newer ones too; the other way round torch refuses to read the older ones
    _CUDNN.allow_tf32, _PRODUCTS.allow_tf32 = convolutions, products
