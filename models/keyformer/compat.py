"""All that leans on transformers' private parts: classes swapped under a model, and ``generate``.

What a model's own forward does is in :mod:`keyformer.modeling`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from keyformer import served
from keyformer.cache import KeyformerCache
from keyformer.call import CALL, LAST_OUTPUTS
from keyformer.config import InputError
from keyformer.replay import replayed

Patches = dict[type[nn.Module], type[nn.Module]]

NAME = "keyformer"
"""Of this attention in transformers' interface."""


class Patched:
    """A class that takes the place of one of transformers', which it is made from."""

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        """What transformers says of its own class, whose source it reads."""
        return stock_class(cls)._can_set_attn_implementation()  # type: ignore[attr-defined]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickled by what it was made from, where it is of no module."""
        mixins = vars(type(self)).get("keyformer_mixins")
        if mixins is None:
            return super().__reduce_ex__(protocol)
        reduced: Any = super().__reduce_ex__(protocol)
        return _unpickled, (stock_class(type(self)), mixins), *reduced[2:]


def stock_class(cls: type) -> type:
    """transformers' class that a patched one was made from, or the class itself."""
    return next(c for c in cls.__mro__ if not _is_ours(c))


def _mixed(stock: type[nn.Module], *mixins: type) -> type[nn.Module]:
    """A subclass with the mixins before it; by name and module it is the same class."""
    return type(
        stock.__name__,
        (*mixins, stock),
        {"__module__": stock.__module__, "keyformer_mixins": mixins},
    )


mixed: Callable[..., type[nn.Module]] = functools.cache(_mixed)


def _unpickled(stock: type[nn.Module], mixins: tuple[type, ...]) -> nn.Module:
    cls = mixed(stock, *mixins)
    return cls.__new__(cls)


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


def of_subclass(cls: type[nn.Module], patches: Patches) -> Patches:
    """What takes the place of a user's subclass of a class in ``patches``; nothing if it is none.

    Of attention layers a subclass may compute otherwise, and is none of its class.
    """
    stock = next((c for c in cls.__mro__ if c in patches), cls)
    return {} if stock is cls else {cls: mixed(cls, patches[stock])}


def unpatch(model: nn.Module) -> None:
    """Undo :func:`patch`: every module gets back the class that its own was made from."""
    for module in model.modules():
        _set_class(module, stock_class(type(module)))


def _is_ours(cls: type) -> bool:
    """Whether a class is of this package or a patched model's, or was made by :func:`mixed`."""
    package = cls.__module__.split(".")[0]
    return "keyformer_mixins" in vars(cls) or package in ("keyformer", *served.PACKAGES.values())


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


class LayerConfig:
    """A model's configuration as its attention layers see it: it names this attention.

    It does so while a forward goes through a cache; otherwise, and where layers are run again for
    their gradients, theirs is the one that the model is set to.
    """

    def __init__(self, of: PreTrainedConfig) -> None:
        self.of = of

    @property
    def _attn_implementation(self) -> str | None:
        return self.of._attn_implementation if CALL.get() is None else NAME

    def __getattr__(self, name: str) -> Any:
        if name == "of":  # not set yet, where this is being copied
            raise AttributeError(name)
        return getattr(self.of, name)


def switch_attention(model: PreTrainedModel, layers: Iterable[nn.Module]) -> None:
    """Let attention layers call :func:`attention_forward`, whatever the model is set to later."""
    config = LayerConfig(model.config)
    for layer in layers:
        layer.config = config  # type: ignore[assignment]


def switch_back(model: PreTrainedModel) -> None:
    """Undo :func:`switch_attention`."""
    for layer in model.modules():
        if isinstance(config := getattr(layer, "config", None), LayerConfig):
            layer.config = config.of  # type: ignore[assignment]


def turn_cache_on(model: Any) -> None:
    """Let ``generate`` use a cache though the checkpoint's files say otherwise, as MPT's do.

    What is set from now on counts.
    """
    if model.generation_config.use_cache is False:
        model.generation_config.use_cache = True
        model.keyformer_turned_cache_on = True


class KeyformerGenerationMixin(Patched):
    """Placed before a ...ForCausalLM: ``generate`` works on a KeyformerCache.

    Where ``use_cache`` is False it is transformers' own.
    """

    config: Any
    get_decoder: Any
    prepare_inputs_for_generation: Any

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """By name the class is transformers' own: so it is saved, and known to pipelines."""
        super().__init_subclass__(**kwargs)
        cls.__name__ = stock_class(cls).__name__

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with :func:`turn_cache_on`."""
        loaded = super().from_pretrained(*args, **kwargs)  # type: ignore[misc]
        turn_cache_on(loaded[0] if isinstance(loaded, tuple) else loaded)
        return loaded

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with the decode steps of ``generate`` replayed on a GPU."""
        output = None if args else replayed(self, kwargs)  # type: ignore[arg-type]
        if output is not None:
            return output
        keep = kwargs.get("logits_to_keep")
        last = LAST_OUTPUTS.set(keep if isinstance(keep, int) and keep > 0 else None)
        try:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        finally:
            LAST_OUTPUTS.reset(last)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own; how much it was asked for the cache knows as long as it runs."""
        cache = kwargs.get("past_key_values")
        try:
            output = super().generate(*args, **kwargs)  # type: ignore[misc]
            cache = getattr(output, "past_key_values", cache)
            return output
        finally:
            if isinstance(cache, KeyformerCache):
                cache.max_new_tokens = cache.max_length = None

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which ``generate_batch`` begins with, where nothing is to be evicted.

        Raises
        ------
        InputError
            If the model's method evicts.
        """
        served.check_paged(self.get_decoder().keyformer_config)
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        if not generation_config.use_cache:
            super()._prepare_cache_for_generation(  # type: ignore[misc]
                generation_config, model_kwargs, *args
            )
            return
        # PEFT's wrapper, where it is there, has put its own in this one's place.
        served.check_adapter(getattr(self.prepare_inputs_for_generation, "__self__", None))
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
            if GenerationMode.ASSISTED_GENERATION in args or generation_config.is_assistant:
                served.check_taking_back(cache, generation_config.max_length)
        super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, *args
        )

    def _get_candidate_generator(
        self, generation_config: Any, *args: Any, assistant_model: Any = None, **kwargs: Any
    ) -> Any:
        """transformers' own; what an assistant that evicts proposes could not be taken back."""
        if isinstance(assistant_model, KeyformerGenerationMixin):
            method = assistant_model.get_decoder().keyformer_config
            cache = KeyformerCache(assistant_model.config, method)
            served.check_taking_back(cache, generation_config.max_length)
        return super()._get_candidate_generator(  # type: ignore[misc]
            generation_config, *args, assistant_model=assistant_model, **kwargs
        )

    def _prefill(
        self,
        input_ids: Tensor,
        generation_config: Any,
        model_kwargs: dict[str, Any],
        *args,
        **kwargs,
    ) -> Any:
        """The prompt; where transformers cuts it up, budgets are still those of the whole."""
        cache, mask = (model_kwargs.get(name) for name in ("past_key_values", "attention_mask"))
        if generation_config.prefill_chunk_size is not None and isinstance(cache, KeyformerCache):
            past = cache.get_seq_length()
            real = torch.ones_like(input_ids) if mask is None else mask
            cache.expect(real[:, past:].to(torch.bool) if real.shape[1] > past else real.bool())
        return super()._prefill(  # type: ignore[misc]
            input_ids, generation_config, model_kwargs, *args, **kwargs
        )

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """transformers' own; a mask that goes on from the last one says so, and is believed."""
        before = model_kwargs.get("attention_mask")
        updated = super()._update_model_kwargs_for_generation(  # type: ignore[misc]
            outputs, model_kwargs, *args, **kwargs
        )
        mask = updated.get("attention_mask")
        if before is not None and mask is not None and mask is not before:
            mask.keyformer_continues = before
            before.keyformer_continues = None
        return updated
