"""Attention over cached slots and new tokens, in query chunks, returning output and scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyformer.score import Scorer

CHUNK_ELEMENTS = {"cpu": 2**20, "gpu": 2**23}
"""Logits held at a time, in queries times keys over batch and heads: chunks of queries keep
memory linear in the prompt's length. On a CPU a chunk should stay in its cache."""


@dataclass
class Tokens:
    """Keys, values and positions of a set of tokens, in any order.

    Attributes
    ----------
    keys, values
        (batch, kv_heads, tokens, head_dim), the model's dtype.
    positions
        (batch, kv_heads, tokens) int64, position in the text, -1 for an empty place.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor

    def __getitem__(self, part: slice) -> Tokens:
        return Tokens(self.keys[:, :, part], self.values[:, :, part], self.positions[:, :, part])


@dataclass
class Attended:
    """What a set of queries gets from attention.

    Attributes
    ----------
    output
        (batch, heads, queries, head_dim), the model's dtype.
    positions
        (batch, kv_heads, tokens) int64: the slots' first, the new tokens' after them.
    scores
        f_theta summed over the queries (section 3.3.2), float32, the shape of
        ``positions``; None without a scorer.
    weights
        The plain softmax, float32, (batch, heads, queries, tokens) in the same order; None
        unless asked for.
    """

    output: Tensor
    positions: Tensor
    scores: Tensor | None
    weights: Tensor | None


def attention(
    query: Tensor,
    query_positions: Tensor,
    slots: Tokens,
    new: Tokens,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    scorer: Scorer | None = None,
    output_weights: bool = False,
) -> Attended:
    """Attend from new tokens to cached slots and, causally, to each other.

    The output uses the plain softmax of x (Eq. 4); noise and temperature touch only the
    scores. A key is seen by every query at its own or a later position. Padding queries
    (position -1) get an arbitrary output and give no score.

    Parameters
    ----------
    query
        (batch, heads, queries, head_dim); heads is a multiple of kv_heads.
    query_positions
        (batch, queries) int64, -1 for padding; increasing apart from padding.
    slots, new
        Cached tokens in any order, and one new token for each query.
    scale
        Factor of the query-key products, 1 / sqrt(head_dim) in Eq. 4.
    alibi_slopes
        (heads,) float32: adds slope * (key position - query position) to the logits.
    scorer
        Ranks the tokens; None where nothing is ranked.
    output_weights
        Return the weights too, which takes memory quadratic in a prompt.
    """
    batch, heads, queries, head_dim = query.shape
    kv_heads, held = slots.positions.shape[1:]
    group = heads // kv_heads
    query = query.view(batch, kv_heads, group, queries, head_dim)
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.view(kv_heads, group, 1, 1)
    scores = query.new_zeros(batch, kv_heads, held + queries, dtype=torch.float32)
    all_positions = torch.cat([slots.positions, new.positions], dim=-1)
    # Filled in place: small results kept between large temporaries would fragment the heap.
    output = torch.empty_like(query)
    weights = []
    chunk_elements = CHUNK_ELEMENTS["cpu" if query.device.type == "cpu" else "gpu"]
    chunk = max(1, chunk_elements // (batch * heads * (held + queries)))
    for start in range(0, queries, chunk):
        end = min(start + chunk, queries)
        seen = new[:end]
        asker = query[:, :, :, start:end].flatten(2, 3)
        asked_from = query_positions[:, start:end]
        positions = all_positions[..., : held + end]

        # Two products instead of one over joined keys: joining would copy the whole cache.
        logits = torch.cat([asker @ t.keys.transpose(2, 3) for t in (slots, seen)], dim=-1)
        logits = logits.view(batch, kv_heads, group, end - start, held + end).float() * scale
        distance = positions[:, :, None, None, :] - asked_from[:, None, None, :, None]
        if alibi_slopes is not None:
            logits = logits + alibi_slopes * distance
        hidden = (distance > 0) | (positions < 0)[:, :, None, None, :]
        logits = logits.masked_fill(hidden, torch.finfo(torch.float32).min)

        probability = torch.softmax(logits, dim=-1)
        mixed = probability.to(new.values.dtype).flatten(2, 3)
        mean = mixed[..., :held] @ slots.values + mixed[..., held:] @ seen.values
        output[:, :, :, start:end] = mean.view(batch, kv_heads, group, end - start, head_dim)
        if scorer is not None:
            given = scorer(logits, asked_from, positions)
            is_padding = (asked_from < 0)[:, None, None, :, None]
            given = given.masked_fill(is_padding, 0.0)
            scores[..., : held + end] += given.sum(dim=(2, 3))
        if output_weights:
            unseen = queries - end
            weights.append(torch.nn.functional.pad(probability.flatten(1, 2), (0, unseen)))
    return Attended(
        output=output.flatten(1, 2),
        positions=all_positions,
        scores=scores if scorer is not None else None,
        weights=torch.cat(weights, dim=2) if output_weights else None,
    )
