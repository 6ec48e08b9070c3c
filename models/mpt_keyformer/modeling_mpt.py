"""MPT with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, MptConfig
from transformers.models.mpt.modeling_mpt import (
    MptAttention,
    MptForCausalLM,
    MptModel,
    build_mpt_alibi_tensor,
)

from keyformer.cache import KeyformerCache
from keyformer.call import CALL
from keyformer.checkpoint import check_fields
from keyformer.compat import KeyformerGenerationMixin, Patches, patch
from keyformer.modeling import KeyformerModelMixin, attend


class MptKeyformerAttention(MptAttention):
    """Multi-head attention with ALiBi taken from each slot's own position."""

    def forward(
        self,
        hidden_states: Tensor,
        position_bias: Tensor,
        past_key_values: Cache | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict; what transformers does where the cache is another or none.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).
        position_bias
            With a KeyformerCache (heads,) float32, the ALiBi slope of each head.

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights, see
            :func:`keyformer.modeling.attend`.
        """
        if not isinstance(past_key_values, KeyformerCache):
            return super().forward(
                hidden_states, position_bias, past_key_values, attention_mask, **kwargs
            )
        batch, tokens, _ = hidden_states.shape
        joined = self.Wqkv(hidden_states)
        if self.clip_qkv:
            joined = joined.clamp(min=-self.clip_qkv, max=self.clip_qkv)
        joined = joined.view(batch, tokens, 3, self.n_heads, self.head_dim)
        query, key, value = joined.permute(2, 0, 3, 1, 4)
        output, weights = attend(
            self.layer_idx,
            query,
            key,
            value,
            scale=self.softmax_scale,
            alibi_slopes=position_bias,
            dropout=self.attn_dropout_p if self.training else 0.0,
        )
        return self.out_proj(output), weights


class MptKeyformerModel(KeyformerModelMixin, MptModel):
    """The layers of MPT over a KeyformerCache."""

    alibi = "columns"

    def build_mpt_alibi_tensor(
        self, num_heads: int, sequence_length: int, alibi_bias_max: int = 8, device: Any = None
    ) -> Tensor:
        """The slopes alone, (heads,) float32: the bias of a token one place back, negated.

        Without a KeyformerCache what transformers builds. ``alibi_bias_max`` is the checkpoint's;
        transformers itself always takes 8, which is wrong for mpt-7b-storywriter (16).
        """
        if CALL.get() is None:
            bias_max = self.config.attn_config.alibi_bias_max
            return super().build_mpt_alibi_tensor(num_heads, sequence_length, bias_max, device)
        return alibi_slopes(num_heads, self.config.attn_config.alibi_bias_max, device)


@functools.cache
def alibi_slopes(heads: int, bias_max: int, device: Any) -> Tensor:
    """Kept, as every step asks for them: (heads,) float32."""
    with torch.inference_mode(False):
        return -build_mpt_alibi_tensor(heads, 2, bias_max, device=device)[:, 0, 0]


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


SERVED = {
    "attn_config.attn_type": ("multihead_attention",),
    "attn_config.alibi": (True,),
    "attn_config.rope": (False,),
    "attn_config.prefix_lm": (False,),
    "attn_config.attn_uses_sequence_id": (False,),
    "attn_config.qk_ln": (False,),
    "attn_config.qk_gn": (False,),
    "attn_config.sliding_window_size": (-1, None),
    "attn_config.attn_logit_softcapping": (None,),
    "block_overrides": (None,),
    "expansion_ratio": (4,),
    "ffn_config.ffn_type": ("mptmlp",),
    "ffn_config.ffn_act_fn": ({"name": "gelu", "approximate": "none"}, {"name": "gelu"}, None),
    "no_bias": (True,),
    "norm_type": ("low_precision_layernorm", "layernorm"),
    "norm_eps": (1e-5,),
    "logit_scale": (None, 1),
    "final_logit_softcapping": (None,),
}
"""What MPT's own code does otherwise under other values, and transformers' does not.

Where there is ALiBi, both ignore ``learned_pos_emb``.
"""


def make_config(settings: dict[str, Any]) -> MptConfig:
    """transformers' configuration from the fields of an original config.json.

    transformers accepts ``clip_qkv`` only as a float; mpt-7b-storywriter has a whole number.

    Raises
    ------
    InputError
        If the model is one that transformers would compute otherwise than it was trained.
    """
    check_fields(settings, SERVED)
    attention = settings.get("attn_config")
    if isinstance(attention, dict) and type(attention.get("clip_qkv")) is int:
        attention = {**attention, "clip_qkv": float(attention["clip_qkv"])}
    return MptConfig.from_dict({**settings, "attn_config": attention})
