"""KeyformerCache: a fixed number of slots in each layer and head, and what fills them.

Nothing is moved. Tokens that lose their place, by the rule of :mod:`keyformer.eviction`, are
overwritten by those that come in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from keyformer import kernels
from keyformer.attention import Attended, Rotary, Tokens
from keyformer.call import CALL
from keyformer.config import InputError, KeyformerConfig
from keyformer.eviction import EMPTY, Eviction, known_positions
from keyformer.precision import dequantize, quantize
from keyformer.score import Scorer, temperature
from keyformer.text import Columns, Text, make_writable

GROWTH = 64
"""Slots added at a time while the text is shorter than the budget."""

Observer = Callable[[int, Tensor, Attended], None]
"""Called with layer index, query positions (batch, tokens) and what they attended to."""


class KeyformerLayer(CacheLayerMixin):
    """The slots of one layer.

    Parameters
    ----------
    config
        The method and its settings.
    text
        What layers of this kind count alike.
    window
        Tokens that the model lets a query of this layer see, itself included, so that no
        other can be of use; None if it sees all.

    Attributes
    ----------
    length
        How much of the text this layer has been given.
    keys, values
        (batch, kv_heads, slots, head_dim), the model's dtype; or, quantized, the elements that
        :func:`keyformer.precision.quantize` gives.
    key_scales, value_scales
        (batch, kv_heads, slots, groups) float16, their scales; no groups if not quantized.
    positions
        (batch, kv_heads, slots) int64, position in the text, -1 for an empty slot; the slots
        of a head fill in their order. A token at p that the attention mask hides has -2 - p: it
        is not seen and the first to leave, and may be shown again until then.
    scores
        (batch, kv_heads, slots) float32, accumulated f_theta (section 3.3.2).
    finished
        (batch, kv_heads, kernels.COUNTS) int32, zeros: the decode kernel's programs count
        themselves here.
    """

    is_sliding = False
    _per_slot = ("keys", "key_scales", "values", "value_scales", "positions", "scores")
    _in_place = (*_per_slot, "finished")

    def __init__(self, config: KeyformerConfig, text: Text, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.text = text
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.is_initialized = False
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first keys; no slots yet."""
        batch, heads, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        none = slice(0, 0)
        self.keys, self.key_scales = self._quantized(key_states[:, :, none])
        self.values, self.value_scales = self._quantized(value_states[:, :, none])
        self.positions = torch.zeros(batch, heads, 0, dtype=torch.int64, device=self.device)
        self.scores = torch.zeros(batch, heads, 0, device=self.device)
        self._count_from_zero()
        self.is_initialized = True

    def place(self, key: Tensor, value: Tensor) -> Tokens:
        """The tokens that the text has just taken, with their keys and values in this layer.

        Parameters
        ----------
        key, value
            (batch, kv_heads, tokens, head_dim) of the new tokens.
        """
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        make_writable(self, self._in_place)
        text = self.text.on(self.device)
        self.length = text.length
        if text.columns.changed:
            self._hide()
        places, columns = self._places(text.positions, text.places), text.columns
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

    def _hide(self) -> None:
        """Let the attention mask that was taken last hide tokens, or show them again."""
        known = known_positions(self.positions)
        unseen = torch.where(known < 0, known, -2 - known)
        shown = self.text.columns.shows(known)
        self.positions.copy_(torch.where(shown & (known >= 0), known, unseen))

    def attend(
        self,
        query: Tensor,
        new: Tokens,
        scorer: Scorer | None,
        *,
        scale: float,
        alibi_slopes: Tensor | None = None,
        softcap: float | None = None,
        rotary: Rotary | None = None,
        output_weights: bool = False,
    ) -> Attended:
        """Attend to the slots and the new tokens, and add up scores; :meth:`admit` follows.

        Parameters
        ----------
        query
            (batch, heads, tokens, head_dim) of the new tokens.
        new
            What :meth:`place` gave for them.
        scorer, scale, alibi_slopes, softcap, output_weights
            See :func:`keyformer.attention.attention`.
        rotary
            Rotates queries and keys to their places. Where the place of a token changes as
            others leave, its key is stored unrotated and rotated whenever it is read.
        """
        query, slots, read, new = self._read(query, new, rotary)
        attended = kernels.attention(
            self.config.backend,
            query,
            slots,
            read,
            scale=scale,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            window=self.window,
            scorer=scorer,
            span=self.text.on(self.device).span,
            output_weights=output_weights,
            mask=self._odd_mask(prompt=True),
        )
        held = self.scores.shape[-1]
        if attended.scores is None:
            new_scores = torch.zeros_like(new.positions, dtype=torch.float32)
        else:
            new_scores = attended.scores[..., held:]
        if held:
            if attended.scores is not None:
                queries = (new.positions[:, :1] >= 0).sum(dim=-1, keepdim=True)
                self.scores.mul_(self.config.forgetting**queries).add_(attended.scores[..., :held])
            self._grow()
        self._arrivals = new, new_scores, attended.output.requires_grad
        return attended

    def step(
        self,
        query: Tensor,
        new: Tokens,
        scorer: Scorer | None,
        tau: Tensor,
        *,
        scale: float,
        alibi_slopes: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Tensor:
        """:meth:`attend` and :meth:`admit` of one new token a sequence, by the decode kernels.

        Nothing waits for the device and nothing is allocated that outlives the step, so it can
        be captured and replayed. Shared scores decide later, in :meth:`admit`.

        Parameters
        ----------
        tau
            () float32: the temperature, in place of the scorer's.

        Returns
        -------
        Tensor
            The heads' output, (batch, heads, 1, head_dim).
        """
        from keyformer.kernels import decode

        self._grow()
        query, slots, read, new = self._read(query, new, rotary, as_stored=True)
        evicts = self.config.score == "per_layer"
        output, new_scores = decode.step(
            self,
            query,
            slots,
            read,
            new,
            scorer,
            tau,
            scale=scale,
            alibi_slopes=alibi_slopes,
            evicts=evicts,
        )
        if not evicts:
            self._arrivals = new, new_scores, False
        return output

    def steps_on_kernels(self, query: Tensor, softcap: float | None) -> bool:
        """Whether :meth:`step` can stand for :meth:`attend` and :meth:`admit`."""
        return self.text.step > 0 and kernels.run_on(
            self.config.backend,
            query,
            softcap=softcap,
            window=self.window,
            mask=self._odd_mask(prompt=False),
        )

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
        self, query: Tensor, new: Tokens, rotary: Rotary | None, as_stored: bool = False
    ) -> tuple[Tensor, Tokens, Tokens, Tokens]:
        """Query, slots and new tokens as attention reads them, and the new as they are stored.

        Where it reads the slots ``as_stored`` they are quantized, unless they are rotated first.
        """
        moving = self.config.positions == "new"
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
        return torch.cat([self.scores, self._arrivals[1]], dim=-1)

    def admit(self, ranked_by: Tensor) -> None:
        """Write the tokens just attended that stay over the slots of those that leave.

        As many slots leave as new tokens stay, head by head, so the two masks pair up.

        Parameters
        ----------
        ranked_by
            The scores that decide, of the shape of :attr:`all_scores`.
        """
        new, new_scores, differentiates = self._arrivals
        del self._arrivals
        if not self.positions.shape[-1]:
            self._fill(new, new_scores, ranked_by)
            return
        slots, tokens = self.positions.shape[-1], new.positions.shape[-1]
        positions = torch.cat([self.positions, new.positions], dim=-1)
        freed, staying, any_stay = self._rule.exchange(positions, ranked_by, slots)

        if differentiates:
            # Gradients need what was there: slots are made anew, not written over.
            source = torch.arange(slots, device=self.device).expand(*freed.shape[:2], -1)
            source = source.scatter(-1, freed, torch.where(any_stay, slots + staying, freed))
            every = torch.arange(tokens, device=self.device).expand(*freed.shape[:2], -1)
            for name, one in self._stored(new, new_scores, every).items():
                joined = torch.cat([getattr(self, name), one], dim=2)
                setattr(self, name, joined.gather(2, _across(source, joined)))
            return
        for name, one in self._stored(new, new_scores, staying).items():
            held = getattr(self, name)
            # Where no token stays, the first slot is written over by itself.
            to = _across(freed, held)
            held.scatter_(2, to, torch.where(_across(any_stay, one), one, held.gather(2, to)))

    def _fill(self, new: Tokens, new_scores: Tensor, ranked_by: Tensor) -> None:
        """:meth:`admit` where there are no slots yet: the best of the new tokens, in their order.

        What the rule comes to without any slot to free, for a fraction of the work.
        """
        wanted = self._wanted()
        staying = self._rule.chosen(new.positions, ranked_by, wanted)
        empty = staying == new.positions.shape[-1]
        stored = self._stored(new, new_scores, staying.masked_fill(empty, 0))
        stored["positions"].masked_fill_(empty, EMPTY)
        for name, held in stored.items():
            setattr(self, name, _with_slots(held, wanted, name))

    @property
    def _rule(self) -> Eviction:
        return Eviction(self.config, self.text.on(self.device), self.window)

    def _stored(self, new: Tokens, new_scores: Tensor, index: Tensor) -> dict[str, Tensor]:
        """What slots hold of the new tokens ``index`` (batch, kv_heads, count), by attribute."""
        keys, values, positions, scores = (
            tensor.gather(2, _across(index, tensor))
            for tensor in (new.keys, new.values, new.positions, new_scores)
        )
        held = (*self._quantized(keys), *self._quantized(values), positions, scores)
        return dict(zip(self._per_slot, held, strict=True))

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots, (batch, kv_heads, slots, head_dim) in the model's dtype."""
        kind = self.config.cache_dtype
        return (
            dequantize(self.keys, self.key_scales, kind, self.dtype),
            dequantize(self.values, self.value_scales, kind, self.dtype),
        )

    def _count_from_zero(self) -> None:
        shape = (*self.positions.shape[:2], kernels.COUNTS)
        self.finished = torch.zeros(shape, dtype=torch.int32, device=self.device)

    def _quantized(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(vectors, self.config.cache_dtype)

    def _wanted(self) -> int:
        """Slots for every token so far, up to the largest budget."""
        text = self.text
        wanted = min(text.largest_budget, max(text.length, text.reserved))
        if text.reserved < wanted:
            wanted = min(text.largest_budget, -(-wanted // GROWTH) * GROWTH)
        return wanted

    def _grow(self) -> None:
        """Add the slots that are wanted, empty."""
        wanted = self._wanted()
        if wanted > self.positions.shape[-1]:
            for name in self._per_slot:
                setattr(self, name, _with_slots(getattr(self, name), wanted, name))

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
        if not self.is_initialized:
            return 0
        return sum(getattr(self, name).nbytes for name in self._per_slot)

    def _select(self, index: Tensor) -> None:
        if self.is_initialized:
            for name in self._per_slot:
                setattr(self, name, getattr(self, name).index_select(0, index.to(self.device)))
            self._count_from_zero()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give beam i the slots of beam ``beam_idx[i]``, positions and scores with them."""
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times in place."""
        batch = self.keys.shape[0] if self.is_initialized else 0
        self._select(torch.arange(batch).repeat_interleave(repeats))

    def empty(self, seen: Tensor) -> None:
        """Empty the slots of all tokens from positions ``seen`` (batch,) on."""
        if self.is_initialized:
            make_writable(self, self._in_place)
            known = known_positions(self.positions)
            later = known >= seen.to(self.device)[:, None, None]
            self.positions.masked_fill_(later, EMPTY)
            self.scores.masked_fill_(later, 0)
            self.length = self.text.length


def model_windows(model_config: PreTrainedConfig) -> list[int | None]:
    """The tokens that a query of each layer sees, itself included; None where it sees all."""
    config = model_config.get_text_config(decoder=True)
    is_field = hasattr(type(config), "sliding_window")  # not just left over in a config.json
    window = config.sliding_window if is_field else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


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


def _order(positions: Tensor) -> Tensor:
    """The rank of each position among those of its head, -1 for an empty slot."""
    order = positions.argsort(dim=-1)
    counting = torch.arange(positions.shape[-1], device=positions.device).expand_as(order)
    ranks = torch.empty_like(positions).scatter_(-1, order, counting)
    empty = positions < 0
    return (ranks - empty.sum(dim=-1, keepdim=True)).masked_fill(empty, -1)


class KeyformerCache(Cache):
    """The cache of a whole model, for ``generate(past_key_values=...)`` or forward calls.

    Budgets are fixed by the first prompt of each sequence; later prompts on the same cache
    are attended, scored and evicted to that budget.

    Layers in which the model itself sees a sliding window keep just that window, unless all
    of its layers have one: then the method chooses among the tokens of the window.

    Parameters
    ----------
    model_config
        The model's configuration, for its layers and their windows.
    config
        The method and its settings.
    noise_ids
        A number for each sequence that says which noise it draws (its last 32 bits; beams of one
        sequence draw each their own): with it a sequence's result does not depend on its place in
        the batch. None takes the place.

    Raises
    ------
    InputError
        In the first forward, if the rows of the batch are not a multiple of ``noise_ids``.

    Attributes
    ----------
    layers
        One :class:`KeyformerLayer` for each layer of the model.
    columns
        Where in what was fed the tokens are.
    text
        What those of the layers count alike that evict by ``config``.
    seed
        Seed of this cache's noise.
    sequences
        (batch,) int64, whose noise each row draws; None before the first forward.
    max_new_tokens, max_length
        What a ``generate`` that is running was asked for, or whoever sets them will feed; T of
        Eq. 10 unless the config has its own.
    observer
        If set, called after each layer's attention with its weights.
    halfway
        Whether a forward has begun that has not ended: its layers then hold different texts.
    replays, graph
        Whether decode steps can be replayed, and the one captured: see keyformer.replay.
    """

    def __init__(
        self,
        model_config: PreTrainedConfig,
        config: KeyformerConfig | None = None,
        noise_ids: Sequence[int] | None = None,
    ) -> None:
        config = config or KeyformerConfig()
        keep_all = KeyformerConfig.preset(
            "full", cache_dtype=config.cache_dtype, backend=config.backend
        )
        windows = model_windows(model_config)
        is_hybrid = None in windows
        self.columns = Columns()
        self.text = Text(config, self.columns, None if is_hybrid else windows[0])
        texts = {
            window: Text(keep_all, self.columns, window)
            for window in windows
            if window and is_hybrid
        }
        super().__init__(
            layers=[
                KeyformerLayer(keep_all, texts[window], window)
                if window in texts
                else KeyformerLayer(config, self.text, window)
                for window in windows
            ]
        )
        self.texts = (self.text, *texts.values())
        self.config = config
        self.seed = config.seed or 0
        if config.seed is None and config.draws_noise:
            self.seed = int(torch.randint(2**62, ()))
        self.noise_ids = noise_ids
        self.sequences: Tensor | None = None
        self.max_new_tokens: int | None = None
        self.max_length: int | None = None
        self.observer: Observer | None = None
        self.halfway = False
        self.replays = False
        self.graph: Any = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer_idx: int,
        real: Tensor,
        *,
        scale: float,
        alibi_slopes: Tensor | None = None,
        softcap: float | None = None,
        rotary: Rotary | None = None,
        output_weights: bool = False,
    ) -> Attended:
        """Attention of one layer's new tokens, with scoring and eviction.

        The counterpart of ``Cache.update`` for a model that evicts; arguments and result are
        those of :meth:`Text.take`, :meth:`KeyformerLayer.place` and
        :meth:`KeyformerLayer.attend`. ``real`` is also counted into :attr:`columns`, unless
        that was done.
        """
        layer = self.layers[layer_idx]
        dtype = layer.dtype if layer.is_initialized else value.dtype
        if not query.dtype == key.dtype == value.dtype == dtype:  # under autocast
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if layer.length == self.text.length:  # no layer has been given these tokens before
            self._begin(query, real)
        new = layer.place(key, value)
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (key, value, layer.keys, layer.values)
        ):
            query = query if query.requires_grad else query.detach().requires_grad_()
        scorer = self._scorer(layer, layer_idx)
        options: dict[str, Any] = {"scale": scale, "alibi_slopes": alibi_slopes, "rotary": rotary}
        output_weights |= self.observer is not None
        fused = not output_weights and layer.steps_on_kernels(query, softcap)
        if fused:
            output = layer.step(query, new, scorer, self.tau.to(layer.device), **options)
            attended = Attended(output, new.positions, None, None)
        else:
            options |= {"softcap": softcap, "output_weights": output_weights}
            attended = layer.attend(query, new, scorer, **options)
            self.replays &= self.text.step == 0
        if layer.config.score == "shared":
            evicting = [one for one in self.layers if one.text is self.text]
            if layer is evicting[-1]:
                shared = sum(one.all_scores.to(layer.device) for one in evicting)
                for one in evicting:
                    one.admit(shared.to(one.device))
        elif not fused:
            layer.admit(layer.all_scores)
        if self.observer is not None:
            self.observer(layer_idx, new.positions[:, 0], attended)
        return attended

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand the new keys and values on as they are; :meth:`attend` does the rest.

        Raises
        ------
        TypeError
            From a model whose attention would not call :meth:`attend`.
        """
        call = CALL.get()
        if call is None or call.cache is not self:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        call.handed[layer_idx] = key_states, value_states
        return key_states, value_states

    def expect(self, real: Tensor) -> None:
        """Announce a prompt to all layers: see :meth:`Text.expect`."""
        for text in self.texts:
            text.expect(real)

    def next_places(self, real: Tensor) -> Tensor:
        """What :meth:`Text.next_places` gives, alike in all layers that evict."""
        return self.text.next_places(real)

    def _begin(self, query: Tensor, real: Tensor) -> None:
        """Count new tokens in; reserve slots for what follows a prompt if kernels attend."""
        tokens = real.shape[1]
        self.halfway = True
        if self.columns.length == self.text.length:
            self.columns.take(real, real)
        if not self.text.length:
            self.tau = torch.empty((), device=query.device)
        make_writable(self, ("tau",))
        if self.sequences is None:
            self.sequences = self._numbered(len(real), query.device)
        if not self.text.length or tokens > 1:
            prompt_end = max(self.text.prompt_end, self.text.length + tokens)
            planned = prompt_end + (self._new_tokens(prompt_end) or 1) - 1
            reserved = planned if kernels.run_on(self.config.backend, query) else 0
            for text in self.texts:
                text.reserved = reserved
            self.replays = reserved > self.text.length + tokens
        # A graph reads no table of places, and takes each new token for one after the last.
        self.replays &= self.columns.places is None and not self.columns.hides
        for text in self.texts:
            text.take(real)
        if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.set_temperature()

    def _numbered(self, rows: int, device: torch.device) -> Tensor:
        """Which noise each row draws: that of its id, and where there are beams of the beam."""
        ids = range(rows) if self.noise_ids is None else self.noise_ids
        each, rest = divmod(rows, len(ids)) if ids else (0, rows)
        if rest:
            raise InputError(f"noise_ids has {len(ids)} numbers, and the batch has {rows} rows")
        first = torch.tensor([each * int(number) % 2**32 for number in ids], device=device)
        return (first[:, None] + torch.arange(each, device=device)).flatten()

    def count_step(self) -> None:
        """Count a token that a replayed step is going to take in; its column is counted."""
        self.halfway = True
        for text in self.texts:
            text.advance(1)
        for layer in self.layers:
            layer.length = layer.text.length

    def set_temperature(self) -> None:
        """Tell the decode kernels the temperature of the step that comes."""
        self.tau.fill_(self._temperature())

    def _temperature(self) -> float:
        length = self.config.generation_length or self._new_tokens(self.text.prompt_end)
        return temperature(self.config, self.text.step, length)

    def places_needed(self, real: Tensor) -> int:
        """How many places ``real`` (batch, tokens) and what is planned after it reach."""
        return self.text.places_needed(real, self.planned(real) - real.shape[1] + 1)

    def planned(self, real: Tensor) -> int:
        """Tokens that will be fed: these (batch, tokens) and, after a prompt, the generated."""
        tokens = real.shape[1]
        seen = self.get_seq_length()
        if seen and tokens == 1:
            return tokens
        return tokens + (self._new_tokens(seen + tokens) or 1) - 1

    def _new_tokens(self, prompt_end: int) -> int | None:
        """How many ``generate`` was asked for after a prompt; None if it was not called."""
        if self.max_new_tokens is None and self.max_length is not None:
            return max(1, self.max_length - prompt_end)
        return self.max_new_tokens

    def _scorer(self, layer: KeyformerLayer, layer_idx: int) -> Scorer | None:
        if not layer.config.needs_scores:
            return None
        factor = 1.0 if self.text.in_first_prompt else self.config.damping
        tau = self._temperature()
        return Scorer(self.config, self.seed, layer_idx, tau, factor, self.sequences)

    def by_column(self, layer_idx: int, attended: Attended) -> Tensor:
        """The weights of a layer as transformers gives them: a column for each one fed so far.

        Parameters
        ----------
        attended
            What :meth:`attend` has just given, with weights.

        Returns
        -------
        Tensor
            (batch, heads, tokens, length), the dtype of the output: 0 where a token was evicted;
            of a layer with a window the last columns alone, as far as it reaches.
        """
        assert attended.weights is not None
        heads, tokens = attended.weights.shape[1:3]
        columns = self.columns.of(attended.positions)
        columns = columns.repeat_interleave(heads // columns.shape[1], dim=1)
        columns = columns[:, :, None].expand_as(attended.weights)
        weights = attended.weights.masked_fill(columns < 0, 0)
        every = weights.new_zeros(*weights.shape[:3], self.columns.length)
        every.scatter_add_(3, columns.clamp(min=0), weights)
        window = self.layers[layer_idx].window
        reach = self.columns.length if window is None else window - 1 + tokens
        return every[..., -reach:].to(attended.output.dtype)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last tokens, as assisted generation does, if none has been evicted.

        The scores that they gave to others stay.

        Parameters
        ----------
        tokens_to_remove
            Minus their number, as in transformers.

        Raises
        ------
        InputError
            If tokens that would have to come back are gone.
        """
        if tokens_to_remove > 0:
            raise InputError(f"tokens_to_remove must be 0 or negative, got {tokens_to_remove}")
        length = self.columns.length + tokens_to_remove
        if not tokens_to_remove:
            return
        if length < 0 or any(text.evicted for text in self.texts):
            why = f"it holds {self.columns.length}" if length < 0 else "it has evicted some"
            raise InputError(f"the cache cannot be cropped by {-tokens_to_remove} tokens: {why}")
        for text in self.texts:
            text.crop(length)
        self.columns.crop(length)
        for layer in self.layers:
            layer.empty(layer.text.seen)

    def __getstate__(self) -> dict[str, Any]:
        """What is copied or saved: all but the captured step, which is of this very cache."""
        return {**vars(self), "graph": None}

    def memory_bytes(self) -> int:
        """Bytes that the slots of all layers occupy."""
        return sum(layer.memory_bytes() for layer in self.layers)

    def reset(self) -> None:
        """Forget everything, budgets included."""
        super().reset()
        self.columns.reset()
        for text in self.texts:
            text.reset()
        self.halfway = self.replays = False
        self.graph = self.sequences = self.max_new_tokens = self.max_length = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give beam i the slots of beam ``beam_idx[i]``, positions and scores with them."""
        alike: dict[Any, list[KeyformerLayer]] = {}
        for layer in self.layers:
            if layer.is_initialized:
                kind = layer.device, layer.window, layer.keys.shape
                alike.setdefault(kind, []).append(layer)
        for (device, window, _), layers in alike.items():
            backend, scores = self.config.backend, layers[0].scores
            hidden = True if self.columns.hides else None  # whose vectors a kernel would not copy
            if kernels.reorder_on(backend, scores, beam_idx, window=window, mask=hidden):
                from keyformer.kernels import reorder

                parents = beam_idx.to(device).contiguous()
                reorder.take(layers, parents, self.text.on(device).shared)
            else:
                for layer in layers:
                    layer.reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences ``indices``."""
        super().batch_select_indices(indices)
        self._select(indices)
        self._renumber(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times in place."""
        super().batch_repeat_interleave(repeats)
        index = torch.arange(len(self.text.seen)).repeat_interleave(repeats)
        self._select(index)
        self._renumber(index)

    def _renumber(self, index: Tensor) -> None:
        """Noise follows a sequence that has an id; without one it is of the row."""
        if self.noise_ids is None or self.sequences is None:
            self.sequences = None
        else:
            self.sequences = self.sequences[index.to(self.sequences.device)]

    def _select(self, index: Tensor) -> None:
        self.columns.select(index, len(self.text.seen))
        for text in self.texts:
            text.select(index)
