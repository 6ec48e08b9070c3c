"""Where tokens stand: positions in the text or in the cache, and tables that end."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import small_stock

from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer

LIMIT = 48
NEW = {"positions": "new", "noise": "none"}


def limited(arch: str):
    """A model of 48 positions."""
    field = "max_seq_len" if arch == "mpt" else "n_positions"
    return enable_keyformer(small_stock(arch, **{field: LIMIT}))


@torch.no_grad()
def test_new_positions_equal_the_rebuilt_short_sequence(arch: str) -> None:
    """With one layer and one head, stock attention over the tokens left gives the same logits.

    A token's key depends on nothing but itself there, and on its embedded position where
    positions are learned: that stays the one it was read at.
    """
    stock = small_stock(arch, layers=1, heads=1)
    model = enable_keyformer(copy.deepcopy(stock))
    cache = KeyformerCache(model.config, KeyformerConfig(kv_budget=9, recent=40, **NEW))
    text = torch.randint(1, 61, (1, 40))
    read_at = list(range(20))
    model(text[:, :20], past_key_values=cache)
    evicted = 0
    for start, end in ((20, 21), (21, 22), (22, 27), (27, 28), (28, 29), (29, 40)):
        kept = cache.layers[0].positions[0, 0].sort().values.tolist()
        evicted += kept != list(range(start - 9, start))
        read_at += range(9, 9 + end - start)
        got = model(text[:, start:end], past_key_values=cache).logits[0]
        short = torch.tensor([kept + list(range(start, end))])
        positions = torch.arange(short.shape[1])[None]
        if arch == "cerebras":
            positions = torch.tensor(read_at)[short]
        expected = stock(text[0][short], position_ids=positions).logits[0, 9:]
        assert torch.allclose(got, expected, atol=1e-4)
    assert evicted > 3  # the tokens left are not just the last ones


@pytest.mark.parametrize("options", [{}, {"num_beams": 4}])
def test_new_positions_are_the_originals_until_something_leaves(stock, padded, options) -> None:
    full = KeyformerConfig.preset("full", positions="new")
    model = enable_keyformer(copy.deepcopy(stock), full)
    expected = stock.generate(**padded, max_new_tokens=20, **options)
    assert torch.equal(model.generate(**padded, max_new_tokens=20, **options), expected)


def test_new_positions_change_what_is_generated(evicting, padded) -> None:
    texts = [
        evicting(KeyformerConfig(kv_cache=40, positions=positions, noise="none")).generate(
            **padded, max_new_tokens=20
        )
        for positions in ("original", "new")
    ]
    assert not torch.equal(*texts)


def test_text_beyond_the_table_is_refused_before_it_begins(arch: str) -> None:
    model = limited(arch)
    prompt = torch.randint(1, 61, (2, 40))
    mask = torch.ones_like(prompt)
    mask[:, :10] = 0  # padding takes no position
    inputs = {"input_ids": prompt, "attention_mask": mask, "min_new_tokens": 1}
    assert model.generate(**inputs, max_new_tokens=19).shape[1] > 40  # the last is not fed back
    if arch == "mpt":  # ALiBi has no table
        assert model.generate(**inputs, max_new_tokens=30).shape[1] > 40
        return
    calls = []
    model.transformer.h[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for options in ({"max_new_tokens": 20}, {"max_length": 60}, {"max_new_tokens": 300}):
        with pytest.raises(InputError, match=f"has {LIMIT}"):
            model.generate(**inputs, **options)
    with pytest.raises(InputError, match="take 49 positions"):
        model(torch.randint(1, 61, (1, 49)))
    assert not calls


def test_new_positions_reach_beyond_the_table(arch: str) -> None:
    """A cache smaller than the table never comes to its end, turn after turn."""
    model = limited(arch)
    cache = KeyformerCache(model.config, KeyformerConfig(kv_budget=20, **NEW))
    for _ in range(4):
        mask = torch.ones(1, cache.get_seq_length() + 20, dtype=torch.long)
        text = model.generate(
            torch.randint(1, 61, (1, 20)),
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=40,
            min_new_tokens=40,
        )
        assert text.shape[1] == 60
    assert cache.get_seq_length() == 4 * 59 > LIMIT
    if arch == "mpt":
        return
    with pytest.raises(InputError, match="take 50 positions"):  # 20 cached and 30 new ones
        model(torch.randint(1, 61, (1, 30)), past_key_values=cache)
