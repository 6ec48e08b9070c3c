"""MPT with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import MptConfig
from transformers.models.mpt.modeling_mpt import (
    MptAttention,
    MptForCausalLM,
    MptModel,
    build_mpt_alibi_tensor,
)

from keyformer.cache import KeyformerCache
from keyformer.modeling import (
    KeyformerGenerationMixin,
    KeyformerModelMixin,
    Patches,
    attend,
    patch,
)


class MptKeyformerAttention(MptAttention):
    """Multi-head attention with ALiBi taken from each slot's own position."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        attention_mask: Tensor,
        past_key_values: KeyformerCache | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).
        position_bias
            (heads,) float32, the ALiBi slope of each head.
        attention_mask
            (batch, 1, 1, tokens) bool, False for padding.

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights (batch, heads, tokens,
            slots + tokens) float32 if they were asked for.
        """
        batch, tokens, _ = hidden_states.shape
        joined = self.Wqkv(hidden_states)
        if self.clip_qkv:
            joined = joined.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        joined = joined.view(batch, tokens, 3, self.n_heads, self.head_dim)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        output, weights = attend(
            past_key_values,
            self.layer_idx,
            query,
            key,
            value,
            attention_mask,
            scale=self.softmax_scale,
            alibi_slopes=position_bias,
        )
        return self.out_proj(output), weights


class MptKeyformerModel(KeyformerModelMixin, MptModel):
    """The layers of MPT over a KeyformerCache."""

    alibi_slopes: Tensor | None = None

    def build_mpt_alibi_tensor(
        self, num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None
    ) -> Tensor:
        """The slopes alone, (heads,) float32: the bias of a token one place back, negated.

        ``alibi_bias_max`` is the checkpoint's; transformers itself always takes 8, which
        is wrong for mpt-7b-storywriter (16).
        """
        if self.alibi_slopes is None or self.alibi_slopes.device != device:
            bias_max = self.config.attn_config.alibi_bias_max
            bias = build_mpt_alibi_tensor(num_heads, 2, bias_max, device=device)
            self.alibi_slopes = -bias[:, 0, 0]  # kept: every step asks for them
        return self.alibi_slopes


class MptKeyformerForCausalLM(KeyformerGenerationMixin, MptForCausalLM):
    """MPT for text generation whose cache evicts."""

    def __init__(self, config: MptConfig) -> None:
        super().__init__(config)
        patch(self, PATCHES)


PATCHES: Patches = {
    MptAttention: MptKeyformerAttention,
    MptModel: MptKeyformerModel,
    MptForCausalLM: MptKeyformerForCausalLM,
}
"""What takes the place of transformers' classes."""

MODEL = MptKeyformerForCausalLM
"""What ``load_model`` loads a checkpoint into."""


def make_config(settings: dict[str, Any]) -> MptConfig:
    """transformers' configuration from the fields of an original config.json.

    transformers accepts ``clip_qkv`` only as a float; mpt-7b-storywriter has a whole number.
    """
    attention = dict(settings.get("attn_config") or {})
    if attention.get("clip_qkv") is not None:
        attention["clip_qkv"] = float(attention["clip_qkv"])
    return MptConfig.from_dict({**settings, "attn_config": attention})
