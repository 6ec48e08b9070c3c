"""Bloom with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BloomConfig
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomForCausalLM,
    BloomModel,
    build_alibi_tensor,
    dropout_add,
)

from keyformer.cache import KeyformerCache
from keyformer.modeling import (
    KeyformerGenerationMixin,
    KeyformerModelMixin,
    Patches,
    attend,
    patch,
)


class BloomKeyformerAttention(BloomAttention):
    """Multi-head attention with ALiBi taken from each slot's own position."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: KeyformerCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict.

        Parameters
        ----------
        hidden_states, residual
            (batch, tokens, hidden_size).
        alibi
            (heads,) float32, the ALiBi slope of each head.
        attention_mask
            (batch, 1, 1, tokens) bool, False for padding.
        layer_past
            The model's cache.

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size) on top of ``residual``, and the weights
            (batch, heads, tokens, slots + tokens) float32 if they were asked for.
        """
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output, weights = attend(
            layer_past,
            self.layer_idx,
            query,
            key,
            value,
            attention_mask,
            scale=self.inv_norm_factor,
            alibi_slopes=alibi,
        )
        output = dropout_add(self.dense(output), residual, self.hidden_dropout, self.training)
        return output, weights


class BloomKeyformerModel(KeyformerModelMixin, BloomModel):
    """The layers of Bloom over a KeyformerCache."""

    def build_alibi_tensor(
        self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype
    ) -> Tensor:
        """The slopes alone, (heads,) float32: the bias of the token at position 1."""
        places = torch.ones(1, 2, device=attention_mask.device)
        return build_alibi_tensor(places, num_heads, torch.float32)[:, 0, 1]


class BloomKeyformerForCausalLM(KeyformerGenerationMixin, BloomForCausalLM):
    """Bloom for text generation whose cache evicts."""

    def __init__(self, config: BloomConfig) -> None:
        super().__init__(config)
        patch(self, PATCHES)


PATCHES: Patches = {
    BloomAttention: BloomKeyformerAttention,
    BloomModel: BloomKeyformerModel,
    BloomForCausalLM: BloomKeyformerForCausalLM,
}
"""What takes the place of transformers' classes."""

MODEL = BloomKeyformerForCausalLM
"""What ``load_model`` loads a checkpoint into."""

make_config = BloomConfig.from_dict
"""transformers' configuration from the fields of an original config.json."""
