"""KeyformerCache: the layers of a whole model, as transformers knows a cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from keyformer import backends
from keyformer.attention import Attended, AttentionSpec
from keyformer.call import CALL
from keyformer.config import InputError, KeyformerConfig
from keyformer.layer import KeyformerLayer
from keyformer.score import Scorer, temperature
from keyformer.text import Columns, Text, make_writable

Observer = Callable[[int, Tensor, Attended], None]
"""Called with layer index, query positions (batch, tokens) and what they attended to."""


def model_windows(model_config: PreTrainedConfig) -> list[int | None]:
    """The tokens that a query of each layer sees, itself included; None where it sees all."""
    config = model_config.get_text_config(decoder=True)
    is_field = hasattr(type(config), "sliding_window")  # not just left over in a config.json
    window = config.sliding_window if is_field else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


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
        evicting = [number for number, window in enumerate(windows) if window not in texts]
        super().__init__(
            layers=[
                KeyformerLayer(keep_all, texts[window], window)
                if window in texts
                else KeyformerLayer(
                    config, self.text, window, (evicting.index(number), len(evicting))
                )
                for number, window in enumerate(windows)
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
        output_weights: bool = False,
        **spec: Any,
    ) -> Attended:
        """Attention of one layer's new tokens, with scoring and eviction.

        The counterpart of ``Cache.update`` for a model that evicts; arguments and result are
        those of :meth:`Text.take`, :meth:`KeyformerLayer.place` and
        :meth:`KeyformerLayer.attend`. ``real`` is also counted into :attr:`columns`, unless
        that was done. ``spec`` has what :class:`keyformer.attention.AttentionSpec` does, but for
        the window, which the layer knows.
        """
        layer = self.layers[layer_idx]
        dtype = layer.dtype if layer.is_initialized else value.dtype
        if not query.dtype == key.dtype == value.dtype == dtype:  # under autocast
            query, key, value = (tensor.to(dtype) for tensor in (query, key, value))
        if layer.length == self.text.length:  # no layer has been given these tokens before
            self._begin(query, real)
            if (call := CALL.get()) and call.on_one_device and self.text.reserved:
                for one in self.layers:
                    one.reserve(key, value)
        new = layer.place(key, value)
        if torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in (key, value, layer.keys, layer.values)
        ):
            query = query if query.requires_grad else query.detach().requires_grad_()
        scorer = self._scorer(layer, layer_idx)
        of_layer = AttentionSpec(window=layer.window, **spec)
        output_weights |= self.observer is not None
        backend = None if output_weights else layer.stepping(query, of_layer)
        if backend is not None:
            tau = self.tau.to(layer.device)
            output = layer.step(query, new, of_layer, scorer, tau, backend)
            attended = Attended(output, new.positions, (), None)
        else:
            attended = layer.attend(query, new, of_layer, scorer, output_weights)
            self.replays &= self.text.step == 0
        if layer.config.score == "shared":
            evicting = [one for one in self.layers if one.text is self.text]
            if layer is evicting[-1]:
                shared = sum(one.all_scores.to(layer.device) for one in evicting)
                for one in evicting:
                    one.admit(shared.to(one.device))
        elif backend is None:
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
            reserved = planned if backends.on_kernels(self.config.backend, query) else 0
            for text in self.texts:
                text.reserved = reserved
            self.replays = reserved > self.text.length + tokens
        # A graph reads no table of places, and takes each new token for one after the last.
        self.replays &= self.columns.places is None and not self.columns.hides
        for text in self.texts:
            text.take(real)
            self.replays &= not text.patchy
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
        length = self.text.length + tokens_to_remove
        if not tokens_to_remove:
            return
        if length < 0 or any(text.evicted for text in self.texts):
            why = f"it holds {self.text.length}" if length < 0 else "it has evicted some"
            raise InputError(f"the cache cannot be cropped by {-tokens_to_remove} tokens: {why}")
        self._take_back(length)

    def forget(self, tokens: int) -> None:
        """Take back the last tokens for good: what was evicted meanwhile does not come back.

        For questions that are read ahead with a text, so that a rule keeps what they look at (as
        :class:`keyformer.rules.peak.Peak` does), and are not part of it. The next token takes the
        place of the first of them; their slots are free, and what they gave to others stays.
        Budgets that were a part of the prompt counted them. Until the slots are filled again the
        torch backend attends.

        Parameters
        ----------
        tokens
            How many columns, fewer than were read; padding among them counts.

        Raises
        ------
        InputError
            If it is no such number, or under ``positions="new"``, where the tokens of a head that
            kept more would take other places.
        """
        least = isinstance(tokens, int) and not isinstance(tokens, bool) and tokens >= 0
        if not least or tokens > max(0, self.text.length - 1):
            raise InputError(
                f"tokens must be a whole number below the {self.text.length} that the cache has"
                f" read, got {tokens!r}"
            )
        if tokens and self.config.positions == "new":
            raise InputError("a cache cannot forget tokens under positions 'new'")
        if tokens:
            self._take_back(self.text.length - tokens)
            self.replays = False

    def _take_back(self, length: int) -> None:
        """Leave the first columns; those of a forward that was refused are not counted."""
        self.columns.crop(self.text.length)
        for text in self.texts:
            text.crop(length)
        self.columns.crop(length)
        for layer in self.layers:
            layer.crop_to(layer.text.seen)

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
            hidden = True if self.columns.hides else None  # whose vectors a kernel would not copy
            parents = beam_idx.to(device).contiguous()
            shared = self.text.on(device).shared
            backends.reorder(self.config, layers, parents, shared, window=window, mask=hidden)
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
