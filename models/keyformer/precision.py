"""What slots hold keys and values in: the model's dtype, or fewer bits and a scale.

A vector is quantized by itself as it enters its slot, so that a slot can be overwritten
without a look at any other, and read back by any kernel that reads whole slots.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from keyformer.config import InputError

LARGEST = {"float8": 448.0, "int8": 127.0, "int4": 7.0}
"""The largest magnitude of each kind; its scale maps a group's largest element to it."""

GROUP = 32
"""Channels of an int4 vector that share a scale, where they can; others have one in all."""

SMALLEST_SCALE = 2.0**-14
"""Of float16 without loss of precision; below it a vector is as good as zero."""


def quantize(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Vectors as a kind of slot stores them.

    An element is off by at most 2^-4 of itself with float8 (E4M3), 1/254 of the vector's
    largest element with int8, 1/14 of its group's with int4, and by the rounding of a float16
    scale.

    Parameters
    ----------
    x
        (..., head_dim), a floating dtype; head_dim is even for int4.
    kind
        One of ``config.CACHE_DTYPES``; "auto" stores x as it is.

    Returns
    -------
    tuple
        Elements: int8 (..., head_dim); for float8 its bits as uint8, since not every operation
        knows that dtype; for int4 uint8 (..., head_dim / 2), a byte of channel c in its low
        half and c + head_dim / 2 in its high one, 8 added to each. Scales: float16 (...,
        groups); groups is 0 for "auto".

    Raises
    ------
    InputError
        If int4 elements do not fill their last byte.
    """
    if kind == "auto":
        return x, x.new_empty(*x.shape[:-1], 0, dtype=torch.float16)
    if kind == "int4" and x.shape[-1] % 2:
        raise InputError(
            f"cache_dtype 'int4' packs two channels a byte and a head has {x.shape[-1]}; int8 and"
            " float8 take any number"
        )
    largest = LARGEST[kind]
    groups = x.shape[-1] // group_size(x.shape[-1], kind)
    grouped = x.float().unflatten(-1, (groups, -1))
    scales = (grouped.abs().amax(dim=-1) / largest).clamp(min=SMALLEST_SCALE).half()
    scaled = (grouped / scales[..., None].float()).clamp(-largest, largest).flatten(-2)
    if kind == "float8":
        return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales
    whole = scaled.round().to(torch.int8)
    if kind == "int8":
        return whole, scales
    low, high = (whole + 8).to(torch.uint8).chunk(2, dim=-1)
    return low | high << 4, scales


def dequantize(elements: Tensor, scales: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """The vectors (..., head_dim) that :func:`quantize` stored, in ``dtype``."""
    if kind == "auto":
        return elements
    if kind == "float8":
        elements = elements.view(torch.float8_e4m3fn)
    if kind == "int4":
        elements = torch.cat([elements & 15, elements >> 4], dim=-1).to(torch.int8) - 8
    grouped = elements.float().unflatten(-1, (scales.shape[-1], -1))
    return (grouped * scales[..., None].float()).flatten(-2).to(dtype)


def group_size(head_dim: int, kind: str) -> int:
    """Channels that share a scale."""
    return math.gcd(head_dim, GROUP) if kind == "int4" else head_dim
