"""Text: what layers of a cache count alike - tokens seen, their places, budgets, steps."""

from __future__ import annotations

import copy
from functools import cached_property

import torch
from torch import Tensor

from keyformer.config import KeyformerConfig


class Span:
    """Where among the columns of new tokens the real ones are, which follow one another.

    Parameters
    ----------
    positions, places
        (batch, tokens) int64 of the new tokens, -1 for padding.
    """

    def __init__(self, positions: Tensor, places: Tensor) -> None:
        self.positions, self.places = positions, places

    @cached_property
    def columns(self) -> Tensor:
        """Of each sequence the first real column, its position, its place, and the last column.

        (4, batch) int64; a sequence without a real token has the number of columns as the first.
        """
        real = self.positions >= 0
        first = real.int().argmax(dim=-1, keepdim=True)
        position, place = self.positions.gather(1, first), self.places.gather(1, first)
        last = first + real.sum(dim=-1, keepdim=True) - 1
        first = first.masked_fill(position < 0, real.shape[1])
        return torch.cat([first, position, place, last], dim=-1).T.contiguous()


class Text:
    """How far the text of each sequence has come, and how much of it is kept.

    Parameters
    ----------
    config
        The method and its settings.
    window
        Tokens that the model lets a query of these layers see, itself included; None if all.

    Attributes
    ----------
    length
        Tokens taken, padding included. The first prompt ends at ``first_prompt`` of them, and
        the last one at ``prompt_end``.
    step
        t of Eq. 10: 0 after a prompt, then the number of decode steps since.
    seen, budget, window
        (batch,) int64: real tokens so far, k and w.
    frozen_before
        (batch,) int64: where the recent window began when the first prompt had been read.
    shared
        (batch, batch) int64: how many first tokens two sequences have from one forward, as
        beams do, so that their keys and values are the same.
    positions, places
        (batch, tokens) int64 of the tokens taken last, -1 for padding: in the text, and what
        the model's position scheme is told.
    span
        Which of the tokens taken last are real.
    largest_budget
        The largest k of the batch.
    reserved
        Tokens that are to find slots without any being added; 0 where they may be.
    """

    _per_sequence = ("seen", "budget", "window", "frozen_before", "shared")
    budget: Tensor
    window: Tensor
    frozen_before: Tensor
    shared: Tensor
    positions: Tensor
    places: Tensor
    span: Span
    largest_budget: int

    def __init__(self, config: KeyformerConfig, window: int | None = None) -> None:
        self.config = config
        self.model_window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything, budgets included."""
        self.length = self.first_prompt = self.prompt_end = self.step = 0
        self.reserved = 0
        self.seen = torch.zeros(1, dtype=torch.int64)

    @property
    def in_first_prompt(self) -> bool:
        """Whether the tokens taken last are of the first prompt."""
        return self.length <= self.first_prompt

    def expect(self, real: Tensor) -> None:
        """Announce a prompt, which may come in chunks; the first one fixes the budgets.

        Parameters
        ----------
        real
            (batch, tokens) bool of the whole prompt, False for padding.
        """
        if not self.first_prompt:
            self._begin(real)
        self.prompt_end = self.length + real.shape[1]

    def take(self, real: Tensor) -> None:
        """Count new tokens in. More than one, or the first, are a prompt if none is expected.

        Waits for the device at the first prompt alone, and changes what it holds in place.

        Parameters
        ----------
        real
            (batch, tokens) bool, False for padding.
        """
        tokens = real.shape[1]
        starts_prompt = tokens > 1 or not self.length
        if starts_prompt and self.length >= self.prompt_end:
            self.expect(real)
        self.positions = self.places = _after(self.seen, real)
        if self.config.positions == "new":
            self.places = self.next_places(real)
        self.span = Span(self.positions, self.places)
        self.seen += real.sum(dim=-1)
        self.advance(tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens, padding included, whose sequences the device has counted already."""
        self.length += tokens
        self.step = 0 if self.length <= self.prompt_end else self.step + 1

    def _begin(self, real: Tensor) -> None:
        """Fix k and w of each sequence by its number of real prompt tokens."""
        lengths = real.sum(dim=-1)
        self.budget = self._budgets(lengths)
        budgets = self.budget.tolist()
        windows = [self.config.recent_window(k) for k in budgets]
        self.window = torch.tensor(windows, device=real.device)
        self.largest_budget = max(budgets)
        self.first_prompt = real.shape[1]
        self.frozen_before = self.window_start(lengths)
        self.seen = torch.zeros_like(lengths)
        self.shared = torch.zeros_like(lengths).repeat(len(lengths), 1)

    def window_start(self, seen: Tensor) -> Tensor:
        """The first position of the recent window after ``seen`` (batch,) tokens."""
        return seen - (self.config.dilation + 1) * self.window

    def next_places(self, real: Tensor) -> Tensor:
        """The places of new tokens: after the text so far, or after the filled slots.

        Parameters
        ----------
        real
            (batch, tokens) bool, False for padding.

        Returns
        -------
        Tensor
            (batch, tokens) int64, -1 for padding.
        """
        return _after(self._first_place(real), real)

    def places_needed(self, real: Tensor, new_tokens: int) -> int:
        """How many places new tokens, chunk by chunk, and those generated after them take.

        Parameters
        ----------
        real
            (batch, tokens) bool, False for padding.
        new_tokens
            Tokens generated after them, of which the last is not fed back; at least 1.
        """
        count = real.sum(dim=-1)
        seen = self.seen.to(count.device)
        at_end = seen + count + new_tokens - 1
        if self.config.positions == "original":
            return int(at_end.max())
        budgets = self._budgets(count)
        chunk = self.config.prefill_chunk or real.shape[1]
        before = torch.arange(0, real.shape[1], chunk, device=count.device)[:, None].minimum(count)
        needed = torch.minimum(seen + before, budgets) + (count - before).clamp(max=chunk)
        return int(torch.maximum(needed.amax(dim=0), torch.minimum(at_end, budgets + 1)).max())

    def _first_place(self, real: Tensor) -> Tensor:
        """The place after those taken, (batch,) int64, where ``real`` tokens are new."""
        seen = self.seen.to(real.device)
        if self.config.positions == "original":
            return seen
        return torch.minimum(seen, self._budgets(real.sum(dim=-1)))

    def _budgets(self, count: Tensor) -> Tensor:
        """k of each sequence, (batch,) int64: by its tokens if this is its first prompt."""
        if self.first_prompt:
            return self.budget.to(count.device)
        budgets = torch.tensor([self.config.budget(int(n)) for n in count], device=count.device)
        window = self.model_window
        return budgets if window is None else budgets.clamp(max=max(1, window - 1))

    def on(self, device: torch.device) -> Text:
        """The same on the device of a layer that is not where the model begins."""
        if self.seen.device == device:
            return self
        there = copy.copy(self)
        for name in (*self._per_sequence, "positions", "places"):
            setattr(there, name, getattr(self, name).to(device))
        there.span = Span(there.positions, there.places)
        return there

    def select(self, index: Tensor) -> None:
        """Take the sequences ``index`` (batch,) instead; in place if they are as many."""
        if not self.first_prompt:
            return
        index = index.to(self.seen.device, torch.int64)
        for name in ("seen", "budget", "window", "frozen_before"):
            old = getattr(self, name)
            taken = old.index_select(0, index)
            setattr(self, name, old.copy_(taken) if taken.shape == old.shape else taken)
        same = index[:, None] == index
        self.shared = torch.where(same, self.seen, self.shared[index[:, None], index])


def _after(first: Tensor, real: Tensor) -> Tensor:
    """Numbers of the real tokens from ``first`` (batch,) on, -1 for padding; (batch, tokens)."""
    numbers = first[:, None]
    if real.shape[1] > 1:  # a decode step is spared the kernels of a sum
        numbers = numbers + (real.cumsum(dim=-1) - 1)
    return numbers.masked_fill(~real, -1)
