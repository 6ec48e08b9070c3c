"""Part of a prompt's queries asked for all: ``Asked(spread=...)`` beside a literal sum."""

from __future__ import annotations

import math

import pytest
import torch
from test_kernels import DEVICE, no_gradients  # noqa: F401

from keyformer import InputError, KeyformerConfig
from keyformer.attention import AttentionSpec, Tokens
from keyformer.backends import torch as torch_backend
from keyformer.backends import triton as triton_backend
from keyformer.rules import Asked, formula
from keyformer.rules.accumulated import Accumulated
from keyformer.score import Scorer, noise
from keyformer.text import Span

pytestmark = pytest.mark.usefixtures("no_gradients")
HEADS, KV_HEADS, WIDTH, SEED = 4, 2, 16, 5


def literal(query, keys, positions, slots: int, spread: int, tau: float, forgetting: float):
    """For each key what the queries that are asked give, one by one; float64."""
    given = torch.zeros(KV_HEADS, keys.shape[1], dtype=torch.float64)
    new = [int(p) for p in positions[slots:] if p >= 0]
    step = max(1, math.ceil(len(new) / spread))
    for i, position in enumerate(positions[slots:].tolist()):
        back = new[-1] - position
        if position < 0 or back % step:
            continue
        counts = min(step, position - new[0] + 1) * forgetting**back
        seen = (positions >= 0) & (positions <= position)
        zeta = noise("gumbel", SEED, 0, HEADS, torch.tensor([[position]]), positions[None, None])
        for head in range(HEADS):
            kv_head = head // (HEADS // KV_HEADS)
            x = (keys[kv_head].double() @ query[head, i].double()) / 4 + zeta[0, head, 0].double()
            weight = (x / tau).masked_fill(~seen, -torch.inf).softmax(dim=0)
            told = (position - positions >= step - 1) | (torch.arange(len(positions)) < slots)
            given[kv_head] += counts * weight.masked_fill(~told, 0)
    return given


@pytest.mark.parametrize("backend", [torch_backend, triton_backend])
@pytest.mark.parametrize("spread", [1, 7, 40, 200])
@pytest.mark.parametrize(("padding", "slots", "tau"), [(0, 0, 1.0), (9, 5, 1.5)])
def test_scores_of_asked_queries(backend, spread, padding, slots, tau) -> None:
    """Every s-th counts for s, of tokens s - 1 places before it and earlier, and of slots."""
    tokens = 130
    config = KeyformerConfig(rule=Accumulated(spread), forgetting=0.99)
    positions = torch.arange(slots, slots + tokens)[None] - padding
    positions = positions.masked_fill(torch.arange(tokens) < padding, -1)
    query = torch.randn(1, HEADS, tokens, WIDTH)
    keys, values = torch.randn(2, 1, KV_HEADS, slots + tokens, WIDTH)
    every = torch.cat([torch.arange(slots)[None], positions], dim=1)
    both = Tokens(keys, values, *(every[:, None].expand(1, KV_HEADS, -1),) * 2)
    both = Tokens(*(t.to(DEVICE) for t in vars(both).values()))
    arguments = [query.to(DEVICE), both[:slots], both[slots:], AttentionSpec(scale=0.25)]
    if backend is triton_backend:
        arguments.append(Span(positions.to(DEVICE), positions.to(DEVICE)))
    scorer = Scorer(config, SEED, 0, tau, sequences=torch.tensor([0], device=DEVICE))
    (got,) = backend.prefill(*arguments, scorer=scorer).received
    expected = literal(query[0], keys[0], every[0], slots, spread, tau, 0.99)
    real = every[0] >= 0
    assert torch.allclose(got[0].cpu()[:, real].double(), expected[:, real], rtol=1e-3, atol=1e-5)


def test_spreads_by_name_and_wrong_ones() -> None:
    config = KeyformerConfig(rule="accumulated(spread=64)")
    assert config.asked == (Asked("sum", spread=64),)
    assert formula(config.rules) == "accumulated(spread=64)"
    with pytest.raises(InputError, match="spread must be a whole number >= 1, got 0"):
        KeyformerConfig(rule="accumulated(spread=0)")
    for asked in ({"kind": "largest"}, {"queries": 3}):
        with pytest.raises(InputError, match="spread is for the sum over all queries"):
            Asked(**asked, spread=4)
