"""KeyformerLayer: one layer's attention over its slots and new tokens, its scores and evictions."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from keyformer import backends
from keyformer.attention import Attended, AttentionSpec, Tokens
from keyformer.budgets import from_largest
from keyformer.config import KeyformerConfig
from keyformer.eviction import Eviction, known_positions
from keyformer.rules.rule import Candidates, checked
from keyformer.score import Scorer
from keyformer.slots import Slots
from keyformer.text import Text, make_writable

GROWTH = 64
"""Slots added at a time while the text is shorter than the budget."""


class KeyformerLayer(Slots, CacheLayerMixin):
    """The slots of one layer, and what fills them; their attributes are those of ``Slots``.

    Parameters
    ----------
    config
        The method and its settings.
    text
        What layers of this kind count alike.
    window
        Tokens that the model lets a query of this layer see, itself included, so that no
        other can be of use; None if it sees all.
    depth
        Which layer it is, from 0 on, of how many that evict by this method.

    Attributes
    ----------
    length
        How much of the text this layer has been given.
    """

    is_sliding = False

    def __init__(
        self,
        config: KeyformerConfig,
        text: Text,
        window: int | None = None,
        depth: tuple[int, int] = (0, 1),
    ) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.window = window
        self.depth = depth
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.length = 0
        self.room = {}

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first keys; no slots yet."""
        config = self.config
        self.make_slots(key_states, value_states, config.cache_dtype, len(config.rules))
        self.is_initialized = True

    @property
    def budget(self) -> Tensor:
        """The slots of each head, (batch, kv_heads) int64."""
        if self.own_budget is not None:
            return self.own_budget
        budget = self.text.on(self.device).budget
        return budget[:, None].expand(-1, self.positions.shape[1])

    @property
    def largest_budget(self) -> int:
        """Of all heads and sequences."""
        return self.text.largest_budget if self.own_largest is None else self.own_largest

    def place(self, key: Tensor, value: Tensor) -> Tokens:
        """The tokens that the text has just taken, with their keys and values in this layer.

        Parameters
        ----------
        key, value
            (batch, kv_heads, tokens, head_dim) of the new tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        make_writable(self, self.in_place)
        text = self.text.on(self.device)
        self.length = text.length
        columns = text.columns
        if columns.changed:
            self.hide(columns.shows(known_positions(self.positions)))
        places = self._places(text.positions, text.places)
        if self._counts_columns and columns.length == text.length:  # of no part of a prompt
            own = torch.arange(text.length - key.shape[2], text.length, device=self.device)
            places = torch.where(places < 0, own, places)
        positions, places = (
            numbers[:, None].expand(key.shape[:3]) for numbers in (text.positions, places)
        )
        return Tokens(key, value, positions, places)

    @property
    def _counts_columns(self) -> bool:
        """Whether padding counts for how far the model's window reaches, as in transformers."""
        columns = self.text.columns
        plain = columns.even and columns.ends_real
        return self.window is not None and self.config.never_evicts and not plain

    def _places(self, positions: Tensor, otherwise: Tensor) -> Tensor:
        """Where tokens at positions (batch, ...) stand for ALiBi and the model's window.

        That they are elsewhere than ``otherwise`` takes padding between tokens, or hidden ones.
        """
        columns = self.text.columns
        if self.config.positions == "original":
            if columns.places is not None:
                return columns.place_of(positions)
            if self._counts_columns:
                return columns.of(positions)
        return otherwise

    def attend(
        self,
        query: Tensor,
        new: Tokens,
        spec: AttentionSpec,
        scorer: Scorer | None,
        output_weights: bool = False,
    ) -> Attended:
        """Attend to the slots and the new tokens, and score them all; :meth:`admit` follows.

        Parameters
        ----------
        query
            (batch, heads, tokens, head_dim) of the new tokens.
        new
            What :meth:`place` gave for them.
        scorer, output_weights
            See :func:`keyformer.backends.torch.prefill`.
        """
        query, slots, read, new = self._read(query, new, spec)
        attended = backends.prefill(
            self.config,
            query,
            slots,
            read,
            spec,
            scorer,
            span=self.text.on(self.device).span,
            output_weights=output_weights,
            unbroken=not self.text.columns.padded and not self.text.columns.hides,
            mask=self._odd_mask(prompt=True),
            cache=self._odd_slots,
        )
        held = self.positions.shape[-1]
        scores = self._scored(attended, slots, read, scorer)
        if held:
            self.scores.copy_(scores[:, :, :held])
            self.grow(self._wanted())
        self._arrivals = new, scores[:, :, held:], attended.output.requires_grad
        return attended

    @torch.no_grad()
    def _scored(
        self, attended: Attended, slots: Tokens, new: Tokens, scorer: Scorer | None
    ) -> Tensor:
        """What the rules give for the slots and, after them, for the new tokens."""
        text, asked = self.text.on(self.device), self.config.asked
        before = self.scores.new_zeros(*new.positions.shape, *self.scores.shape[3:])
        if slots.positions.shape[-1]:
            queries = text.taken.view(-1, *(1,) * (before.ndim - 1))
            old = self.scores * self.config.forgetting**queries
            before = torch.cat([old, before], dim=2)
        if scorer is None:
            return before
        several = before.ndim == 4
        scores = []
        for number, (rule, _) in enumerate(self.config.rules):
            told = tuple(attended.received[asked.index(one)] for one in rule.asked)
            candidates = Candidates(
                positions=attended.positions,
                before=before[..., number] if several else before,
                received=told if isinstance(rule.asks, tuple) else told[0] if told else None,
                queries=text.taken,
                seen=text.seen,
                length=text.length,
                config=self.config,
                read=lambda: (
                    torch.cat([slots.keys, new.keys], dim=2),
                    torch.cat([slots.values, new.values], dim=2),
                ),
            )
            score = checked(rule, candidates)
            if text.columns.padded:  # a sequence without new tokens stays as it is
                score = torch.where(candidates.queries[:, None, None] > 0, score, candidates.before)
            scores.append(score)
        return torch.stack(scores, dim=-1) if several else scores[0]

    def step(
        self,
        query: Tensor,
        new: Tokens,
        spec: AttentionSpec,
        scorer: Scorer | None,
        tau: Tensor,
        backend: ModuleType,
    ) -> Tensor:
        """:meth:`attend` and :meth:`admit` of one new token a sequence, at once.

        By the kernels nothing waits for the device and nothing is allocated that outlives the
        step, so it can be captured and replayed. Shared scores decide later, in :meth:`admit`.

        Parameters
        ----------
        tau
            () float32: the temperature, in place of the scorer's.
        backend
            What :meth:`stepping` gave.

        Returns
        -------
        Tensor
            The heads' output, (batch, heads, 1, head_dim).
        """
        self.grow(self._wanted())
        as_stored = backend is not backends.torch
        query, slots, read, new = self._read(query, new, spec, as_stored)
        evicts = self.config.score == "per_layer"
        output, new_scores = backend.step(
            self, query, slots, read, new, spec, scorer, tau, evicts=evicts
        )
        if not evicts:
            self._arrivals = new, new_scores, False
        return output

    def stepping(self, query: Tensor, spec: AttentionSpec) -> ModuleType | None:
        """The backend whose :meth:`step` can stand for :meth:`attend` and :meth:`admit`."""
        if not self.text.step:
            return None
        odd = {"mask": self._odd_mask(prompt=False), "cache": self._odd_slots}
        return backends.stepping(self.config, query, spec, **odd)

    @property
    def _odd_slots(self) -> str | None:
        """What of the slots the kernels do not know, which read the first ones as filled."""
        return "one that has forgotten tokens" if self.text.patchy else None

    def _odd_mask(self, prompt: bool) -> str | None:
        """What the attention mask does that the kernels do not know; None if they know it."""
        columns = self.text.columns
        if columns.hides:
            return "one that hides earlier tokens"
        if prompt and not columns.new_even:
            return "one with holes"
        # They serve tokens alone, not what follows the last, unless just they are asked for.
        ends_in_padding = prompt and not columns.ends_real and self.config.backend == "auto"
        return "one that ends in padding" if ends_in_padding else None

    def _read(
        self, query: Tensor, new: Tokens, spec: AttentionSpec, as_stored: bool = False
    ) -> tuple[Tensor, Tokens, Tokens, Tokens]:
        """Query, slots and new tokens as attention reads them, and the new as they are stored.

        Where it reads the slots ``as_stored`` they are quantized, unless they are rotated first.
        """
        rotary, moving = spec.rotary, self.config.positions == "new"
        places = _order(self.positions) if moving else self._places(self.positions, self.positions)
        as_stored &= rotary is None or not moving
        keys, values = (self.keys, self.values) if as_stored else self.read()
        slots = Tokens(keys, values, self.positions, places)
        if rotary is None:
            return query, slots, new, new
        heads = query.shape[1]
        turned = rotary(torch.cat([query, new.keys], dim=1), new.places[:, :1])
        query, read = turned[:, :heads], replace(new, keys=turned[:, heads:])
        if moving:
            return query, slots.rotated(rotary), read, new
        return query, slots, read, read

    @property
    def all_scores(self) -> Tensor:
        """Scores of the slots and, after them, of the tokens that :meth:`admit` will place."""
        return torch.cat([self.scores, self._arrivals[1]], dim=2)

    def admit(self, ranked_by: Tensor) -> None:
        """Write the tokens just attended that stay over the slots of those that leave.

        Parameters
        ----------
        ranked_by
            The scores that decide, of the shape of :attr:`all_scores`.
        """
        new, new_scores, differentiates = self._arrivals
        del self._arrivals
        text, slots = self.text.on(self.device), self.positions.shape[-1]
        eviction = Eviction(self.config, text, self.budget, self.window)
        if not slots:
            budget = eviction.shared_out(new.positions, ranked_by, self.depth)
            if budget is not eviction.budget:
                self.own_budget, self.own_largest = budget, int(budget.max())
                eviction = replace(eviction, budget=budget)
            columns, wanted = text.columns, self._wanted()
            alike = text.budgets_alike and self.own_budget is None
            unbroken = alike and not (columns.padded or columns.hides)
            chosen = eviction.chosen(new.positions, ranked_by, wanted, unbroken)
            self.fill(new, new_scores, chosen, wanted, unbroken)
            return
        positions = torch.cat([self.positions, new.positions], dim=-1)
        exchanged = eviction.exchange(positions, ranked_by, slots)
        write = self.rewrite if differentiates else self.overwrite
        write(new, new_scores, *exchanged)

    def reserve(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for what is left of a first prompt, and for what is to follow it."""
        if self.config.policy is None:
            self.lazy_initialization(key_states, value_states)
            self.make_room(self._wanted())
            self.is_initialized = False  # its own keys may be others

    def _wanted(self) -> int:
        """Slots for every token so far, up to the largest budget."""
        text, largest = self.text, self.largest_budget
        wanted = min(largest, max(text.length, text.reserved))
        if text.reserved < wanted:
            wanted = min(largest, -(-wanted // GROWTH) * GROWTH)
        return wanted

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Refuse a model that would append keys without evicting."""
        raise TypeError(
            "a KeyformerCache evicts inside attention and this model's attention does not call"
            " it; load the model with keyformer.load_model or pass it to enable_keyformer"
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers' position arithmetic expects."""
        return self.text.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over every token seen and the new ones."""
        return self.text.length + query_length, 0

    def get_max_length(self) -> int:
        """No maximum: any number of tokens can flow through the slots."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.13

    def memory_bytes(self) -> int:
        """Bytes of the slots: keys and values with their scales, positions and scores."""
        return self.slot_bytes() if self.is_initialized else 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give beam i the slots of beam ``beam_idx[i]``, positions and scores with them."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        if self.is_initialized:
            self.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times in place."""
        batch = self.keys.shape[0] if self.is_initialized else 0
        self.batch_select_indices(torch.arange(batch).repeat_interleave(repeats))

    def crop_to(self, seen: Tensor) -> None:
        """Take back all tokens from positions ``seen`` (batch,) on."""
        if self.is_initialized:
            self.empty(seen)
            self.length = self.text.length


def _order(positions: Tensor) -> Tensor:
    """The rank of each position among those of its head, -1 for an empty slot."""
    there = positions >= 0
    return (there.sum(dim=-1, keepdim=True) - 1 - from_largest(positions)).masked_fill(~there, -1)
