"""RoPE in one pass over the vectors: on pairs of neighbours, as GPT-J has it, and on halves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyformer.kernels.early import early, let_next_start, wait
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
    EARLY: tl.constexpr,
):
    """Some vectors of (batch, heads, tokens), all of their dimensions."""
    wait(EARLY)
    let_next_start(EARLY)
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
        **early(vectors.device),
    )
    return output


@triton.jit
def _rotate_halves(
    query,
    key,
    cos,
    sin,
    query_output,
    key_output,
    heads,
    kv_heads,
    tokens,
    query_stride_batch,
    query_stride_head,
    query_stride_token,
    key_stride_batch,
    key_stride_head,
    key_stride_token,
    angle_stride_batch,
    angle_stride_token,
    HEAD_DIM: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Some heads of a token, those of the keys after those of the queries."""
    wait(EARLY)
    let_next_start(EARLY)
    half: tl.constexpr = HEAD_DIM // 2
    batch, token = tl.program_id(0).to(tl.int64) // tokens, tl.program_id(0) % tokens
    head, dim = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, HALF_BLOCK)
    of_key = head >= heads
    kv_head = head - heads
    at = batch * query_stride_batch + head * query_stride_head + token * query_stride_token
    key_at = batch * key_stride_batch + kv_head * key_stride_head + token * key_stride_token
    vector = tl.where(of_key, key + key_at, query + at)[:, None] + dim[None, :]
    real = (kv_head < kv_heads)[:, None] & (dim < half)[None, :]
    first = tl.load(vector, mask=real, other=0.0).to(tl.float32)
    second = tl.load(vector + half, mask=real, other=0.0).to(tl.float32)
    angle = batch * angle_stride_batch + token * angle_stride_token + dim
    in_half = dim < half
    cos_1 = tl.load(cos + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cos + angle + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sin + angle, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sin + angle + half, mask=in_half, other=0.0).to(tl.float32)[None, :]
    at = ((batch * heads + head) * tokens + token) * HEAD_DIM
    key_at = ((batch * kv_heads + kv_head) * tokens + token) * HEAD_DIM
    output = tl.where(of_key, key_output + key_at, query_output + at)[:, None] + dim[None, :]
    tl.store(output, first * cos_1 - second * sin_1, mask=real)
    tl.store(output + half, second * cos_2 + first * sin_2, mask=real)


def rotate_halves(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Turn the vectors of queries and keys, each number with that half a vector further on.

    Parameters
    ----------
    query, key
        (batch, heads or kv_heads, tokens, head_dim).
    cos, sin
        (batch or 1, tokens, head_dim) of the same dtype.

    Returns
    -------
    tuple
        query * cos + rotate_half(query) * sin as transformers' Llama has it, contiguous, and key
        likewise.
    """
    query, key = readable(query), readable(key)
    cos, sin = cos.contiguous(), sin.contiguous()
    batch, heads, tokens, head_dim = query.shape
    kv_heads = key.shape[1]
    turned = torch.empty_like(query, memory_format=torch.contiguous_format)
    turned_key = torch.empty_like(key, memory_format=torch.contiguous_format)
    half_block = triton.next_power_of_2(head_dim // 2)
    block = max(1, 256 // half_block)
    _rotate_halves[(batch * tokens, triton.cdiv(heads + kv_heads, block))](
        query,
        key,
        cos,
        sin,
        turned,
        turned_key,
        heads,
        kv_heads,
        tokens,
        *query.stride()[:3],
        *key.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0,
        cos.stride(1),
        HEAD_DIM=head_dim,
        HALF_BLOCK=half_block,
        BLOCK=block,
        num_warps=1,
        **early(query.device),
    )
    return turned, turned_key
