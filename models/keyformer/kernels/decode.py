"""One new token a sequence: attention over the slots, scores and eviction, in two kernels.

The first reads each key and value once, a part of a head's slots in each program, so that
one sequence fills the card. The second joins the parts; beside that, and at the same time,
it adds up the scores, finds the token that leaves and writes the new one over it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from keyformer.attention import Tokens
from keyformer.config import KeyformerConfig
from keyformer.kernels.noise import LOG2_E, head_row, query_row, spread, zeta
from keyformer.score import Scorer
from keyformer.text import Text

NOTHING = tl.constexpr(-1e30)
"""The running maximum of no logits."""

STAYS = tl.constexpr(torch.iinfo(torch.int64).max)
"""The rank of a token that may not leave."""


@triton.jit(do_not_specialize=["row"])
def _attend(
    query,
    keys,
    values,
    positions,
    places,
    slopes,
    seen,
    budgets,
    new_positions,
    new_places,
    tau,
    logits,
    stats,
    outputs,
    query_stride_batch,
    query_stride_head,
    slots,
    scale,
    row,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    ALIBI: tl.constexpr,
    SCORED: tl.constexpr,
    NOISE: tl.constexpr,
    ONCE: tl.constexpr,
):
    """Softmax and mean of values over PART slots, and the logits that scores are made of."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    batch, kv_head = tl.program_id(1) // KV_HEADS, tl.program_id(1) % KV_HEADS
    group = tl.arange(0, GROUP_BLOCK)
    head = kv_head * GROUP + group
    dim = tl.arange(0, DIM_BLOCK)
    in_group, in_head = group < GROUP, dim < HEAD_DIM

    new_position = tl.load(new_positions + batch)
    held = tl.load(seen + batch) - (new_position >= 0).to(tl.int64)
    held = tl.minimum(held, tl.load(budgets + batch)).to(tl.int32)
    query += batch * query_stride_batch + head[:, None] * query_stride_head + dim[None, :]
    q = tl.load(query, mask=in_group[:, None] & in_head[None, :], other=0.0)
    factor = scale * LOG2_E
    if ALIBI:
        slope = tl.load(slopes + head, mask=in_group, other=0.0) * LOG2_E
        place = tl.load(new_places + batch)
    if SCORED:
        sharpness = 1.0 / tl.load(tau)
        if NOISE != "none":
            rows = query_row(head_row(row, batch, head), new_position, ONCE)

    top = tl.full([GROUP_BLOCK], NOTHING, tl.float32)
    noisy_top = tl.full([GROUP_BLOCK], NOTHING, tl.float32)
    total = tl.zeros([GROUP_BLOCK], tl.float32)
    noisy_total = tl.zeros([GROUP_BLOCK], tl.float32)
    output = tl.zeros([GROUP_BLOCK, DIM_BLOCK], tl.float32)
    first_slot = tl.program_id(1).to(tl.int64) * slots
    first_logit = (batch * KV_HEADS * GROUP + head).to(tl.int64) * slots
    end = tl.minimum(part * PART + PART, held)
    for start in range(part * PART, end, BLOCK):
        slot = start + tl.arange(0, BLOCK)
        filled = slot < held
        vectors = (first_slot + slot)[:, None] * HEAD_DIM + dim[None, :]
        there = filled[:, None] & in_head[None, :]
        k = tl.load(keys + vectors, mask=there, other=0.0)
        v = tl.load(values + vectors, mask=there, other=0.0)
        if GROUP_BLOCK == 1:
            x = tl.sum(k.to(tl.float32) * q.to(tl.float32), axis=1)[None, :]
        else:
            x = tl.dot(q, tl.trans(k), input_precision="tf32x3")
        x = x * factor
        if ALIBI:
            distance = tl.load(places + first_slot + slot, mask=filled, other=0) - place
            x += slope[:, None] * distance.to(tl.float32)[None, :]
        x = tl.where(filled[None, :], x, NOTHING)

        new_top = tl.maximum(top, tl.max(x, axis=1))
        weight = tl.exp2(x - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weight, axis=1)
        if GROUP_BLOCK == 1:
            mean = tl.sum(tl.trans(weight) * v.to(tl.float32), axis=0)[None, :]
        else:
            mean = tl.dot(weight.to(v.dtype), v, input_precision="tf32x3")
        output = output * shrink[:, None] + mean
        top = new_top
        if SCORED:
            if NOISE != "none":
                position = tl.load(positions + first_slot + slot, mask=filled, other=0)
                x += zeta(rows[:, None], spread(position)[None, :], NOISE)
            x = tl.where(filled[None, :], x * sharpness, NOTHING)
            new_top = tl.maximum(noisy_top, tl.max(x, axis=1))
            noisy_total = noisy_total * tl.exp2(noisy_top - new_top)
            noisy_total += tl.sum(tl.exp2(x - new_top[:, None]), axis=1)
            noisy_top = new_top
            x_at = logits + first_logit[:, None] + slot[None, :]
            tl.store(x_at, x, mask=in_group[:, None] & filled[None, :])

    heads = tl.num_programs(1) * GROUP
    at = (batch * KV_HEADS * GROUP + head) * parts + part
    tl.store(stats + at, top, mask=in_group)
    tl.store(stats + heads * parts + at, total, mask=in_group)
    if SCORED:
        tl.store(stats + 2 * heads * parts + at, noisy_top, mask=in_group)
        tl.store(stats + 3 * heads * parts + at, noisy_total, mask=in_group)
    outputs += at.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :]
    tl.store(outputs, output, mask=in_group[:, None] & in_head[None, :])


@triton.jit
def _join(
    query,
    key,
    value,
    stats,
    outputs,
    output,
    head,
    heads,
    parts,
    used,
    scale,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
):
    """The output of a head, from its parts and the new token's own key and value."""
    dim = tl.arange(0, DIM_BLOCK)
    in_head = dim < HEAD_DIM
    q = tl.load(query + dim, mask=in_head, other=0.0).to(tl.float32)
    k = tl.load(key + dim, mask=in_head, other=0.0).to(tl.float32)
    mean = tl.load(value + dim, mask=in_head, other=0.0).to(tl.float32)
    top = tl.sum(q * k, axis=0) * (scale * LOG2_E)
    total = tl.full([], 1.0, tl.float32)
    for start in range(0, used, PARTS_BLOCK):
        part = start + tl.arange(0, PARTS_BLOCK)
        at = head * parts + part
        tops = tl.load(stats + at, mask=part < used, other=NOTHING)
        totals = tl.load(stats + heads * parts + at, mask=part < used, other=0.0)
        means = tl.load(
            outputs + at.to(tl.int64)[:, None] * HEAD_DIM + dim[None, :],
            mask=(part < used)[:, None] & in_head[None, :],
            other=0.0,
        )
        new_top = tl.maximum(top, tl.max(tops, axis=0))
        weight, shrink = tl.exp2(tops - new_top), tl.exp2(top - new_top)
        total = total * shrink + tl.sum(totals * weight, axis=0)
        mean = mean * shrink + tl.sum(means * weight[:, None], axis=0)
        top = new_top
    tl.store(output + head * HEAD_DIM + dim, mean / total, mask=in_head)


@triton.jit
def _rank(
    score, position, seen, window_start, safe_before, MEAN: tl.constexpr, STRIDE: tl.constexpr
):
    """KeyformerLayer._leaves for tokens: the lowest leaves."""
    if MEAN:
        score = score / (seen - position).to(tl.float32)
    rank = (score.to(tl.int32, bitcast=True).to(tl.int64) << 32) + (0x7FFFFFFF - position)
    recent = position >= window_start
    if STRIDE > 1:
        recent = recent & (position % STRIDE == 0)
    return tl.where(recent | (position < safe_before), STAYS, rank)


@triton.jit(do_not_specialize=["row"])
def _settle(
    query,
    key,
    value,
    stored_key,
    keys,
    values,
    positions,
    scores,
    seen,
    budgets,
    windows,
    frozen_before,
    new_positions,
    tau,
    logits,
    stats,
    outputs,
    output,
    new_scores,
    query_stride_batch,
    query_stride_head,
    key_stride_batch,
    key_stride_head,
    value_stride_batch,
    value_stride_head,
    stored_key_stride_batch,
    stored_key_stride_head,
    slots,
    parts,
    scale,
    row,
    forgetting,
    damping,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
    PARTS_BLOCK: tl.constexpr,
    SCORED: tl.constexpr,
    NOISE: tl.constexpr,
    ONCE: tl.constexpr,
    EVICTS: tl.constexpr,
    MEAN: tl.constexpr,
    FROZEN: tl.constexpr,
    STRIDE: tl.constexpr,
    SINKS: tl.constexpr,
):
    """The first programs each join a head's output; the rest score and evict, each in a head."""
    heads = KV_HEADS * GROUP
    kv_pairs = tl.num_programs(0) // (GROUP + 1)
    pair = tl.program_id(0)
    joins = pair < kv_pairs * GROUP
    if joins:
        batch, kv_head = pair // heads, pair % heads // GROUP
    else:
        pair -= kv_pairs * GROUP
        batch, kv_head = pair // KV_HEADS, pair % KV_HEADS
    new_position = tl.load(new_positions + batch)
    seen_now, budget = tl.load(seen + batch), tl.load(budgets + batch)
    held = tl.minimum(seen_now - (new_position >= 0).to(tl.int64), budget).to(tl.int32)
    used = tl.cdiv(held, PART)
    key += batch * key_stride_batch + kv_head * key_stride_head
    value += batch * value_stride_batch + kv_head * value_stride_head
    if joins:
        _join(
            query + batch * query_stride_batch + pair % heads * query_stride_head,
            key,
            value,
            stats,
            outputs,
            output,
            pair,
            kv_pairs * GROUP,
            parts,
            used,
            scale,
            HEAD_DIM,
            DIM_BLOCK,
            PARTS_BLOCK,
        )
    elif new_position >= 0:
        dim = tl.arange(0, DIM_BLOCK)
        in_head = dim < HEAD_DIM
        first_slot = pair.to(tl.int64) * slots
        new_score = tl.full([], 0.0, tl.float32)
        if SCORED:
            group = tl.arange(0, GROUP_BLOCK)
            in_group = group < GROUP
            head = kv_head * GROUP + group
            queries = query + batch * query_stride_batch + head[:, None] * query_stride_head
            real = in_group[:, None] & in_head[None, :]
            q = tl.load(queries + dim[None, :], mask=real, other=0.0).to(tl.float32)
            new_key = tl.load(key + dim, mask=in_head, other=0.0).to(tl.float32)
            x = tl.sum(q * new_key[None, :], axis=1) * (scale * LOG2_E)
            if NOISE != "none":
                rows = query_row(head_row(row, batch, head), new_position, ONCE)
                x += zeta(rows, spread(new_position), NOISE)
            x *= 1.0 / tl.load(tau)
            top, total = x, tl.full([GROUP_BLOCK], 1.0, tl.float32)
            for start in range(0, used, PARTS_BLOCK):
                part = start + tl.arange(0, PARTS_BLOCK)
                at = (2 * kv_pairs * GROUP + batch * heads + head)[:, None] * parts + part[None, :]
                there = in_group[:, None] & (part < used)[None, :]
                tops = tl.load(stats + at, mask=there, other=NOTHING)
                totals = tl.load(stats + kv_pairs * GROUP * parts + at, mask=there, other=0.0)
                new_top = tl.maximum(top, tl.max(tops, axis=1))
                total *= tl.exp2(top - new_top)
                total += tl.sum(totals * tl.exp2(tops - new_top[:, None]), axis=1)
                top = new_top
            normal = top + tl.log2(total)
            new_score = tl.sum(tl.where(in_group, tl.exp2(x - normal), 0.0), axis=0) * damping

        safe_before = tl.minimum(budget, SINKS)
        if FROZEN:
            safe_before = tl.maximum(safe_before, tl.load(frozen_before + batch))
        window_start = seen_now - STRIDE * tl.load(windows + batch)
        full = held == budget
        lowest = tl.full([BLOCK], STAYS, tl.int64)
        lowest_slot = tl.zeros([BLOCK], tl.int32)
        end = held
        if not SCORED:
            end = tl.where(full, held, 0)
        for start in range(0, end, BLOCK):
            slot = start + tl.arange(0, BLOCK)
            filled = slot < held
            score = tl.zeros([BLOCK], tl.float32)
            if SCORED:
                y_at = (batch * heads + head).to(tl.int64)[:, None] * slots + slot[None, :]
                y_there = in_group[:, None] & filled[None, :]
                y = tl.load(logits + y_at, mask=y_there, other=NOTHING)
                given = tl.sum(tl.exp2(y - normal[:, None]), axis=0)
                score = tl.load(scores + first_slot + slot, mask=filled, other=0.0)
                score = score * forgetting + given * damping
                tl.store(scores + first_slot + slot, score, mask=filled)
            if EVICTS:
                position = tl.load(positions + first_slot + slot, mask=filled, other=0)
                rank = _rank(score, position, seen_now, window_start, safe_before, MEAN, STRIDE)
                lower = filled & (rank < lowest)
                lowest = tl.where(lower, rank, lowest)
                lowest_slot = tl.where(lower, slot, lowest_slot)
        if EVICTS:
            new_rank = _rank(
                new_score, new_position, seen_now, window_start, safe_before, MEAN, STRIDE
            )
            leaving = tl.min(lowest, axis=0)
            loser = tl.min(tl.where(lowest == leaving, lowest_slot, slots), axis=0)
            target = first_slot + tl.where(full, loser, held)
            stays = (held < budget) | (leaving < new_rank)
            tl.debug_barrier()  # the slot's own score was stored by another thread
            tl.store(scores + target, new_score, mask=stays)
            tl.store(positions + target, new_position, mask=stays)
            stored_key += batch * stored_key_stride_batch + kv_head * stored_key_stride_head
            stored = tl.load(stored_key + dim, mask=in_head, other=0.0)
            tl.store(keys + target * HEAD_DIM + dim, stored, mask=in_head & stays)
            stored = tl.load(value + dim, mask=in_head, other=0.0)
            tl.store(values + target * HEAD_DIM + dim, stored, mask=in_head & stays)
        else:
            tl.store(new_scores + pair, new_score)


def tiling(vector_bytes: int) -> tuple[int, int, int]:
    """Slots read at a time and in a whole program, and its warps."""
    block = max(16, min(128, 32768 // vector_bytes))
    return block, block, 4


def step(
    config: KeyformerConfig,
    text: Text,
    query: Tensor,
    slots: Tokens,
    held: Tokens,
    scores: Tensor,
    read: Tokens,
    new: Tokens,
    scorer: Scorer | None,
    tau: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None,
    evicts: bool,
) -> tuple[Tensor, Tensor]:
    """Attend with one new token a sequence, add up scores, and write it over who leaves.

    What attention.attention and KeyformerLayer.admit do, without waiting for the device and
    without a number of this step among the arguments, so that the step can be replayed.

    Parameters
    ----------
    config, text
        The eviction rule, and how far each sequence is.
    query
        (batch, heads, 1, head_dim).
    slots, read
        Cached and new tokens as attention reads them.
    held, scores, new
        The slots and the new tokens as they are stored; the slots are written. Other than
        ``slots`` and ``read`` only where keys are rotated when they are read.
    scorer
        Whose noise and factor count; None where nothing is ranked.
    tau
        () float32: the temperature, in place of the scorer's.
    scale, alibi_slopes
        See attention.attention.
    evicts
        False where the scores of other layers decide too: then nothing is written but scores.

    Returns
    -------
    tuple
        Output (batch, heads, 1, head_dim), and the new tokens' scores (batch, kv_heads, 1)
        float32, of use where nothing was evicted.
    """
    batch, heads, _, head_dim = query.shape
    kv_heads, count = held.positions.shape[1:]
    group = heads // kv_heads
    dim_block = max(16, triton.next_power_of_2(head_dim))
    # With tensor cores, which take 16 rows at least; a single head needs none.
    group_block = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    block, part, warps = tiling(dim_block * query.element_size())
    parts = max(1, triton.cdiv(count, part))
    scored = scorer is not None
    noise = scorer.noise_drawn if scorer is not None else "none"
    row = scorer.row if scorer is not None else 0

    def scratch(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=query.device)

    logits = scratch(batch * heads, count if scored else 0)
    stats = scratch(4 if scored else 2, batch * heads, parts)
    outputs = scratch(batch * heads, parts, head_dim)
    output = torch.empty((batch, 1, heads, head_dim), dtype=query.dtype, device=query.device)
    new_scores = scores.new_zeros(batch, kv_heads, 0 if evicts else 1)
    shape = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "GROUP_BLOCK": group_block,
        "HEAD_DIM": head_dim,
        "DIM_BLOCK": dim_block,
        "SCORED": scored,
        "NOISE": noise,
        "ONCE": config.noise_schedule == "once",
    }
    _attend[(parts, batch * kv_heads)](
        query,
        slots.keys,
        slots.values,
        slots.positions,
        slots.places,
        alibi_slopes,
        text.seen,
        text.budget,
        text.positions,
        text.places,
        tau,
        logits,
        stats,
        outputs,
        *query.stride()[:2],
        count,
        scale,
        row,
        BLOCK=block,
        PART=part,
        ALIBI=alibi_slopes is not None,
        num_warps=warps,
        num_stages=1,
        **shape,
    )
    _settle[(batch * kv_heads * (group + 1),)](
        query,
        read.keys,
        new.values,
        new.keys,
        held.keys,
        held.values,
        held.positions,
        scores,
        text.seen,
        text.budget,
        text.window,
        text.frozen_before,
        text.positions,
        tau,
        logits,
        stats,
        outputs,
        output,
        new_scores,
        *query.stride()[:2],
        *read.keys.stride()[:2],
        *new.values.stride()[:2],
        *new.keys.stride()[:2],
        count,
        parts,
        scale,
        row,
        config.forgetting,
        scorer.factor if scorer is not None else 1.0,
        BLOCK=max(64, 2048 // group_block),
        PART=part,
        PARTS_BLOCK=16,
        EVICTS=evicts,
        MEAN=config.normalize == "mean",
        FROZEN=config.key_set == "frozen",
        STRIDE=config.dilation + 1,
        SINKS=config.sinks,
        num_warps=8,
        num_stages=1,
        **shape,
    )
    return output.transpose(1, 2), new_scores
