"""Any model whose attention goes through transformers' attention interface.

Its attention layers stay as they are: they hand rotated queries, keys and values to the
function registered here, which calls the cache. Its model and generation classes get the
mixins of :mod:`keyformer.modeling`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from keyformer import served
from keyformer.attention import Rotary
from keyformer.cache import KeyformerCache
from keyformer.call import CALL
from keyformer.compat import NAME, KeyformerGenerationMixin, Patches, mixed
from keyformer.modeling import KeyformerModelMixin, attend


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What transformers' attention layers call where there is a cache.

    Parameters
    ----------
    query, key, value
        (batch, heads or kv_heads, tokens, head_dim) of the new tokens, rotated where the
        model rotates.
    attention_mask
        That which the model was given; the cache knows what may be seen.

    Returns
    -------
    tuple
        Output (batch, tokens, heads, head_dim), and the weights if they were asked for.

    Raises
    ------
    InputError
        If the layer asks for something that the cache does not do.
    """
    call = CALL.get()
    assert call is not None  # see LayerConfig
    served.check_attention(
        module, call, key, value, attention_mask, dropout, sliding_window, kwargs
    )
    query, key, rotary = unrotated(module, query, key)
    output, weights = attend(
        module.layer_idx,  # type: ignore[arg-type]
        query,
        key,
        value,
        scale=scaling,
        softcap=softcap,
        rotary=rotary,
    )
    return output.unflatten(-1, (query.shape[1], -1)), weights


# Here, as a model that is unpickled calls nothing else of this file.
AttentionInterface.register(NAME, attention_forward)


def unrotated(
    module: nn.Module, query: Tensor, key: Tensor
) -> tuple[Tensor, Tensor, Rotary | None]:
    """New queries and keys of a layer as they are stored, and what rotates them to a place.

    Where places do not change they are stored as the layer has rotated them.
    """
    call = CALL.get()
    if call is None or call.rotation is None:
        return query, key, None
    rotary = call.rotation.of_layer(module)
    return call.rotation.undo(rotary, query), call.rotation.undo(rotary, key), rotary


class ModelRotary:
    """A model's own rotary embedding, at places other than those its layers were told.

    Parameters
    ----------
    embedding
        The module that gives cosines and sines for positions.
    places
        (batch, tokens) int64, the positions that the layers rotate new tokens to.
    """

    def __init__(self, embedding: nn.Module, places: Tensor) -> None:
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


class InterfaceModelMixin:
    """Placed after KeyformerModelMixin where layers rotate before they call their attention."""

    rotary_emb: nn.Module
    layers_rotate = True

    def _rotation(self, cache: KeyformerCache, position_ids: Tensor | None) -> Any:
        """What turns new tokens back whose places change; learned positions stay."""
        has_table = self.position_table is not None  # type: ignore[attr-defined]
        if cache.config.positions == "original" or has_table or position_ids is None:
            return None
        return ModelRotary(self.rotary_emb, position_ids)


def make_patches(model: PreTrainedModel) -> Patches:
    """What takes the place of a model's classes once its attention goes through here."""
    return {
        of: mixed(of, *mixins)  # type: ignore[arg-type]
        for of, mixins in (
            (type(model.get_decoder()), (InterfaceModelMixin, KeyformerModelMixin)),
            (type(model), (KeyformerGenerationMixin,)),
        )
    }
