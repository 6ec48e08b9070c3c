"""Attention and scores of a prompt, in tiles: no tensor of queries times keys exists.

The first kernel gives the output and the log-sum-exps of the softmax behind the scores
(Eq. 9); the second, once those are known, its sums over the queries, drawing the same noise
again. Slots that hold earlier text and the new tokens are walked over one after the other.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyformer.attention import Attended, Tokens
from keyformer.kernels.noise import (
    LOG2_E,
    divide,
    exponential,
    head_row,
    query_row,
    spread,
    zeta,
)
from keyformer.score import Scorer

HIDDEN = tl.constexpr(-1e30)
"""The logit of a key that is not there: finite, so that no difference of two is NaN."""


@triton.jit
def _tile(
    base,
    start,
    end,
    stride,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK vectors of a matrix from ``start`` on, 0 beyond its end."""
    row, dim = tl.arange(0, BLOCK), tl.arange(0, DIM_BLOCK)
    mask = (start + row < end)[:, None]
    if HEAD_DIM != DIM_BLOCK:
        mask = mask & (dim < HEAD_DIM)[None, :]
    base += tl.cast(start, tl.int64) * stride
    return tl.load(base + row[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit
def _add(
    output,
    top,
    total,
    noisy_top,
    noisy_total,
    logits,
    value,
    rows,
    columns,
    sharpness,
    NOISE: tl.constexpr,
    NOISY: tl.constexpr,
    SOFT: tl.constexpr,
):
    """Take a tile of logits (queries, keys) into the running softmaxes."""
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weight = tl.exp2(logits - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, axis=1)
    output = output * shrink[:, None]
    output = tl.dot(weight.to(value.dtype), value, output, input_precision="tf32x3")
    if NOISY and SOFT:
        noisy_total *= shrink
        noisy_total += tl.sum(divide(weight, exponential(rows[:, None], columns[None, :])), axis=1)
        noisy_top = new_top
    elif NOISY:
        if NOISE != "none":
            logits += zeta(rows[:, None], columns[None, :], NOISE)
        logits *= sharpness
        new_noisy_top = tl.maximum(noisy_top, tl.max(logits, axis=1))
        noisy_total *= tl.exp2(noisy_top - new_noisy_top)
        noisy_total += tl.sum(tl.exp2(logits - new_noisy_top[:, None]), axis=1)
        noisy_top = new_noisy_top
    return output, new_top, total, noisy_top, noisy_total


@triton.jit(do_not_specialize=["row", "slots"])
def _attend(
    query,
    key,
    value,
    slot_key,
    slot_value,
    positions,
    places,
    slot_positions,
    slot_places,
    slopes,
    held,
    first_real,
    output,
    normal,
    hashes,
    query_stride_batch,
    query_stride_head,
    query_stride,
    key_stride_batch,
    key_stride_head,
    key_stride,
    value_stride_batch,
    value_stride_head,
    value_stride,
    queries,
    slots,
    scale,
    sharpness,
    row,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
    SLOTS: tl.constexpr,
    SCORED: tl.constexpr,
    TAU_IS_1: tl.constexpr,
    NOISY: tl.constexpr,
    NOISE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Output of QUERY_BLOCK queries of a head, and the log-sum-exp of (x + zeta) / tau."""
    # exp(x + zeta) is exp(x) over an exponential variate: at tau = 1 no second exp is needed.
    SOFT: tl.constexpr = NOISE == "gumbel" and TAU_IS_1
    # The last queries have the most keys: they go first.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERY_BLOCK
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    kv_head = head // GROUP
    asked = start + tl.arange(0, QUERY_BLOCK)
    in_prompt = asked < queries
    query += batch.to(tl.int64) * query_stride_batch + head * query_stride_head
    key += batch.to(tl.int64) * key_stride_batch + kv_head * key_stride_head
    value += batch.to(tl.int64) * value_stride_batch + kv_head * value_stride_head
    positions += batch * queries
    places += batch * queries
    first = tl.load(first_real + batch).to(tl.int32)

    top = tl.full([QUERY_BLOCK], HIDDEN, tl.float32)
    noisy_top = tl.full([QUERY_BLOCK], HIDDEN, tl.float32)
    total = tl.full([QUERY_BLOCK], 1.0, tl.float32)
    noisy_total = tl.full([QUERY_BLOCK], 1.0, tl.float32)
    mean = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    factor = scale * LOG2_E
    place = tl.load(places + asked, mask=in_prompt, other=0).to(tl.int32)
    # ALiBi's distances are from here: the softmax does not see what a query's logits share.
    here = tl.max(place, axis=0)
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * LOG2_E
    rows = tl.zeros([QUERY_BLOCK], tl.uint32)
    if NOISE != "none":
        position = tl.load(positions + asked, mask=in_prompt, other=0)
        rows = query_row(head_row(row, batch, head), position, ONCE)

    if start + QUERY_BLOCK > first:
        q = _tile(query, start, queries, query_stride, HEAD_DIM, DIM_BLOCK, QUERY_BLOCK)
        if SLOTS:
            pair = tl.program_id(1) // GROUP
            slot_key += pair.to(tl.int64) * slots * HEAD_DIM
            slot_value += pair.to(tl.int64) * slots * HEAD_DIM
            filled = tl.load(held + batch).to(tl.int32)
            for slot in range(0, filled, KEY_BLOCK):
                seen = slot + tl.arange(0, KEY_BLOCK)
                k = _tile(slot_key, slot, filled, HEAD_DIM, HEAD_DIM, DIM_BLOCK, KEY_BLOCK)
                v = _tile(slot_value, slot, filled, HEAD_DIM, HEAD_DIM, DIM_BLOCK, KEY_BLOCK)
                bias = tl.where(seen < filled, 0.0, HIDDEN)
                if ALIBI:
                    at = slot_places + pair * slots + seen
                    distance = tl.load(at, mask=seen < filled, other=0).to(tl.int32) - here
                    bias += slope * distance.to(tl.float32)
                columns = tl.zeros([KEY_BLOCK], tl.uint32)
                if NOISE != "none":
                    at = slot_positions + pair * slots + seen
                    columns = spread(tl.load(at, mask=seen < filled, other=0))
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor + bias[None, :]
                mean, top, total, noisy_top, noisy_total = _add(
                    mean,
                    top,
                    total,
                    noisy_top,
                    noisy_total,
                    logits,
                    v,
                    rows,
                    columns,
                    sharpness,
                    NOISE,
                    NOISY,
                    SOFT,
                )
        for part in tl.static_range(2):
            # Keys before the first query are seen by all; from there on, each by later ones.
            begin = tl.minimum(first // KEY_BLOCK * KEY_BLOCK, start)
            end = start
            if part == 1:
                begin = start
                end = tl.minimum(start + QUERY_BLOCK, queries)
            for new in range(begin, end, KEY_BLOCK):
                seen = new + tl.arange(0, KEY_BLOCK)
                k = _tile(key, new, queries, key_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK)
                v = _tile(value, new, queries, value_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK)
                key_place = tl.load(places + seen, mask=seen < queries, other=-1).to(tl.int32)
                bias = tl.where(key_place >= 0, 0.0, HIDDEN)
                if ALIBI:
                    bias += slope * (key_place - here).to(tl.float32)
                columns = tl.zeros([KEY_BLOCK], tl.uint32)
                if NOISE != "none":
                    columns = spread(tl.load(positions + seen, mask=seen < queries, other=0))
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor + bias[None, :]
                if part == 1:
                    logits = tl.where(asked[:, None] >= seen[None, :], logits, HIDDEN)
                mean, top, total, noisy_top, noisy_total = _add(
                    mean,
                    top,
                    total,
                    noisy_top,
                    noisy_total,
                    logits,
                    v,
                    rows,
                    columns,
                    sharpness,
                    NOISE,
                    NOISY,
                    SOFT,
                )
        mean = mean / total[:, None]

    dim = tl.arange(0, DIM_BLOCK)
    at = output + (batch.to(tl.int64) * queries + asked[:, None]) * HEADS * HEAD_DIM
    mask = in_prompt[:, None] & (dim < HEAD_DIM)[None, :]
    tl.store(at + head * HEAD_DIM + dim[None, :], mean, mask=mask)
    if SCORED:
        shared = slope * (here - place).to(tl.float32)
        if NOISY:
            log = noisy_top + tl.log2(noisy_total) + shared * sharpness
        else:
            log = top + tl.log2(total) + shared
        at = tl.program_id(1) * queries + asked
        tl.store(normal + at, log, mask=in_prompt)
        if NOISE != "none":
            tl.store(hashes + at, rows.to(tl.int32, bitcast=True), mask=in_prompt)


@triton.jit
def _score(
    query,
    key,
    places,
    key_positions,
    key_places,
    slopes,
    first_real,
    normal,
    hashes,
    scores,
    query_stride_batch,
    query_stride_head,
    query_stride,
    key_stride_batch,
    key_stride_head,
    key_stride,
    place_stride_batch,
    place_stride_head,
    score_stride,
    queries,
    keys,
    scale,
    sharpness,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
    CAUSAL: tl.constexpr,
    NOISE: tl.constexpr,
):
    """The scores that all queries together give to KEY_BLOCK keys of a key/value head."""
    start = tl.program_id(0) * KEY_BLOCK
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    seen = start + tl.arange(0, KEY_BLOCK)
    query += batch.to(tl.int64) * query_stride_batch
    key += batch.to(tl.int64) * key_stride_batch + kv_head * key_stride_head
    places += batch * queries
    at = batch * place_stride_batch + kv_head * place_stride_head + seen
    place = tl.load(key_places + at, mask=seen < keys, other=-1).to(tl.int32)
    columns = tl.zeros([KEY_BLOCK], tl.uint32)
    if NOISE != "none":
        columns = spread(tl.load(key_positions + at, mask=seen < keys, other=0))
    here = tl.max(place, axis=0)
    given = tl.zeros([KEY_BLOCK], tl.float32)
    first = tl.load(first_real + batch).to(tl.int32) // QUERY_BLOCK * QUERY_BLOCK
    all_see = first
    if CAUSAL:
        first = tl.maximum(first, start // QUERY_BLOCK * QUERY_BLOCK)
        all_see = tl.minimum(tl.maximum(first, start + KEY_BLOCK), queries)
        all_see = tl.cdiv(all_see, QUERY_BLOCK) * QUERY_BLOCK
    factor = scale * LOG2_E * sharpness
    k = _tile(key, start, keys, key_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        slope = 0.0
        bias = tl.zeros([KEY_BLOCK], tl.float32)
        if ALIBI:
            slope = tl.load(slopes + head) * LOG2_E * sharpness
            bias += slope * (place - here).to(tl.float32)
        bias = tl.where(place >= 0, bias, HIDDEN)
        of_query = query + head * query_stride_head
        of_head = (batch * KV_HEADS * GROUP + head) * queries
        for part in tl.static_range(2):
            begin, end = first, all_see
            if part == 1:
                begin, end = all_see, queries
            for block in range(begin, end, QUERY_BLOCK):
                asked = block + tl.arange(0, QUERY_BLOCK)
                in_prompt = asked < queries
                q = _tile(of_query, block, queries, query_stride, HEAD_DIM, DIM_BLOCK, QUERY_BLOCK)
                log = tl.load(normal + of_head + asked, mask=in_prompt, other=float("inf"))
                if ALIBI:
                    ask_place = tl.load(places + asked, mask=in_prompt, other=0).to(tl.int32)
                    log -= slope * (here - ask_place).to(tl.float32)
                logits = tl.dot(k, tl.trans(q), input_precision="tf32x3") * factor + bias[:, None]
                if CAUSAL and part == 0:
                    logits = tl.where(asked[None, :] >= seen[:, None], logits, HIDDEN)
                if NOISE != "none":
                    rows = tl.load(hashes + of_head + asked, mask=in_prompt, other=0)
                    rows = rows.to(tl.uint32, bitcast=True)
                    logits += zeta(rows[None, :], columns[:, None], NOISE) * sharpness
                given += tl.sum(tl.exp2(logits - log[None, :]), axis=1)
    at = scores + tl.program_id(1).to(tl.int64) * score_stride + seen
    tl.store(at, given, mask=seen < keys)


def tiling(vector_bytes: int) -> tuple[int, int, int, int]:
    """Rows of a tile that stay, rows of those that pass by, warps and stages of the pipeline."""
    if vector_bytes <= 256:
        return 128, 64, 8, 3
    if vector_bytes <= 512:
        return 64, 32, 8, 2
    return 32, 32, 4, 1


def attention(
    query: Tensor,
    slots: Tokens,
    new: Tokens,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    scorer: Scorer | None = None,
) -> Attended:
    """attention.attention, without the weights; filled slots come before empty ones."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, held = slots.positions.shape[1:]
    dim_block = max(16, triton.next_power_of_2(head_dim))
    positions, places = new.positions[:, 0].contiguous(), new.places[:, 0].contiguous()
    first_real = (positions >= 0).int().argmax(dim=-1)
    first_real = first_real.masked_fill((positions < 0).all(dim=-1), queries)
    output = torch.empty((batch, queries, heads, head_dim), dtype=query.dtype, device=query.device)
    sharpness = 1.0 if scorer is None else 1.0 / scorer.tau
    row = 0 if scorer is None else scorer.row
    noise = "none" if scorer is None else scorer.noise_drawn
    scores = None
    normal = query.new_empty(batch, heads, queries if scorer else 0, dtype=torch.float32)
    hashes = normal.new_empty(normal.shape if noise != "none" else 0, dtype=torch.int32)
    shape: dict[str, Any] = {
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "DIM_BLOCK": dim_block,
        "ALIBI": alibi_slopes is not None,
        "NOISE": noise,
    }
    long, short, warps, stages = tiling(dim_block * query.element_size())
    _attend[(triton.cdiv(queries, long), batch * heads)](
        query,
        new.keys,
        new.values,
        slots.keys,
        slots.values,
        positions,
        places,
        slots.positions,
        slots.places,
        alibi_slopes,
        (slots.positions[:, 0] >= 0).sum(dim=-1),
        first_real,
        output,
        normal,
        hashes,
        *query.stride()[:3],
        *new.keys.stride()[:3],
        *new.values.stride()[:3],
        queries,
        held,
        scale,
        sharpness,
        row,
        HEADS=heads,
        SLOTS=held > 0,
        SCORED=scorer is not None,
        TAU_IS_1=sharpness == 1.0,
        ONCE=scorer is not None and scorer.config.noise_schedule == "once",
        NOISY=noise != "none" or sharpness != 1.0,
        QUERY_BLOCK=long,
        KEY_BLOCK=short,
        num_warps=warps,
        num_stages=stages,
        **shape,
    )
    if scorer is not None:
        weight = scorer.weight(positions, positions.amax(dim=-1))[:, None]
        normal = (normal - weight.log2()).masked_fill(weight == 0, float("inf"))
        scores = normal.new_empty(batch, kv_heads, held + queries)
        for tokens, causal, at in ((slots, False, 0), (new, True, held)):
            keys = tokens.keys.shape[2]
            if not keys:
                continue
            _score[(triton.cdiv(keys, long), batch * kv_heads)](
                query,
                tokens.keys,
                places,
                tokens.positions,
                tokens.places,
                alibi_slopes,
                first_real,
                normal,
                hashes,
                scores[..., at:],
                *query.stride()[:3],
                *tokens.keys.stride()[:3],
                *tokens.places.stride()[:2],
                held + queries,
                queries,
                keys,
                scale,
                sharpness,
                KV_HEADS=kv_heads,
                QUERY_BLOCK=short,
                KEY_BLOCK=long,
                CAUSAL=causal,
                num_warps=warps,
                num_stages=stages,
                **shape,
            )
    positions = torch.cat([slots.positions, new.positions], dim=-1)
    return Attended(output.transpose(1, 2), positions, scores, None)
