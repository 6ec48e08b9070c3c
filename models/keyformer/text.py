"""Text: what layers of a cache count alike - tokens seen, their places, budgets, steps."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from keyformer.config import InputError, KeyformerConfig

NO_MASK = (
    "attention_mask is not given though earlier columns were padding: they stay hidden, which"
    " transformers' own caches do not promise"
)


class Columns:
    """Which columns of the text are tokens, and which of those the attention mask shows.

    A column is what was fed at one index, a token or padding. While each sequence's tokens follow
    one another and all are shown, as in ``generate``, a token's column is its position and a
    constant, and nothing is looked up.

    Attributes
    ----------
    length
        Columns taken.
    padded
        Whether any of them is padding.
    even
        Whether each sequence's tokens follow one another.
    hides
        Whether the last mask hides a token.
    changed
        Whether it hides others than the mask before.
    new_even
        :attr:`even`, of the columns taken last alone.
    whole
        Whether the last mask was one over all columns, as transformers' models take it.
    counted
        Whether columns were taken for places, padding too; so it goes on.
    places
        (batch, length) int64: what ALiBi takes for the place of each column; None where that is
        the token's position and a constant. Whoever knows the model sets it after :meth:`take`.
    """

    real: Tensor | None
    shown: Tensor | None
    mask: Tensor | None
    places: Tensor | None

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0
        self.padded = self.hides = self.changed = self.counted = False
        self.even = self.new_even = self.ends_real = self.whole = True
        # Up to the last column that is none or hidden; all after it are tokens, and shown.
        self.real = self.shown = self.mask = self.places = None

    def take(self, mask: Tensor | None, tokens: Tensor) -> Tensor:
        """Count new columns in, and look at what their mask says of the earlier ones.

        Waits for the device, unless the mask is that of ``generate``'s next step.

        Parameters
        ----------
        mask
            (batch, new) or (batch, length + new), nonzero for what is a token and may be seen;
            None where all tokens are. The first form leaves earlier columns as they were.
        tokens
            (batch, new, ...): what is fed.

        Returns
        -------
        Tensor
            (batch, new) bool, which new columns are tokens.

        Raises
        ------
        InputError
            If the mask has another shape, or shows columns that were padding when they were fed.
        """
        batch, new = tokens.shape[:2]
        past, self.places, self.changed = self.length, None, False
        self.whole = not self.padded or (mask is not None and mask.shape[1] > new)
        if mask is None:
            if self.padded:
                warnings.warn(NO_MASK, stacklevel=2)
            real = torch.ones(batch, new, dtype=torch.bool, device=tokens.device)
            if self.hides:
                real = torch.cat([self._until(past, self.real, real), real], dim=1)
        else:
            widths = sorted({new, past + new})
            if mask.shape[0] != batch or mask.shape[1] not in widths:
                allowed = " or ".join(str((batch, width)) for width in widths)
                raise InputError(
                    f"attention_mask must have shape {allowed}, got {tuple(mask.shape)}"
                )
            real = mask.to(torch.bool)
        shown, real = real[:, :-new], real[:, -new:]
        if self.continued_by(mask):
            self.advance(mask, new)
            return real
        if shown.shape[1]:
            self._show(shown)
        self._append(real)
        self.mask = mask
        self.length += new
        return real

    def continued_by(self, mask: Tensor | None) -> bool:
        """Whether a mask is known to show what is shown, and to add nothing but tokens."""
        if mask is None:
            return not self.hides
        before = getattr(mask, "keyformer_continues", None)
        return before is not None and before is self.mask

    def advance(self, mask: Tensor | None, new: int) -> None:
        """Count ``new`` columns in, all of them tokens, under a mask that continues the last."""
        self.even &= self.ends_real
        self.new_even = self.ends_real = True
        self.mask = mask
        self.length += new

    def _show(self, shown: Tensor) -> None:
        """Let a mask (batch, length) bool hide earlier tokens, or show them again."""
        real = self._until(self.length, self.real, shown)
        if torch.equal(shown, self._until(self.length, self.shown, shown)):
            return
        if bool((shown & ~real).any()):
            raise InputError(
                "attention_mask shows earlier tokens that were padding when they were read: they"
                " have no keys"
            )
        self.shown, self.changed = shown, True
        self.hides = bool((real & ~shown).any())

    def _append(self, real: Tensor) -> None:
        """Take (batch, new) bool columns, which may have padding among them."""
        full = bool(real.all())
        self.new_even = full or _one_run(real)
        if full and self.ends_real:
            return
        self.padded |= not full
        self.shown = torch.cat([self._until(self.length, self.shown, real), real], dim=1)
        self.real = torch.cat([self._until(self.length, self.real, real), real], dim=1)
        self.even = _one_run(self.real)
        self.ends_real = bool(self.real[:, -1].all())

    @staticmethod
    def _until(length: int, known: Tensor | None, like: Tensor) -> Tensor:
        """(batch, length) bool: what is known of the first columns, True of all others."""
        if known is None:
            return like.new_ones(len(like), length)
        return torch.nn.functional.pad(known, (0, length - known.shape[1]), value=True)

    def all_shown(self, batch: int, device: torch.device) -> Tensor:
        """(batch, length) bool: the mask taken last over all columns."""
        like = torch.ones(batch, 0, dtype=torch.bool, device=device)
        return self._until(self.length, self.shown, like).to(device)

    def of(self, positions: Tensor) -> Tensor:
        """The column of each position (batch, ...), -1 where that is negative."""
        if self.real is None:
            return positions.clamp(min=-1)
        real = self._until(self.length, self.real, self.real).to(positions.device)
        columns = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        return _looked_up(columns, positions)

    def place_of(self, positions: Tensor) -> Tensor:
        """What ALiBi takes for the places of positions (batch, ...), -1 for a negative one."""
        assert self.places is not None
        return _looked_up(self.places.to(positions.device), self.of(positions))

    def shows(self, positions: Tensor) -> Tensor:
        """Whether the mask shows the tokens at positions (batch, ...) >= 0, bool."""
        shown = self.all_shown(len(positions), positions.device)
        return _looked_up(shown.long(), self.of(positions)) == 1

    def tokens_from(self, column: int) -> Tensor:
        """How many tokens each sequence has from there on, (batch,) or (1,) int64."""
        if self.real is None:
            return torch.tensor([self.length - column])
        return self._until(self.length, self.real, self.real)[:, column:].sum(dim=-1)

    def crop(self, length: int) -> None:
        """Take back all columns from ``length`` on."""
        if length >= self.length:
            return
        self.length, self.mask = length, None
        if self.shown is not None:
            self.shown = self.shown[:, :length]
        if self.real is not None:
            self.real = self.real[:, :length]
            self.padded = not bool(self.real.all())
            self.even = _one_run(self.real)
            self.ends_real = not length or bool(self.real[:, -1].all())
        self.hides = self.shown is not None and bool(
            (self._until(self.shown.shape[1], self.real, self.shown) & ~self.shown).any()
        )

    def select(self, index: Tensor, rows: int) -> None:
        """Take the sequences ``index`` (batch,) of ``rows`` instead."""
        if len(index) != rows:
            self.mask = None
        self.real, self.shown = (
            known if known is None else known.index_select(0, index.to(known.device))
            for known in (self.real, self.shown)
        )


def _one_run(real: Tensor) -> bool:
    """Whether no sequence of (batch, columns) has padding between tokens."""
    if not real.shape[1]:
        return True
    count = real.sum(dim=-1)
    reach = torch.arange(1, real.shape[1] + 1, device=real.device) * real
    first = real.int().argmax(dim=-1)
    return bool(((reach.amax(dim=-1) - first == count) | (count == 0)).all())


def _looked_up(table: Tensor, index: Tensor) -> Tensor:
    """Of each row of ``table`` (batch, n) the entries ``index`` (batch, ...); -1 where negative."""
    found = table.gather(1, index.clamp(min=0).flatten(1)).view(index.shape)
    return found.masked_fill(index < 0, -1)


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
    columns
        Where in what was fed the tokens are.
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
    prompt_tokens
        (batch,) int64: n, those of the first prompt; not selected with the others.
    frozen_before
        (batch,) int64: where the recent window began when the first prompt had been read.
    shared
        (batch, batch) int64: how many first tokens two sequences have from one forward, as
        beams do, so that their keys and values are the same.
    taken
        (batch,) int64: real tokens taken last.
    positions, places
        (batch, tokens) int64 of the tokens taken last, -1 for padding: in the text, and what
        the model's position scheme is told.
    span
        Which of the tokens taken last are real.
    largest_budget, budgets_alike
        The largest k of the batch, and whether all are that.
    reserved
        Tokens that are to find slots without any being added; 0 where they may be.
    freed
        Tokens that may still come before all slots are filled again that were freed when others
        were forgotten.
    patchy
        Whether slots had been freed so when the last tokens came: the filled ones do not come
        first.
    """

    _per_sequence = ("seen", "prompt_tokens", "budget", "window", "frozen_before", "shared")
    prompt_tokens: Tensor
    budget: Tensor
    window: Tensor
    frozen_before: Tensor
    shared: Tensor
    taken: Tensor
    positions: Tensor
    places: Tensor
    span: Span
    largest_budget: int
    budgets_alike: bool

    def __init__(
        self, config: KeyformerConfig, columns: Columns, window: int | None = None
    ) -> None:
        self.config = config
        self.columns = columns
        self.model_window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything, budgets included."""
        self.length = self.first_prompt = self.prompt_end = self.step = 0
        self.reserved = self.freed = 0
        self.patchy = False
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
        make_writable(self, self._per_sequence)
        tokens = real.shape[1]
        starts_prompt = tokens > 1 or not self.length
        if starts_prompt and self.length >= self.prompt_end:
            self.expect(real)
        self.positions = self.places = _after(self.seen, real)
        if self.config.positions == "new":
            self.places = self.next_places(real)
        self.span = Span(self.positions, self.places)
        self.taken = real.sum(dim=-1)
        self.seen += self.taken
        self.patchy = self.freed > 0
        if self.patchy:
            self.freed = max(0, self.freed - int(self.taken.min()))
        self.advance(tokens)

    def advance(self, tokens: int) -> None:
        """Count tokens, padding included, whose sequences the device has counted already."""
        self.length += tokens
        self.step = 0 if self.length <= self.prompt_end else self.step + 1

    def _begin(self, real: Tensor) -> None:
        """Fix k and w of each sequence by its number of real prompt tokens."""
        lengths = real.sum(dim=-1)
        self.prompt_tokens = lengths
        self.budget = self._budgets(lengths)
        budgets = self.budget.tolist()
        windows = [self.config.recent_window(k) for k in budgets]
        self.window = torch.tensor(windows, device=real.device)
        self.largest_budget = max(budgets, default=1)
        self.budgets_alike = len(set(budgets)) < 2
        self.first_prompt = real.shape[1]
        self.frozen_before = self.window_start(lengths)
        self.seen = torch.zeros_like(lengths)
        self.shared = torch.zeros_like(lengths).repeat(len(lengths), 1)

    @property
    def evicted(self) -> bool:
        """Whether any sequence has more tokens than slots; waits for the device."""
        return bool(self.first_prompt) and bool((self.seen > self.budget).any())

    def crop(self, length: int) -> None:
        """Take back the last tokens, so that ``length`` are left.

        The columns are those of before; budgets stay.
        """
        make_writable(self, self._per_sequence)
        if self.evicted or self.freed:
            self.freed += self.length - length
        self.seen -= self.columns.tokens_from(length).to(self.seen.device)
        self.frozen_before = self.frozen_before.minimum(self.seen)
        self.shared = self.shared.minimum(self.seen).minimum(self.seen[:, None])
        self.step = max(0, self.step - (self.length - length))
        self.length = length
        self.first_prompt = min(self.first_prompt, max(1, length))
        self.prompt_end = min(self.prompt_end, length)

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
        for name in (*self._per_sequence, "taken", "positions", "places"):
            setattr(there, name, getattr(self, name).to(device))
        there.span = Span(there.positions, there.places)
        return there

    def select(self, index: Tensor) -> None:
        """Take the sequences ``index`` (batch,) instead; in place if they are as many."""
        if not self.first_prompt:
            return
        make_writable(self, self._per_sequence)
        index = index.to(self.seen.device, torch.int64)
        for name in ("seen", "budget", "window", "frozen_before"):
            old = getattr(self, name)
            taken = old.index_select(0, index)
            setattr(self, name, old.copy_(taken) if taken.shape == old.shape else taken)
        same = index[:, None] == index
        self.shared = torch.where(same, self.seen, self.shared[index[:, None], index])


def make_writable(holder: object, names: Iterable[str]) -> None:
    """Copy those attributes that are tensors of torch's inference mode, where it has ended.

    Outside of it they could neither be changed in place nor saved for gradients.
    """
    if torch.is_inference_mode_enabled():
        return
    for name in names:
        tensor = getattr(holder, name, None)
        if tensor is not None and tensor.is_inference():
            setattr(holder, name, tensor.clone())


def _after(first: Tensor, real: Tensor) -> Tensor:
    """Numbers of the real tokens from ``first`` (batch,) on, -1 for padding; (batch, tokens)."""
    numbers = first[:, None]
    if real.shape[1] > 1:  # a decode step is spared the kernels of a sum
        numbers = numbers + (real.cumsum(dim=-1) - 1)
    return numbers.masked_fill(~real, -1)
