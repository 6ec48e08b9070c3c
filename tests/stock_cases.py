"""Calls of a model's forward, written down, and what transformers' own model gives for them.

A :class:`Case` is one to three forwards on one cache, small enough to print: its ``repr`` is
the case again. :func:`check` runs it on transformers' own model and on a copy with method
``full``, and says how they differ. Nothing here knows how Keyformer works.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from functools import cache
from typing import Any

import torch
from conftest import small_stock
from families import FAMILIES, small_model
from originals import ORIGINALS
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel

from keyformer import KeyformerCache, KeyformerConfig, enable_keyformer

VOCABULARY = 61
FULL = KeyformerConfig.preset("full")
NO_DROPOUT = dict.fromkeys(
    [
        "attention_dropout",
        "hidden_dropout",
        "activation_dropout",
        "dropout",
        "layerdrop",
        "attn_pdrop",
        "embd_pdrop",
        "resid_pdrop",
    ],
    0.0,
)
WINDOWS = {"mistral window": 5, "gemma2": 5, "gemma3_text": 5}
"""Columns that a layer with a window sees: fewer than a case has."""

NAMES = [*ORIGINALS, *FAMILIES]
"""What is tested: the paper's models, and those of any-model support."""

SQUARE_MASKS = ("causal", "sparse", "prefix", "bias")


def _text(thing: Any) -> str:
    """A dataclass as the call that makes it, without what is as it would be anyway."""
    given = [
        f"{f.name}={getattr(thing, f.name)!r}"
        for f in fields(thing)
        if getattr(thing, f.name) != f.default
    ]
    return f"{type(thing).__name__}({', '.join(given)})"


@dataclass(frozen=True)
class Step:
    """One forward.

    Attributes
    ----------
    tokens
        New ones, alike in all sequences.
    mask
        For each sequence a string of "0" and "1", one for each column read so far and each
        new one; None: no ``attention_mask``.
    positions
        ``position_ids`` of the new tokens: a row for each sequence or one for all; None: not
        given.
    embeds
        Give ``inputs_embeds`` instead of ``input_ids``.
    keep
        ``logits_to_keep``: a number, or a tuple for a tensor of indices; None: not given.
    token_types
        Give ``token_type_ids``.
    hidden_states, attentions
        Ask for them.
    plain
        Ask for a tuple, ``return_dict=False``.
    square
        Instead of the mask, one of (batch, 1, tokens, tokens), additive, that hides padding and:
        "causal", what comes later; "sparse", half of what came before as well; "prefix", what
        comes later in the second half; "bias", what comes later, with a bias on all else.
    """

    tokens: int
    mask: tuple[str, ...] | None = None
    positions: tuple[tuple[int, ...], ...] | None = None
    embeds: bool = False
    keep: int | tuple[int, ...] | None = None
    token_types: bool = False
    hidden_states: bool = False
    attentions: bool = False
    plain: bool = False
    square: str | None = None

    __repr__ = _text


@dataclass(frozen=True)
class Case:
    """Forwards on one cache.

    Attributes
    ----------
    family
        One of NAMES.
    steps
        The forwards.
    batch
        Number of sequences.
    attention
        The implementation of attention of transformers' own model.
    switched
        Another one that both models are given after Keyformer was enabled.
    cache
        "passed": made by the caller; "made": by the model, and passed on; "none".
    mode
        "eval", without gradients; "grad", the same with them; "train".
    labels
        Give ``labels`` in the last forward, for tokens that a real one predicts.
    checkpointing
        With gradient checkpointing.
    mask_dtype
        "int64", "bool" or "float32".
    seed
        Of tokens and of what gradients are taken of.
    """

    family: str
    steps: tuple[Step, ...]
    batch: int = 1
    attention: str = "eager"
    switched: str | None = None
    cache: str = "made"
    mode: str = "eval"
    labels: bool = False
    checkpointing: bool = False
    mask_dtype: str = "int64"
    seed: int = 0

    __repr__ = _text

    def real(self, step: int) -> Tensor:
        """(batch, tokens) bool: which new tokens of a forward are no padding."""
        mask, tokens = self.steps[step].mask, self.steps[step].tokens
        if mask is None:
            return torch.ones(self.batch, tokens, dtype=torch.bool)
        return _bits(mask)[:, -tokens:]

    def seeing(self, step: int) -> Tensor:
        """The same, and padding after a real token that its queries can see."""
        mask, tokens = self.steps[step].mask, self.steps[step].tokens
        if mask is None:
            return self.real(step)
        visible = _bits(mask)
        seen = visible.cumsum(dim=-1)
        if self.family in WINDOWS:
            seen[:, WINDOWS[self.family] :] -= seen.clone()[:, : -WINDOWS[self.family]]
        return seen[:, -tokens:] > 0

    def labelled(self, step: int) -> Tensor:
        """The same shape: which new tokens are real and come after a real one."""
        real = self.real(step)
        return real & real.roll(1, dims=1) & (torch.arange(real.shape[1]) > 0)

    def inputs(self, step: int, embed: Any) -> dict[str, Any]:
        """The arguments of a forward, new tensors each time; ``embed`` looks tokens up."""
        this, arguments = self.steps[step], {}
        random = torch.Generator().manual_seed(10 * self.seed + step)
        ids = torch.randint(1, VOCABULARY, (self.batch, this.tokens), generator=random)
        types = torch.randint(1, VOCABULARY, ids.shape, generator=random)
        if this.embeds:
            embeds = embed(ids).detach().clone()
            arguments["inputs_embeds"] = embeds.requires_grad_(self.mode != "eval")
        else:
            arguments["input_ids"] = ids
        if this.square is not None:
            arguments["attention_mask"] = self.square_mask(step, random)
        elif this.mask is not None:
            arguments["attention_mask"] = _bits(this.mask).to(getattr(torch, self.mask_dtype))
        if this.positions is not None:
            arguments["position_ids"] = torch.tensor(this.positions)
        if this.keep is not None:
            kept = this.keep if isinstance(this.keep, int) else torch.tensor(this.keep)
            arguments["logits_to_keep"] = kept
        if this.token_types:
            arguments["token_type_ids"] = types
        if self.labels and step == len(self.steps) - 1:
            arguments["labels"] = ids.masked_fill(~self.labelled(step), -100)
        for name, asked in (
            ("output_hidden_states", this.hidden_states),
            ("output_attentions", this.attentions),
        ):
            if asked:
                arguments[name] = True
        if this.plain:
            arguments["return_dict"] = False
        if self.cache == "none":
            arguments["use_cache"] = False
        elif self.cache == "made":
            arguments["use_cache"] = True
        return arguments

    def square_mask(self, step: int, random: torch.Generator) -> Tensor:
        """What ``Step.square`` describes."""
        kind, real = self.steps[step].square, self.real(step)
        tokens = real.shape[1]
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        if kind == "sparse":
            chosen = torch.rand(self.batch, tokens, tokens, generator=random) < 0.5
            causal = causal & (chosen | torch.eye(tokens, dtype=torch.bool))
        elif kind == "prefix":
            causal = causal | (torch.arange(tokens) < tokens // 2)
        visible = (causal & real[:, None, :])[:, None]
        mask = torch.zeros(self.batch, 1, tokens, tokens)
        if kind == "bias":
            mask = torch.randn(mask.shape, generator=random).sub_(1).clamp(-2, 2)
        return mask.masked_fill(~visible, torch.finfo(torch.float32).min)


def _bits(rows: tuple[str, ...]) -> Tensor:
    return torch.tensor([[digit == "1" for digit in row] for row in rows])


@cache
def stock_model(family: str, attention: str) -> PreTrainedModel:
    """transformers' own model: tiny, with random weights and no dropout."""
    if family in ORIGINALS:
        return small_stock(family, attn_implementation=attention)
    changes = dict(NO_DROPOUT)
    if family in WINDOWS:
        changes["sliding_window"] = WINDOWS[family]
    small = small_model(family, **changes)
    config = copy.deepcopy(small.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    model.load_state_dict(small.state_dict())
    return model


@cache
def full_model(family: str, attention: str) -> PreTrainedModel:
    """A copy of it with a cache that evicts nothing."""
    return enable_keyformer(copy.deepcopy(stock_model(family, attention)), FULL)


@dataclass(frozen=True)
class Abilities:
    """What a family's own model can be given."""

    attentions: tuple[str, ...]
    switches: bool
    positions: bool
    token_types: bool
    outputs_attentions: bool
    square_masks: tuple[str, ...]


@cache
def abilities(family: str) -> Abilities:
    """What transformers' own model of a family can be given."""
    # Falcon's eager attention adds ALiBi twice.
    ours_alone = family == "falcon alibi"
    first = "sdpa" if ours_alone else "eager"
    stock = stock_model(family, first)
    known = inspect.signature(stock.forward).parameters
    return Abilities(
        attentions=("eager", "sdpa") if stock._supports_sdpa and not ours_alone else (first,),
        switches=stock._can_set_attn_implementation(),
        positions="position_ids" in known,
        token_types="token_type_ids" in known,
        outputs_attentions=not ours_alone,
        square_masks=() if ours_alone or family in ("bloom", "opt") else SQUARE_MASKS,
    )


@dataclass
class Part:
    """A tensor of an output: its shape and dtype, and its values where they mean something."""

    values: Tensor
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None

    @classmethod
    def of(cls, whole: Tensor, chosen: Tensor, dim: int = 1) -> Part:
        """Of a tensor whose first dimension and ``dim`` are sequences and queries."""
        values = whole.detach().transpose(1, dim)
        if values.shape[:2] == chosen.shape:
            values = values[chosen]
        return cls(values, tuple(whole.shape), whole.dtype)


@dataclass
class Outcome:
    """What a model gave for a case.

    Attributes
    ----------
    parts
        By name, tensors of outputs.
    gradients
        By name, of parameters and ``inputs_embeds``.
    """

    parts: dict[str, Part] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def _as_asked(model: PreTrainedModel, case: Case) -> Iterator[None]:
    """The model in the mode of the case, and afterwards as it was, without gradients."""
    if case.mode == "train":
        model.train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        with torch.no_grad() if case.mode == "eval" else nullcontext():
            yield
    finally:
        if case.checkpointing:
            model.gradient_checkpointing_disable()
        if case.mode == "train":
            model.eval()
        if case.mode != "eval":
            model.zero_grad(set_to_none=True)


def run(model: PreTrainedModel, case: Case, held: Cache | None, padding: bool = False) -> Outcome:
    """What a model gives for a case.

    Parameters
    ----------
    held
        The cache that is passed, where the case asks for one.
    padding
        Also take logits of padding whose queries see something.
    """
    outcome = Outcome()
    embed = stock_model(case.family, case.attention).get_input_embeddings()
    given: dict[str, Tensor] = {}
    with _as_asked(model, case):
        for number, step in enumerate(case.steps):
            name = f"forward {number + 1}"
            inputs = case.inputs(number, embed)
            if "inputs_embeds" in inputs:
                given[f"inputs_embeds of {name}"] = inputs["inputs_embeds"]
            if case.cache == "passed" or (case.cache == "made" and number):
                inputs["past_key_values"] = held
            output = model(**inputs)
            if step.plain:
                outcome.parts[f"{name}: tuple"] = Part(torch.tensor(len(output)))
                held = next((part for part in output if isinstance(part, Cache)), held)
                loss = output[0] if "labels" in inputs else None
                logits = output[int(loss is not None)]
            else:
                held = held if output.past_key_values is None else output.past_key_values
                loss, logits = output.loss, output.logits
            real = case.real(number)
            kept = real[:, _kept(step)]
            outcome.parts[f"{name}: logits"] = Part.of(logits, kept)
            if padding:
                seeing = case.seeing(number)[:, _kept(step)]
                outcome.parts[f"{name}: logits of padding"] = Part.of(logits, seeing & ~kept)
            if loss is not None:
                outcome.parts[f"{name}: loss"] = Part(loss.detach())
            if not step.plain:
                for index, states in enumerate(output.hidden_states or ()):
                    part = Part.of(states, real)
                    outcome.parts[f"{name}: hidden states, layer {index}"] = part
                for index, weights in enumerate(output.attentions or ()):
                    if weights is not None:
                        part = Part.of(weights, real, dim=2)
                        outcome.parts[f"{name}: attentions, layer {index}"] = part
        if case.mode != "eval":
            if loss is None:
                random = torch.Generator().manual_seed(case.seed)
                loss = (torch.randn(logits.shape, generator=random) * logits)[kept].sum()
            if loss.requires_grad:  # of no real query there is nothing to take gradients of
                loss.backward()
            given.update(model.named_parameters())
            for name, tensor in given.items():
                gradient = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                outcome.gradients[name] = gradient.clone()
    return outcome


def _kept(step: Step) -> Any:
    """An index of the queries that have logits."""
    if step.keep is None:
        return slice(None)
    return list(step.keep) if isinstance(step.keep, tuple) else slice(-step.keep, None)


def compare(expected: Outcome, got: Outcome) -> list[str]:
    """How two outcomes differ, a line each."""
    lines = []
    for name in dict.fromkeys([*expected.parts, *got.parts]):
        one, other = expected.parts.get(name), got.parts.get(name)
        if one is None or other is None:
            lines.append(f"{name}: only {'ours has it' if one is None else 'stock has it'}")
        elif (one.shape, one.dtype) != (other.shape, other.dtype):
            lines.append(f"{name}: ours {other.shape} {other.dtype}, not {one.shape} {one.dtype}")
        else:
            scale = max(1.0, one.values.abs().max().item()) if one.values.numel() else 1.0
            lines += _apart(name, one.values, other.values, 2e-4 * scale)
    largest = max((g.abs().max().item() for g in expected.gradients.values()), default=0.0)
    for name, one in expected.gradients.items():
        # Some are zero but for rounding, which is as large as the others make it.
        allowed = 1e-3 * one.abs().max().item() + 1e-4 * largest
        lines += _apart(f"gradient of {name}", one, got.gradients[name], allowed)
    return lines


def _apart(name: str, one: Tensor, other: Tensor, allowed: float) -> list[str]:
    if one.shape != other.shape:
        return [f"{name}: ours {tuple(other.shape)}, not {tuple(one.shape)}"]
    difference = (one.double() - other.double()).abs()
    worst = difference.max().item() if difference.numel() else 0.0
    if worst <= allowed:  # not so where ours is NaN
        return []
    at = int(difference.nan_to_num(torch.inf).argmax())
    pair = f"ours {other.flatten()[at]:.5g}, stock {one.flatten()[at]:.5g}"
    return [f"{name}: {worst:.3g} apart, {allowed:.1g} allowed: {pair}"]


@dataclass
class Verdict:
    """How a case ended: no lines where both models agree.

    Attributes
    ----------
    lines
        How they differ.
    refused
        Why stock raised an error, and so must ours; None where it did not.
    """

    lines: list[str]
    refused: str | None = None


def check(case: Case, padding: bool = False) -> Verdict:
    """Run a case on transformers' own model and on the one with method ``full``.

    Parameters
    ----------
    padding
        Compare logits of padding too where it sees something; their values are arbitrary.
    """
    key = (case.family, case.attention)
    stock, ours = stock_model(*key), full_model(*key)
    if case.switched is not None:
        stock, ours = copy.deepcopy(stock), copy.deepcopy(ours)
        for model in (stock, ours):
            model.set_attn_implementation(case.switched)
    passed = case.cache == "passed"
    expected, got, refused, refusal = None, None, None, None
    try:
        expected = run(stock, case, DynamicCache(config=stock.config) if passed else None, padding)
    except Exception as error:
        refused = _reason(error)
    try:
        got = run(ours, case, KeyformerCache(ours.config, FULL) if passed else None, padding)
    except Exception as error:
        refusal = _reason(error)
        full_model.cache_clear()  # whatever it left behind
    if expected is None:
        return Verdict([f"stock raises {refused}, ours does not"] if got else [], refused)
    if got is None:
        return Verdict([f"ours raises {refusal}"])
    if not all(part.values.isfinite().all() for part in expected.parts.values()):
        return Verdict([], "not finite")
    return Verdict(compare(expected, got))


def _reason(error: Exception) -> str:
    first = str(error).strip().splitlines()
    return f"{type(error).__name__}: {first[0] if first else ''}"
