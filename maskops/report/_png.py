"""Images inside a page."""

from __future__ import annotations

import base64
import struct
import zlib

import numpy as np
import torch.nn.functional as F
from torch import Tensor

_COLOUR_TYPES = {1: 0, 3: 2}


def data_uri(image: Tensor, most: int) -> str:
    """A PNG, as an address that holds it.

    image: (C, H, W) in [0, 1]; RGB, or else shown in grey, as the mean of the channels
    most:  pixels of the longer side; larger images are made smaller
    """
    image = image.detach().float().cpu()
    if len(image) not in _COLOUR_TYPES:
        image = image.mean(0, keepdim=True)
    scale = most / max(image.shape[1:])
    if scale < 1:
        size = [max(1, round(scale * side)) for side in image.shape[1:]]
        image = F.interpolate(image[None], size, mode="area")[0]
    pixels = (255 * image.nan_to_num().clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()
    return f"data:image/png;base64,{base64.b64encode(_png(pixels)).decode()}"


def _png(pixels: np.ndarray) -> bytes:
    height, width, channels = pixels.shape
    header = struct.pack(">2I5B", width, height, 8, _COLOUR_TYPES[channels], 0, 0, 0)
    # each row begins with its filter: none
    rows = np.pad(pixels.reshape(height, -1), ((0, 0), (1, 0))).tobytes()
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
