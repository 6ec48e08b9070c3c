"""Falcon with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, FalconConfig
from transformers.models.falcon.modeling_falcon import (
    FalconAttention,
    FalconFlashAttention2,
    FalconForCausalLM,
    FalconLinear,
    FalconModel,
    apply_rotary_pos_emb,
    build_alibi_tensor,
)

from keyformer.cache import KeyformerCache
from keyformer.call import CALL
from keyformer.checkpoint import check_fields
from keyformer.compat import KeyformerGenerationMixin, Patches, patch
from keyformer.interface import InterfaceModelMixin, unrotated
from keyformer.modeling import KeyformerModelMixin, attend, dropout_rate


class FalconKeyformerAttention(FalconAttention):
    """Grouped, multi-query or multi-head attention with RoPE, or ALiBi by each slot's position.

    Slots hold the key/value heads as they are; transformers stores the copies for all query
    heads. ALiBi is exact here, where transformers rounds it to bfloat16.
    """

    def forward(
        self,
        hidden_states: Tensor,
        alibi: Tensor | None,
        attention_mask: Tensor,
        position_ids: Tensor | None = None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict; what transformers does where the cache is another or none.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).
        layer_past
            The model's cache.
        position_embeddings
            Cosines and sines, each (batch, tokens, head_dim).

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights, see
            :func:`keyformer.modeling.attend`.
        """
        if not isinstance(layer_past, KeyformerCache):
            return super().forward(
                hidden_states,
                alibi,
                attention_mask,
                position_ids,
                layer_past,
                use_cache,
                output_attentions,
                position_embeddings,
                **kwargs,
            )
        query, key, value = self.split(self.query_key_value(hidden_states))
        slopes, rotary, dropout = None, None, 0.0  # transformers drops weights with ALiBi alone
        if self.config.alibi:
            dropout = dropout_rate(self.attention_dropout)
            token = torch.ones(1, 2, device=query.device)  # the bias at position 1 is the slope
            slopes = build_alibi_tensor(token, self.num_heads, torch.float32)[:, 0, 1]
            slopes = slopes * self.inv_norm_factor
        else:
            assert position_embeddings is not None
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
            query, key, rotary = unrotated(self, query, key)
        output, weights = attend(
            self.layer_idx,
            query,
            key,
            value,
            scale=self.inv_norm_factor,
            alibi_slopes=slopes,
            rotary=rotary,
            dropout=dropout,
        )
        return self.dense(output), weights

    def split(self, joined: Tensor) -> Iterator[Tensor]:
        """Query, key and value (batch, heads or kv_heads, tokens, head_dim) of all layouts.

        ``joined`` is (batch, tokens, ...) with the query heads of each key/value head before it.
        """
        total = joined.shape[-1] // self.head_dim
        kv_heads = (total - self.num_heads) // 2
        by_group = joined.view(*joined.shape[:2], kv_heads, total // kv_heads, self.head_dim)
        parts = by_group.split([total // kv_heads - 2, 1, 1], dim=3)
        return (part.flatten(2, 3).transpose(1, 2) for part in parts)


class FalconKeyformerFlashAttention(FalconKeyformerAttention, FalconFlashAttention2):
    """The same where the model was loaded with flash attention."""


class FalconKeyformerModel(InterfaceModelMixin, KeyformerModelMixin, FalconModel):
    """The layers of Falcon over a KeyformerCache."""

    @property
    def alibi(self) -> str | None:  # type: ignore[override]
        """What ALiBi counts, in the models that have it."""
        return "tokens" if self.config.alibi else None

    @property
    def use_alibi(self) -> bool:
        """Whether the model adds ALiBi to the mask; with a KeyformerCache its layers do it."""
        return self.config.alibi and CALL.get() is None


class FalconKeyformerForCausalLM(KeyformerGenerationMixin, FalconForCausalLM):
    """Falcon for text generation whose cache evicts."""

    def __init__(self, config: FalconConfig) -> None:
        super().__init__(config)
        # Falcon's own linear layer computes the same; what quantizes weights passes over it.
        patch(self, {**PATCHES, FalconLinear: nn.Linear})


PATCHES: Patches = {
    FalconAttention: FalconKeyformerAttention,
    FalconFlashAttention2: FalconKeyformerFlashAttention,
    FalconModel: FalconKeyformerModel,
    FalconForCausalLM: FalconKeyformerForCausalLM,
}
"""What takes the place of transformers' classes."""

MODEL = FalconKeyformerForCausalLM
"""What ``load_model`` loads a checkpoint into."""

SERVED = {"apply_residual_connection_post_layernorm": (False,)}
NEW_DECODER = {"parallel_attn": (True,), "num_ln_in_parallel_attn": (None, 1, 2)}
OLD_PARALLEL = {"num_ln_in_parallel_attn": (None, 1)}
"""The values that transformers computes with; under others it ignores a field or lacks a norm."""


def make_config(settings: dict[str, Any]) -> FalconConfig:
    """transformers' configuration from the fields of an original config.json.

    Raises
    ------
    InputError
        If the model is one that transformers would compute otherwise than it was trained.
    """
    check_fields(settings, SERVED)
    if settings.get("new_decoder_architecture"):
        check_fields(settings, NEW_DECODER)
    elif settings.get("parallel_attn", True):
        check_fields(settings, OLD_PARALLEL)
    return FalconConfig.from_dict(settings)
