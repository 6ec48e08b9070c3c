"""Bloom with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import BloomConfig, Cache
from transformers.models.bloom.modeling_bloom import (
    BloomAttention,
    BloomForCausalLM,
    BloomModel,
    build_alibi_tensor,
    dropout_add,
)

from keyformer.cache import KeyformerCache
from keyformer.call import CALL
from keyformer.checkpoint import check_fields
from keyformer.compat import KeyformerGenerationMixin, Patches, patch
from keyformer.modeling import KeyformerModelMixin, attend, dropout_rate


class BloomKeyformerAttention(BloomAttention):
    """Multi-head attention with ALiBi taken from each slot's own position."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor,
        alibi: Tensor,
        attention_mask: Tensor,
        layer_past: Cache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict; what transformers does where the cache is another or none.

        Parameters
        ----------
        hidden_states, residual
            (batch, tokens, hidden_size).
        alibi
            With a KeyformerCache (heads,) float32, the ALiBi slope of each head.
        layer_past
            The model's cache.

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size) on top of ``residual``, and the weights, see
            :func:`keyformer.modeling.attend`.
        """
        if not isinstance(layer_past, KeyformerCache):
            return super().forward(
                hidden_states, residual, alibi, attention_mask, layer_past, **kwargs
            )
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        output, weights = attend(
            self.layer_idx,
            query,
            key,
            value,
            scale=self.inv_norm_factor,
            alibi_slopes=alibi,
            dropout=dropout_rate(self.attention_dropout),
        )
        output = dropout_add(self.dense(output), residual, self.hidden_dropout, self.training)
        return output, weights


class BloomKeyformerModel(KeyformerModelMixin, BloomModel):
    """The layers of Bloom over a KeyformerCache."""

    alibi = "tokens"

    def build_alibi_tensor(
        self, attention_mask: Tensor, num_heads: int, dtype: torch.dtype
    ) -> Tensor:
        """With a KeyformerCache the slopes alone, (heads,) float32: the bias at position 1."""
        if CALL.get() is None:
            return build_alibi_tensor(attention_mask, num_heads, dtype)
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


def make_config(settings: dict[str, Any]) -> BloomConfig:
    """transformers' configuration from the fields of an original config.json.

    Raises
    ------
    InputError
        If it asks for transformers' sums over ``pretraining_tp`` parts, which lack the biases.
    """
    if settings.get("pretraining_tp", 1) != 1:
        check_fields(settings, {"slow_but_exact": (False,)})
    return BloomConfig.from_dict(settings)
