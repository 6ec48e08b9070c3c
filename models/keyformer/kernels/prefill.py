"""Attention and scores of a prompt, in tiles: no tensor of queries times keys exists.

Online softmax, as in flash attention; query heads of a group share their keys (GQA).

The first kernel gives the output and the log-sum-exps of the softmax behind the scores
(Eq. 9); the second, once those are known, its sums over the queries, drawing the same noise
again. Slots that hold earlier text and the new tokens are walked over one after the other. Where
not all queries are asked for scores, both take the rows of those alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from keyformer.kernels.noise import (
    LOG2_E,
    divide,
    exponential,
    head_row,
    query_row,
    spread,
    zeta,
)
from keyformer.kernels.tiles import HIDDEN, tile


@triton.jit
def _add(
    output,
    top,
    total,
    noisy_top,
    noisy_total,
    logits,
    shift,
    value,
    rows,
    columns,
    sharpness,
    NOISE: tl.constexpr,
    NOISY: tl.constexpr,
    SOFT: tl.constexpr,
    OUTPUT: tl.constexpr,
):
    """Take a tile of logits (queries, keys), all of them plus ``shift``, into the softmaxes."""
    new_top = tl.maximum(top, tl.max(logits, axis=1) + shift)
    weight = tl.exp2(logits - (new_top - shift)[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weight, axis=1)
    if OUTPUT:
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
        shift *= sharpness
        new_noisy_top = tl.maximum(noisy_top, tl.max(logits, axis=1) + shift)
        noisy_total *= tl.exp2(noisy_top - new_noisy_top)
        noisy_total += tl.sum(tl.exp2(logits - (new_noisy_top - shift)[:, None]), axis=1)
        noisy_top = new_noisy_top
    return output, new_top, total, noisy_top, noisy_total


@triton.jit
def _asked(first, last, most, ASKED: tl.constexpr):
    """How many of the queries from ``first`` to ``last`` are asked, and from one to the next."""
    queries = tl.maximum(last - first + 1, 0)
    if ASKED == "spread":
        step = tl.maximum(tl.cdiv(queries, most), 1)
        return tl.cdiv(queries, step), step
    else:
        return tl.minimum(queries, most), queries * 0 + 1


@triton.jit(do_not_specialize=["row", "slots", "most"])
def attend(
    query,
    key,
    value,
    slot_key,
    slot_value,
    slot_positions,
    slot_places,
    slopes,
    held,
    columns,
    output,
    normal,
    hashes,
    sequences,
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
    padded,
    slots,
    scale,
    sharpness,
    log_factor,
    log_forgetting,
    row,
    most,
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
    OUTPUT: tl.constexpr,
    ASKED: tl.constexpr,
):
    """OUTPUT of QUERY_BLOCK queries of a head, and the log-sum-exp of (x + zeta) / tau.

    Of "all" queries, or where ASKED is "last" or "spread" of ``most``: then a row is one of
    those. The grid is one of padded / QUERY_BLOCK * batch * heads. Vectors lie side by side;
    those of slots are dense, what leads to the others is told by strides.

    =========================== ==================================== =====================
    array                       shape                                dtype
    =========================== ==================================== =====================
    query                       (batch, heads, queries, HEAD_DIM)    model's
    key, value                  (batch, kv_heads, queries, HEAD_DIM) model's
    slot_key, slot_value        (batch, kv_heads, slots, HEAD_DIM)   model's
    slot_positions, slot_places (batch, kv_heads, slots)             int64, filled first
    slopes                      (heads,)                             float32 or None
    held                        (batch, kv_heads)                    int64: filled slots
    columns                     (4, batch)                           int64: Span.columns
    output                      (batch, queries, heads, HEAD_DIM)    model's
    normal                      (batch, heads, padded)               float32
    hashes                      (batch, heads, padded)               int32, of the queries
    sequences                   (batch,)                             int64 or None
    =========================== ==================================== =====================
    """
    # exp(x + zeta) is exp(x) over an exponential variate: at tau = 1 no second exp is needed.
    SOFT: tl.constexpr = NOISE == "gumbel" and TAU_IS_1
    # The last queries have the most keys: they go first.
    blocks = tl.cdiv(queries, QUERY_BLOCK)
    if ASKED != "all":
        blocks = padded // QUERY_BLOCK
    start_row = (blocks - 1 - tl.program_id(0) % blocks) * QUERY_BLOCK
    query_head = (tl.program_id(0) // blocks).to(tl.int64)
    batch, head = query_head // HEADS, query_head % HEADS
    kv_head = head // GROUP
    query += batch * query_stride_batch + head * query_stride_head
    key += batch * key_stride_batch + kv_head * key_stride_head
    value += batch * value_stride_batch + kv_head * value_stride_head
    # From the first real token on, places and positions go up by one from column to column.
    batches = tl.num_programs(0) // blocks // HEADS
    first = tl.load(columns + batch).to(tl.int32)
    to_position = tl.load(columns + batches + batch).to(tl.int32) - first
    to_place = tl.load(columns + 2 * batches + batch).to(tl.int32) - first
    last = tl.load(columns + 3 * batches + batch).to(tl.int32)
    rows_asked, step, start = queries, 1, start_row
    if ASKED != "all":
        rows_asked, step = _asked(first, last, most, ASKED)
        start = last - (rows_asked - 1 - start_row) * step
    asked = start + tl.arange(0, QUERY_BLOCK) * step
    # Tiles of keys begin at multiples of their size.
    cut_from = start // KEY_BLOCK * KEY_BLOCK

    top = tl.full([QUERY_BLOCK], HIDDEN, tl.float32)
    noisy_top = tl.full([QUERY_BLOCK], HIDDEN, tl.float32)
    total = tl.full([QUERY_BLOCK], 1.0, tl.float32)
    noisy_total = tl.full([QUERY_BLOCK], 1.0, tl.float32)
    mean = tl.zeros([QUERY_BLOCK, DIM_BLOCK], tl.float32)
    factor = scale * LOG2_E
    # ALiBi's distances are from here: the softmax does not see what a query's logits share.
    here = start + (QUERY_BLOCK - 1) * step
    slope = 0.0
    if ALIBI:
        slope = tl.load(slopes + head) * LOG2_E
    rows = tl.zeros([QUERY_BLOCK], tl.uint32)
    if NOISE != "none":
        sequence = tl.load(sequences + batch)
        rows = query_row(head_row(row, sequence, head), asked + to_position, ONCE)

    if (here >= first) & (start_row < rows_asked):
        q = tile(
            query + tl.cast(start, tl.int64) * query_stride,
            0,
            rows_asked - start_row,
            step * query_stride,
            HEAD_DIM,
            DIM_BLOCK,
            QUERY_BLOCK,
            True,
        )
        if SLOTS:
            first_slot = query_head // GROUP * slots
            slot_key += first_slot * HEAD_DIM
            slot_value += first_slot * HEAD_DIM
            slot_places += first_slot
            slot_positions += first_slot
            filled = tl.load(held + query_head // GROUP).to(tl.int32)
            for slot in range(0, filled, KEY_BLOCK):
                seen = slot + tl.arange(0, KEY_BLOCK)
                k = tile(slot_key, slot, filled, HEAD_DIM, HEAD_DIM, DIM_BLOCK, KEY_BLOCK, True)
                v = k
                if OUTPUT:
                    v = tile(
                        slot_value, slot, filled, HEAD_DIM, HEAD_DIM, DIM_BLOCK, KEY_BLOCK, True
                    )
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor
                if ALIBI:
                    place = tl.load(slot_places + seen, mask=seen < filled, other=0).to(tl.int32)
                    logits += slope * (place - (here + to_place)).to(tl.float32)[None, :]
                hash_of_slot = tl.zeros([KEY_BLOCK], tl.uint32)
                if NOISE != "none":
                    position = tl.load(slot_positions + seen, mask=seen < filled, other=0)
                    hash_of_slot = spread(position)
                mean, top, total, noisy_top, noisy_total = _add(
                    mean,
                    top,
                    total,
                    noisy_top,
                    noisy_total,
                    tl.where((seen < filled)[None, :], logits, HIDDEN),
                    0.0,
                    v,
                    rows,
                    hash_of_slot,
                    sharpness,
                    NOISE,
                    NOISY,
                    SOFT,
                    OUTPUT,
                )
        # All see the whole tiles before the first query. Then come those that are cut: by
        # padding, if there is such a one, and by each query's own place.
        column = tl.arange(0, KEY_BLOCK)
        padded_tile = first // KEY_BLOCK * KEY_BLOCK
        whole = tl.minimum(tl.cdiv(first, KEY_BLOCK) * KEY_BLOCK, cut_from)
        cut = cut_from
        if padded_tile < whole:
            cut -= KEY_BLOCK
        for CUT in tl.static_range(2):
            begin, end = whole, cut_from
            if CUT:
                begin, end = cut, tl.minimum(here + 1, queries)
            for at in range(begin, end, KEY_BLOCK):
                new = at
                if CUT:
                    new = tl.where(at < cut_from, padded_tile, at)
                k = tile(key, new, queries, key_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK, CUT)
                v = k
                if OUTPUT:
                    v = tile(value, new, queries, value_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK, CUT)
                logits = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factor
                shift = 0.0
                if ALIBI:
                    logits += (slope * column.to(tl.float32))[None, :]
                    shift = slope * (new - here).to(tl.float32)
                if CUT:
                    seen = new + column
                    sees = (asked[:, None] >= seen[None, :]) & (seen >= first)[None, :]
                    logits = tl.where(sees, logits, HIDDEN)
                mean, top, total, noisy_top, noisy_total = _add(
                    mean,
                    top,
                    total,
                    noisy_top,
                    noisy_total,
                    logits,
                    shift,
                    v,
                    rows + spread(new + to_position),
                    spread(column),
                    sharpness,
                    NOISE,
                    NOISY,
                    SOFT,
                    OUTPUT,
                )
        mean = mean / total[:, None]

    if OUTPUT:
        dim = tl.arange(0, DIM_BLOCK)
        at = output + (batch * queries + asked[:, None]) * HEADS * HEAD_DIM
        mask = (asked < queries)[:, None] & (dim < HEAD_DIM)[None, :]
        tl.store(at + head * HEAD_DIM + dim[None, :], mean, mask=mask)
    if SCORED:
        shared = slope * (here - asked).to(tl.float32)
        if NOISY:
            log = noisy_top + tl.log2(noisy_total) + shared * sharpness
        else:
            log = top + tl.log2(total) + shared
        # A query's softmax counts for less with each later one; that of padding for nothing.
        log -= log_factor + (last - asked).to(tl.float32) * log_forgetting
        if ASKED == "spread":
            log -= tl.log2(tl.maximum(tl.minimum(step, asked - first + 1), 1).to(tl.float32))
        log = tl.where((asked >= first) & (asked <= last), log, float("inf"))
        at = query_head * padded + start_row + tl.arange(0, QUERY_BLOCK)
        tl.store(normal + at, log)
        if NOISE != "none":
            tl.store(hashes + at, rows.to(tl.int32, bitcast=True))


@triton.jit(do_not_specialize=["most"])
def score(
    query,
    key,
    key_positions,
    key_places,
    slopes,
    columns,
    normal,
    hashes,
    scores,
    query_stride_batch,
    query_stride_head,
    query_stride,
    key_stride_batch,
    key_stride_head,
    key_stride,
    position_stride_batch,
    position_stride_head,
    place_stride_batch,
    place_stride_head,
    score_stride,
    queries,
    padded,
    keys,
    scale,
    sharpness,
    most,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    ALIBI: tl.constexpr,
    CAUSAL: tl.constexpr,
    NOISE: tl.constexpr,
    ASKED: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """What queries together give to KEY_BLOCK keys of a key/value head, or the LARGEST of it.

    The grid is one of ceil(keys / KEY_BLOCK) * batch * kv_heads; ``scores`` (batch, kv_heads,
    keys) float32 go to every score_stride-th row, all else is as in :func:`attend`, keys those of
    slots or new tokens. Where ASKED is "all", rows of padded are told apart by ``normal`` alone.
    """
    blocks = tl.cdiv(keys, KEY_BLOCK)
    start = tl.program_id(0) % blocks * KEY_BLOCK
    pair = (tl.program_id(0) // blocks).to(tl.int64)
    batch, kv_head = pair // KV_HEADS, pair % KV_HEADS
    seen = start + tl.arange(0, KEY_BLOCK)
    query += batch * query_stride_batch
    key += batch * key_stride_batch + kv_head * key_stride_head
    key_places += batch * place_stride_batch + kv_head * place_stride_head
    key_positions += batch * position_stride_batch + kv_head * position_stride_head
    place = tl.load(key_places + seen, mask=seen < keys, other=-1).to(tl.int32)
    hash_of_key = tl.zeros([KEY_BLOCK], tl.uint32)
    if NOISE != "none":
        hash_of_key = spread(tl.load(key_positions + seen, mask=seen < keys, other=0))
    here = tl.max(place, axis=0)
    given = tl.zeros([KEY_BLOCK], tl.float32)
    batches = tl.num_programs(0) // blocks // KV_HEADS
    first_column = tl.load(columns + batch).to(tl.int32)
    to_place = tl.load(columns + 2 * batches + batch).to(tl.int32) - first_column
    rows_asked, step, first_asked = queries, 1, 0
    if ASKED != "all":
        last_column = tl.load(columns + 3 * batches + batch).to(tl.int32)
        rows_asked, step = _asked(first_column, last_column, most, ASKED)
        first_asked = last_column - (rows_asked - 1) * step
    # The first row that is asked, and the first that all of these keys are seen by.
    first = tl.maximum(first_column - first_asked, 0) // step
    all_see = first // QUERY_BLOCK * QUERY_BLOCK
    if CAUSAL:
        first = tl.maximum(first, tl.cdiv(tl.maximum(start + step - 1 - first_asked, 0), step))
        all_see = tl.cdiv(tl.maximum(start + KEY_BLOCK + step - 2 - first_asked, 0), step)
        all_see = tl.minimum(tl.maximum(first, all_see), rows_asked)
        all_see = tl.cdiv(all_see, QUERY_BLOCK) * QUERY_BLOCK
    first = first // QUERY_BLOCK * QUERY_BLOCK
    factor = scale * LOG2_E * sharpness
    column = tl.arange(0, QUERY_BLOCK)
    k = tile(key, start, keys, key_stride, HEAD_DIM, DIM_BLOCK, KEY_BLOCK, True)
    for member in range(GROUP):
        head = kv_head * GROUP + member
        slope = 0.0
        bias = tl.zeros([KEY_BLOCK], tl.float32)
        if ALIBI:
            slope = tl.load(slopes + head) * LOG2_E * sharpness
            bias += slope * (place - here).to(tl.float32)
        bias = tl.where(place >= 0, bias, HIDDEN)
        of_query = query + head * query_stride_head
        of_head = (batch * KV_HEADS * GROUP + head) * padded
        for CUT in tl.static_range(2):
            begin, end = all_see, rows_asked
            if CUT:
                begin, end = first, all_see
            for block in range(begin, end, QUERY_BLOCK):
                asked = first_asked + block * step
                q = tile(
                    of_query + tl.cast(asked, tl.int64) * query_stride,
                    0,
                    rows_asked - block,
                    step * query_stride,
                    HEAD_DIM,
                    DIM_BLOCK,
                    QUERY_BLOCK,
                    True,
                )
                log = tl.load(normal + of_head + block + column)
                shifted = bias
                if ALIBI:
                    log += slope * (column * step).to(tl.float32)
                    shifted += slope * (here - (asked + to_place)).to(tl.float32)
                logits = tl.dot(k, tl.trans(q), input_precision="tf32x3") * factor
                logits += shifted[:, None]
                if CUT and CAUSAL:
                    told_of = asked + column * step - (step - 1)
                    logits = tl.where(told_of[None, :] >= seen[:, None], logits, HIDDEN)
                if NOISE != "none":
                    rows = tl.load(hashes + of_head + block + column).to(tl.uint32, bitcast=True)
                    logits += zeta(rows[None, :], hash_of_key[:, None], NOISE) * sharpness
                if LARGEST:
                    given = tl.maximum(given, tl.max(tl.exp2(logits - log[None, :]), axis=1))
                else:
                    given += tl.sum(tl.exp2(logits - log[None, :]), axis=1)
    at = scores + pair * score_stride + seen
    tl.store(at, given, mask=seen < keys)


def tiling(vector_bytes: int) -> tuple[int, int, int, int]:
    """Rows of a tile that stay, rows of those that pass by, warps and stages of the pipeline."""
    if vector_bytes <= 256:
        return 64, 64, 4, 3
    if vector_bytes <= 512:
        return 64, 32, 4, 2
    return 32, 32, 4, 1
