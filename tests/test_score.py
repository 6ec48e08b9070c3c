"""Noise, temperature and configuration against the paper's definitions."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from keyformer import InputError, KeyformerConfig
from keyformer.config import METHODS
from keyformer.score import Scorer, noise, temperature


def draw(
    kind: str, seed: int = 0, layer: int = 0, heads: int = 4, queries: int = 100, keys: int = 400
):
    places = torch.arange(max(queries, keys))
    return noise(kind, seed, layer, heads, places[None, :queries], places[None, None, :keys])


@pytest.mark.parametrize(
    ("kind", "quantile"),
    [
        ("gumbel", lambda p: -math.log(-math.log(p))),
        (
            "gaussian",
            lambda p: 0.5772 + 1.2825 * float(torch.special.ndtri(torch.tensor(p))),
        ),
    ],
)
def test_noise_has_the_papers_distribution(kind: str, quantile) -> None:
    sample = draw(kind).flatten()
    for p in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        share = float((sample < quantile(p)).float().mean())
        assert share == pytest.approx(p, abs=4 * math.sqrt(p * (1 - p) / sample.numel()) + 1e-4)
    assert sample.mean() == pytest.approx(0.5772, abs=0.02)
    assert sample.std() == pytest.approx(1.2825, abs=0.02)
    assert sample.isfinite().all()


def test_noise_is_independent_between_counters() -> None:
    base = draw("gumbel")
    others = [draw("gumbel", seed=1), draw("gumbel", seed=2**33), draw("gumbel", layer=1)]
    others += [base.roll(1, dims) for dims in (1, 2, 3)]
    for other in others:
        both = torch.stack([base.flatten(), other.flatten()])
        assert abs(float(torch.corrcoef(both)[0, 1])) < 0.01


def test_noise_does_not_depend_on_the_split() -> None:
    whole = draw("gumbel", seed=7, heads=4)
    places = torch.arange(400)
    part = noise("gumbel", 7, 0, 4, places[None, 30:50], places[None, None, 100:120].flip(-1))
    assert torch.equal(whole[:, :, 30:50, 100:120].flip(-1), part)


def test_noise_follows_positions_not_slots() -> None:
    """Each key/value head's own order of positions, shared by the query heads of its group."""
    positions = torch.stack([torch.randperm(9), torch.randperm(9)])[None]
    query = torch.tensor([[9]])
    got = noise("gumbel", 3, 2, 4, query, positions)
    whole = noise("gumbel", 3, 2, 4, query, torch.arange(9)[None, None])
    for head in range(4):
        assert torch.equal(got[0, head, 0], whole[0, head, 0, positions[0, head // 2]])


@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("schedule", ["fresh", "once"])
def test_score_is_equation_9_summed_over_queries(tau: float, schedule: str) -> None:
    """Softmax of (x + zeta) / tau, less for queries that lie back, and all times a factor."""
    logits = torch.randn(1, 2, 1, 3, 8)
    places = torch.arange(8)
    queries, keys = places[None, 5:8], places[None, None].expand(1, 2, 8)
    config = KeyformerConfig(noise_schedule=schedule, forgetting=0.75)
    plain = logits.softmax(dim=-1)
    (got,) = Scorer(config, 11, 4, tau, 0.5)(
        logits, plain, queries, keys, torch.tensor([5]), torch.tensor([9])
    )
    drawn_at = queries if schedule == "fresh" else 0 * queries
    zeta = noise("gumbel", 11, 4, 2, drawn_at, keys)
    for head in range(2):
        expected = torch.zeros(8)
        for i in range(3):
            powers = [
                math.exp((float(logits[0, head, 0, i, j]) + float(zeta[0, head, i, j])) / tau)
                for j in range(8)
            ]
            weight = 0.5 * 0.75 ** (9 - (5 + i))
            expected += torch.tensor([weight * p / sum(powers) for p in powers])
        assert torch.allclose(got[0, head], expected, atol=1e-6)


def test_padding_gives_no_score() -> None:
    logits = torch.randn(1, 1, 2, 4, 6)
    queries, keys = torch.tensor([[-1, -1, 4, 5]]), torch.arange(6)[None, None]
    ends = torch.tensor([4]), torch.tensor([5])
    scorer = Scorer(KeyformerConfig(forgetting=0.5), 0, 0, 1.0)
    plain = logits.softmax(dim=-1)
    (real,) = scorer(logits[..., 2:, :], plain[..., 2:, :], queries[:, 2:], keys, *ends)
    (padded,) = scorer(logits, plain, queries, keys, *ends)
    assert torch.allclose(padded, real)


def test_a_constant_changes_no_score() -> None:
    """Softmax does not see a constant, whatever Table 4 of the paper says."""
    logits, places = torch.randn(1, 2, 1, 3, 8), torch.arange(8)
    keys = places[None, None].expand(1, 2, 8)
    (with_constant,), (without,) = (
        Scorer(KeyformerConfig(noise=kind), 0, 0, 1.5)(
            logits, logits.softmax(dim=-1), places[None, 5:8], keys, places[5:6], places[7:]
        )
        for kind in ("constant", "none")
    )
    assert torch.allclose(with_constant, without, atol=1e-6)


@given(st.floats(0.1, 5), st.floats(0.1, 5), st.integers(1, 1000), st.integers(0, 1000))
def test_temperature_is_equation_10(tau_init, tau_end, length, step) -> None:
    config = KeyformerConfig(tau_init=tau_init, tau_end=tau_end)
    t = min(step, length)
    expected = tau_init + t * (tau_end - tau_init) / length
    assert temperature(config, step, length) == pytest.approx(expected)
    assert temperature(config, step, None) == tau_init


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("kv_cache", v) for v in (0, -1, 100.1, math.nan, math.inf, "50", True)),
        *(("recent", v) for v in (-0.1, 101, math.nan, None)),
        *((f, v) for f in ("tau_init", "tau_end") for v in (0, -1, math.nan, math.inf)),
        *(("kv_budget", v) for v in (0, -5, 2.5, math.nan)),
        *(("generation_length", v) for v in (0, 1.5)),
        *((f, v) for f in ("damping", "forgetting") for v in (0, -0.5, 1.01, math.nan)),
        ("noise", "uniform"),
        ("noise_schedule", "twice"),
        ("score", "per_head"),
        *(("normalize", v) for v in ("max", -0.1, 1.1, math.nan, True, [0.5])),
        ("key_set", "thawed"),
        ("positions", "old"),
        ("dilation", -1),
        ("sinks", -1),
        ("seed", -1),
        ("backend", "numpy"),
    ],
)
def test_settings_out_of_range_are_named(field: str, value) -> None:
    with pytest.raises(InputError) as error:
        KeyformerConfig(**{field: value})
    assert field in str(error.value) and repr(value) in str(error.value)
    assert "\n" not in str(error.value)


def test_presets_are_the_rows_of_the_paper() -> None:
    given = {"kv_cache": 50, "recent": 20, "tau_init": 1.5, "noise": "gaussian"}
    presets = {name: KeyformerConfig.preset(name, **given) for name in METHODS}
    kept = {
        name: (config.budget(200), config.recent_window(config.budget(200)), config.sinks)
        for name, config in presets.items()
        if name != "full"
    }
    assert kept == {
        "window": (100, 100, 0),
        "dilated_window": (100, 100, 0),
        "streaming_llm": (100, 96, 4),
        "key": (100, 0, 0),
        "h2o": (100, 20, 0),
        "keyformer": (100, 20, 0),
        "recall": (100, 20, 0),
    }
    assert presets["full"].budget(200) > 10**15
    for name in ("key", "h2o", "recall"):
        assert (presets[name].noise, presets[name].tau_init, presets[name].tau_end) == (
            "none",
            1,
            1,
        )
    assert KeyformerConfig(normalize=1).plain()["normalize"] == 1.0
    assert [presets[name].power_of_age for name in ("h2o", "recall")] == [0, 0.25]
    assert presets["keyformer"] == KeyformerConfig(**given)
    assert presets["dilated_window"].dilation == 1
    with pytest.raises(InputError, match="snapkv"):
        KeyformerConfig.preset("snapkv")
    with pytest.raises(InputError, match="kv_cash"):
        KeyformerConfig.preset("h2o", kv_cash=50)


@given(st.integers(1, 5000), st.floats(0.01, 100), st.floats(0, 100), st.integers(0, 8))
def test_budget_and_window_are_whole_tokens(n, kv_cache, recent, sinks) -> None:
    config = KeyformerConfig(kv_cache=kv_cache, recent=recent, sinks=sinks)
    k = config.budget(n)
    assert k == max(1, int(n * kv_cache / 100))
    assert config.recent_window(k) == min(int(k * recent / 100), max(0, k - sinks))
    assert KeyformerConfig(kv_budget=7, kv_cache=kv_cache).budget(n) == 7
