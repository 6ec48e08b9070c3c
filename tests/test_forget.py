"""Tokens that a cache forgets after an eviction, as those of questions asked ahead."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from conftest import small
from torch import Tensor

import keyformer.backends
from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer

H2O = KeyformerConfig.preset("h2o", kv_budget=14, recent=50)


@pytest.fixture
def text() -> Tensor:
    """Two sequences of 40 tokens."""
    return torch.randint(2, 61, (2, 40), generator=torch.Generator().manual_seed(3))


def started(model, config: KeyformerConfig, text: Tensor) -> KeyformerCache:
    """A cache that has read a text."""
    cache = KeyformerCache(model.config, config)
    model(text, past_key_values=cache)
    return cache


@torch.no_grad()
def test_what_is_forgotten_was_read_by_the_rule_alone(text) -> None:
    """Later tokens see those that stayed and are counted from where the text goes on."""
    one = dict.fromkeys(("num_hidden_layers", "num_attention_heads", "num_key_value_heads"), 1)
    stock = small("llama", **one)
    config = KeyformerConfig.preset("recall", kv_budget=12)
    model = enable_keyformer(copy.deepcopy(stock), config)
    cache = started(model, config, text[:, :20])
    held = cache.layers[0].positions[:, 0].clone()
    cache.forget(5)
    assert cache.get_seq_length() == 15
    positions = cache.layers[0].positions[:, 0]
    assert held.max() == 19 and torch.equal(positions, held.masked_fill(held >= 15, -1))
    mask = torch.ones(2, 1, 16, 16).tril().bool()
    for row in range(2):
        mask[row, :, 15:, :15] = False
        mask[row, :, 15:, positions[row, positions[row] >= 0]] = True
    whole = torch.cat([text[:, :15], text[:, 20:21]], dim=1)
    hidden = torch.zeros(mask.shape).masked_fill(~mask, -1e9)
    expected = stock(whole, attention_mask=hidden).logits[:, -1:]
    got = model(text[:, 20:21], past_key_values=cache).logits
    assert torch.allclose(got, expected, atol=1e-5)


@pytest.fixture
def on_kernels_by_default(monkeypatch) -> list[bool]:
    """Kernels run wherever they can, as on a GPU; whether they could, each time."""
    can, taken = keyformer.backends.on_kernels, []

    def auto(backend, query, **others) -> bool:
        taken.append(not any(others.values()) and can("triton", query))
        return taken[-1]

    for place in (keyformer.backends, keyformer.backends.choice):
        monkeypatch.setattr(place, "on_kernels", auto)
    return taken


@torch.no_grad()
@pytest.mark.parametrize(("question", "chunk"), [(1, None), (3, 7), (9, None)])
def test_kernels_wait_until_the_slots_are_filled(
    request, text, question: int, chunk: int | None
) -> None:
    """torch attends while some are free between others, and gives what it gives alone."""
    config = replace(H2O, prefill_chunk=chunk)
    model = enable_keyformer(small("llama", num_hidden_layers=1), config)
    parts = [text[:, 24 : 24 + question], *text[:, 33:].split(1, dim=1)]
    ends = []
    for fixture in (None, "on_kernels_by_default"):
        taken = request.getfixturevalue(fixture) if fixture else []
        cache = started(model, config, text[:, :24])
        cache.forget(5)
        model(text[:, :2], past_key_values=cache)
        cache.forget(5)  # all that is free now, one of the text among them
        del taken[:]
        ends.append([model(part, past_key_values=cache).logits for part in parts])
    assert False in taken and taken[-1] == (question > 1)
    for one, other in zip(*ends, strict=True):
        assert torch.allclose(one, other, atol=1e-4)


@torch.no_grad()
def test_frozen_tokens_are_those_that_are_left(text) -> None:
    """The recent window moves on."""
    config = replace(H2O, key_set="frozen")
    model = enable_keyformer(small("llama", num_hidden_layers=1), config)
    cache = started(model, config, text[:, :30])
    cache.forget(10)
    for token in text[:, 10:].split(1, dim=1):
        model(token, past_key_values=cache)
    assert set(range(43, 50)) < set(cache.layers[0].positions[0, 0].tolist())


@torch.no_grad()
def test_steps_are_forgotten_and_what_was_refused_is_not_counted(text) -> None:
    config = KeyformerConfig.preset("recall", kv_cache=50)
    sizes = {"n_positions": 30, "max_position_embeddings": 30}
    model = enable_keyformer(small("gpt2", **sizes), config)
    cache = started(model, config, text[:, :20])
    for token in text[:, 20:24].split(1, dim=1):
        model(token, past_key_values=cache)
    with pytest.raises(InputError, match="30"):
        model(text[:, :10], past_key_values=cache)
    cache.forget(3)
    assert cache.text.seen.tolist() == [21, 21]
    assert cache.columns.length == cache.text.length == 21 and cache.text.step == 1


@torch.no_grad()
@pytest.mark.parametrize("takes_back", ["forget", "crop"])
def test_beams_have_no_more_in_common_than_is_left(
    on_kernels_by_default, text, takes_back: str
) -> None:
    config = replace(H2O, kv_budget=30)
    model = enable_keyformer(small("llama", num_hidden_layers=1), config)
    cache = started(model, config, text[:1, :20].repeat(2, 1))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.forget(6) if takes_back == "forget" else cache.crop(-6)
    model(text[:, :5], past_key_values=cache)
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache.layers[0].keys[0], cache.layers[0].keys[1])


@torch.no_grad()
@pytest.mark.parametrize("tokens", [-1, 20, 1.0, "2", None, True])
def test_what_cannot_be_forgotten_is_named(text, tokens) -> None:
    model = enable_keyformer(small("llama"), H2O)
    cache = started(model, H2O, text[:, :20])
    with pytest.raises(InputError, match=f"below the 20 that the cache has read, got {tokens!r}"):
        cache.forget(tokens)
    KeyformerCache(model.config, H2O).forget(0)
    new = replace(H2O, positions="new")
    with pytest.raises(InputError, match="positions 'new'"):
        started(enable_keyformer(model, new), new, text[:, :20]).forget(2)
