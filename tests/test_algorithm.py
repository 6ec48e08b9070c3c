"""The cache against a literal Algorithm 1 and against masked full-length attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import Case
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Head, rotate
from transformers import PreTrainedConfig

import keyformer.backends.torch
from keyformer import KeyformerCache, KeyformerConfig
from keyformer.config import METHODS
from keyformer.score import temperature

configs = st.builds(
    KeyformerConfig,
    kv_cache=st.floats(1, 100),
    recent=st.sampled_from([0, 10, 30, 50, 99, 100]),
    kv_budget=st.sampled_from([None, None, None, 1, 3, 8, 70]),
    tau_init=st.floats(0.5, 2),
    tau_end=st.floats(0.5, 3),
    noise=st.sampled_from(["gumbel", "gaussian", "constant", "none"]),
    noise_schedule=st.sampled_from(["fresh", "once"]),
    damping=st.sampled_from([1.0, 1.0, 0.6]),
    forgetting=st.sampled_from([1.0, 1.0, 0.9, 0.5]),
    normalize=st.sampled_from(["sum", "mean", 0.25, 0.5]),
    key_set=st.sampled_from(["dynamic", "frozen"]),
    dilation=st.sampled_from([0, 0, 1, 3]),
    positions=st.sampled_from(["original", "new"]),
    sinks=st.sampled_from([0, 0, 1, 4]),
    seed=st.integers(0, 2**40),
)
cases = st.builds(
    Case,
    config=configs,
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 2),
    prompts=st.lists(st.integers(1, 14), min_size=1, max_size=3),
    later=st.lists(st.sampled_from([1, 1, 1, 2, 5]), max_size=6),
    alibi=st.booleans(),
    rotates=st.booleans(),
    seed=st.integers(0, 2**20),
)


@settings(max_examples=80, deadline=None)
@given(case=cases, chunk=st.sampled_from([1, 40, 10**6]))
def test_equals_literal_algorithm(case: Case, chunk: int) -> None:
    """Outputs, kept positions and scores of every head after every forward."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(keyformer.backends.torch.CHUNK_ELEMENTS, "cpu", chunk)
        check_against_oracle(case)


def check_against_oracle(case: Case) -> None:
    heads = {place: case.oracle(*place) for place in case.places()}
    step = 0
    for cache, (start, end), output in case.run():
        step = 0 if end - start > 1 or start == 0 else step + 1
        tau = temperature(case.config, step, 7)
        for (row, h), head in heads.items():
            expected = head.step(*case.columns(row, h, start, end), tau)
            check_output(case, row, h, (start, end), output, expected)
            check_slots(cache.layers[0], row, h, head, case.config.needs_scores)


@settings(max_examples=60, deadline=None)
@given(case=cases, chunk=st.integers(1, 9))
def test_prompts_in_chunks_equal_literal_algorithm(case: Case, chunk: int) -> None:
    """Each chunk attends to the slots and itself; to scores and frozen keys all are one prompt."""
    case = replace(case, prompts=[max(case.prompts)])
    heads = {place: case.oracle(*place) for place in case.places()}
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), case.config)
    cache.max_new_tokens = 7
    step = 0
    for start, end in case.forwards():
        step = 0 if end - start > 1 or start == 0 else step + 1
        if step == 0:
            cache.expect(case.real(start, end))
        pieces = [(at, min(at + chunk, end)) for at in range(start, end, chunk)]
        output = torch.cat([case.attend(cache, 0, *piece) for piece in pieces], dim=2)
        assert cache.text.step == step
        assert cache.text.prompt_end == end - step
        for (row, h), head in heads.items():
            tau = temperature(case.config, step, 7)
            expected = head.step(*case.columns(row, h, start, end), tau, chunk)
            check_output(case, row, h, (start, end), output, expected)
            check_slots(cache.layers[0], row, h, head, case.config.needs_scores)


@pytest.mark.parametrize("normalize", ["sum", "mean"])
@pytest.mark.parametrize("key_set", ["dynamic", "frozen"])
def test_shared_scores_keep_the_same_tokens_in_all_layers(normalize: str, key_set: str) -> None:
    """One f_theta, summed over the layers, decides for all of them when the last has attended."""
    config = KeyformerConfig(
        kv_cache=40, recent=30, score="shared", normalize=normalize, key_set=key_set, seed=7
    )
    layers = [Case(config, 2, 2, [17, 9], [1] * 6 + [3, 1], True, seed=s) for s in range(3)]
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=3), config)
    cache.max_new_tokens = 7
    heads = [
        {place: case.oracle(*place, layer) for place in case.places()}
        for layer, case in enumerate(layers)
    ]
    step = 0
    for start, end in layers[0].forwards():
        step = 0 if end - start > 1 else step + 1
        tau = temperature(config, step, 7)
        for number, case in enumerate(layers):
            output = case.attend(cache, number, start, end)
            for (row, h), head in heads[number].items():
                expected = head.attend(*case.columns(row, h, start, end), tau)
                check_output(case, row, h, (start, end), output, expected)
        for row, h in layers[0].places():
            alike = [heads[number][row, h] for number in range(3)]
            totals = [
                sum(t.f_theta for t in tokens)
                for tokens in zip(*(head.tokens for head in alike), strict=True)
            ]
            for number, head in enumerate(alike):
                head.evict(dict(zip(head.tokens, totals, strict=True)))
                check_slots(cache.layers[number], row, h, head, True)
    assert torch.equal(cache.layers[0].positions, cache.layers[2].positions)
    assert not torch.equal(cache.layers[0].positions[:, 0], cache.layers[0].positions[:, 1])


def check_output(case: Case, row: int, h: int, part, output: torch.Tensor, expected: list) -> None:
    got = output[row, list(case.shared_by(h))][:, case.real(*part)[row]]
    assert torch.allclose(got.cpu(), torch.tensor(expected), atol=1e-4)


def check_slots(layer, row: int, h: int, head: Head, scored: bool) -> None:
    positions, held_keys, held_values, held_scores = (
        getattr(layer, name)[row, h].cpu() for name in ("positions", "keys", "values", "scores")
    )
    filled = positions >= 0
    order = positions[filled].argsort()
    assert positions[filled][order].tolist() == [t.position for t in head.tokens]
    assert int(filled.sum()) == min(head.seen, head.k)
    stored_rotated = head.rotates and not head.new_positions
    keys = [rotate(t.key, t.position) if stored_rotated else t.key for t in head.tokens]
    values = torch.tensor([t.value for t in head.tokens])
    assert torch.allclose(held_keys[filled][order], torch.tensor(keys), atol=1e-5)
    assert torch.equal(held_values[filled][order], values)
    if scored:
        scores = torch.tensor([t.f_theta for t in head.tokens])
        assert torch.allclose(held_scores[filled][order], scores, atol=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_kept_slots_equal_masked_attention(method: str) -> None:
    """Decoding over the slots equals full-length attention with the evicted tokens masked."""
    config = KeyformerConfig.preset(method, kv_cache=40, seed=5)
    case = Case(config, 2, 2, [25, 17], [1] * 12, alibi=True, seed=3)
    first = case.longest - torch.tensor(case.prompts)
    allowed = None
    for cache, (start, end), output in case.run():
        if allowed is not None:
            places = torch.arange(end)[None, :] - first[:, None]
            mask = allowed[:, :, None, :] & (places >= 0)[:, None, None, :]
            bias = case.slopes[None, :, None, None] * (places - places[:, -1:])[:, None, None, :]
            bias = bias.masked_fill(~mask.repeat_interleave(2, dim=1), float("-inf"))
            expected = torch.nn.functional.scaled_dot_product_attention(
                case.query[:, :, start:end],
                case.key[:, :, :end].repeat_interleave(2, dim=1),
                case.value[:, :, :end].repeat_interleave(2, dim=1),
                attn_mask=bias,
                scale=case.scale,
            )
            assert torch.allclose(output, expected, atol=1e-5)
        # The columns that are in the slots now, and the next token's own.
        positions = cache.layers[0].positions
        column = (positions + first[:, None, None]).masked_fill(positions < 0, end + 1)
        allowed = torch.zeros(case.batch, case.kv_heads, end + 2, dtype=torch.bool)
        allowed.scatter_(-1, column, True)
        allowed[..., end] = True
        allowed = allowed[..., : end + 1]


def test_ties_keep_the_older_token() -> None:
    """Token 0 takes all attention, so the others score exactly 0: the older ones stay."""
    config = KeyformerConfig(kv_budget=3, recent=0, noise="none")
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), config)
    query = torch.ones(1, 1, 6, 4)
    key = torch.zeros(1, 1, 6, 4)
    key[:, :, 0] = 1000
    cache.attend(query, key, key, 0, torch.ones(1, 6, dtype=torch.bool), scale=1.0)
    assert cache.layers[0].scores.sort().values[0, 0, :2].tolist() == [0, 0]
    assert sorted(cache.layers[0].positions[0, 0].tolist()) == [0, 1, 2]
    for _ in range(3):
        one = torch.ones(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4)
        cache.attend(*one, 0, torch.ones(1, 1, dtype=torch.bool), scale=1.0)
        assert sorted(cache.layers[0].positions[0, 0].tolist()) == [0, 1, 2]


def test_slots_are_overwritten_in_place() -> None:
    """A decode step changes the storage of at most one slot a head and allocates none."""
    case = Case(KeyformerConfig(kv_cache=50, seed=0), 2, 1, [20], [1] * 6, False, seed=1)
    before = None
    for cache, _, _ in case.run():
        layer = cache.layers[0]
        if before is not None:
            assert layer.keys.data_ptr() == before[0]
            changed = (layer.keys != before[1]).any(-1).sum(-1)
            assert (changed <= 1).all()
            assert layer.keys.shape[2] == 10
        before = layer.keys.data_ptr(), layer.keys.clone()
