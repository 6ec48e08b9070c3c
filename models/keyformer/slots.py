"""What a layer stores: keys, values, positions and scores in a fixed number of slots.

Nothing is moved. Tokens that lose their place, by the rule of :mod:`keyformer.eviction`, are
overwritten by those that come in.
"""

from __future__ import annotations

import torch
from torch import Tensor

from keyformer.attention import Tokens
from keyformer.eviction import EMPTY, known_positions
from keyformer.kernels import COUNTS
from keyformer.precision import dequantize, quantize
from keyformer.text import make_writable


class Slots:
    """The slots of one layer.

    Attributes
    ----------
    keys, values
        (batch, kv_heads, slots, head_dim), the model's dtype; or, quantized, the elements that
        :func:`keyformer.precision.quantize` gives.
    key_scales, value_scales
        (batch, kv_heads, slots, groups) float16, their scales; no groups if not quantized.
    positions
        (batch, kv_heads, slots) int64, position in the text, -1 for an empty slot; the slots
        of a head fill in their order, until some are emptied. A token at p that the attention mask
        hides has -2 - p: it is not seen and the first to leave, and may be shown again until then.
    scores
        (batch, kv_heads, slots) float32: what the rule gave last; of several rules with a last
        dimension for them.
    own_budget, own_largest
        (batch, kv_heads) int64: the slots of each head, if a policy has shared them out, and
        the largest of them; None where all heads have what the text gives them.
    room
        What :meth:`make_room` has allocated, by attribute, until it is used.
    finished
        (batch, kv_heads, kernels.COUNTS) int32, zeros: the decode kernel's programs count
        themselves here.
    """

    per_slot = ("keys", "key_scales", "values", "value_scales", "positions", "scores")
    """The names of what a slot has."""

    in_place = (*per_slot, "finished")

    keys: Tensor
    key_scales: Tensor
    values: Tensor
    value_scales: Tensor
    positions: Tensor
    scores: Tensor
    own_budget: Tensor | None
    own_largest: int | None
    finished: Tensor
    room: dict[str, Tensor]

    def make_slots(self, key: Tensor, value: Tensor, kind: str, rules: int) -> None:
        """Take batch size, heads, dtype and device from first keys and values; no slots yet.

        Parameters
        ----------
        key, value
            (batch, kv_heads, tokens, head_dim).
        kind
            What slots hold vectors in, one of ``config.CACHE_DTYPES``.
        rules
            How many score tokens.
        """
        self.kind, self.own_budget, self.own_largest = kind, None, None
        self.dtype, self.device = key.dtype, key.device
        none = slice(0, 0)
        self.keys, self.key_scales = quantize(key[:, :, none], kind)
        self.values, self.value_scales = quantize(value[:, :, none], kind)
        shape = (*key.shape[:2], 0)
        self.positions = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self.scores = torch.zeros(*shape, *(() if rules == 1 else (rules,)), device=self.device)
        self._count_from_zero()

    def _count_from_zero(self) -> None:
        shape = (*self.positions.shape[:2], COUNTS)
        self.finished = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots, (batch, kv_heads, slots, head_dim) in the model's dtype."""
        return (
            dequantize(self.keys, self.key_scales, self.kind, self.dtype),
            dequantize(self.values, self.value_scales, self.kind, self.dtype),
        )

    def make_room(self, slots: int) -> None:
        """Allocate ahead what :meth:`fill` will make of that many slots.

        Slots that outlive a prompt, and are allocated one layer after the other among its short
        lived tensors, leave gaps between them in which few of the next layer's find a place.
        """
        self.room = {
            name: (none := getattr(self, name)).new_empty(*none.shape[:2], slots, *none.shape[3:])
            for name in self.per_slot
        }

    def fill(
        self, new: Tokens, scores: Tensor, chosen: Tensor | None, slots: int, unbroken: bool
    ) -> None:
        """Make slots of chosen new tokens, and further empty ones.

        Parameters
        ----------
        scores
            (batch, kv_heads, tokens), or with a last dimension for rules: of the new tokens.
        chosen, unbroken
            What :meth:`keyformer.eviction.Eviction.chosen` gave for them.
        """
        if chosen is None:
            stored = self._held(new.keys, new.values, new.positions, scores)
        elif unbroken:
            stored = self._stored(new, scores, chosen)
        else:
            empty = chosen == new.positions.shape[-1]
            stored = self._stored(new, scores, chosen.masked_fill(empty, 0))
            stored["positions"].masked_fill_(empty, EMPTY)
        for name, held in stored.items():
            setattr(self, name, self._in_room(name, held, slots, copies=chosen is None))
        self.room = {}

    def _in_room(self, name: str, held: Tensor, slots: int, copies: bool) -> Tensor:
        """The same in ``slots`` of its own: those allocated ahead where they fit."""
        room, count = self.room.get(name), held.shape[2]
        shape = (*held.shape[:2], slots, *held.shape[3:])
        if room is None or (room.shape, room.dtype, room.device) != (
            shape,
            held.dtype,
            held.device,
        ):
            if count == slots and copies:
                return held.clone(memory_format=torch.contiguous_format)
            return _with_slots(held, slots, name)
        room[:, :, :count] = held
        room[:, :, count:] = EMPTY if name == "positions" else 0
        return room

    def overwrite(
        self, new: Tokens, scores: Tensor, freed: Tensor, staying: Tensor, any_stay: Tensor
    ) -> None:
        """Write new tokens over slots, in place; the three are what ``Eviction.exchange`` gives."""
        # Where no token stays, the first slot is written over by itself.
        self._write(self._stored(new, scores, staying), freed, any_stay)

    def put(self, new: Tokens, scores: Tensor, slot: Tensor, stays: Tensor) -> None:
        """Write one new token a head into a slot, in place, where it ``stays``.

        Parameters
        ----------
        new, scores
            One token: (batch, kv_heads, 1) each.
        slot, stays
            (batch, kv_heads, 1) int64 and bool.
        """
        self._write(self._held(new.keys, new.values, new.positions, scores), slot, stays)

    def _write(self, stored: dict[str, Tensor], slot: Tensor, stays: Tensor) -> None:
        """Put what :meth:`_held` gives into slots, in place, but not where nothing ``stays``."""
        # To look costs nothing on a CPU; elsewhere it would wait for the device.
        all_stay = stays.device.type == "cpu" and bool(stays.all())
        for name, one in stored.items():
            held = getattr(self, name)
            if one.numel():
                to = _across(slot, held)
                if not all_stay:
                    one = torch.where(_across(stays, one), one, held.gather(2, to))
                held.scatter_(2, to, one)

    def rewrite(
        self, new: Tokens, scores: Tensor, freed: Tensor, staying: Tensor, any_stay: Tensor
    ) -> None:
        """:meth:`overwrite` into slots made anew: gradients need what was there."""
        slots, tokens = self.positions.shape[-1], new.positions.shape[-1]
        source = torch.arange(slots, device=self.device).expand(*freed.shape[:2], -1)
        source = source.scatter(-1, freed, torch.where(any_stay, slots + staying, freed))
        every = torch.arange(tokens, device=self.device).expand(*freed.shape[:2], -1)
        for name, one in self._stored(new, scores, every).items():
            joined = torch.cat([getattr(self, name), one], dim=2)
            setattr(self, name, joined.gather(2, _across(source, joined)))

    def _stored(self, new: Tokens, scores: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What slots hold of the new tokens ``index`` (batch, kv_heads, count), by attribute."""
        keys, values, positions, scores = (
            tensor.gather(2, _across(index, tensor))
            for tensor in (new.keys, new.values, new.positions, scores)
        )
        return self._held(keys, values, positions, scores)

    def _held(
        self, keys: Tensor, values: Tensor, positions: Tensor, scores: Tensor
    ) -> dict[str, Tensor]:
        """What slots hold of tokens, by attribute."""
        held = (*quantize(keys, self.kind), *quantize(values, self.kind), positions, scores)
        return dict(zip(self.per_slot, held, strict=True))

    def grow(self, slots: int) -> None:
        """Add empty ones up to ``slots`` in all."""
        if slots > self.positions.shape[-1]:
            for name in self.per_slot:
                setattr(self, name, _with_slots(getattr(self, name), slots, name))

    def hide(self, shown: Tensor) -> None:
        """Let tokens be seen where ``shown`` (batch, kv_heads, slots), and hide the others."""
        known = known_positions(self.positions)
        unseen = torch.where(known < 0, known, -2 - known)
        self.positions.copy_(torch.where(shown & (known >= 0), known, unseen))

    def empty(self, seen: Tensor) -> None:
        """Empty the slots of all tokens from positions ``seen`` (batch,) on."""
        make_writable(self, self.in_place)
        later = known_positions(self.positions) >= seen.to(self.device)[:, None, None]
        self.positions.masked_fill_(later, EMPTY)
        self.scores.masked_fill_(_across(later, self.scores), 0)

    def select(self, index: Tensor) -> None:
        """Take the sequences ``index`` (batch,) instead."""
        index = index.to(self.device)
        for name in self.per_slot:
            setattr(self, name, getattr(self, name).index_select(0, index))
        self._count_from_zero()
        self.select_budget(index)

    def select_budget(self, index: Tensor) -> None:
        """The part of :meth:`select` that is no slot's; in place if they are as many."""
        if (old := self.own_budget) is not None:
            taken = old.index_select(0, index.to(self.device))
            self.own_budget = old.copy_(taken) if taken.shape == old.shape else taken

    def slot_bytes(self) -> int:
        """Bytes of the slots: keys and values with their scales, positions and scores."""
        return sum(getattr(self, name).nbytes for name in self.per_slot)


def _across(index: Tensor, vectors: Tensor) -> Tensor:
    """``index`` (batch, kv_heads, count) for every element of vectors, or of single numbers."""
    rest = (None,) * (vectors.ndim - 3)
    return index[(..., *rest)].expand(*index.shape, *vectors.shape[3:])


def _with_slots(held: Tensor, slots: int, name: str) -> Tensor:
    """The same with empty slots added: ``slots`` in all."""
    if held.shape[2] == slots:
        return held
    rest = (0, 0) * (held.ndim - 3)
    empty = EMPTY if name == "positions" else 0
    return torch.nn.functional.pad(held, (*rest, 0, slots - held.shape[2]), value=empty)
