"""Cerebras-GPT with an evicting cache: transformers' GPT-2, its attention layer replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention, GPT2LMHeadModel, GPT2Model

from keyformer.cache import KeyformerCache
from keyformer.compat import KeyformerGenerationMixin, Patches, patch
from keyformer.modeling import FUSED_GELU, KeyformerModelMixin, attend


class CerebrasKeyformerAttention(GPT2Attention):
    """Multi-head attention; positions were added to the embeddings already."""

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict; what transformers does where the cache is another or none.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights, see
            :func:`keyformer.modeling.attend`.
        """
        if not isinstance(past_key_values, KeyformerCache):
            return super().forward(hidden_states, past_key_values, attention_mask, *args, **kwargs)
        batch, tokens, _ = hidden_states.shape
        joined = self.c_attn(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        dropout = self.attn_dropout.p if self.training else 0.0
        output, weights = attend(
            self.layer_idx, query, key, value, scale=self.scaling, dropout=dropout
        )
        return self.resid_dropout(self.c_proj(output)), weights


class CerebrasKeyformerModel(KeyformerModelMixin, GPT2Model):
    """The layers of GPT-2 over a KeyformerCache."""


class CerebrasKeyformerForCausalLM(KeyformerGenerationMixin, GPT2LMHeadModel):
    """Cerebras-GPT for text generation whose cache evicts."""

    # Old checkpoints hold each layer's causal mask.
    _keys_to_ignore_on_load_unexpected = (r"\.attn\.(masked_)?bias$",)

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        patch(self, PATCHES)


PATCHES: Patches = FUSED_GELU | {
    GPT2Attention: CerebrasKeyformerAttention,
    GPT2Model: CerebrasKeyformerModel,
    GPT2LMHeadModel: CerebrasKeyformerForCausalLM,
}
"""What takes the place of transformers' classes."""

MODEL = CerebrasKeyformerForCausalLM
"""What ``load_model`` loads a checkpoint into."""

make_config = GPT2Config.from_dict
"""transformers' configuration from the fields of an original config.json."""
