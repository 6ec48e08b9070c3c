"""Texts fed by hand: part by part, each part evicted, then what follows judged or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer.modeling import position_inputs
from keyformer_evaluation.tasks.generation import ends_text

Tokens = list[int]


class Part(NamedTuple):
    """What of a text is read in one forward, after which the cache is evicted.

    Attributes
    ----------
    ids
        Its tokens.
    ahead
        How many of them, the last, are questions asked ahead: forgotten once it is evicted.
    """

    ids: Tokens
    ahead: int = 0


def padded(texts: Sequence[Tokens], left: bool, device: torch.device) -> tuple[Tensor, Tensor]:
    """Texts of a batch as (batch, longest) ids, int64, and which of them are real, bool."""
    longest = max(map(len, texts))
    ids = torch.zeros(len(texts), longest, dtype=torch.int64)
    real = torch.zeros(len(texts), longest, dtype=torch.bool)
    for row, text in enumerate(texts):
        part = slice(longest - len(text), None) if left else slice(len(text))
        ids[row, part], real[row, part] = torch.tensor(text), True
    return ids.to(device), real.to(device)


@torch.no_grad()
def read(
    model: PreTrainedModel,
    texts: Sequence[Sequence[Part]],
    config: KeyformerConfig,
    noise_ids: Sequence[int],
    max_new_tokens: int,
) -> tuple[KeyformerCache, Tensor]:
    """Feed a batch of texts, each in the same number of parts, as much of each asked ahead.

    Parts of other lengths are padded at their left, which models whose ALiBi counts columns (MPT)
    take for distance: there give texts of several parts alone.

    Parameters
    ----------
    noise_ids
        Which noise each text draws.
    max_new_tokens
        T of Eq. 10.

    Returns
    -------
    KeyformerCache
        Evicted to the budgets, which the first parts fix.
    Tensor
        (batch, vocabulary) logits of what comes next.
    """
    cache = KeyformerCache(model.config, config, noise_ids)
    cache.max_new_tokens = max_new_tokens
    for number, parts in enumerate(zip(*texts, strict=True)):
        ids, real = padded([part.ids for part in parts], left=True, device=model.device)
        places = {} if number else position_inputs(model, real)
        logits = model(
            ids, attention_mask=real, past_key_values=cache, logits_to_keep=1, **places
        ).logits
        (ahead,) = {part.ahead for part in parts}
        cache.forget(ahead)
    return cache, logits[:, -1]


@torch.no_grad()
def judge(
    model: PreTrainedModel, cache: KeyformerCache, logits: Tensor, following: Sequence[Tokens]
) -> list[tuple[Tensor, Tensor]]:
    """Feed what follows in each text token by token, and say how well each was foreseen.

    Parameters
    ----------
    logits
        (batch, vocabulary) of the first token.

    Returns
    -------
    list
        For each text the negative log-likelihoods of its tokens, float32, in nats, and whether
        each was the likeliest, bool; both (tokens,), on the CPU.
    """
    ids, real = padded(following, left=False, device=model.device)
    losses, hits = [], []
    for step in range(ids.shape[1]):
        token = ids[:, step]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), token, reduction="none"))
        hits.append(logits.argmax(dim=-1) == token)
        if step + 1 < ids.shape[1]:
            logits = model(
                token[:, None], attention_mask=real[:, step : step + 1], past_key_values=cache
            ).logits[:, -1]
    lost, hit = torch.stack(losses, dim=1).cpu(), torch.stack(hits, dim=1).cpu()
    return [(lost[row, : len(text)], hit[row, : len(text)]) for row, text in enumerate(following)]


@torch.no_grad()
def write(model: PreTrainedModel, cache: KeyformerCache, logits: Tensor, most: int) -> list[Tokens]:
    """Go on greedily, with ``most`` tokens at most; the one that ends a text is part of it.

    Parameters
    ----------
    logits
        (batch, vocabulary) of the first token.
    """
    tokens, wanted = [], []
    going = torch.ones(len(logits), dtype=torch.bool, device=model.device)
    while True:
        token = logits.argmax(dim=-1)
        tokens.append(token)
        wanted.append(going)
        going = going & ~ends_text(token, model, {})
        if len(tokens) == most or not going.any():
            break
        logits = model(token[:, None], attention_mask=going[:, None], past_key_values=cache).logits[
            :, -1
        ]
    written, kept = torch.stack(tokens, dim=1).cpu(), torch.stack(wanted, dim=1).cpu()
    return [row[keep].tolist() for row, keep in zip(written, kept, strict=True)]
