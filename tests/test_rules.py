"""What ranks tokens and how slots are shared out, against rules_oracle.py; and generate."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import itertools
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import Case, rotary
from families import small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Head
from rules_oracle import (
    Layer,
    Rule,
    accumulated,
    key_diversity,
    largest,
    last,
    leverage,
    long_keys,
    observed,
    peak,
    pyramid,
    recall,
)
from test_algorithm import check_output
from torch import Tensor
from transformers import PreTrainedConfig

import keyformer.rules
from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer, load_model
from keyformer.budgets import Adaptive, Policy, Pyramid
from keyformer.precision import dequantize, quantize
from keyformer.rules import (
    Accumulated,
    Asked,
    Candidates,
    KeyDiversity,
    Largest,
    Last,
    Leverage,
    Observed,
    Peak,
    Recall,
)
from keyformer.score import temperature
from keyformer_evaluation.records.identity import own_code


@dataclass(frozen=True)
class LongKeys(keyformer.rules.Rule):
    """Tokens of the longest keys stay."""

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.keys.norm(dim=-1)


@dataclass(frozen=True)
class Channel(keyformer.rules.Rule):
    """A channel of the key is the score: exact numbers of any sign."""

    channel: int = 0

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.keys[..., self.channel]


@dataclass(frozen=True)
class MyAccumulated(keyformer.rules.Rule):
    """Accumulated, as a user would write it."""

    asks = Asked(kind="sum")

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.before + tokens.received


@dataclass(frozen=True)
class MyLast(keyformer.rules.Rule):
    """Last, as a user would write it."""

    @property
    def asks(self) -> Asked:
        return Asked(kind="sum", queries=1)

    def score(self, tokens: Candidates) -> Tensor:
        dense = tokens.by_position(tokens.received)
        return tokens.at(dense.sum(dim=1, keepdim=True).expand_as(dense))


@dataclass(frozen=True)
class MyLargest(keyformer.rules.Rule):
    """Largest, as a user would write it."""

    asks = Asked(kind="largest")

    def score(self, tokens: Candidates) -> Tensor:
        return torch.maximum(tokens.before, tokens.received)


RULES: dict[str, tuple[Any, Rule]] = {
    "accumulated": ("accumulated", Rule(accumulated)),
    "observed": ("observed", Rule(observed)),
    "observed by three": (
        Observed(queries=3, pooling=3),
        Rule(partial(observed, queries=3, pooling=3)),
    ),
    "observed by one": (
        Observed(queries=1, pooling=1),
        Rule(partial(observed, queries=1, pooling=1)),
    ),
    "last": ("last", Rule(last)),
    "last pooled": (Last(pooling=5), Rule(partial(last, pooling=5))),
    "peak": ("peak", Rule(peak)),
    "peak of two": (Peak(queries=2, pooling=3), Rule(partial(peak, queries=2, pooling=3))),
    "recall": ("recall(queries=4)", Rule(partial(recall, queries=4))),
    "recall of two": (
        Recall(queries=2, pooling=3, strength=0.5, power=2),
        Rule(partial(recall, queries=2, pooling=3, strength=0.5, power=2)),
    ),
    "key_diversity": ("key_diversity", Rule(key_diversity, rounding=1e-5)),
    "leverage": ("leverage", Rule(leverage, rounding=2e-3)),
    "largest": ("largest", Rule(largest)),
    "long keys": (LongKeys(), Rule(long_keys)),
    "my accumulated": (MyAccumulated(), Rule(accumulated)),
    "my last": (MyLast(), Rule(last)),
    "my largest": (MyLargest(), Rule(largest)),
}
"""What a configuration is given, and the oracle's."""

BUDGETS: dict[str, tuple[Any, dict[str, float]]] = {
    "uniform": ("uniform", {}),
    "pyramid": ("pyramid", {"beta": 20}),
    "flat pyramid": (Pyramid(beta=1.5), {"beta": 1.5}),
    "adaptive": ("adaptive", {"least": 0.2}),
    "half adaptive": (Adaptive(least=0.5), {"least": 0.5}),
}

SHARES = {1: [(1.0,)], 2: [(0.7, 0.3), (0.5, 0.5), (0.1, 0.9)], 3: [(0.7, 0.2, 0.1), (1 / 3,) * 3]}
"""Some add up to 1 only but for rounding."""


@dataclass
class Problem:
    """Layers with random numbers of their own, and what chooses in them."""

    rules: tuple[str, ...]
    shares: tuple[float, ...]
    budgets: str
    layers: int
    settings: dict[str, Any]
    kv_heads: int
    group: int
    prompts: list[int]
    later: list[int]
    alibi: bool = False
    rotates: bool = False
    seed: int = 0
    kind: type[Case] = Case

    def __post_init__(self) -> None:
        rule: Any = {
            RULES[name][0]: share for name, share in zip(self.rules, self.shares, strict=True)
        }
        if self.shares == (1.0,):
            (rule,) = rule
        self.config = KeyformerConfig(rule=rule, budgets=BUDGETS[self.budgets][0], **self.settings)
        sizes = self.kv_heads, self.group, self.prompts, self.later, self.alibi
        self.cases = [
            self.kind(self.config, *sizes, seed=self.seed + layer, rotates=self.rotates)
            for layer in range(self.layers)
        ]

    def cache(self) -> KeyformerCache:
        cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=self.layers), self.config)
        cache.max_new_tokens = 7
        return cache

    def oracle(self, number: int, row: int) -> Layer:
        case = self.cases[number]
        heads = [case.oracle(row, h, number) for h in range(self.kv_heads)]
        if self.config.noise == "none":
            heads = [dataclasses.replace(head, noise=silent) for head in heads]  # quicker
        rules = [
            dataclasses.replace(RULES[name][1], share=share)
            for name, share in zip(self.rules, self.shares, strict=True)
        ]
        given = BUDGETS[self.budgets][1]
        slots = None
        if "beta" in given:
            safe = heads[0].w + heads[0].sinks
            ks = pyramid(self.prompts[row], heads[0].k, safe, self.layers, given["beta"])
            slots = [ks[number]] * self.kv_heads
        return Layer(heads, rules, slots, given.get("least"))


def silent(query: int, key: int) -> float:
    """No noise."""
    return 0.0


@st.composite
def problems(draw, most_rules: int = 3, most_prompts: int = 2, least_prompt: int = 1) -> Problem:
    rules = draw(
        st.lists(st.sampled_from(list(RULES)), min_size=1, max_size=most_rules, unique=True)
    )
    budgets = draw(st.sampled_from(list(BUDGETS)))
    chosen = {
        "kv_cache": draw(st.sampled_from([30, 50, 80, 100])),
        "kv_budget": draw(st.sampled_from([None, None, None, 5])),
        "recent": draw(st.sampled_from([0, 0, 20, 50, 100])),
        "sinks": draw(st.sampled_from([0, 0, 1, 3])),
        "noise": draw(st.sampled_from(["none", "none", "constant", "gumbel"])),
        "damping": draw(st.sampled_from([1.0, 1.0, 0.6])),
        "forgetting": draw(st.sampled_from([1.0, 1.0, 0.8])),
        "normalize": draw(st.sampled_from(["sum", "sum", "mean", 0.25])),
        "key_set": draw(st.sampled_from(["dynamic", "dynamic", "frozen"])),
        "dilation": draw(st.sampled_from([0, 0, 0, 1, 3])),
        "seed": 11,
    }
    if budgets == "uniform":
        chosen["positions"] = draw(st.sampled_from(["original", "new"]))
    return Problem(
        rules=tuple(rules),
        shares=draw(st.sampled_from(SHARES[len(rules)])),
        budgets=budgets,
        layers=draw(st.integers(1, 3)) if "pyramid" in budgets else 1,
        settings=chosen,
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 2)),
        prompts=draw(st.lists(st.integers(least_prompt, 14), min_size=1, max_size=most_prompts)),
        later=draw(st.lists(st.sampled_from([1, 1, 1, 2, 5]), max_size=5)),
        alibi=draw(st.booleans()),
        rotates=draw(st.booleans()),
        seed=draw(st.integers(0, 2**20)),
    )


def check(problem: Problem, chunk: int = 10**6, parents: list[int] | None = None) -> None:
    """Outputs, budgets, kept positions and scores of all heads after every forward.

    With ``parents`` beams are reordered after each forward.
    """
    cache, cases = problem.cache(), problem.cases
    rows = range(len(problem.prompts))
    oracles = {(n, row): problem.oracle(n, row) for n in range(problem.layers) for row in rows}
    step = 0
    for start, end in cases[0].forwards():
        step = 0 if end - start > 1 or start == 0 else step + 1
        tau = temperature(problem.config, step, 7)
        if chunk < end - start:
            cache.expect(cases[0].real(start, end))
        for at in range(start, end, chunk):
            part = at, min(at + chunk, end)
            for number, case in enumerate(cases):
                output = case.attend(cache, number, *part)
                layer = cache.layers[number]
                for row in rows:
                    follow(case, layer, row, oracles[number, row], part, output, tau, part[1] < end)
                check_room(layer, [oracles[number, row] for row in rows])
        if parents:
            cache.reorder_cache(torch.tensor(parents))
            oracles = {(n, row): copy.deepcopy(oracles[n, parents[row]]) for n, row in oracles}


def follow(case: Case, layer, row: int, oracle: Layer, part, output, tau, goes_on: bool) -> None:
    """The oracle takes the same tokens, and has to come to the same."""
    columns = [case.columns(row, h, *part) for h in range(case.kv_heads)]
    expected = oracle.attend(columns, tau)
    if columns[0][1]:
        for h, of_head in enumerate(expected):
            check_output(case, row, h, part, output, of_head)
        held = [set(positions[positions >= 0].tolist()) for positions in layer.positions[row]]
        oracle.evict(held, layer.budget[row].tolist(), goes_on)
    assert layer.budget[row].tolist() == oracle.budgets
    for h, head in enumerate(oracle.heads):
        positions = layer.positions[row, h]
        order = positions.argsort()[(positions < 0).sum() :]
        assert positions[order].tolist() == [t.position for t in head.tokens]
        assert len(order) == min(head.seen, oracle.budgets[h])
        values = layer.values[row, h, order]  # none where others' tokens score better
        wanted = torch.tensor([t.value for t in head.tokens])
        assert torch.equal(values, wanted.reshape(values.shape))
        if head.scored:
            scores = layer.scores[row, h, order].reshape(len(order), len(oracle.rules)).T
            for r, rule in enumerate(oracle.rules):
                wanted = torch.tensor([t.scores[r] for t in head.tokens])
                assert torch.allclose(scores[r], wanted, rtol=1e-3, atol=1e-5 + rule.rounding)


def check_room(layer, oracles: list[Layer]) -> None:
    """Shapes and dtypes; once all heads are full there are as many slots as the largest needs."""
    rules = () if len(oracles[0].rules) == 1 else (len(oracles[0].rules),)
    assert layer.scores.shape == (*layer.positions.shape, *rules)
    assert layer.scores.dtype == torch.float32
    assert layer.budget.dtype == torch.int64
    assert layer.budget.shape == layer.positions.shape[:2]
    largest_budget = max(max(oracle.budgets) for oracle in oracles)
    if min(oracle.heads[0].seen for oracle in oracles) >= largest_budget:
        assert layer.positions.shape[-1] == layer.keys.shape[2] == largest_budget


GRID = {"kv_cache": 40, "recent": 30, "sinks": 1, "noise": "none"}


@pytest.mark.parametrize(
    ("rule", "budgets"),
    [
        *((rule, "uniform") for rule in RULES if not rule.startswith("my ")),
        *((rule, "adaptive") for rule in RULES if not rule.startswith("my ")),
        *((rule, "pyramid") for rule in ("accumulated", "observed by three", "last", "leverage")),
    ],
)
def test_every_rule_under_every_budget(rule: str, budgets: str) -> None:
    """Two sequences, three query heads to a head, decode steps and a second prompt."""
    layers, kv_heads = (2, 1) if budgets == "pyramid" else (1, 2)
    sizes = {"kv_heads": kv_heads, "group": 3, "prompts": [16, 9], "later": [1, 1, 4, 1]}
    rotates = rule in ("key_diversity", "leverage")
    check(Problem((rule,), (1.0,), budgets, layers, GRID, **sizes, rotates=rotates, seed=1))


@pytest.mark.parametrize("rule", ["accumulated", "last", "largest"])
def test_rules_as_a_user_would_write_them(rule: str) -> None:
    chosen = {**GRID, "forgetting": 0.8, "damping": 0.6}
    sizes = {"kv_heads": 2, "group": 2, "prompts": [16, 9], "later": [1, 4, 1]}
    check(Problem((f"my {rule}",), (1.0,), "uniform", 1, chosen, **sizes))


@pytest.mark.parametrize(
    "setting",
    [
        {"normalize": "mean"},
        {"normalize": 0.5},
        {"key_set": "frozen"},
        {"dilation": 1},
        {"kv_budget": 40},
    ],
    ids=str,
)
def test_shares_of_adaptive_budgets(setting: dict[str, Any]) -> None:
    """With settings that change which tokens compete, or their order."""
    rules, shares = ("accumulated", "key_diversity"), (0.6, 0.4)
    sizes = {"kv_heads": 3, "group": 1, "prompts": [20, 13], "later": [1, 4, 1]}
    check(Problem(rules, shares, "adaptive", 1, {**GRID, **setting}, **sizes, seed=2))


@settings(max_examples=30, deadline=None)
@given(problem=problems())
def test_equals_literal_rules(problem: Problem) -> None:
    """One rule or several with shares, under any settings."""
    check(problem)


@settings(max_examples=15, deadline=None)
@given(problem=problems(most_rules=2, most_prompts=1, least_prompt=4), chunk=st.integers(1, 9))
def test_prompts_in_chunks(problem: Problem, chunk: int) -> None:
    """A pyramid is that of the whole prompt; adaptive budgets are fixed by the first piece."""
    check(problem, chunk)


class Pausing(Case):
    """The first sequence has no token in the second forward after the prompt, one less in the next.

    Padding comes last there, as in the pieces of a batch of prompts in chunks.
    """

    def real(self, start: int, end: int) -> Tensor:
        real = super().real(start, end)
        columns = torch.arange(start, end) - self.longest
        real[0] &= (columns != 1) & (columns != 4)
        return real


@pytest.mark.parametrize("rule", RULES)
def test_a_sequence_without_new_tokens_stays_as_it_is(rule: str) -> None:
    """Alone it would see no such forward, and in the next only the tokens it has."""
    chosen = {**GRID, "tau_end": 1.0, "forgetting": 0.8}
    sizes = {"kv_heads": 2, "group": 1, "prompts": [9, 12], "later": [1, 1, 3, 1]}
    check(Problem((rule,), (1.0,), "uniform", 1, chosen, **sizes, kind=Pausing))


@pytest.mark.parametrize(
    ("rules", "shares"), [(("observed by three",), (1.0,)), (("last", "key_diversity"), (0.7, 0.3))]
)
@pytest.mark.parametrize("budgets", ["pyramid", "adaptive"])
def test_beams_take_scores_budgets_and_positions_along(rules, shares, budgets: str) -> None:
    sizes = {"kv_heads": 2, "group": 1, "prompts": [16, 7, 11], "later": [1, 2, 1]}
    layers = 2 if budgets == "pyramid" else 1
    check(Problem(rules, shares, budgets, layers, GRID, **sizes, seed=3), parents=[2, 2, 0])


@pytest.mark.parametrize("budgets", ["pyramid", "adaptive"])
def test_sequences_of_a_batch_are_selected_and_repeated(budgets: str) -> None:
    rules, shares = ("largest", "leverage"), (0.5, 0.5)
    problem = Problem(rules, shares, budgets, 2, GRID, 2, 1, [20, 9, 14], [1])
    cache = problem.cache()
    for part in problem.cases[0].forwards():
        for number, case in enumerate(problem.cases):
            case.attend(cache, number, *part)
    names = ("positions", "scores", "budget", "keys")
    for change, rows in (
        (lambda: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
        (lambda: cache.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        before = [{name: getattr(layer, name).clone() for name in names} for layer in cache.layers]
        change()
        for layer, was in zip(cache.layers, before, strict=True):
            slots = layer.positions.shape[-1]
            for name in ("positions", "scores", "keys"):
                wanted = was[name][rows]
                assert torch.equal(getattr(layer, name), wanted[:, :, :slots]), name
            assert (was["positions"][rows][..., slots:] < 0).all()
            assert torch.equal(layer.budget, was["budget"][rows])


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize(
    "rule", ["observed", "last pooled", "key_diversity", "leverage", "largest"]
)
def test_quantized_slots(kind: str, rule: str) -> None:
    """Rules are told keys as attention reads them: rounded ones of slots, exact ones of new."""
    chosen = {"kv_cache": 60, "noise": "none", "rule": RULES[rule][0], "budgets": "adaptive"}
    quantized, rounded = (
        KeyformerCache(
            PreTrainedConfig(num_hidden_layers=1), KeyformerConfig(cache_dtype=dtype, **chosen)
        )
        for dtype in (kind, "auto")
    )
    generator = torch.Generator().manual_seed(0)
    for tokens in (40, 1, 1, 4, 1):
        query = torch.randn(2, 4, tokens, 16, generator=generator)
        key, value = torch.randn(2, 2, 2, tokens, 16, generator=generator)
        real = torch.ones(2, tokens, dtype=torch.bool)
        outputs = [
            cache.attend(query, key, value, 0, real, scale=0.2).output
            for cache in (quantized, rounded)
        ]
        assert torch.allclose(*outputs, atol=1e-5)
        one, other = quantized.layers[0], rounded.layers[0]
        assert torch.equal(one.budget, other.budget)
        assert torch.equal(one.positions, other.positions)
        filled = one.positions >= 0
        assert torch.allclose(one.scores[filled], other.scores[filled], atol=1e-4)
        for name in ("keys", "values"):
            vectors = getattr(other, name)
            setattr(other, name, dequantize(*quantize(vectors, kind), kind, torch.float32))


# Numbers by hand: zero queries, so that f of each visible token is the same.

BY_HAND = {
    "accumulated": [25 / 12, 13 / 12, 7 / 12, 1 / 4],
    "observed by three": [26 / 36, 33 / 36, 23 / 36, 10 / 36],
    "observed by one": [1 / 4] * 4,
    "last": [1 / 2] * 4,
    "last pooled": [0.3, 0.4, 0.4, 0.3],
    "largest": [1, 1 / 2, 1 / 3, 1 / 4],
}
"""Scores of a prompt of four tokens, in each of two heads."""


def score_both(rule: str, keys: Tensor, steps: int = 0, **chosen: Any) -> list[list[list[float]]]:
    """Scores of each head's tokens by the cache and by the oracle, for zero queries."""
    heads, tokens = keys.shape[:2]
    chosen = {"kv_budget": tokens, "recent": 0, "noise": "none", **chosen}
    config = KeyformerConfig(rule=RULES[rule][0], **chosen)
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), config)
    forgetting = chosen.get("forgetting", 1.0)
    oracle = Layer(
        [Head(tokens, 0, 0, 1.0, 0.0, silent, forgetting=forgetting) for _ in range(heads)],
        [RULES[rule][1]],
    )
    edges = [0, *range(tokens - steps, tokens + 1)]
    for start, end in itertools.pairwise(edges):
        part = keys[None, :, start:end]
        cache.attend(
            torch.zeros_like(part), part, part, 0, torch.ones(1, end - start).bool(), scale=1.0
        )
        columns = [([[[0.0] * 4] * len(now)], now.tolist(), now.tolist()) for now in part[0]]
        oracle.attend(columns, 1.0)
        oracle.evict()
    layer = cache.layers[0]
    ours = layer.scores[0].gather(-1, layer.positions[0].argsort(dim=-1))[:, -tokens:]
    return [ours.tolist(), [[t.scores[0] for t in head.tokens] for head in oracle.heads]]


@pytest.mark.parametrize("rule", BY_HAND)
def test_scores_by_hand(rule: str) -> None:
    for scores in score_both(rule, torch.zeros(2, 4, 4)):
        assert scores == [pytest.approx(BY_HAND[rule], rel=1e-5)] * 2


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        # Weights of the prompt's queries are 1/4, 1/2 and 1, then one query gives 1/4 to all.
        ("accumulated", [1 / 2 * (1 / 4 + 1 / 4 + 1 / 3) + 1 / 4, 13 / 24, 5 / 12, 1 / 4]),
        ("observed by one", [1 / 4] * 4),
        ("largest", [1 / 4] * 4),
        ("last", [1 / 4] * 4),
    ],
)
def test_forgetting_by_hand(rule: str, expected: list[float]) -> None:
    for scores in score_both(rule, torch.zeros(1, 4, 4), steps=1, forgetting=0.5):
        assert scores[0] == pytest.approx(expected, rel=1e-5)


def test_observed_decays_by_hand() -> None:
    """Two of three thirds are left of what a prompt of two tokens gave, for each query since."""
    # The prompt's: (3/2 + 1/2) / 3 of both. One query gives 1/3 to each of three, the next 1/4.
    first = [2 / 3 * 2 / 3 + 2 / 9, 2 / 3 * 2 / 3 + 1 / 3, 2 / 9]
    expected = [2 / 3 * first[0] + 1 / 6, 2 / 3 * first[1] + 1 / 4, 2 / 3 * first[2] + 1 / 4, 1 / 6]
    for scores in score_both("observed by three", torch.zeros(1, 4, 4), steps=2):
        assert scores[0] == pytest.approx(expected, rel=1e-5)


def test_key_scores_by_hand() -> None:
    keys = torch.tensor([[[3.0, 0, 0, 0], [0, 2, 0, 0], [5, 0, 0, 0], [0, -1, 0, 0]]])
    for scores in score_both("key_diversity", keys):  # the mean direction is that of channel 0
        assert scores[0] == pytest.approx([0, 1, 0, 1], abs=1e-6)
    # Centred: +-10 of channel 0 and +-0.1 of channel 1, so that e is 1e-4 * 200.02 / 4.
    keys = torch.tensor([[[10.0, 1, 0, 0], [0, 0.9, 0, 0], [-10, 1, 0, 0], [0, 1.1, 0, 0]]])
    e = 1e-4 * 200.02 / 4
    of_long, of_short = 100 / (200 + e), 0.01 / (0.02 + e)
    for scores in score_both("leverage", keys):
        assert scores[0] == pytest.approx([of_long, of_short] * 2, rel=1e-4)


def test_a_key_that_is_alone_has_no_leverage() -> None:
    for scores in score_both("leverage", torch.ones(1, 1, 4)):
        assert scores == [[0.0]]


def test_leverage_is_that_of_linear_algebra() -> None:
    """The oracle's elimination against the pseudo-inverse."""
    keys = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0)).double()
    centred = keys - keys.mean(dim=1, keepdim=True)
    gram = centred.mT @ centred
    e = 1e-4 * gram.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    inverse = torch.linalg.pinv(gram + e[:, None, None] * torch.eye(4))
    expected = ((centred @ inverse) * centred).sum(-1)
    ours, literal = score_both("leverage", keys.float())
    assert torch.allclose(torch.tensor(literal), expected.float(), atol=1e-5)
    assert torch.allclose(torch.tensor(ours), expected.float(), atol=1e-4)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        # 10 slots: half a slot last, so 19.5, 10 and 0.5 of the layers.
        ((100, 10, 0, 3, 20), [19, 10, 1]),
        ((100, 15, 5, 3, 20), [24, 15, 6]),
        # No more than there are candidates: 12, 10, 8.
        ((14, 12, 2, 3, 20), [14, 12, 10]),
        # A budget beyond the prompt is that of all.
        ((8, 12, 2, 3, 20), [12, 12, 12]),
        ((100, 10, 0, 1, 20), [10]),
        ((100, 10, 0, 2, 2), [15, 5]),
        ((100, 4, 4, 3, 20), [4, 4, 4]),
    ],
)
def test_pyramid_by_hand(sizes, expected: list[int]) -> None:
    n, k, sinks, layers, beta = sizes
    assert pyramid(*sizes) == expected
    config = KeyformerConfig(
        kv_budget=k, sinks=sinks, recent=0, noise="none", budgets=Pyramid(beta=beta)
    )
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=layers), config)
    vectors = torch.randn(1, 2, n, 4)
    for number, budget in enumerate(expected):
        cache.attend(vectors, vectors, vectors, number, torch.ones(1, n).bool(), scale=1.0)
        assert cache.layers[number].budget.tolist() == [[budget, budget]]


def fed(keys: list[list[float]], **chosen: Any) -> Any:
    """The layer of a cache that ranks by these, a list for each head, after one prompt."""
    config = KeyformerConfig(noise="none", **{"rule": Channel(), "recent": 0, **chosen})
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), config)
    key = torch.zeros(1, len(keys), len(keys[0]), 4)
    key[0, :, :, 0] = torch.tensor(keys)
    cache.attend(key, key, key, 0, torch.ones(1, len(keys[0])).bool(), scale=0.0)
    return cache.layers[0]


def kept(layer: Any, row: int = 0) -> list[list[int]]:
    """Positions that each head of a sequence holds."""
    return [sorted(p for p in held if p >= 0) for held in layer.positions[row].tolist()]


def test_of_two_equals_the_older_stays() -> None:
    layer = fed([[-3, -2, -1, -2, -2, -9], [5, -7, -7, -7, 0, 0]], kv_budget=3)
    assert kept(layer) == [[1, 2, 3], [0, 4, 5]]
    assert kept(fed([[-4] * 6], kv_budget=3, sinks=1, recent=34)) == [[0, 1, 5]]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        # Three of the four slots are clear; the fourth goes to the lower head, or to the older.
        ([[1, 5, 1, 0], [1, 5, 0, 4]], [[0, 1], [1, 3]]),
        ([[0, 5, 1, 0], [1, 5, 0, 4]], [[1], [0, 1, 3]]),
        # One head has all the best but for what each gets at least.
        ([[9, 8, 7, 6], [1, 2, 0, 0]], [[0, 1, 2], [1]]),
    ],
)
def test_adaptive_by_hand(keys, expected: list[list[int]]) -> None:
    least = 0.05 if keys[0][0] < 9 else 0.5
    keys = [[x - 10.0 for x in of_head] for of_head in keys]  # scores of any sign
    layer = fed(keys, kv_budget=2, budgets=Adaptive(least=least))
    assert kept(layer) == expected
    assert layer.budget.tolist() == [[len(held) for held in expected]]


def test_adaptive_leaves_short_prompts_alone() -> None:
    layer = fed([[9.0, 8, 7, 6], [1, 2, 0, 0]], kv_budget=4, budgets="adaptive")
    assert layer.budget.tolist() == [[4, 4]]


def test_shares_are_whole_slots() -> None:
    """0.29 of 100 slots are 29, though 0.29 * 100 is less; the second rule has what is left."""
    keys = torch.randn(1, 1, 240, 4, generator=torch.Generator().manual_seed(0))
    keys[..., 1] = -keys[..., 0]  # what one rule takes the other would leave
    rule = {Channel(0): 0.29, Channel(1): 0.71}
    config = KeyformerConfig(kv_budget=110, recent=5, sinks=5, noise="none", rule=rule)
    assert 0.29 * 100 < 29 == config.budget(240) - config.recent_window(110) - 5 - 71
    cache = KeyformerCache(PreTrainedConfig(num_hidden_layers=1), config)
    cache.attend(keys, keys, keys, 0, torch.ones(1, 240).bool(), scale=1.0)
    first, second = keys[0, 0, :, 0].tolist(), keys[0, 0, :, 1].tolist()
    others = sorted(range(5, 235), key=lambda p: -first[p])
    expected = {*range(5), *range(235, 240), *others[:29]}
    expected.update(sorted(others[29:], key=lambda p: -second[p])[:71])
    assert set(kept(cache.layers[0])[0]) == expected


def test_one_rule_of_share_1_is_that_rule() -> None:
    scores = [
        fed([[1.0, 4, 2, 3]], kv_budget=2, rule=rule).scores for rule in (Channel(), {Channel(): 1})
    ]
    assert torch.equal(*scores)


def test_what_a_rule_is_told() -> None:
    """Two forwards of two sequences, the first of which is shorter, with keys that are rotated."""
    told: list[SimpleNamespace] = []

    @dataclass(frozen=True)
    class Listening(keyformer.rules.Rule):
        asks = Asked(kind="sum", queries=2)

        def score(self, tokens: Candidates) -> Tensor:
            told.append(SimpleNamespace(config=tokens.config))
            for name in ("positions", "before", "received", "keys", "values", "queries", "seen"):
                setattr(told[-1], name, getattr(tokens, name).clone())
            return tokens.before + 1

    @dataclass(frozen=True)
    class Asking(keyformer.rules.Rule):
        def score(self, tokens: Candidates) -> Tensor:
            assert tokens.received is None
            return tokens.before - 1

    rule = {Listening(): 0.5, Asking(): 0.5}
    config = KeyformerConfig(kv_budget=4, recent=50, noise="none", forgetting=0.5, rule=rule)
    case = Case(config, 2, 2, [3, 6], [2], alibi=False, seed=0, rotates=True)
    held = [[[]] * 2] * 2  # before the first forward, by sequence and head
    for (cache, (start, _), _), seen in zip(case.run(), ([3, 6], [5, 8]), strict=True):
        tokens = told.pop()
        assert not told
        assert tokens.config == config
        assert tokens.seen.tolist() == seen
        assert tokens.queries.tolist() == ([3, 6] if start == 0 else [2, 2])
        for row in range(2):
            new = list(range(seen[row] - int(tokens.queries[row]), seen[row]))
            first = 6 - case.prompts[row]
            for h in range(2):
                positions = tokens.positions[row, h]
                here = positions >= 0
                assert sorted(positions[here].tolist()) == held[row][h] + new
                columns = positions[here] + first
                rotated = rotary(case.key[row, h, columns], positions[here])
                assert torch.allclose(tokens.keys[row, h, here], rotated, atol=1e-5)
                assert torch.equal(tokens.values[row, h, here], case.value[row, h, columns])
                before = [0.25 * (p not in new) for p in positions[here].tolist()]
                assert tokens.before[row, h, here].tolist() == before
                # Two heads whose last query gives 1 in all and the one before half of it.
                assert float(tokens.received[row, h, here].sum()) == pytest.approx(3, rel=1e-4)
        held = [kept(cache.layers[0], row) for row in range(2)]


# Whole models.


@pytest.fixture(scope="module")
def bundled():
    """A trained checkpoint of six layers and eight heads."""
    path = Path(__file__).parents[1] / "models" / "mpt-tiny-keyformer"
    return load_model(path, device="cpu", dtype="float32")[0]


GENERATED = [
    ("accumulated", "pyramid"),
    ("observed", "adaptive"),
    ("last", "pyramid"),
    ("key_diversity", "adaptive"),
    ("leverage", "uniform"),
    ("largest", "adaptive"),
    ({"accumulated": 0.7, "key_diversity": 0.3}, "pyramid"),
    (LongKeys(), "adaptive"),
]


@pytest.mark.parametrize(("rule", "budgets"), GENERATED, ids=lambda value: str(value)[:20])
def test_generate(bundled, rule, budgets: str) -> None:
    """Slots are as many as budgets say, and a batch gives each sequence what it gets alone."""
    chosen = {"kv_cache": 60, "sinks": 2, "noise": "none"}
    config = KeyformerConfig(rule=rule, budgets=budgets, **chosen)
    model = enable_keyformer(bundled, config)
    text = torch.randint(1, 2048, (2, 80), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(text)
    mask[0, :16] = 0
    options = {"max_new_tokens": 3, "min_new_tokens": 3}
    cache = KeyformerCache(model.config, config)
    together = model.generate(text, attention_mask=mask, past_key_values=cache, **options)
    check_slots_of_model(cache, config, seen=[64 + 2, 80 + 2], prompts=[64, 80])
    for row, real in enumerate(mask.bool()):
        alone = KeyformerCache(model.config, config)
        got = model.generate(text[row : row + 1, real], past_key_values=alone, **options)
        assert torch.equal(got[0, -3:], together[row, -3:])
        for one, both in zip(alone.layers, cache.layers, strict=True):
            assert torch.equal(one.budget[0], both.budget[row])
            assert kept(one) == kept(both, row)


def check_slots_of_model(cache, config: KeyformerConfig, seen: list[int], prompts: list[int]):
    """Filled slots, the sum of budgets, and bytes."""
    ks = torch.tensor([config.budget(n) for n in prompts])
    heads = cache.layers[0].positions.shape[1]
    for layer in cache.layers:
        filled = (layer.positions >= 0).sum(-1)
        assert torch.equal(filled, torch.minimum(layer.budget, torch.tensor(seen)[:, None]))
        assert layer.keys.shape[2] == layer.budget.max()
        if config.budgets != "pyramid":
            assert torch.equal(layer.budget.sum(-1), ks * heads)
        for row, last_seen in enumerate(seen):
            window = config.recent_window(int(ks[row]))
            stay = [*range(config.sinks), *range(last_seen - window, last_seen)]
            here = (layer.positions[row, :, :, None] == torch.tensor(stay)).any(1)
            assert here.all()
    budgets = torch.stack([layer.budget for layer in cache.layers])
    assert torch.equal(budgets.sum((0, 2)), ks * heads * len(cache.layers))
    if config.budgets != "uniform":
        assert budgets.min() < budgets.max()
    assert cache.memory_bytes() == sum(
        tensor.nbytes
        for layer in cache.layers
        for tensor in (layer.keys, layer.values, layer.positions, layer.scores)
    )


@torch.no_grad()
@pytest.mark.parametrize(
    ("rule", "budgets", "chunk"),
    [
        ("observed", "adaptive", 20),
        ({Observed(queries=5, pooling=3): 0.5, "largest": 0.5}, "pyramid", 7),
        ("last", "pyramid", 7),
        ("key_diversity", "adaptive", 7),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_batch_in_chunks_gives_each_sequence_its_own_result(rule, budgets, chunk: int) -> None:
    """Its budgets too, whose first piece may be as long as the prompt; two queries to a key."""
    config = KeyformerConfig(
        kv_cache=40, noise="none", rule=rule, budgets=budgets, prefill_chunk=chunk
    )
    model = enable_keyformer(small_model("llama"), config)
    text = torch.randint(1, 61, (3, 40), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(text)
    mask[1, :22] = 0
    mask[2, :9] = 0
    together = KeyformerCache(model.config, config)
    logits = model(text, attention_mask=mask, past_key_values=together).logits
    longer = torch.cat([mask, mask[:, -1:]], dim=1)
    after = model(text[:, :1], attention_mask=longer, past_key_values=together).logits
    for row, real in enumerate(mask.bool()):
        alone = KeyformerCache(model.config, config)
        got = model(text[row : row + 1, real], past_key_values=alone).logits[0]
        assert torch.allclose(got, logits[row, real], atol=1e-4)
        got = model(text[row : row + 1, :1], past_key_values=alone).logits[0]
        assert torch.allclose(got, after[row], atol=1e-4)
        for one, both in zip(alone.layers, together.layers, strict=True):
            assert torch.equal(one.budget[0], both.budget[row])
            assert kept(one) == kept(both, row)


@torch.no_grad()
@pytest.mark.parametrize("rule", ["observed", "largest"])
def test_beams_and_second_prompts_keep_to_budgets(rule: str) -> None:
    config = KeyformerConfig(kv_cache=50, noise="none", rule=rule, budgets="adaptive")
    model = enable_keyformer(small_model("llama"), config)
    cache = KeyformerCache(model.config, config)
    text = torch.randint(1, 61, (1, 30), generator=torch.Generator().manual_seed(4))
    options = {"max_new_tokens": 5, "min_new_tokens": 5}
    text = model.generate(text, past_key_values=cache, **options)
    budgets = [layer.budget.clone() for layer in cache.layers]
    text = torch.cat([text, text[:, :9]], dim=1)
    model.generate(text, past_key_values=cache, **options)
    check_slots_of_model(cache, config, [30 + 5 + 9 + 4], [30])
    assert all(map(torch.equal, budgets, (layer.budget for layer in cache.layers)))
    beams = KeyformerCache(model.config, config)
    model.generate(text[:, :30], past_key_values=beams, num_beams=3, **options)
    check_slots_of_model(beams, config, [30 + 4] * 3, [30] * 3)


@torch.no_grad()
def test_layers_with_a_window_are_no_part_of_the_pyramid() -> None:
    kinds = ["sliding_attention", "full_attention", "full_attention"]
    model = enable_keyformer(small_model("gemma3_text", num_hidden_layers=3, layer_types=kinds))
    config = KeyformerConfig(kv_cache=50, noise="none", budgets="pyramid")
    cache = KeyformerCache(model.config, config)
    model(torch.randint(2, 61, (1, 40)), past_key_values=cache)
    expected = pyramid(40, 20, 6, 2)
    for layer, budget in zip(cache.layers[1:], expected, strict=True):
        assert ((layer.positions >= 0).sum(-1) == budget).all()
        assert (layer.budget == budget).all()


# What cannot be.


def test_defaults() -> None:
    config = KeyformerConfig()
    assert config.rule == "accumulated"
    assert config.budgets == "uniform"
    assert Observed() == Observed(queries=64, pooling=5)
    assert Last() == Last(pooling=1)
    assert Pyramid() == Pyramid(beta=20)
    assert Adaptive() == Adaptive(least=0.2)


@pytest.mark.parametrize(
    ("named", "instance"),
    [
        ("accumulated", Accumulated()),
        ("observed", Observed()),
        ("last", Last()),
        ("key_diversity", KeyDiversity()),
        ("leverage", Leverage()),
        ("largest", Largest()),
        ("recall", Recall(queries=16, pooling=17, strength=1 / 32, power=3)),
    ],
)
def test_names_are_instances(named: str, instance: Any) -> None:
    scores = []
    for rule in (named, instance):
        problem = Problem(("last",), (1.0,), "uniform", 1, GRID, 2, 1, [12], [1])
        cases = [dataclasses.replace(problem.cases[0], config=KeyformerConfig(rule=rule, **GRID))]
        for cache, _, _ in cases[0].run():
            layer = cache.layers[0]
        scores.append((layer.positions, layer.scores))
    assert all(map(torch.equal, *scores))


class Loud(MyLast):
    """Asks for no such thing."""

    asks = "yes"


@dataclass(frozen=True)
class Hasty(LongKeys):
    """Does not do in a step what it says."""

    accumulates = True


@dataclass(frozen=True)
class Louder(Recall):
    """Twice what Recall gives: in a step, too."""

    def score(self, tokens: Candidates) -> Tensor:
        return 2 * super().score(tokens)


def test_a_subclass_does_not_accumulate_unless_it_says_so() -> None:
    assert Recall.accumulates and Accumulated.accumulates
    assert not (Louder.accumulates or MyAccumulated.accumulates)


NAMES = ("accumulated", "observed", "last", "key_diversity", "leverage", "largest")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: KeyformerConfig(rule="best"), ["'best'", *NAMES]),
        (lambda: KeyformerConfig(rule=7), ["7"]),
        (lambda: KeyformerConfig(rule={"last": 0.5, "best": 0.5}), ["'best'", *NAMES]),
        (lambda: KeyformerConfig(rule={}), ["{}"]),
        (lambda: KeyformerConfig(rule={"last": 0.5, "largest": 0.4}), ["0.5", "0.4", "1"]),
        (lambda: KeyformerConfig(rule={"last": 1.5, "largest": -0.5}), ["1.5"]),
        (lambda: KeyformerConfig(rule={"last": 0.0, "largest": 1.0}), ["0.0"]),
        (lambda: KeyformerConfig(rule={"last": 1.0, "largest": math.nan}), ["nan"]),
        (lambda: KeyformerConfig(rule={"last": "0.5", "largest": 0.5}), ["'0.5'"]),
        (lambda: Observed(queries=0), ["queries", "0"]),
        (lambda: Observed(queries=2.5), ["queries", "2.5"]),
        (lambda: Observed(pooling=4), ["pooling", "4", "odd"]),
        (lambda: Observed(pooling=0), ["pooling", "0", "odd"]),
        (lambda: Last(pooling=2), ["pooling", "2", "odd"]),
        (lambda: Recall(queries=0), ["queries", "0"]),
        (lambda: Recall(strength=0), ["strength", "0", "> 0"]),
        (lambda: Recall(power=0), ["power", "0", "> 0"]),
        (lambda: KeyformerConfig(rule=Loud()), ["Loud()", "Asked", "'yes'"]),
        (lambda: KeyformerConfig(rule=Hasty()), ["Hasty()", "accumulates", "Asked('sum')"]),
        (lambda: Last(pooling=-1), ["pooling", "-1", "odd"]),
        (lambda: KeyformerConfig(budgets="round"), ["'round'", "uniform", "pyramid", "adaptive"]),
        (lambda: KeyformerConfig(budgets=7), ["7"]),
        (lambda: Pyramid(beta=0), ["beta", "0"]),
        (lambda: Adaptive(least=1.5), ["least", "1.5"]),
        (lambda: Adaptive(least=-0.1), ["least", "-0.1"]),
        (lambda: KeyformerConfig(budgets="pyramid", positions="new"), ["budgets", "positions"]),
        (lambda: KeyformerConfig(budgets=Adaptive(), positions="new"), ["budgets", "positions"]),
        (lambda: KeyformerConfig(budgets="adaptive", score="shared"), ["budgets", "score"]),
        (lambda: KeyformerConfig(budgets="pyramid", score="shared"), ["budgets", "score"]),
    ],
)
def test_what_cannot_be_is_named(make, says: list[str]) -> None:
    with pytest.raises(InputError) as error:
        make()
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in says), message


@dataclass(frozen=True)
class Misshapen(keyformer.rules.Rule):
    """Forgets the heads."""

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.before.sum(dim=1)


class Debt(Policy):
    """Gives less than nothing."""

    def key_slots(self, shared: Any) -> Tensor:
        return -shared.key_slots[:, None]


@pytest.mark.parametrize("settings", [{"rule": Misshapen()}, {"budgets": Debt()}])
def test_what_a_rule_or_policy_of_ones_own_may_not_give(settings: dict[str, Any]) -> None:
    case = Case(KeyformerConfig(kv_cache=50, **settings), 1, 1, [8], [1], False, 0)
    with pytest.raises(
        InputError, match=r"^(rule Misshapen\(\)|budgets .*Debt.*) must give [^\n]*$"
    ):
        list(case.run())


class Bare(keyformer.rules.Rule):
    """No dataclass; in another dtype, and for one token no number."""

    def score(self, tokens: Candidates) -> Tensor:
        return tokens.positions.double().masked_fill(tokens.positions == 6, torch.nan)


def test_scores_of_any_dtype_and_what_is_no_number() -> None:
    config = KeyformerConfig(kv_budget=4, recent=0, rule=Bare())
    case = Case(config, 1, 1, [8], [1], False, 0)
    caches = [cache for cache, _, _ in case.run()]
    assert sorted(caches[-1].layers[0].positions[0, 0].tolist()) == [4, 5, 7, 8]
    assert caches[-1].layers[0].scores.dtype == torch.float32


@dataclass(frozen=True)
class Needy(keyformer.rules.Rule):
    """Of a number that is to be given."""

    alpha: float
    channel: int = 0

    def score(self, tokens: Candidates) -> Tensor:
        return self.alpha * tokens.keys[..., self.channel]


def test_rules_of_ones_own_in_the_table(monkeypatch) -> None:
    monkeypatch.setitem(keyformer.rules.RULES, "bare", Bare)
    monkeypatch.setitem(keyformer.rules.RULES, "needy", Needy)
    assert KeyformerConfig(rule="bare").plain()["rule"] == "bare"
    of = KeyformerConfig(rule=" 0.5*needy(alpha=0.5,channel=1) + 0.5*bare ")
    assert of.rules[0] == (Needy(0.5, 1), 0.5)
    assert KeyformerConfig(rule=of.plain()["rule"]).rules[0] == of.rules[0]
    loud = KeyformerConfig(rule="0.5*recall(strength=1e+20,power=0.5) + 0.5*last")
    assert loud.rules[0] == (Recall(strength=1e20, power=0.5), 0.5)
    assert KeyformerConfig(rule=loud.plain()["rule"]).rules == loud.rules
    for wrong, says in (
        ("needy", "needs a number for alpha"),
        ("bare(x=1)", "takes no settings"),
        ("needy(alpha=much)", "takes numbers for alpha, channel"),
        (Needy, r"takes an instance, as Needy\(\)"),
    ):
        with pytest.raises(InputError, match=says):
            KeyformerConfig(rule=wrong)


def test_the_code_of_ones_own_rule_is_part_of_a_results_key(tmp_path, monkeypatch) -> None:
    """As rules and policies of this package are: an edited file gives another key."""
    assert own_code(KeyformerConfig(rule="peak", budgets="pyramid")) == {}
    monkeypatch.syspath_prepend(tmp_path)
    text = (
        "from keyformer.rules import Rule\n"
        "class Mine(Rule):\n"
        "    def score(self, tokens):\n"
        "        return tokens.{}\n"
    )
    keys = []
    for number, what in enumerate(("before", "before", "positions.float()")):
        (tmp_path / f"my_rule_{number}.py").write_text(text.format(what))
        module = importlib.import_module(f"my_rule_{number}")
        keys.append(own_code(KeyformerConfig(rule={module.Mine(): 0.5, "last": 0.5})))
    assert keys[0] == keys[1] != keys[2]
    names: dict[str, Any] = {"__name__": "nowhere"}
    exec(text.format("before"), names)
    exec(text.format("received").replace("Mine", "Other"), names)
    codes = [own_code(KeyformerConfig(rule=names[name]())) for name in ("Mine", "Other")]
    assert codes[0] and codes[1] and codes[0] != codes[1]
