"""The settings of the method, and as a row of them every method the paper compares, and ours."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from numbers import Integral, Real
from typing import Any

from keyformer.budgets import Policy, policy
from keyformer.errors import InputError
from keyformer.rules import Asked, Rule, Shares, formula, shares

UNLIMITED = sys.maxsize
"""A kv_budget that no text reaches: nothing is ever evicted."""

NOISES = ("gumbel", "gaussian", "constant", "none")
NOISE_SCHEDULES = ("fresh", "once")
SCORES = ("per_layer", "shared")
NORMALIZATIONS = {"sum": 0.0, "mean": 1.0}
KEY_SETS = ("dynamic", "frozen")
POSITIONS = ("original", "new")
CACHE_DTYPES = ("auto", "float8", "int8", "int4")
BACKENDS = ("auto", "torch", "triton")

PLAIN = {"noise": "none", "tau_init": 1.0, "tau_end": 1.0}
"""The model's own softmax for a score."""

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kv_budget": UNLIMITED, "recent": 100.0, "sinks": 0},
    "window": {"recent": 100.0, "sinks": 0},
    "dilated_window": {"recent": 100.0, "sinks": 0, "dilation": 1},
    "streaming_llm": {"recent": 100.0, "sinks": 4},
    "key": {"recent": 0.0, "sinks": 0, **PLAIN},
    "h2o": {"sinks": 0, **PLAIN},
    "keyformer": {"sinks": 0},
    "recall": {"rule": "recall", "recent": 20.0, "sinks": 0, "normalize": 0.25, **PLAIN},
}
"""What defines each method; what a row does not name is the user's to set."""


@dataclass(frozen=True)
class KeyformerConfig:
    """How many tokens the cache keeps, and how it chooses them.

    Parameters
    ----------
    kv_cache
        Cache budget k in percent of the prompt's real tokens, in (0, 100].
    recent
        Recent window w in percent of k, in [0, 100] (section 3.3.3).
    kv_budget
        Cache budget in tokens; overrides ``kv_cache``. ``UNLIMITED`` never evicts.
    tau_init, tau_end
        Temperature at the prompt and at the last decode step, both > 0 (Eq. 10).
    generation_length
        T of Eq. 10 in tokens; None takes it from ``generate``'s ``max_new_tokens``.
    noise
        Logit adjustment zeta of Eq. 4: "gumbel" (Eq. 5), "gaussian" of the same mean and
        standard deviation, "constant" (the Gumbel mean) or "none".
    noise_schedule
        "fresh": zeta is drawn for each query and key; "once": for each key, and stays
        (Algorithm 1 to the letter).
    score
        "per_layer", or "shared": one f_theta over all layers, which then keep the same tokens
        (Table 3). A shared prompt is evicted after the last layer, so that until then all
        layers hold all of it.
    damping
        alpha of Fig. 5 in (0, 1]: factor of the scores that queries give once the cache holds
        something, where they see fewer tokens than the text has.
    forgetting
        Factor in (0, 1] of all scores for each query that comes after (arXiv 2407.20485).
    normalize
        What ranks tokens: the score divided by a power in [0, 1] of the number of queries that
        could see the token. "sum" is the power 0, "mean" the power 1.
    key_set
        "dynamic": tokens outside the recent window compete at every step; "frozen": those
        that win after the first prompt stay for good, and only the window moves on (what the
        authors' released code does).
    dilation
        Of the recent window: it holds every (dilation + 1)-th token (Fig. 2c), those whose
        position is a multiple of dilation + 1.
    positions
        What the model's position scheme is told: "original", each token's position in the
        text ("Org Pos" of Table 3), or "new", its rank among the tokens in the cache.
    sinks
        First tokens of the text that are never evicted (StreamingLLM keeps 4).
    cache_dtype
        What slots hold keys and values in: "auto", the model's dtype, or "float8", "int8" or
        "int4" with scales, see :mod:`keyformer.precision`. New tokens are quantized as they
        enter their slot.
    prefill_chunk
        Tokens of a prompt that are processed at a time, at least 1: each chunk attends to the
        slots and, causally, to itself, is scored and evicted to the budget, so that memory does
        not grow with the prompt. Budgets are still those of the whole prompt, and all of it is
        t = 0. With 1 a token sees only key and recent tokens; with None, or as many as the
        prompt has, it sees the whole text before it (the paper's prompt phase).
    seed
        Seed of the noise; None draws one from torch's global generator for each cache.
    backend
        "torch"; "triton", the kernels of keyformer.kernels; or "auto": the kernels on a GPU
        where they can run, and torch elsewhere.
    rule
        What ranks tokens, see :mod:`keyformer.rules`: a name in ``RULES``, a rule of your own, or
        several of them with the share of the key slots that each fills, the first the first:
        ``{"accumulated": 0.9, "last": 0.1}`` or ``"0.9*accumulated + 0.1*last"``.
    budgets
        How layers and heads share the key slots, see :mod:`keyformer.budgets`: "uniform" (the
        paper), "pyramid", "adaptive", or a policy of your own.

    Raises
    ------
    InputError
        If a value is outside its range; the message names the value and the range.
    """

    kv_cache: float = 60.0
    recent: float = 30.0
    kv_budget: int | None = None
    tau_init: float = 1.0
    tau_end: float = 2.0
    generation_length: int | None = None
    noise: str = "gumbel"
    noise_schedule: str = "fresh"
    score: str = "per_layer"
    damping: float = 1.0
    forgetting: float = 1.0
    normalize: str | float = "sum"
    key_set: str = "dynamic"
    dilation: int = 0
    positions: str = "original"
    sinks: int = 0
    cache_dtype: str = "auto"
    prefill_chunk: int | None = None
    seed: int | None = None
    backend: str = "auto"
    rule: str | Rule | Mapping[Any, float] | Sequence[tuple[Any, float]] = "accumulated"
    budgets: str | Policy = "uniform"

    def __post_init__(self) -> None:
        def number(name: str, fits: Any, allowed: str) -> None:
            value = getattr(self, name)
            if not isinstance(value, Real) or isinstance(value, bool) or not fits(value):
                raise InputError(f"{name} must be {allowed}, got {value!r}")

        def whole(name: str, least: int, or_none: str = "") -> None:
            value = getattr(self, name)
            if or_none and value is None:
                return
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise InputError(
                    f"{name} must be a whole number >= {least}{or_none}, got {value!r}"
                )

        def choice(name: str, allowed: tuple[str, ...]) -> None:
            value = getattr(self, name)
            if value not in allowed:
                raise InputError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")

        number("kv_cache", lambda v: 0 < v <= 100, "a percentage in (0, 100]")
        number("recent", lambda v: 0 <= v <= 100, "a percentage in [0, 100]")
        for name in ("tau_init", "tau_end"):
            number(name, lambda v: v > 0 and math.isfinite(v), "a finite temperature > 0")
        for name in ("damping", "forgetting"):
            number(name, lambda v: 0 < v <= 1, "a factor in (0, 1]")
        whole("kv_budget", 1, " or None")
        whole("generation_length", 1, " or None")
        whole("prefill_chunk", 1, " or None")
        whole("sinks", 0)
        whole("dilation", 0)
        whole("seed", 0, " or None")
        choice("noise", NOISES)
        choice("noise_schedule", NOISE_SCHEDULES)
        choice("score", SCORES)
        if not isinstance(self.normalize, str) or self.normalize not in NORMALIZATIONS:
            number("normalize", lambda v: 0 <= v <= 1, "sum, mean or a power in [0, 1]")
            object.__setattr__(self, "normalize", float(self.normalize))
        choice("key_set", KEY_SETS)
        choice("positions", POSITIONS)
        choice("cache_dtype", CACHE_DTYPES)
        choice("backend", BACKENDS)
        rules = self.rules
        if isinstance(self.rule, Mapping):
            object.__setattr__(self, "rule", tuple(self.rule.items()))
        elif isinstance(self.rule, list):
            object.__setattr__(self, "rule", tuple(map(tuple, self.rule)))
        if self.policy is not None and self.positions == "new":
            raise InputError(
                f"budgets {self.budgets} cannot be combined with positions 'new': layers would"
                " count their tokens differently"
            )
        if self.policy is not None and self.score == "shared":
            raise InputError(
                f"budgets {self.budgets} cannot be combined with score 'shared', under which all"
                " layers keep the same tokens"
            )
        for rule, _ in rules:
            if not all(isinstance(one, Asked) for one in rule.asked):
                raise InputError(
                    f"rule {rule} must ask for an Asked, a tuple of them or None, got {rule.asks!r}"
                )
            first = rule.asked[0] if rule.asked else None
            if rule.accumulates and (first is None or first.queries or first.kind != "sum"):
                raise InputError(
                    f"rule {rule} accumulates and must ask for Asked('sum') first, got"
                    f" {rule.asks!r}"
                )

    @classmethod
    def preset(cls, method: str, **settings: Any) -> KeyformerConfig:
        """The configuration of a method, by name.

        Parameters
        ----------
        method
            A key of ``METHODS``.
        settings
            Fields of KeyformerConfig. What defines the method stays as its row says, so one
            set of settings serves all methods: ``recent`` does not turn "key" into "h2o".

        Raises
        ------
        InputError
            If the method or a setting is unknown, or a value is out of range.
        """
        if method not in METHODS:
            raise InputError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        known = [field.name for field in fields(cls)]
        for name in settings:
            if name not in known:
                raise InputError(f"unknown setting {name!r}; known are {', '.join(known)}")
        return cls(**{**settings, **METHODS[method]})

    @property
    def never_evicts(self) -> bool:
        """Whether this is method full: the model is transformers' own, to the letter."""
        return self.kv_budget == UNLIMITED

    @property
    def needs_scores(self) -> bool:
        """Whether any slot is won by score; recent = 100 leaves none to win."""
        return self.recent < 100

    @property
    def power_of_age(self) -> float:
        """Of the number of queries that could see a token; by that its score is divided."""
        named = self.normalize
        return NORMALIZATIONS[named] if isinstance(named, str) else named

    @cached_property
    def rules(self) -> Shares:
        """What ranks the tokens, each with its share of the key slots."""
        return shares(self.rule)

    @cached_property
    def policy(self) -> Policy | None:
        """How layers and heads share the key slots; None where all have as many."""
        return policy(self.budgets)

    @cached_property
    def asked(self) -> tuple[Asked, ...]:
        """What the rules want to know of attention, each once."""
        if not self.needs_scores:
            return ()
        return tuple(dict.fromkeys(one for rule, _ in self.rules for one in rule.asked))

    @property
    def draws_noise(self) -> bool:
        """Whether two runs with other seeds can differ."""
        return bool(self.asked) and self.noise in ("gumbel", "gaussian")

    def plain(self) -> dict[str, Any]:
        """Its fields as a record holds them: rules and policies by what they print as."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {**values, "rule": formula(self.rules), "budgets": str(self.budgets)}

    def budget(self, prompt_length: int) -> int:
        """k: slots for a prompt of ``prompt_length`` real tokens."""
        if self.kv_budget is not None:
            return self.kv_budget
        return max(1, int(prompt_length * self.kv_cache / 100))

    def recent_window(self, budget: int) -> int:
        """w: the most recent tokens that are kept among ``budget`` slots; sinks come first."""
        return min(int(budget * self.recent / 100), max(0, budget - self.sinks))
