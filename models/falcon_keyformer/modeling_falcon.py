"""Falcon with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FalconConfig
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
from keyformer.interface import InterfaceModelMixin, attention_forward
from keyformer.modeling import (
    KeyformerGenerationMixin,
    KeyformerModelMixin,
    Patches,
    patch,
)


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
        layer_past: KeyformerCache | None = None,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).
        attention_mask
            (batch, 1, 1, tokens) bool, False for padding.
        layer_past
            The model's cache.
        position_embeddings
            Cosines and sines, each (batch, tokens, head_dim).

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights (batch, heads, tokens,
            slots + tokens) float32 if they were asked for.
        """
        query, key, value = self.split(self.query_key_value(hidden_states))
        slopes = None
        if self.config.alibi:
            token = torch.ones(1, 2, device=query.device)  # the bias at position 1 is the slope
            slopes = build_alibi_tensor(token, self.num_heads, torch.float32)[:, 0, 1]
            slopes = slopes * self.inv_norm_factor
        else:
            query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        output, weights = attention_forward(
            self,
            query,
            key,
            value,
            attention_mask,
            scaling=self.inv_norm_factor,
            alibi_slopes=slopes,
        )
        return self.dense(output.flatten(2)), weights

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


class FalconKeyformerModel(KeyformerModelMixin, InterfaceModelMixin, FalconModel):
    """The layers of Falcon over a KeyformerCache."""

    @property
    def use_alibi(self) -> bool:
        """Whether the model adds ALiBi to the mask; its attention layers do it themselves."""
        return False


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

make_config = FalconConfig.from_dict
"""transformers' configuration from the fields of an original config.json."""
