"""Any model whose attention goes through transformers' attention interface.

Its attention layers stay as they are: they hand rotated queries, keys and values to the
function registered here, which calls the cache. Its model and generation classes get the
mixins of :mod:`keyformer.modeling`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, GenerationMixin, PreTrainedConfig, PreTrainedModel

from keyformer.attention import Rotary
from keyformer.cache import KeyformerCache
from keyformer.config import InputError
from keyformer.modeling import KeyformerGenerationMixin, KeyformerModelMixin, Patches, attend

NAME = "keyformer"
"""Of this attention in transformers' interface."""

NOT_THROUGH_INTERFACE = (
    "not all of its layers have an attention that goes through transformers' attention interface"
)
SERVED_LAYERS = ("full_attention", "sliding_attention")
MOVABLE = (
    *("llama", "qwen2", "qwen3", "mistral", "phi3"),
    *("gemma2", "gemma3_text", "gpt_neox", "falcon"),
)
"""Models whose layers all rotate every token, so that a token can be given a new place."""

UNSTEADY = ("dynamic", "longrope")
"""Kinds of RoPE whose frequencies change with the length of the text."""


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    alibi_slopes: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call, see :func:`keyformer.modeling.attend`.

    Parameters
    ----------
    query, key, value
        (batch, heads or kv_heads, tokens, head_dim) of the new tokens, rotated where the
        model rotates.
    attention_mask
        (batch, 1, 1, tokens) bool, what :class:`KeyformerModelMixin` passes.
    alibi_slopes
        Instead of a rotation, see :func:`keyformer.attention.attention`.

    Returns
    -------
    tuple
        Output (batch, tokens, heads, head_dim), and the weights if they were asked for.

    Raises
    ------
    InputError
        If the layer asks for something that the cache does not do.
    """
    if dropout:
        raise InputError(
            f"attention dropout {dropout} is not supported: call model.eval(), set it to 0, or"
            " train before enable_keyformer"
        )
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise _unsupported(type(module).__name__, f"it adds {name} to its logits")
    cache, rotation = _CALL.get()
    rotary = None
    if rotation is not None and alibi_slopes is None:
        rotary = rotation.of_layer(module)
        query, key = rotation.undo(rotary, query), rotation.undo(rotary, key)
    output, weights = attend(
        cache,
        module.layer_idx,  # type: ignore[arg-type]
        query,
        key,
        value,
        attention_mask,
        scale=scaling,
        alibi_slopes=alibi_slopes,
        softcap=softcap,
        window=sliding_window,
        rotary=rotary,
    )
    return output.unflatten(-1, (query.shape[1], -1)), weights


class ModelRotary:
    """A model's own rotary embedding, at places other than those its layers were told.

    Parameters
    ----------
    embedding
        The module that gives cosines and sines for positions.
    places
        (batch, tokens) int64, the positions that the layers rotate new tokens to.

    Raises
    ------
    InputError
        If its frequencies depend on the length of the text, so that a rotation cannot be
        undone.
    """

    def __init__(self, embedding: nn.Module, places: Tensor) -> None:
        kinds = embedding.rope_type
        for kind in kinds.values() if isinstance(kinds, dict) else [kinds]:
            if kind in UNSTEADY:
                raise InputError(
                    f"positions='new' cannot be had with rope_type {kind!r}, whose frequencies"
                    " change with the length of the text; use positions='original'"
                )
        self.embedding, self.places = embedding, places
        self.apply = sys.modules[type(embedding).__module__].apply_rotary_pos_emb
        self.by_layer_type = "layer_type" in inspect.signature(embedding.forward).parameters

    def of_layer(self, attention: nn.Module) -> Rotary:
        """The rotation of one attention layer."""
        kind = attention.layer_type if self.by_layer_type else None
        return functools.partial(self._rotate, kind)

    def undo(self, rotary: Rotary, x: Tensor) -> Tensor:
        """New queries or keys as they were before their layer rotated them."""
        return rotary(x, -self.places[:, None].to(x.device))

    def _rotate(self, layer_type: Any, x: Tensor, places: Tensor) -> Tensor:
        """Rotate (batch, heads, tokens, head_dim) by places (batch, heads or 1, tokens)."""
        shape = x.shape
        if places.shape[1] > 1:  # by head, so heads become sequences
            x, places = x.flatten(0, 1)[:, None], places.flatten(0, 1)[:, None]
        kind = {"layer_type": layer_type} if self.by_layer_type else {}
        cos, sin = self.embedding(x, places[:, 0], **kind)
        # YaRN's factor is in the tokens already: what is wanted is a rotation alone.
        prefix = f"{layer_type}_" if self.by_layer_type else ""
        factor = getattr(self.embedding, f"{prefix}attention_scaling")
        turning, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        # Where layers are spread over devices, the embedding is on one of them.
        cos, sin = ((part / factor).to(x.device) for part in (cos, sin))
        turned, _ = self.apply(turning, turning, cos, sin)
        return torch.cat([turned, rest], dim=-1).view(shape)


_CALL: ContextVar[tuple[KeyformerCache | None, ModelRotary | None]] = ContextVar(
    "call", default=(None, None)
)
"""The cache of the forward call that is running in this thread, and the rotation of its new
tokens if their places change: not every model passes its layers' keyword arguments on."""


class InterfaceModelMixin:
    """Placed after KeyformerModelMixin: tells :func:`attention_forward` the cache of a call."""

    config: Any
    rotary_emb: nn.Module

    def forward(self, **inputs: Any) -> Any:
        """The model's forward, its layers' calls to the cache's ``update`` let through.

        ``position_ids`` are (batch, tokens) int64, the places of the new tokens.

        Raises
        ------
        InputError
            If tokens should get new places and the model cannot give them any.
        """
        cache = inputs["past_key_values"]
        if cache is None:
            return super().forward(**inputs)  # type: ignore[misc]
        rotation = None
        has_table = self.position_table is not None  # type: ignore[attr-defined]
        if cache.config.positions == "new" and not has_table:
            if self.config.model_type not in MOVABLE:
                raise InputError(
                    f"positions='new' is not supported for model_type {self.config.model_type!r};"
                    f" it is for {', '.join(MOVABLE)} and models with a table of positions"
                )
            rotation = ModelRotary(self.rotary_emb, inputs["position_ids"])
        call = _CALL.set((cache, rotation))
        cache.hands_over = True
        try:
            return super().forward(**inputs)  # type: ignore[misc]
        finally:
            cache.hands_over = False
            _CALL.reset(call)


def check_supported(config: PreTrainedConfig) -> None:
    """Refuse a configuration whose models cannot evict.

    Raises
    ------
    InputError
        Saying why.
    """
    kinds = set(getattr(config, "layer_types", None) or ()) - set(SERVED_LAYERS)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder, whose decoder attends to two sets of keys"
    elif config.get_text_config(decoder=True) is not config:
        reason = "it reads more than text"
    elif not getattr(config, "num_attention_heads", None):
        reason = "it has no attention heads: a state-space model has no keys to evict"
    elif getattr(config, "kv_lora_rank", None):
        reason = "its attention is latent: all heads share one compressed vector a token"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "some of its layers attend to the keys of others"
    elif getattr(config, "use_bidirectional_attention", False):
        reason = "its tokens attend to later ones"
    elif kinds:
        reason = (
            "it has layers that are neither full nor sliding-window attention, such as state-space"
            f" ones: {', '.join(sorted(kinds))}"
        )
    else:
        return
    raise _unsupported(config.model_type, reason)


def _unsupported(what: str, reason: str) -> InputError:
    return InputError(f"{what} is not supported: {reason}")


def make_patches(model: PreTrainedModel) -> Patches:
    """What takes the place of a model's classes once its attention goes through here.

    Raises
    ------
    InputError
        If the model cannot be served; the message says why.
    """
    name, config = type(model).__name__, model.config
    check_supported(config)
    decoder = type(model.get_decoder())
    if not isinstance(model, GenerationMixin) or decoder is type(model):
        raise InputError(f"a {name} does not generate text")
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "scaling")]
    if {m.layer_idx for m in attentions} != set(range(config.num_hidden_layers)):
        raise _unsupported(name, NOT_THROUGH_INTERFACE)
    return {
        of: _mixed(of, *mixins)  # type: ignore[arg-type]
        for of, mixins in (
            (decoder, (KeyformerModelMixin, InterfaceModelMixin)),
            (type(model), (KeyformerGenerationMixin,)),
        )
    }


@functools.cache
def _mixed(stock: type[nn.Module], *mixins: type) -> type[nn.Module]:
    """A subclass with the mixins before it, under the same name: it is saved as that one."""
    return type(stock.__name__, (*mixins, stock), {"__module__": __name__})


def switch_attention(model: PreTrainedModel) -> None:
    """Let the model's attention layers call :func:`attention_forward`.

    Raises
    ------
    InputError
        If its attention does not go through transformers' interface.
    """
    AttentionInterface.register(NAME, attention_forward)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise _unsupported(type(model).__name__, NOT_THROUGH_INTERFACE)
