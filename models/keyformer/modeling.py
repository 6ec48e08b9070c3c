"""What every patched model shares: its calls to the cache, and generate's use of it."""

from __future__ import annotations

from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import NewGELUActivation
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from keyformer import kernels
from keyformer.attention import Rotary, Tokens
from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer.replay import replayed

Patches = dict[type[nn.Module], type[nn.Module]]


def attend(
    cache: KeyformerCache | None,
    layer_idx: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    window: int | None = None,
    rotary: Rotary | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a patched layer: through the cache, or plain and causal without one.

    Parameters
    ----------
    cache
        The model's ``past_key_values``.
    query, key, value
        (batch, heads or kv_heads, tokens, head_dim) of the new tokens, not rotated.
    real
        (batch, 1, 1, tokens) bool, what :class:`KeyformerModelMixin` passes as the mask.
    scale, alibi_slopes, softcap, rotary
        See :meth:`keyformer.cache.KeyformerLayer.attend`.
    window
        See :func:`keyformer.attention.attention`; a cache has its own from the configuration.

    Returns
    -------
    tuple
        What the heads give, side by side, (batch, tokens, heads * head_dim); and the weights
        (batch, heads, tokens, slots + tokens) float32 if they were asked for.
    """
    real = real[:, 0, 0]
    options: dict[str, Any] = {"scale": scale, "alibi_slopes": alibi_slopes, "softcap": softcap}
    if cache is not None:
        attended = cache.attend(query, key, value, layer_idx, real, rotary=rotary, **options)
    else:
        positions = (real.cumsum(dim=-1) - 1).masked_fill(~real, -1)[:, None]
        if rotary is not None:
            query, key = rotary(query, positions), rotary(key, positions)
        positions = positions.expand(-1, key.shape[1], -1)
        new = Tokens(key, value, positions, positions)
        attended = kernels.attention("auto", query, new[:0], new, window=window, **options)
    return attended.output.transpose(1, 2).flatten(2), attended.weights


class KeyformerModelMixin:
    """Placed before a base model such as MptModel: gives its layers what eviction needs.

    Attributes
    ----------
    keyformer_config
        The method used where no cache is passed in.
    keyformer_stock
        use_cache and attention implementation before the model was made to evict; None if
        it was built so.
    """

    config: Any
    keyformer_config = KeyformerConfig()
    keyformer_stock: tuple[bool, str] | None = None

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KeyformerCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward, with a KeyformerCache made where one is due.

        ``attention_mask`` is (batch, tokens) or (batch, tokens seen + tokens), 0 for padding.
        ``position_ids`` are replaced: the cache knows where each token stands.

        A prompt longer than ``prefill_chunk`` goes through the layers chunk by chunk; the
        hidden states kept are those that the cache's ``outputs_wanted`` asks for.

        Raises
        ------
        InputError
            If a token would stand beyond the model's table of positions, or hidden states or
            attentions of all layers are asked for from a prompt in chunks.
        TypeError
            If the cache is of a kind that does not evict.
        """
        tokens = input_ids if input_ids is not None else inputs_embeds
        if tokens is None:
            raise ValueError("one of input_ids and inputs_embeds is needed")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(f"attention_mask must be 2D, got shape {tuple(attention_mask.shape)}")
        if use_cache is None:
            use_cache = self.config.use_cache
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if use_cache and past_key_values is None:
            past_key_values = KeyformerCache(self.config, self.keyformer_config)
        if not isinstance(past_key_values, KeyformerCache | None):
            kind = type(past_key_values).__name__
            raise TypeError(f"a model with Keyformer takes a KeyformerCache, got a {kind}")
        if past_key_values is not None:
            past_key_values.output_attentions = bool(output_attentions)
        if attention_mask is None:
            real = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        else:
            real = attention_mask[:, -tokens.shape[1] :].to(torch.bool)
        inputs = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_attentions": output_attentions,
            **kwargs,
        }
        if past_key_values is None:
            places = (real.cumsum(dim=-1) - 1).masked_fill(~real, -1)
            return self._forward_at(places, real, inputs)
        self._check_places(past_key_values, real)
        chunk = past_key_values.config.prefill_chunk
        if chunk is None or chunk >= real.shape[1]:
            return self._forward_at(past_key_values.next_places(real), real, inputs)
        return self._forward_in_chunks(chunk, past_key_values, real, inputs)

    def _forward_at(self, places: Tensor, real: Tensor, inputs: dict[str, Any]) -> Any:
        """The base model's forward, told which tokens are real and where they stand."""
        # Which new tokens are real is all that a layer asks of a mask. transformers hands a
        # mask of four dimensions through as it is, and so builds none of n x n entries.
        return super().forward(  # type: ignore[misc]
            attention_mask=real[:, None, None], position_ids=places.clamp(min=0), **inputs
        )

    def _forward_in_chunks(
        self, chunk: int, cache: KeyformerCache, real: Tensor, inputs: dict[str, Any]
    ) -> Any:
        """The outputs of a prompt whose tokens go through the layers ``chunk`` at a time."""
        all_layers = [inputs["output_attentions"], inputs.get("output_hidden_states")]
        if any(all_layers) or self.config.output_hidden_states:
            raise InputError(
                "a prompt in chunks gives neither attentions nor hidden states of all layers:"
                " leave prefill_chunk out, or set the cache's observer"
            )
        return_dict = inputs.get("return_dict")
        if return_dict is None:
            return_dict = self.config.return_dict
        cache.expect(real)
        batch, tokens = real.shape
        first_wanted = max(0, tokens - (cache.outputs_wanted or tokens))
        wanted: Tensor | None = None
        row = torch.arange(batch, device=real.device)[:, None]
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
            output = self._forward_at(cache.next_places(here), here, {**part, "return_dict": True})
            hidden = output.last_hidden_state
            if wanted is None:
                wanted = hidden.new_empty(batch, tokens - first_wanted, hidden.shape[-1])
            at = (columns >= first_wanted).nonzero(as_tuple=True)
            wanted[at[0], columns[at] - first_wanted] = hidden[at]
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

    def _check_places(self, cache: KeyformerCache, real: Tensor) -> None:
        """Before the first layer: is the table large enough, for a prompt's generation too?"""
        table = self.position_table
        if real.shape[1] == 1 and cache.text.length < cache.text.reserved:
            return  # the prompt's check counted this token
        # Counting real tokens waits for the device, so only where they could be too many.
        if table is None or cache.get_seq_length() + cache.planned(real) <= table:
            return
        needed = cache.places_needed(real)
        if needed > table:
            raise InputError(
                f"the text would take {needed} positions and the model has {table}: shorten the"
                " prompt or what is generated, or let a smaller cache have new positions"
            )


class KeyformerGenerationMixin:
    """Placed before a ...ForCausalLM: ``generate`` works on a KeyformerCache.

    It does so whatever ``use_cache`` says: MPT's checkpoints turn it off, and there is
    nothing to evict without a cache.
    """

    config: Any
    get_decoder: Any

    def forward(
        self,
        input_ids: Tensor | None = None,
        past_key_values: KeyformerCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> Any:
        """The model's forward; the cache learns of how many tokens logits are asked for."""
        if isinstance(past_key_values, KeyformerCache):
            last = logits_to_keep if isinstance(logits_to_keep, int) else 0
            past_key_values.outputs_wanted = last or None
        return super().forward(  # type: ignore[misc]
            input_ids=input_ids,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            labels=labels,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the decode steps of ``generate`` replayed on a GPU."""
        output = None if args else replayed(self, kwargs)  # type: ignore[arg-type]
        return super().__call__(*args, **kwargs) if output is None else output  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        generation_config.use_cache = True
        cache = model_kwargs.get("past_key_values")
        if cache is None:
            # Gemma's checkpoints ask for a hybrid cache, which this is where layers have windows.
            if generation_config.cache_implementation not in (None, "dynamic", "hybrid"):
                raise InputError(
                    f"cache_implementation={generation_config.cache_implementation!r} cannot be"
                    " combined with Keyformer, which is a cache of its own"
                )
            cache = KeyformerCache(self.config, self.get_decoder().keyformer_config)
            model_kwargs["past_key_values"] = cache
        generation_config.cache_implementation = None
        if isinstance(cache, KeyformerCache):
            cache.max_new_tokens = generation_config.max_new_tokens
            cache.max_length = generation_config.max_length
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )


class FusedGELU(NewGELUActivation):
    """GELU by tanh in one kernel instead of eight."""

    def forward(self, input: Tensor) -> Tensor:
        """The same, rounded once."""
        return nn.functional.gelu(input, approximate="tanh")


FUSED_GELU: Patches = {NewGELUActivation: FusedGELU}


def patch(model: nn.Module, patches: Patches) -> None:
    """Give modules a subclass of their class, which computes with the same parameters.

    Weights, buffers and names stay as they are, so checkpoints load unchanged.

    Parameters
    ----------
    patches
        For each class to look for, the subclass of it that takes its place.
    """
    for module in model.modules():
        if type(module) in patches:
            _set_class(module, patches[type(module)])


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: every module gets back the class that its own was made from."""
    for module in model.modules():
        _set_class(module, next(c for c in type(module).__mro__ if not _is_ours(c)))


def _is_ours(cls: type) -> bool:
    """Whether a class is of this package or of one of the patched models'."""
    return cls.__module__.split(".")[0].endswith("keyformer")


def _set_class(module: nn.Module, new: type[nn.Module]) -> None:
    if type(module) is new:
        return
    # accelerate's hooks hold on to the forward of the class they were added to, and
    # removing one leaves that forward on the module.
    hook = getattr(module, "_hf_hook", None)
    if hook is not None:
        remove_hook_from_module(module)
        module.__dict__.pop("forward", None)
    module.__class__ = new
    if isinstance(module, PreTrainedModel):
        # By class name transformers looks up which outputs a model can record.
        _CAN_RECORD_REGISTRY.update({str(new): module._can_record_outputs})
    if hook is not None:
        add_hook_to_module(module, hook)
