"""Algorithm 1: who stays, who leaves, and where a new token goes.

One rule serves the prompt, every decode step and a second prompt on the same cache: tokens get a
rank, and those of the lowest leave, as many as must. The decode kernel settles by the same ranks
(:mod:`keyformer.kernels.decode`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from keyformer.budgets import SAFE, Shared, from_largest
from keyformer.config import InputError, KeyformerConfig
from keyformer.text import Text

EMPTY = -1
"""The position of no token. What the mask hides is less: -2 - its position."""

STAYS = torch.iinfo(torch.int64).max
"""The rank of a token that may not leave."""

LOWEST = -(2**62)
"""No score has a lower rank."""

HIDDEN, OUT_OF_WINDOW, NOTHING = LOWEST - 2**33, LOWEST - 2**34, LOWEST - 2**35
"""The ranks of a token that the attention mask hides, of one that no query can see any more, and
of none at all, each before its position."""


@dataclass(frozen=True)
class Eviction:
    """The rule for the tokens of one layer.

    Attributes
    ----------
    config
        The method and its settings.
    text
        How far each sequence has come, on the device of the tokens.
    budget
        (batch, kv_heads) int64: the slots of each head.
    window
        Tokens that the model lets a query see; None if all.
    """

    config: KeyformerConfig
    text: Text
    budget: Tensor
    window: int | None

    def ranks(self, positions: Tensor, scores: Tensor) -> Tensor:
        """The order in which tokens leave, lowest first.

        Padding and empty slots leave first, then what the model's own window has left behind, then
        what the attention mask hides, the oldest first; then tokens by score, the younger of two
        equals first. Sinks and the recent window stay, and key tokens if they are frozen. Where
        rules share the key slots, what one of them has chosen stays, and the next one chooses of
        the rest: the last one's scores are those that tokens leave by.

        Parameters
        ----------
        positions
            (batch, kv_heads, tokens) int64, see :class:`keyformer.layer.KeyformerLayer`.
        scores
            What the rule gave, float32, the same shape; or with a last dimension for the rules.

        Returns
        -------
        Tensor
            int64, the same shape.
        """
        hidden, there = positions < EMPTY, positions >= 0
        positions = known_positions(positions)
        if self.window is not None:
            beyond = positions <= self.text.seen[:, None, None] - self.window
            there &= ~beyond
        stays = self.safe(positions) & there
        *first, last = scores.unbind(dim=-1) if scores.ndim == 4 else (scores,)
        for (_, share), one in zip(self.config.rules, first, strict=False):
            competes = there & ~stays
            rank = self._by_score(one, positions).masked_fill(~competes, SAFE)
            most = (share * self.key_slots.double() + 1e-9).floor().long()
            room = self.budget - stays.sum(dim=-1)  # less than K where key tokens are frozen
            stays |= competes & (from_largest(rank) < most.minimum(room)[..., None])
        rank = self._by_score(last, positions).masked_fill(stays, STAYS)
        rank = torch.where(hidden, HIDDEN + positions, rank)
        if self.window is not None:
            rank = torch.where(beyond, OUT_OF_WINDOW + positions, rank)
        return rank.masked_fill(positions < 0, NOTHING)

    def safe(self, positions: Tensor) -> Tensor:
        """Who stays whatever the scores: the recent window, sinks, frozen key tokens; bool."""
        config, text = self.config, self.text
        safe = positions >= text.window_start(text.seen)[:, None, None]
        if config.dilation:
            safe &= positions % (config.dilation + 1) == 0
        if config.sinks:
            safe |= positions < self.budget[..., None].clamp(max=config.sinks)
        if config.key_set == "frozen" and not text.in_first_prompt:
            safe |= positions < text.frozen_before[:, None, None]
        return safe

    @property
    def key_slots(self) -> Tensor:
        """K, the slots that neither sinks nor the recent window take, (batch, kv_heads) int64."""
        sinks = self.budget.clamp(max=self.config.sinks)
        return self.budget - sinks - self.text.window[:, None]

    def _by_score(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Ranks of real tokens: scores in their order, of two equals the older above, int64."""
        scores = self._weighed(scores, positions)
        # The bits of floats sort as integers do, those of negative ones the other way round.
        bits = (scores + 0.0).contiguous().view(torch.int32)
        bits = bits ^ ((bits >> 31) & torch.iinfo(torch.int32).max)
        return (bits.to(torch.int64) << 31) + (torch.iinfo(torch.int32).max - positions)

    def _weighed(self, scores: Tensor, positions: Tensor) -> Tensor:
        """Scores as they are compared: less for tokens that more queries could see."""
        if not self.config.power_of_age:
            return scores
        age = self.text.seen[:, None, None] - positions
        return scores / age.float() ** self.config.power_of_age

    def loser(self, positions: Tensor, scores: Tensor) -> Tensor:
        """Who leaves if it has to be one of these, by the order of :meth:`ranks`.

        For tokens none of which is hidden or out of the model's window, under a single rule.

        Returns
        -------
        Tensor
            (batch, kv_heads, 1) int64: its number.
        """
        stays = self.safe(positions) | (positions < 0)
        weighed = self._weighed(scores, positions).masked_fill(stays, torch.inf)
        lowest = weighed.amin(dim=-1, keepdim=True)
        return positions.masked_fill(weighed > lowest, EMPTY).argmax(dim=-1, keepdim=True)

    def shared_out(self, positions: Tensor, scores: Tensor, depth: tuple[int, int]) -> Tensor:
        """The slots of each head after the first prompt, (batch, kv_heads) int64: its policy's.

        Parameters
        ----------
        positions, scores
            Those of :meth:`ranks`.
        depth
            Which layer it is, of how many that evict by this method.

        Raises
        ------
        InputError
            If the policy gives something else.
        """
        policy = self.config.policy
        if policy is None:
            return self.budget
        rank = self._by_score(scores[..., 0] if scores.ndim == 4 else scores, positions)
        order = rank.masked_fill(self.safe(positions) | (positions < 0), SAFE)
        taken = self.budget[:, 0] - self.key_slots[:, 0]
        candidates = self.text.prompt_tokens - taken
        shared = Shared(self.key_slots[:, 0], candidates, *depth, order)
        given = policy.key_slots(shared)
        batch, heads = self.budget.shape
        wanted = [(batch, 1), *([(batch, heads)] if policy.by_head else [])]
        whole = isinstance(given, Tensor) and given.dtype in (torch.int32, torch.int64)
        if not whole or tuple(given.shape) not in wanted or bool((given < 0).any()):
            raise InputError(
                f"budgets {policy} must give {' or '.join(map(str, wanted))} whole numbers >= 0,"
                f" got {given}".replace("\n", " ")
            )
        return (taken[:, None] + given).expand(self.budget.shape).contiguous()

    def chosen(
        self, positions: Tensor, scores: Tensor, slots: int, unbroken: bool = False
    ) -> Tensor | None:
        """Who of a first prompt stays where there are no slots yet: the best up to the budget.

        What :meth:`exchange` comes to without any slot to free, for a fraction of the work.

        Parameters
        ----------
        positions, scores
            (batch, kv_heads, tokens) of the new tokens.
        slots
            At most this many stay.
        unbroken
            Whether all are tokens, of equal budgets, and shown.

        Returns
        -------
        Tensor
            (batch, kv_heads, count) int64: their numbers in their order. If not ``unbroken``,
            count is min(slots, tokens), and after a sequence's own the number of tokens. None if
            all stay.
        """
        tokens = positions.shape[-1]
        beyond = self.window is not None and tokens >= self.window
        if unbroken and not (beyond or self.config.dilation or scores.ndim == 4):
            return self._chosen_by_place(positions, scores)
        ranks, best = self.ranks(positions, scores).topk(min(slots, tokens), dim=-1)
        place = torch.arange(best.shape[-1], device=positions.device)
        stays = (ranks >= OUT_OF_WINDOW) & (place < self.budget[..., None])
        return best.masked_fill(~stays, tokens).sort(dim=-1).values

    def _chosen_by_place(self, positions: Tensor, scores: Tensor) -> Tensor | None:
        """:meth:`chosen` where place and position are one: sinks, the best, the recent window."""
        tokens, budget = positions.shape[-1], self.text.largest_budget
        if tokens <= budget:
            return None
        sinks, recent = min(self.config.sinks, budget), self.config.recent_window(budget)
        every = torch.arange(tokens, device=positions.device).expand(positions.shape)
        compete = self._weighed(scores, positions)[..., sinks : tokens - recent]
        # Of equals the older comes first.
        order = compete.sort(dim=-1, descending=True, stable=True).indices
        best = order[..., : budget - sinks - recent].sort(dim=-1).values + sinks
        return torch.cat([every[..., :sinks], best, every[..., tokens - recent :]], dim=-1)

    def exchange(
        self, positions: Tensor, scores: Tensor, slots: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which slots are freed, and which new tokens go there.

        As many slots leave as new tokens stay, head by head, so the two pair up.

        Parameters
        ----------
        positions, scores
            (batch, kv_heads, slots + new tokens).
        slots
            How many of them are slots.

        Returns
        -------
        Tensor
            (batch, kv_heads, min(slots, new tokens)) int64: slots; a pair too many repeats the
            first.
        Tensor
            The same shape: the number of the new token that goes to each.
        Tensor
            (batch, kv_heads, 1) bool: whether any does. If none, both are 0 and nothing is to be
            written.
        """
        leaves = self.leaves(positions, scores, slots)
        pairs = min(slots, positions.shape[-1] - slots)
        stays = ~leaves[..., slots:]
        freed, staying = _listed(leaves[..., :slots], pairs), _listed(stays, pairs)
        return freed, staying, stays.any(dim=-1, keepdim=True)

    def leaves(self, positions: Tensor, scores: Tensor, slots: int) -> Tensor:
        """Who leaves when new tokens compete with the slots.

        As many leave as are new: padding first, then empty slots in their order. Slots beyond a
        head's own budget stay, and therefore never fill.

        Parameters
        ----------
        positions, scores, slots
            Those of :meth:`exchange`.

        Returns
        -------
        Tensor
            Bool, the shape of ``positions``, True for those that leave.
        """
        rank = self.ranks(positions, scores)
        place = torch.arange(positions.shape[-1], device=positions.device)
        empty = NOTHING + place - positions.shape[-1] * (1 + (place >= slots).long())
        rank = torch.where(positions == EMPTY, empty, rank)
        rank = rank.masked_fill((place >= self.budget[..., None]) & (place < slots), STAYS)
        leaving = rank.topk(positions.shape[-1] - slots, largest=False, sorted=False).indices
        return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, leaving, True)


def known_positions(positions: Tensor) -> Tensor:
    """The same, whether the attention mask hides them or not."""
    return torch.where(positions < EMPTY, -2 - positions, positions)


def _listed(mask: Tensor, count: int) -> Tensor:
    """Indices of the True entries of each row in their order, (..., count).

    Of fewer than ``count`` the first is repeated; of none it is 0. Nothing waits for the device.
    """
    found = mask.cumsum(dim=-1)
    place = torch.where(mask, found - 1, count)
    index = torch.arange(mask.shape[-1], device=mask.device).expand(mask.shape)
    listed = torch.zeros(*mask.shape[:-1], count + 1, dtype=torch.int64, device=mask.device)
    listed = listed.scatter_(-1, place, index)[..., :count]
    beyond = torch.arange(count, device=mask.device) >= found[..., -1:]
    return torch.where(beyond, listed[..., :1], listed)
