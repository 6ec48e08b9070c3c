"""RoPE on pairs of neighbours, as GPT-J has it, in one pass over the vectors."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyformer.kernels.tiles import readable


@triton.jit
def _rotate(
    vectors,
    table,
    places,
    output,
    rows,
    heads,
    tokens,
    stride_batch,
    stride_head,
    stride_token,
    place_stride_batch,
    place_stride_head,
    place_stride_token,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    ROTARY_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Some vectors of (batch, heads, tokens), all of their dimensions."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    batch, head, token = row // tokens // heads, row // tokens % heads, row % tokens
    there = row < rows
    dim, pair = tl.arange(0, DIM_BLOCK), tl.arange(0, DIM_BLOCK // 2)
    real = there[:, None] & (dim < HEAD_DIM)[None, :]
    at = batch * stride_batch + head * stride_head + token * stride_token
    x = tl.load(vectors + at[:, None] + dim[None, :], mask=real, other=0.0).to(tl.float32)
    at = batch * place_stride_batch + head * place_stride_head + token * place_stride_token
    place = tl.maximum(tl.load(places + at, mask=there, other=0), 0)
    turning = there[:, None] & (pair < ROTARY_DIM // 2)[None, :]
    angle = table + place[:, None] * ROTARY_DIM + pair[None, :]
    sin = tl.load(angle, mask=turning, other=0.0).to(tl.float32)
    cos = tl.load(angle + ROTARY_DIM // 2, mask=turning, other=1.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(x, [BLOCK, DIM_BLOCK // 2, 2]))
    turned = tl.join(even * cos - odd * sin, odd * cos + even * sin)
    at = row[:, None] * HEAD_DIM + dim[None, :]
    tl.store(output + at, tl.reshape(turned, [BLOCK, DIM_BLOCK]), mask=real)


def rotate_neighbours(vectors: Tensor, table: Tensor, places: Tensor) -> Tensor:
    """Turn the first dimensions of vectors, each pair of neighbours, by the angles of its place.

    Parameters
    ----------
    vectors
        (batch, heads, tokens, head_dim).
    table
        (places, rotary_dim), floating: the sines of each place and then its cosines.
    places
        (batch, heads or 1, tokens) int64; below 0 for an empty slot, whatever becomes of it.

    Returns
    -------
    Tensor
        Of the shape and dtype of ``vectors``, contiguous.
    """
    vectors, table = readable(vectors), table.contiguous()
    batch, heads, tokens, head_dim = vectors.shape
    output = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
    rows = batch * heads * tokens
    dim_block = max(2, triton.next_power_of_2(head_dim))
    block = max(1, 1024 // dim_block)
    _rotate[(triton.cdiv(rows, block),)](
        vectors,
        table,
        places,
        output,
        rows,
        heads,
        tokens,
        *vectors.stride()[:3],
        *places.expand(batch, heads, tokens).stride(),
        HEAD_DIM=head_dim,
        DIM_BLOCK=dim_block,
        ROTARY_DIM=table.shape[-1],
        BLOCK=block,
    )
    return output
