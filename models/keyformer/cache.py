"""KeyformerCache: a fixed number of slots in each layer and head, and the rule that fills them.

Nothing is moved. Tokens that lose their place are overwritten by those that come in; one
rule serves the prompt, every decode step and a second prompt on the same cache.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from keyformer.attention import Attended, Rotary, Tokens, attention
from keyformer.config import KeyformerConfig
from keyformer.precision import dequantize, quantize
from keyformer.score import Scorer, temperature

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
    window
        Tokens that the model lets a query of this layer see, itself included, so that no
        other can be of use; None if it sees all.

    Attributes
    ----------
    keys, values
        (batch, kv_heads, slots, head_dim), the model's dtype; or, quantized, the elements that
        :func:`keyformer.precision.quantize` gives.
    key_scales, value_scales
        (batch, kv_heads, slots, groups) float16, their scales; no groups if not quantized.
    positions
        (batch, kv_heads, slots) int64, position in the text, -1 for an empty slot.
    scores
        (batch, kv_heads, slots) float32, accumulated f_theta (section 3.3.2).
    step
        t of Eq. 10: 0 after a prompt, then the number of decode steps since.
    """

    is_sliding = False
    _per_slot = ("keys", "key_scales", "values", "value_scales", "positions", "scores")
    _per_sequence = (
        *_per_slot,
        *("_seen", "_budget", "_window", "_frozen_before"),
    )

    def __init__(self, config: KeyformerConfig, window: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything, budgets included."""
        self.is_initialized = False
        self.step = 0
        self.prompt_end = 0
        self._first_prompt = 0
        self._length = 0
        self._seen = torch.zeros(1, dtype=torch.int64)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Take batch size, heads, dtype and device from the first keys; no slots yet."""
        batch, heads, _, _ = key_states.shape
        self.dtype, self.device = key_states.dtype, key_states.device
        none = slice(0, 0)
        self.keys, self.key_scales = self._quantized(key_states[:, :, none])
        self.values, self.value_scales = self._quantized(value_states[:, :, none])
        self.positions = torch.zeros(batch, heads, 0, dtype=torch.int64, device=self.device)
        self.scores = torch.zeros(batch, heads, 0, device=self.device)
        self._seen = torch.zeros(batch, dtype=torch.int64, device=self.device)
        for name in ("_budget", "_window", "_frozen_before"):
            setattr(self, name, getattr(self, name).to(self.device))
        self.is_initialized = True

    def expect(self, real: Tensor) -> None:
        """Announce a prompt, which may come in chunks; the first one fixes the budgets.

        Parameters
        ----------
        real
            (batch, tokens) bool of the whole prompt, False for padding.
        """
        if not self._first_prompt:
            self._set_budgets(real)
        self.prompt_end = self._length + real.shape[1]

    def place(self, key: Tensor, value: Tensor, real: Tensor) -> Tokens:
        """Count new tokens in. More than one, or the first, are a prompt if none is expected.

        Parameters
        ----------
        key, value
            (batch, kv_heads, tokens, head_dim) of the new tokens.
        real
            (batch, tokens) bool, False for padding.

        Returns
        -------
        Tokens
            The new tokens with their positions and places.
        """
        starts_prompt = key.shape[2] > 1 or not self.is_initialized
        if starts_prompt and self._length >= self.prompt_end:
            self.expect(real)
        if not self.is_initialized:
            self.lazy_initialization(key, value)
        real = real.to(self.device)
        count = real.cumsum(dim=-1)
        positions = (self._seen[:, None] + count - 1).masked_fill(~real, -1)
        places = self.next_places(real)
        self._seen = self._seen + count[:, -1]
        self._length += key.shape[2]
        self.step = 0 if self._length <= self.prompt_end else self.step + 1
        by_head = (slice(None), None, slice(None))
        shape = key.shape[:3]
        return Tokens(key, value, positions[by_head].expand(shape), places[by_head].expand(shape))

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
        count = real.cumsum(dim=-1)
        return (self._first_place(count[:, -1])[:, None] + count - 1).masked_fill(~real, -1)

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
        seen = self._seen.to(count.device)
        at_end = seen + count + new_tokens - 1
        if self.config.positions == "original":
            return int(at_end.max())
        budgets = self._budgets(count)
        chunk = self.config.prefill_chunk or real.shape[1]
        before = torch.arange(0, real.shape[1], chunk, device=count.device)[:, None].minimum(count)
        needed = torch.minimum(seen + before, budgets) + (count - before).clamp(max=chunk)
        return int(torch.maximum(needed.amax(dim=0), torch.minimum(at_end, budgets + 1)).max())

    def _first_place(self, count: Tensor) -> Tensor:
        """The place after those taken, (batch,) int64, where ``count`` real tokens are new."""
        seen = self._seen.to(count.device)
        if self.config.positions == "original":
            return seen
        return torch.minimum(seen, self._budgets(count))

    def _budgets(self, count: Tensor) -> Tensor:
        """k of each sequence, (batch,) int64: by its tokens if this is its first prompt."""
        if self._first_prompt:
            return self._budget.to(count.device)
        budgets = torch.tensor([self.config.budget(int(n)) for n in count], device=count.device)
        return budgets if self.window is None else budgets.clamp(max=max(1, self.window - 1))

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
        moving = self.config.positions == "new"
        places = _ranks(self.positions) if moving else self.positions
        slots = Tokens(*self.read(), self.positions, places)
        read = new
        if rotary is not None:
            query = rotary(query, new.places[:, :1])
            read = new.rotated(rotary)
            if moving:
                slots = slots.rotated(rotary)
            else:
                new = read
        attended = attention(
            query,
            slots,
            read,
            scale=scale,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            window=self.window,
            scorer=scorer,
            output_weights=output_weights,
        )
        new_scores = torch.zeros_like(new.positions, dtype=torch.float32)
        if attended.scores is not None:
            held = self.scores.shape[-1]
            queries = (new.positions[:, :1] >= 0).sum(dim=-1, keepdim=True)
            kept = self.scores * self.config.forgetting**queries
            self.scores = kept + attended.scores[..., :held]
            new_scores = attended.scores[..., held:]
        self._grow()
        self._arrivals = new, new_scores
        return attended

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
        new, new_scores = self._arrivals
        del self._arrivals
        slots = self.positions.shape[-1]
        positions = torch.cat([self.positions, new.positions], dim=-1)
        leaves = self._leaves(positions, ranked_by, slots)
        freed = leaves[..., :slots].nonzero(as_tuple=True)
        staying = (~leaves[..., slots:]).nonzero(as_tuple=True)
        arrived = (
            *self._quantized(new.keys[staying]),
            *self._quantized(new.values[staying]),
            *(new.positions[staying], new_scores[staying]),
        )
        for name, one in zip(self._per_slot, arrived, strict=True):
            getattr(self, name)[freed] = one

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the slots, (batch, kv_heads, slots, head_dim) in the model's dtype."""
        kind = self.config.cache_dtype
        return (
            dequantize(self.keys, self.key_scales, kind, self.dtype),
            dequantize(self.values, self.value_scales, kind, self.dtype),
        )

    def _quantized(self, vectors: Tensor) -> tuple[Tensor, Tensor]:
        return quantize(vectors, self.config.cache_dtype)

    @property
    def in_first_prompt(self) -> bool:
        """Whether the tokens placed last are of the first prompt."""
        return self._length <= self._first_prompt

    def _set_budgets(self, real: Tensor) -> None:
        """Fix k and w of each sequence by its number of real prompt tokens."""
        lengths = real.sum(dim=-1)
        self._budget = self._budgets(lengths)
        budgets = self._budget.tolist()
        windows = [self.config.recent_window(k) for k in budgets]
        self._window = torch.tensor(windows, device=real.device)
        self._largest_budget = max(budgets)
        self._first_prompt = real.shape[1]
        self._frozen_before = self._window_start(lengths)

    def _window_start(self, seen: Tensor) -> Tensor:
        """The first position of the recent window after ``seen`` (batch,) tokens."""
        return seen - (self.config.dilation + 1) * self._window

    def _grow(self) -> None:
        """Have slots for every token so far, up to the largest budget."""
        held = self.keys.shape[2]
        wanted = min(self._largest_budget, self._length)
        if wanted <= held:
            return
        wanted = min(self._largest_budget, -(-wanted // GROWTH) * GROWTH)
        for name in self._per_slot:
            old = getattr(self, name)
            rest = (0, 0) * (old.ndim - 3)
            empty = -1 if name == "positions" else 0
            new = torch.nn.functional.pad(old, (*rest, 0, wanted - held), value=empty)
            setattr(self, name, new)

    def _leaves(self, positions: Tensor, scores: Tensor, slots: int) -> Tensor:
        """Who leaves when the new tokens compete with the slots: the eviction rule.

        Slots and new tokens are ranked together and as many leave as are new. Padding goes
        first, then empty slots and what the model's own window has left behind, then tokens by
        score, the younger of two equals first. Sinks and the recent window stay, key tokens if
        they are frozen, and slots beyond a sequence's own budget, which therefore never fill.

        Parameters
        ----------
        positions, scores
            (batch, kv_heads, slots + new tokens).
        slots
            How many of them are slots.

        Returns
        -------
        Tensor
            Bool, the same shape, True for those that leave.
        """
        config = self.config
        seen, budget = self._seen[:, None, None], self._budget[:, None, None]
        if config.normalize == "mean":
            scores = scores / (seen - positions)
        highest = torch.iinfo(torch.int64).max
        # Scores are never negative, so their bits sort as integers do.
        rank = scores.contiguous().view(torch.int32).to(torch.int64) << 32
        rank = rank + (torch.iinfo(torch.int32).max - positions)
        window_start = self._window_start(self._seen)[:, None, None]
        kept = (positions >= window_start) & (positions % (config.dilation + 1) == 0)
        kept |= positions < budget.clamp(max=config.sinks)
        if config.key_set == "frozen" and not self.in_first_prompt:
            kept |= positions < self._frozen_before[:, None, None]
        rank = rank.masked_fill(kept, highest)
        unseen = positions < 0
        if self.window is not None:
            unseen |= positions <= seen - self.window
        rank = rank.masked_fill(unseen, -1)
        place = torch.arange(positions.shape[-1], device=positions.device)
        rank = rank.masked_fill((place >= slots) & (positions < 0), -2)
        rank = rank.masked_fill((place >= budget) & (place < slots), highest)
        leaving = rank.topk(positions.shape[-1] - slots, largest=False).indices
        return torch.zeros_like(rank, dtype=torch.bool).scatter_(-1, leaving, True)

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        """Refuse a model that would append keys without evicting."""
        raise TypeError(
            "a KeyformerCache evicts inside attention and this model's attention does not call"
            " it; load the model with keyformer.load_model or pass it to enable_keyformer"
        )

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: what transformers' position arithmetic expects."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over every token seen and the new ones."""
        return self._length + query_length, 0

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
            for name in self._per_sequence:
                setattr(self, name, getattr(self, name).index_select(0, index.to(self.device)))

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

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse: evicted tokens cannot be brought back (assisted generation needs this)."""
        raise ValueError("a KeyformerCache cannot be cropped: evicted tokens are gone")


def model_windows(model_config: PreTrainedConfig) -> list[int | None]:
    """The tokens that a query of each layer sees, itself included; None where it sees all."""
    config = model_config.get_text_config(decoder=True)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def _ranks(positions: Tensor) -> Tensor:
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

    Attributes
    ----------
    layers
        One :class:`KeyformerLayer` for each layer of the model.
    seed
        Seed of this cache's noise.
    max_new_tokens, max_length
        What ``generate`` was asked for; T of Eq. 10 unless the config has its own.
    outputs_wanted
        Of how many tokens, counted from a prompt's end, the model's outputs are of use; None is
        all. Where a prompt comes in chunks the model keeps no others.
    observer
        If set, called after each layer's attention with its weights.
    hands_over
        Whether :meth:`update` hands keys and values on to an attention that calls
        :meth:`attend` with them.
    """

    def __init__(
        self, model_config: PreTrainedConfig, config: KeyformerConfig | None = None
    ) -> None:
        config = config or KeyformerConfig()
        keep_all = KeyformerConfig.preset(
            "full", cache_dtype=config.cache_dtype, backend=config.backend
        )
        windows = model_windows(model_config)
        is_hybrid = None in windows
        super().__init__(
            layers=[
                KeyformerLayer(keep_all if window and is_hybrid else config, window)
                for window in windows
            ]
        )
        self.config = config
        self._evicting = [layer for layer in self.layers if layer.config is config]
        self.seed = config.seed or 0
        if config.seed is None and config.draws_noise:
            self.seed = int(torch.randint(2**62, ()))
        self.max_new_tokens: int | None = None
        self.max_length: int | None = None
        self.output_attentions = False
        self.outputs_wanted: int | None = None
        self.observer: Observer | None = None
        self.hands_over = False

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
    ) -> Attended:
        """Attention of one layer's new tokens, with scoring and eviction.

        The counterpart of ``Cache.update`` for a model that evicts; arguments and result are
        those of :meth:`KeyformerLayer.place` and :meth:`KeyformerLayer.attend`.
        """
        layer = self.layers[layer_idx]
        new = layer.place(key, value, real)
        attended = layer.attend(
            query,
            new,
            self._scorer(layer, layer_idx),
            scale=scale,
            alibi_slopes=alibi_slopes,
            softcap=softcap,
            rotary=rotary,
            output_weights=self.output_attentions or self.observer is not None,
        )
        if layer.config.score == "per_layer":
            layer.admit(layer.all_scores)
        elif layer is self._evicting[-1]:
            shared = sum(one.all_scores.to(layer.device) for one in self._evicting)
            for one in self._evicting:
                one.admit(shared.to(one.device))
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
        if not self.hands_over:
            return super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return key_states, value_states

    def expect(self, real: Tensor) -> None:
        """Announce a prompt to all layers: see :meth:`KeyformerLayer.expect`."""
        for layer in self.layers:
            layer.expect(real)

    def next_places(self, real: Tensor) -> Tensor:
        """What :meth:`KeyformerLayer.next_places` gives, alike in all layers that evict."""
        return self._evicting[0].next_places(real)

    def places_needed(self, real: Tensor) -> int:
        """How many places ``real`` (batch, tokens) and what is planned after it reach."""
        return self._evicting[0].places_needed(real, self.planned(real) - real.shape[1] + 1)

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
        length = self.config.generation_length or self._new_tokens(layer.prompt_end)
        tau = temperature(self.config, layer.step, length)
        factor = 1.0 if layer.in_first_prompt else self.config.damping
        return Scorer(self.config, self.seed, layer_idx, tau, factor)

    def memory_bytes(self) -> int:
        """Bytes that the slots of all layers occupy."""
        return sum(layer.memory_bytes() for layer in self.layers)
