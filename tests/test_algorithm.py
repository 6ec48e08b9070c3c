"""The cache against a literal Algorithm 1 and against masked full-length attention."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Head, rotate
from transformers import PreTrainedConfig

import keyformer.attention
from keyformer import KeyformerCache, KeyformerConfig
from keyformer.config import METHODS
from keyformer.score import noise, temperature


@dataclass
class Case:
    """Random keys, queries and values, and the sizes of the forward calls they come in."""

    config: KeyformerConfig
    kv_heads: int
    group: int
    prompts: list[int]  # real tokens of each sequence's prompt
    later: list[int]  # tokens of each forward after it, the same for all sequences
    alibi: bool
    seed: int
    rotates: bool = False
    head_dim: int = 4

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        self.batch, self.heads = len(self.prompts), self.kv_heads * self.group
        self.longest = max(self.prompts)
        total = self.longest + sum(self.later)

        def normal(heads: int) -> torch.Tensor:
            return torch.randn(self.batch, heads, total, self.head_dim, generator=generator) * 1.5

        self.query, self.key, self.value = (
            normal(self.heads),
            normal(self.kv_heads),
            normal(self.kv_heads),
        )
        self.slopes = torch.rand(self.heads, generator=generator) if self.alibi else None
        self.scale = 1 / math.sqrt(self.head_dim)

    def forwards(self):
        """(start, end) columns of each forward call."""
        edges = [0, self.longest]
        for size in self.later:
            edges.append(edges[-1] + size)
        return list(itertools.pairwise(edges))

    def real(self, start: int, end: int) -> torch.Tensor:
        columns = torch.arange(start, end)
        first = self.longest - torch.tensor(self.prompts)
        return columns[None] >= first[:, None]

    def run(self):
        """The cache after each forward, with the output of that forward."""
        cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), self.config)
        cache.max_new_tokens = 7
        for start, end in self.forwards():
            part = slice(start, end)
            attended = cache.attend(
                self.query[:, :, part],
                self.key[:, :, part],
                self.value[:, :, part],
                0,
                self.real(start, end),
                scale=self.scale,
                alibi_slopes=self.slopes,
                rotary=rotary if self.rotates else None,
            )
            yield cache, (start, end), attended.output

    def oracle(self, row: int, kv_head: int) -> Head:
        n = self.prompts[row]
        if self.config.kv_budget is not None:
            k = self.config.kv_budget
        else:
            k = max(1, int(n * self.config.kv_cache / 100))
        w = min(int(k * self.config.recent / 100), max(0, k - self.config.sinks))
        total = self.longest + sum(self.later)
        places = torch.arange(total)
        zeta = noise(
            self.config.noise,
            self.config.seed,
            0,
            self.heads,
            places.expand(self.batch, -1),
            places.expand(self.batch, self.kv_heads, -1),
        ).expand(self.batch, self.heads, total, total)
        shared = range(kv_head * self.group, (kv_head + 1) * self.group)
        return Head(
            k=k,
            w=w,
            sinks=min(k, self.config.sinks),
            scale=self.scale,
            slope=[float(self.slopes[h]) if self.alibi else 0.0 for h in shared],
            noise=[lambda q, i, h=h: float(zeta[row, h, q, i]) for h in shared],
            new_positions=self.config.positions == "new",
            rotates=self.rotates,
        )


def rotary(x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """oracle.rotate of every vector, on tensors."""
    frequencies = 10000 ** (-torch.arange(0, x.shape[-1], 2) / x.shape[-1])
    turn = torch.polar(torch.ones(()), places[..., None] * frequencies)
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turn).flatten(-2)


configs = st.builds(
    KeyformerConfig,
    kv_cache=st.floats(1, 100),
    recent=st.sampled_from([0, 10, 30, 50, 99, 100]),
    kv_budget=st.sampled_from([None, None, None, 1, 3, 8, 70]),
    tau_init=st.floats(0.5, 2),
    tau_end=st.floats(0.5, 3),
    noise=st.sampled_from(["gumbel", "gaussian", "constant", "none"]),
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
    heads = {
        (row, h): case.oracle(row, h) for row in range(case.batch) for h in range(case.kv_heads)
    }
    step = 0
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(keyformer.attention.CHUNK_ELEMENTS, "cpu", chunk)
        for cache, (start, end), output in case.run():
            step = 0 if end - start > 1 or start == 0 else step + 1
            tau = temperature(case.config, step, 7)
            real = case.real(start, end)
            for (row, h), head in heads.items():
                columns = [start + i for i in range(end - start) if real[row, i]]
                shared = range(h * case.group, (h + 1) * case.group)
                expected = head.step(
                    [case.query[row, g, columns].tolist() for g in shared],
                    case.key[row, h, columns].tolist(),
                    case.value[row, h, columns].tolist(),
                    tau,
                )
                got = output[row, list(shared)][:, real[row]]
                assert torch.allclose(got, torch.tensor(expected), atol=1e-4)
                check_slots(cache.layers[0], row, h, head, case.config.needs_scores)


def check_slots(layer, row: int, h: int, head: Head, scored: bool) -> None:
    positions = layer.positions[row, h]
    filled = positions >= 0
    order = positions[filled].argsort()
    assert positions[filled][order].tolist() == [t.position for t in head.tokens]
    assert int(filled.sum()) == min(head.seen, head.k)
    stored_rotated = head.rotates and not head.new_positions
    keys = [rotate(t.key, t.position) if stored_rotated else t.key for t in head.tokens]
    values = torch.tensor([t.value for t in head.tokens])
    assert torch.allclose(layer.keys[row, h][filled][order], torch.tensor(keys), atol=1e-5)
    assert torch.equal(layer.values[row, h][filled][order], values)
    if scored:
        scores = torch.tensor([t.f_theta for t in head.tokens])
        assert torch.allclose(layer.scores[row, h][filled][order], scores, atol=1e-3)


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
