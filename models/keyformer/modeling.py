"""What every patched model shares: its calls to the cache."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import NewGELUActivation

from keyformer import served
from keyformer.cache import KeyformerCache
from keyformer.call import CALL, LAST_OUTPUTS, Call, running
from keyformer.compat import Patched, Patches, stock_class
from keyformer.config import InputError, KeyformerConfig


def attend(
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    dropout: float = 0.0,
    **spec: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a layer, through the cache of the forward that is running.

    Parameters
    ----------
    query, key, value
        (batch, heads or kv_heads, tokens, head_dim) of the new tokens; not rotated if ``rotary``
        is to.
    dropout
        The rate at which transformers' layer would drop weights now: there must be none.
    spec
        How the layer attends, but for its window: see :class:`keyformer.attention.AttentionSpec`.

    Returns
    -------
    tuple
        What the heads give, side by side, (batch, tokens, heads * head_dim); and the weights
        (batch, heads, tokens, columns fed so far) in the model's dtype if they were asked for.
    """
    call = CALL.get()
    assert call is not None, "there is no forward of a patched model"
    served.check_dropout(dropout)
    attended = call.cache.attend(
        query,
        key,
        value,
        layer_idx,
        call.real,
        output_weights=call.output_attentions,
        **spec,
    )
    weights = call.cache.by_column(layer_idx, attended) if call.output_attentions else None
    return attended.output.transpose(1, 2).flatten(2), weights


def dropout_rate(module: nn.Dropout) -> float:
    """The rate at which a module drops now."""
    return module.p if module.training else 0.0


def _names(cls: Any) -> tuple[str, ...]:
    """Of transformers' own forward, in the order in which it takes them."""
    names = inspect.signature(stock_class(cls).forward).parameters  # type: ignore[attr-defined]
    return tuple(names)[1:]


_argument_names: Callable[[type], tuple[str, ...]] = functools.cache(_names)


def position_inputs(model: nn.Module, real: Tensor) -> dict[str, Tensor]:
    """``position_ids`` of a prompt as ``generate`` gives them, if the model's forward takes any.

    Parameters
    ----------
    real
        (batch, tokens), nonzero for tokens and 0 for padding, which has no place.
    """
    if "position_ids" not in _argument_names(type(model)):
        return {}
    return {"position_ids": (real.long().cumsum(dim=-1) - 1).clamp(min=0)}


class KeyformerModelMixin(Patched):
    """Placed before a base model such as MptModel: gives its layers what eviction needs.

    Where there is no KeyformerCache, in training and with use_cache=False, the forward is
    transformers' own, its attention included.

    Attributes
    ----------
    keyformer_config
        The method used where no cache is passed in.
    alibi
        What ALiBi counts: "columns" that were fed, or "tokens" that the mask shows; None without.
    layers_look_up
        Whether the layers look places up in a table, which has none below 0.
    layers_rotate
        Whether keys come rotated, so that they have to be turned back where places change.
    """

    config: Any
    training: bool
    parameters: Callable[..., Any]
    keyformer_config = KeyformerConfig()
    alibi: str | None = None
    layers_look_up = False
    layers_rotate = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, with a KeyformerCache made where one is due.

        Arguments are those of transformers' model. ``attention_mask`` is (batch, tokens) or
        (batch, tokens seen + tokens), 0 for padding and for earlier tokens that are not to be
        seen; ``position_ids`` count for positions="original".

        A prompt longer than ``prefill_chunk`` goes through the layers chunk by chunk.

        Raises
        ------
        InputError
            If the cache cannot serve the call: see :mod:`keyformer.served`.
        TypeError
            If the cache is of a kind that does not evict.
        """
        inputs = {**dict(zip(_argument_names(type(self)), args, strict=False)), **kwargs}
        cache = self._cache_for(inputs)
        if cache is None and CALL.get() is None:
            return super().forward(**inputs)  # type: ignore[misc]
        if cache is None:  # within another model's forward, or an earlier one of its own
            with running(None):
                return super().forward(**inputs)  # type: ignore[misc]
        for name in ("input_ids", "position_ids"):
            if isinstance(given := inputs.get(name), Tensor) and given.ndim == 1:
                inputs[name] = given[None]  # as some of transformers' models take them
        served.check_call(self, cache, inputs)
        inputs["past_key_values"] = cache
        tokens = served.fed(inputs)
        cache.columns.crop(cache.text.length)  # what a forward that failed has left
        real = cache.columns.take(inputs.pop("attention_mask", None), tokens)
        given = inputs.pop("position_ids", None)
        served.check_columns(cache, real, given)
        self._place_for_alibi(cache, real)
        self._check_places(cache, real, given)
        told = self._told_positions(cache, real, given)
        chunk = cache.config.prefill_chunk
        if chunk is None or chunk >= real.shape[1]:
            position_ids = self._counted_on(cache, real) if told is None else told
            output = self._forward_at(cache, position_ids, real, inputs)
        else:
            output = self._forward_in_chunks(chunk, cache, told, real, inputs)
        cache.halfway = False
        return output

    def _cache_for(self, inputs: dict[str, Any]) -> KeyformerCache | None:
        """The cache of a call, a new one if it is due; None if there is to be none of this kind."""
        cache = inputs.get("past_key_values")
        if isinstance(cache, KeyformerCache):
            return cache
        if self.training:
            return None
        if cache is not None:
            kind = type(cache).__name__
            raise TypeError(f"a model with Keyformer takes a KeyformerCache, got a {kind}")
        use_cache = inputs.get("use_cache")
        if self.config.use_cache if use_cache is None else use_cache:
            return KeyformerCache(self.config, self.keyformer_config)
        return None

    def _place_for_alibi(self, cache: KeyformerCache, real: Tensor) -> None:
        """Tell where ALiBi puts each column, if that is not its token's position."""
        columns, shown = cache.columns, None
        if self.alibi == "tokens" and columns.hides:
            shown = columns.all_shown(len(real), real.device)
        elif self.alibi == "columns" and not columns.even and cache.config.never_evicts:
            shown = torch.ones(len(real), columns.length, dtype=torch.bool, device=real.device)
        columns.places = None if shown is None else shown.cumsum(dim=-1) - 1

    def _told_positions(
        self, cache: KeyformerCache, real: Tensor, given: Tensor | None
    ) -> Tensor | None:
        """Where new columns stand by ``position_ids`` or the mask, (batch or 1, tokens) int64.

        None where they are counted on from what the cache holds.
        """
        if cache.config.positions == "new" or not self._takes_positions:
            return None
        if given is None and cache.config.never_evicts and self.counts_tokens:
            shown = cache.columns.all_shown(len(real), real.device)
            return (shown.cumsum(dim=-1) * shown - 1)[:, -real.shape[1] :]
        return given

    def _counted_on(
        self, cache: KeyformerCache, real: Tensor, columns: Tensor | None = None
    ) -> Tensor | None:
        """Where new tokens stand after those before, (batch, tokens) int64; padding has no place.

        Under method full and a mask over all columns, as transformers takes it, padding counts as
        it does there: the model is told nothing and counts by itself, unless these are
        ``columns`` (batch, tokens) of a prompt in chunks.
        """
        if not self._takes_positions:
            return None
        as_stock = cache.columns.whole or cache.columns.counted
        if cache.replays and not cache.columns.padded and real.shape[1] == 1:
            as_stock = False  # the same number, but on the device: a graph may be replayed
        if cache.config.positions == "new" or not (cache.config.never_evicts and as_stock):
            return cache.next_places(real).clamp(min=0)
        cache.columns.counted = True
        return columns

    @property
    def _takes_positions(self) -> bool:
        return "position_ids" in _argument_names(type(self))

    def counts_alone(self, cache: KeyformerCache) -> bool:
        """Whether without ``position_ids`` a step stands where the host counts that it does."""
        return cache.columns.padded and cache.config.never_evicts and self._takes_positions

    @property
    def counts_tokens(self) -> bool:
        """Whether without position_ids the model counts what the mask shows, as OPT does."""
        return self.config.model_type == "opt"

    def _forward_at(
        self,
        cache: KeyformerCache,
        position_ids: Tensor | None,
        real: Tensor,
        inputs: dict[str, Any],
    ) -> Any:
        """The base model's forward, its layers' attention through the cache."""
        # transformers hands a mask of four dimensions through as it is, and so builds none of
        # n x n entries.
        mask = real[:, None, None]
        first = not cache.text.length
        call = Call(
            cache,
            real,
            mask,
            on_one_device=first and len({one.device for one in self.parameters()}) == 1,
            output_attentions=served.outputs_attentions(self, inputs),
            rotation=self._rotation(cache, position_ids),
        )
        if position_ids is not None:
            inputs = {**inputs, "position_ids": position_ids}
        with running(call):
            output = super().forward(attention_mask=mask, **inputs)  # type: ignore[misc]
        served.check_layers(self, cache)  # type: ignore[arg-type]
        return output

    def _rotation(self, cache: KeyformerCache, position_ids: Tensor | None) -> Any:
        """What turns new queries and keys back where their places change."""
        return None

    def _forward_in_chunks(
        self,
        chunk: int,
        cache: KeyformerCache,
        told: Tensor | None,
        real: Tensor,
        inputs: dict[str, Any],
    ) -> Any:
        """The outputs of a prompt whose tokens go through the layers ``chunk`` at a time."""
        return_dict = inputs.get("return_dict")
        if return_dict is None:
            return_dict = self.config.return_dict
        cache.expect(real)
        batch, tokens = real.shape
        first_wanted = max(0, tokens - (LAST_OUTPUTS.get() or tokens))
        wanted: Tensor | None = None
        row = torch.arange(batch, device=real.device)[:, None]
        if told is not None:
            told = told.expand(batch, -1)
        past = cache.text.length
        # Padding goes last, so that each sequence is cut where it would be cut alone.
        order = (~real).to(torch.uint8).argsort(dim=1, stable=True)
        for columns in order.split(chunk, dim=1):
            part = {
                name: value[row, columns]
                if isinstance(value, Tensor) and value.shape[:2] == real.shape
                else value
                for name, value in inputs.items()
            }
            here = real[row, columns]
            if told is None:
                at = self._counted_on(cache, here, past + columns)
            else:
                at = told[row, columns]
            output = self._forward_at(cache, at, here, {**part, "return_dict": True})
            hidden = output.last_hidden_state
            if wanted is None:
                wanted = hidden.new_empty(batch, tokens - first_wanted, hidden.shape[-1])
            found = (columns >= first_wanted).nonzero(as_tuple=True)
            wanted[found[0], columns[found] - first_wanted] = hidden[found]
        output.last_hidden_state = wanted
        return output if return_dict else output.to_tuple()

    @property
    def position_table(self) -> int | None:
        """Number of positions that the model has a table for; None if it computes them."""
        for name in ("wpe", "embed_positions"):
            if (table := getattr(self, name, None)) is not None:
                # OPT's begins with rows that no position has.
                return table.num_embeddings - getattr(table, "offset", 0)
        return None

    def _check_places(self, cache: KeyformerCache, real: Tensor, given: Tensor | None) -> None:
        """Before the first layer: is the table large enough, for a prompt's generation too?"""
        table = self.position_table
        if table is None or (real.shape[1] == 1 and cache.text.length < cache.text.reserved):
            return  # the prompt's check counted this token
        later = cache.planned(real) - real.shape[1]
        needed = cache.text.length + real.shape[1] + later
        if cache.config.positions == "original" and given is not None:
            needed = int(given.max()) + 1 + later if given.numel() else 0
            served.check_least_place(self, given)
        elif needed > table and (self.counts_tokens or not cache.config.never_evicts):
            needed = cache.places_needed(real)  # counting tokens waits for the device
        if needed > table:
            raise InputError(
                f"the text would take {needed} positions and the model has {table}: shorten the"
                " prompt or what is generated, or let a smaller cache have new positions"
            )


class FusedGELU(NewGELUActivation):
    """GELU by tanh in one kernel instead of eight."""

    def forward(self, input: Tensor) -> Tensor:
        """The same, rounded once."""
        return nn.functional.gelu(input, approximate="tanh")


FUSED_GELU: Patches = {NewGELUActivation: FusedGELU}
