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
    deterministic = torch.are_deterministic_algorithms_enabled() or _CUDNN.deterministic
    benchmark, of_products = _CUDNN.benchmark, _matmul_precision()
    convolutions, recurrent, products = _CUDNN.conv.fp32_precision, _CUDNN.rnn.fp32_precision, _PRODUCTS.fp32_precision
    try:
        # torch's setters themselves: its attributes can't be set once it has been told to allow that in contexts alone
        torch._C._set_cudnn_benchmark(not deterministic)
        if tf32 is not None:
            _allow_tf32(tf32, tf32)
        yield
    finally:
        torch._C._set_cudnn_benchmark(benchmark)
        if tf32 is not None:
            _allow_tf32(convolutions == "tf32", products == "tf32")
            torch._C._set_fp32_precision_setter("cuda", "conv", convolutions)
            torch._C._set_fp32_precision_setter("cuda", "rnn", recurrent)
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
    torch._C._set_cudnn_allow_tf32(convolutions)
    _PRODUCTS.allow_tf32 = products
