"""What the kernels share: tensors laid out as they read them, and tiles of vectors out of those.

A program's own vectors may begin anywhere in a tensor, so what leads to them is counted in 64
bits; within a tile 32 are enough, and faster.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from keyformer import attention

HIDDEN = tl.constexpr(attention.HIDDEN)
"""The logit of a key that is not there: finite, so that no difference of two is NaN."""

FARTHEST = 2**24
"""Elements from one vector to the next up to which a tile's offsets have 32 bits."""


def readable(vectors: Tensor) -> Tensor:
    """The same, with the elements of a vector side by side; copied where they are not.

    What the dimensions before the last are apart a kernel is told: sliced and expanded heads,
    sequences and tokens are read where they are.
    """
    if vectors.stride(-1) == 1 and (vectors.ndim < 2 or vectors.stride(-2) < FARTHEST):
        return vectors
    return vectors.contiguous()


def readable_slopes(slopes: Tensor | None) -> Tensor | None:
    """ALiBi's slopes as the kernels read them: float32, side by side."""
    return None if slopes is None else slopes.float().contiguous()


@triton.jit
def tile(
    base,
    start,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    CUT: tl.constexpr,
):
    """BLOCK vectors of a matrix from ``start`` on; 0 from ``end`` on, if it may CUT the tile."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    at = base + tl.cast(start, tl.int64) * stride + row[:, None] * stride + dim[None, :]
    if CUT and HEAD_DIM != DIM_BLOCK:
        return tl.load(at, mask=(start + row < end)[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
    elif CUT:
        return tl.load(at, mask=(start + row < end)[:, None], other=0.0)
    elif HEAD_DIM != DIM_BLOCK:
        return tl.load(at, mask=(dim < HEAD_DIM)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def slot_tile(
    elements,
    scales,
    start,
    end,
    dtype: tl.constexpr,
    KIND: tl.constexpr,
    SCALES: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK vectors of a head's slots from ``start`` on: precision.dequantize in a kernel."""
    if KIND == "auto":
        return tile(elements, start, end, HEAD_DIM, HEAD_DIM, DIM_BLOCK, BLOCK, True)
    else:
        slot, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
        filled = start + slot < end
        first = tl.cast(start, tl.int64)
        scales += first * SCALES
        there = filled[:, None] & (dim < HEAD_DIM)[None, :]
        if KIND != "int4":
            elements += first * HEAD_DIM
            raw = tl.load(elements + slot[:, None] * HEAD_DIM + dim[None, :], mask=there, other=0)
            if KIND == "float8":
                # E4M3's exponent is 120 less than that of float32 with the same bits.
                bits = raw.to(tl.uint32)
                bits = ((bits & 128) << 24) | ((bits & 127) << 20)
                value = bits.to(tl.float32, bitcast=True) * 1.329227995784916e36
            else:
                value = raw.to(tl.float32)
            scale = tl.load(scales + slot, mask=filled, other=0.0)[:, None].to(tl.float32)
            return (value * scale).to(dtype)
        elif HEAD_DIM == DIM_BLOCK:
            elements += first * (HEAD_DIM // 2)
            half = tl.arange(0, HEAD_DIM // 2)
            at = elements + slot[:, None] * (HEAD_DIM // 2) + half[None, :]
            raw = tl.load(at, mask=filled[:, None], other=0)
            value = tl.join(raw & 15, raw >> 4).permute(0, 2, 1)
            value = tl.reshape(value, [BLOCK, SCALES, HEAD_DIM // SCALES]).to(tl.float32) - 8
            at = scales + slot[:, None] * SCALES + tl.arange(0, SCALES)[None, :]
            scale = tl.load(at, mask=filled[:, None], other=0.0).to(tl.float32)
            return tl.reshape(value * scale[:, :, None], [BLOCK, HEAD_DIM]).to(dtype)
        else:
            row: tl.constexpr = HEAD_DIM // 2
            elements += first * row
            raw = tl.load(elements + slot[:, None] * row + (dim % row)[None, :], there, other=0)
            value = ((raw.to(tl.int32) >> (dim // row * 4)[None, :]) & 15) - 8
            group = dim // (HEAD_DIM // SCALES)
            scale = tl.load(scales + slot[:, None] * SCALES + group[None, :], there, other=0.0)
            return (value.to(tl.float32) * scale.to(tl.float32)).to(dtype)
