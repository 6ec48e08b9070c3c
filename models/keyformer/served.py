"""What can be served: looked at when a model is made to evict, and on each forward call.

Everything that Keyformer refuses of a model or of a call is refused here, in one line.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Cache, GenerationMixin, PreTrainedConfig, PreTrainedModel

from keyformer.cache import model_windows
from keyformer.config import InputError, KeyformerConfig

if TYPE_CHECKING:
    from keyformer.cache import KeyformerCache
    from keyformer.call import Call

PACKAGES = {
    "mpt": "mpt_keyformer",
    "gptj": "gptj_keyformer",
    "gpt2": "cerebras_keyformer",
    "bloom": "bloom_keyformer",
    "falcon": "falcon_keyformer",
}
"""By model_type, the packages with a MODEL, PATCHES and make_config: models with an attention of
their own. All others must have one that goes through transformers' attention interface."""

NOT_THROUGH_INTERFACE = (
    "not all of its layers have an attention that goes through transformers' attention interface"
)
ATTENDS_BOTH_WAYS = "its tokens attend to later ones"
ALWAYS_DECODES = ("gpt_neox", "gpt_neox_japanese")
"""Models that have an ``is_decoder`` in their configuration and do not look at it."""

SERVED_LAYERS = ("full_attention", "sliding_attention")
MOVABLE = (
    *("llama", "qwen2", "qwen3", "mistral", "phi3"),
    *("gemma2", "gemma3_text", "gpt_neox", "falcon"),
)
"""Models whose layers all rotate every token, so that a token can be given a new place."""

TESTED = (*MOVABLE, "opt")
"""Models that are known to hand their attention what it expects; all others are tried once."""

UNSTEADY = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies change with the length of the text."""

OTHER_INPUTS = ("encoder_hidden_states", "encoder_attention_mask", "head_mask")
"""Arguments of transformers' models that change what attention sees, and a cache does not know."""

NARROW = 8
"""The width of a window where a model is tried out."""

PREFIXES = ("PREFIX_TUNING", "CARTRIDGE")
"""Kinds of PEFT's adapters that are a cache which is filled already."""

HARMLESS = ("position_ids", "cache_position", "position_embeddings", "token_type_ids")
"""Tensors that layers pass on to their attention and that do not change it."""


def check_config(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose models cannot evict.

    Raises
    ------
    InputError
        Saying why.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - set(SERVED_LAYERS)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, whose decoder attends to two sets of keys"
    elif getattr(config, "add_cross_attention", False):
        reason = "its layers attend to an encoder too"
    elif config.get_text_config(decoder=True) is not config:
        reason = "it reads more than text"
    elif not getattr(config, "num_attention_heads", None):
        reason = "it has no attention heads: a state-space model has no keys to evict"
    elif getattr(config, "kv_lora_rank", None):
        reason = "its attention is latent: all heads share one compressed vector a token"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "some of its layers attend to the keys of others"
    elif getattr(config, "use_bidirectional_attention", False) or not getattr(
        config, "is_causal", True
    ):
        reason = ATTENDS_BOTH_WAYS
    elif config.model_type not in ALWAYS_DECODES and not getattr(config, "is_decoder", True):
        reason = f"{ATTENDS_BOTH_WAYS}, unless is_decoder is set"
    elif kinds:
        reason = (
            "it has layers that are neither full nor sliding-window attention, such as state-space"
            f" ones: {', '.join(sorted(kinds))}"
        )
    else:
        return
    raise unsupported(config.model_type, reason)


def check_model(model: PreTrainedModel) -> list[nn.Module]:
    """The attention layers of a model that is to evict through transformers' interface.

    Raises
    ------
    InputError
        If there are not just one for each of its layers; the message says why.
    """
    name, config = type(model).__name__, model.config
    check_config(config)
    if not isinstance(model, GenerationMixin) or type(model.get_decoder()) is type(model):
        raise InputError(f"a {name} does not generate text")
    if not isinstance(model.get_decoder(), PreTrainedModel):
        raise unsupported(name, "it has no decoder of its own beneath the head")
    found = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    layers = sorted(m.layer_idx for m in found if isinstance(m.layer_idx, int))
    if len(layers) < len(found) or layers != list(range(config.num_hidden_layers)):
        raise unsupported(name, NOT_THROUGH_INTERFACE)
    if not all(getattr(m, "config", None) is config for m in found):
        raise unsupported(name, NOT_THROUGH_INTERFACE)
    if not all(getattr(m, "is_causal", True) for m in found):
        raise unsupported(name, ATTENDS_BOTH_WAYS)
    return found


def check_adapter(model: Any) -> None:
    """Refuse PEFT's wrapper around a model if its adapter is keys and values of its own.

    Raises
    ------
    InputError
        Naming its kind.
    """
    adapter = getattr(model, "active_peft_config", None)
    if (kind := getattr(adapter, "peft_type", None)) in PREFIXES:
        raise InputError(
            f"{kind.value} of PEFT cannot be combined with Keyformer: it puts keys and values of"
            " no token into transformers' own cache"
        )


def check_call(model: Any, cache: KeyformerCache, inputs: dict[str, Any]) -> None:
    """Refuse a forward call that a cache cannot serve, before anything has changed.

    Parameters
    ----------
    model
        The decoder.
    inputs
        Arguments of its forward, by name.

    Raises
    ------
    InputError
        Saying why.
    """
    config, text = cache.config, cache.text
    tokens = fed(inputs)
    windows, own = [layer.window for layer in cache.layers], model_windows(model.config)
    if windows != own:
        raise InputError(
            f"the cache was made for another model: its layers have windows {_brief(windows)}, and"
            f" those of this {model.config.model_type} {_brief(own)}"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InputError(
            f"attention_mask must be (batch, tokens) where a KeyformerCache is used, got {got};"
            " other masks are for calls with use_cache=False"
        )
    counts = model.counts_tokens and inputs.get("position_ids") is None
    if mask is not None and (counts or model.alibi == "tokens") and mask.dtype != torch.bool:
        known = cache.columns.continued_by(mask)
        if not known and bool(((mask != 0) & (mask != 1)).any()):
            raise InputError(
                f"attention_mask must hold zeros and ones alone: a {model.config.model_type} of"
                " transformers would take other values for places"
            )
    if cache.halfway:
        raise InputError("a forward through this cache was interrupted or failed: reset the cache")
    if text.length and len(text.seen) != len(tokens):
        raise InputError(f"the cache holds {len(text.seen)} sequences and {len(tokens)} were given")
    for name in OTHER_INPUTS:
        if inputs.get(name) is not None:
            raise InputError(f"{name} cannot be combined with a KeyformerCache")
    if inputs.get("is_causal", True) is False:
        raise InputError("is_causal=False cannot be combined with a KeyformerCache")
    if model.training and model.is_gradient_checkpointing:
        raise InputError(
            "gradient checkpointing cannot be combined with a KeyformerCache: layers that are run"
            " again would be fed twice; train with use_cache=False"
        )
    chunk = config.prefill_chunk
    if chunk is not None and chunk < tokens.shape[1]:
        given = inputs.get("output_hidden_states")
        hidden = model.config.output_hidden_states if given is None else given
        if hidden or outputs_attentions(model, inputs):
            raise InputError(
                "a prompt in chunks gives neither attentions nor hidden states of all layers:"
                " leave prefill_chunk out, or set the cache's observer"
            )
    if config.positions == "new" and model.layers_rotate and model.position_table is None:
        kind = model.config.model_type
        if kind not in MOVABLE:
            raise InputError(
                f"positions='new' is not supported for model_type {kind!r}; it is for"
                f" {', '.join(MOVABLE)} and models with a table of positions"
            )
        for rope in _kinds(getattr(model.rotary_emb, "rope_type", "default")):
            if rope in UNSTEADY:
                raise InputError(
                    f"positions='new' cannot be had with rope_type {rope!r}, whose frequencies"
                    " change with the length of the text; use positions='original'"
                )


def check_columns(cache: KeyformerCache, real: Tensor, position_ids: Tensor | None) -> None:
    """Refuse masks and positions under which tokens cannot be given new places.

    Parameters
    ----------
    real
        (batch, tokens) bool, which new columns are tokens.
    position_ids
        (batch or 1, tokens) int64 as they were given, if they were.
    """
    if cache.config.positions != "new":
        return
    if cache.columns.hides:
        raise InputError("positions='new' cannot be had where attention_mask hides earlier tokens")
    if not cache.columns.new_even:
        raise InputError("positions='new' cannot be had with padding between tokens")
    if position_ids is None or position_ids.shape[1] == 1:
        return  # one token has the place after those in the cache, whatever it is called
    steps = position_ids.diff(dim=-1) == 1
    both = (real[:, 1:] & real[:, :-1]).expand(len(real), -1)
    if not bool((steps | ~both).all()):
        raise InputError(
            "position_ids that do not count up by one cannot be had with positions='new'"
        )


def check_least_place(model: Any, position_ids: Tensor) -> None:
    """Refuse places before the first of a model whose layers look them up, as GPT-J's do."""
    if model.layers_look_up and bool((position_ids < 0).any()):
        raise InputError(f"position_ids must be at least 0, got {int(position_ids.min())}")


def check_taking_back(cache: KeyformerCache, length: int) -> None:
    """Refuse assisted decoding, which takes rejected tokens back, where tokens may be evicted.

    Parameters
    ----------
    length
        Tokens that the text may come to.
    """
    windows = [text.model_window for text in cache.texts if text.model_window]
    largest = cache.text.largest_budget if cache.text.first_prompt else cache.config.kv_budget or 0
    if largest < length or any(window < length for window in windows):
        raise InputError(
            "assisted decoding takes tokens back, which a cache that evicts cannot: it needs the"
            f" method full, or a kv_budget of at least {length}, and layers without a window"
        )


def check_paged(config: KeyformerConfig) -> None:
    """Refuse continuous batching, whose caches are transformers' own, where tokens are evicted."""
    if not config.never_evicts:
        raise InputError(
            "continuous batching takes paged caches of transformers' own, which never evict: use"
            " generate, the method full, or disable_keyformer"
        )


def check_attention(
    module: nn.Module,
    call: Call,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    sliding_window: int | None,
    others: dict[str, Any],
) -> None:
    """Refuse an attention that asks for what a cache does not do.

    Parameters
    ----------
    key, value
        What it hands over, which must be what it gave the cache.
    mask
        The attention mask that it hands over, which must be the one that the model was given.
    others
        Its further keyword arguments.
    """
    name = type(module).__name__
    layer: Any = module.layer_idx
    handed = call.handed.pop(layer, None)
    if handed is None or handed[0] is not key or handed[1] is not value:
        raise unsupported(name, "it attends to other keys and values than it gives the cache")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != call.mask.shape):
        raise unsupported(name, "it makes its own attention mask")
    check_dropout(dropout)
    if sliding_window is not None and sliding_window != call.cache.layers[layer].window:
        raise unsupported(name, f"layer {layer} has a window that its configuration does not name")
    for other, given in others.items():
        if isinstance(given, Tensor) and other not in HARMLESS:
            raise unsupported(name, f"it adds {other} to its logits")


def check_layers(model: nn.Module, cache: KeyformerCache) -> None:
    """After a forward: has every layer attended through the cache?"""
    for number, layer in enumerate(cache.layers):
        if layer.length != layer.text.length:
            raise unsupported(
                type(model).__name__, f"the attention of layer {number} did not reach the cache"
            )


def fed(inputs: dict[str, Any]) -> Tensor:
    """What is fed: (batch, tokens) int64 or, already embedded, (batch, tokens, hidden)."""
    ids: Any = inputs.get("input_ids")
    embeds: Any = inputs.get("inputs_embeds")
    if (ids is None) == (embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    return embeds if ids is None else ids


def outputs_attentions(model: Any, inputs: dict[str, Any]) -> bool:
    """Whether a forward is asked for its layers' weights."""
    given = inputs.get("output_attentions")
    return bool(model.config.output_attentions if given is None else given)


def check_dropout(rate: float) -> None:
    """Refuse an attention that drops weights now, at a rate other than 0."""
    if rate:
        raise InputError(
            f"attention dropout {rate} cannot be combined with a KeyformerCache: call"
            " model.eval(), set it to 0, or train with use_cache=False"
        )


def unsupported(what: str, reason: str) -> InputError:
    """The error that refuses a model."""
    return InputError(f"{what} is not supported: {reason}")


def _brief(windows: list[int | None]) -> str:
    """How many layers have which window, for a message."""
    counted = Counter("none" if window is None else str(window) for window in windows)
    return ", ".join(f"{window} ({count})" for window, count in counted.items())


def _kinds(rope_type: Any) -> Iterable[str]:
    return rope_type.values() if isinstance(rope_type, dict) else (rope_type,)


@torch.no_grad()
def try_out(model: PreTrainedModel, make_cache: Callable[[], Cache]) -> Tensor:
    """Feed a model that nobody has tested a few tokens, with padding and then a masked past.

    Parameters
    ----------
    make_cache
        Gives the cache to feed; called where windows are narrow, so that the text goes beyond.

    Returns
    -------
    Tensor
        (2 forwards, 2 sequences, tokens, hidden_size): the decoder's outputs for the last tokens.

    Raises
    ------
    InputError
        If the tokens cannot be fed, as where its layers hand their attention something else than
        a cache takes.
    """
    trained = [module for module in model.modules() if module.training]
    model.eval()
    vocabulary, padding = model.config.vocab_size, getattr(model.config, "pad_token_id", None)
    ids = torch.arange(6 * NARROW, device=model.device).view(2, -1) % vocabulary
    if padding is not None:  # some models tell by the token that it has no place
        ids = torch.where(ids == padding, (ids + 1) % vocabulary, ids)
    mask = torch.ones_like(ids)
    mask[0, : NARROW // 2] = 0
    outputs = []
    try:
        with _narrow_windows(model):
            cache = make_cache()
            for start, end in ((0, 2 * NARROW), (2 * NARROW, 3 * NARROW)):
                output = model.get_decoder()(
                    input_ids=ids[:, start:end],
                    attention_mask=mask[:, :end],
                    past_key_values=cache,
                    use_cache=True,
                )
                outputs.append(output.last_hidden_state[:, -NARROW:])
                mask[1, NARROW : 2 * NARROW] = 0
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, AttributeError, KeyError, IndexError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise unsupported(
            type(model).__name__, f"a first token could not be fed: {reason}"
        ) from error
    finally:
        for module in trained:
            module.training = True
    return torch.stack(outputs).float()


def check_outputs(model: PreTrainedModel, expected: Tensor, got: Tensor) -> None:
    """Compare what :func:`try_out` gave with transformers' own cache and with a KeyformerCache.

    A few tokens may differ by more than rounding, as where experts are chosen by a hair.

    Raises
    ------
    InputError
        If most of a sequence's tokens do.
    """
    dtype = torch.bfloat16 if getattr(model, "hf_quantizer", None) else model.dtype
    apart = (got - expected).norm(dim=-1) / expected.norm(dim=-1)
    most = float(apart.median(dim=-1).values.max())
    if expected.isfinite().all() and not most <= torch.finfo(dtype).eps ** 0.5:
        reason = "with a KeyformerCache it gives other logits than transformers' own"
        raise unsupported(type(model).__name__, f"{reason} ({most:.1g} apart)")


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Within, no window of the model is wider than NARROW."""
    wide = [(one, vars(one).get("sliding_window")) for one in (model.config, *model.modules())]
    wide = [(one, window) for one, window in wide if (window or 0) > NARROW]
    try:
        for one, _ in wide:
            one.sliding_window = NARROW
        yield
    finally:
        for one, window in wide:
            one.sliding_window = window
