"""GPT-J with an evicting cache: transformers' model, its attention layer replaced."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, GPTJConfig
from transformers.models.gptj.modeling_gptj import (
    GPTJAttention,
    GPTJFlashAttention2,
    GPTJForCausalLM,
    GPTJModel,
)

from keyformer import backends
from keyformer.attention import Rotary
from keyformer.cache import KeyformerCache
from keyformer.checkpoint import check_fields
from keyformer.compat import KeyformerGenerationMixin, Patches, patch
from keyformer.modeling import FUSED_GELU, KeyformerModelMixin, attend, dropout_rate


class GPTJKeyformerAttention(GPTJAttention):
    """Multi-head attention with RoPE by each slot's own place."""

    embed_positions: Tensor

    def forward(
        self,
        hidden_states: Tensor,
        layer_past: Cache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, score and evict; what transformers does where the cache is another or none.

        Parameters
        ----------
        hidden_states
            (batch, tokens, hidden_size).
        layer_past
            The model's cache.
        position_ids
            (batch or 1, tokens) int64, below the size of the table.

        Returns
        -------
        tuple
            Output (batch, tokens, hidden_size), and the weights, see
            :func:`keyformer.modeling.attend`.
        """
        if not isinstance(layer_past, KeyformerCache):
            return super().forward(
                hidden_states, layer_past, attention_mask, position_ids, **kwargs
            )
        heads = (*hidden_states.shape[:2], self.num_attention_heads, self.head_dim)
        query, key, value = (
            project(hidden_states).view(heads).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        rotary: Rotary | None = partial(self.rotate, backend=layer_past.config.backend)
        if layer_past.config.positions == "original":
            assert rotary is not None and position_ids is not None
            places = position_ids[:, None].expand(len(query), 1, -1)
            turned = rotary(torch.cat([query, key], dim=1), places)
            (query, key), rotary = turned.chunk(2, dim=1), None
        output, weights = attend(
            self.layer_idx,
            query,
            key,
            value,
            scale=1 / self.scale_attn,
            rotary=rotary,
            dropout=dropout_rate(self.attn_dropout),
        )
        return self.resid_dropout(self.out_proj(output)), weights

    def rotate(self, x: Tensor, places: Tensor, backend: str) -> Tensor:
        """RoPE on the first ``rotary_dim`` dimensions, pairs of neighbours.

        Parameters
        ----------
        x
            (batch, heads, tokens, head_dim).
        places
            (batch, heads or 1, tokens) int64, below the size of the table; -1 for an empty
            slot, whatever becomes of it.
        backend
            That of KeyformerConfig.
        """
        if self.embed_positions.device != x.device:  # no parameter, so it stayed behind
            self.embed_positions = self.embed_positions.to(x.device)
        if backends.on_kernels(backend, x):
            from keyformer.kernels import rotary

            return rotary.rotate_neighbours(x, self.embed_positions, places)
        sin, cos = self.embed_positions[places.clamp(min=0)].to(x.dtype).chunk(2, dim=-1)
        turning, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        even, odd = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1)
        return torch.cat([turned.flatten(-2), rest], dim=-1)


class GPTJKeyformerFlashAttention(GPTJKeyformerAttention, GPTJFlashAttention2):
    """The same where the model was loaded with flash attention."""


class GPTJKeyformerModel(KeyformerModelMixin, GPTJModel):
    """The layers of GPT-J over a KeyformerCache."""

    layers_look_up = True

    @property
    def position_table(self) -> int:
        """Sines and cosines come from a table of this many positions."""
        return self.config.max_position_embeddings


class GPTJKeyformerForCausalLM(KeyformerGenerationMixin, GPTJForCausalLM):
    """GPT-J for text generation whose cache evicts."""

    # Old checkpoints hold each layer's causal mask.
    _keys_to_ignore_on_load_unexpected = (r"\.attn\.(masked_)?bias$",)

    def __init__(self, config: GPTJConfig) -> None:
        super().__init__(config)
        patch(self, PATCHES)


PATCHES: Patches = FUSED_GELU | {
    GPTJAttention: GPTJKeyformerAttention,
    GPTJFlashAttention2: GPTJKeyformerFlashAttention,
    GPTJModel: GPTJKeyformerModel,
    GPTJForCausalLM: GPTJKeyformerForCausalLM,
}
"""What takes the place of transformers' classes."""

MODEL = GPTJKeyformerForCausalLM
"""What ``load_model`` loads a checkpoint into."""

SERVED = {"rotary": (True,), "scale_attn_weights": (True,)}
"""Fields of the original's config.json that transformers takes for granted."""


def make_config(settings: dict[str, Any]) -> GPTJConfig:
    """transformers' configuration from the fields of an original config.json.

    Raises
    ------
    InputError
        If the model is one that transformers would compute otherwise than it was trained.
    """
    check_fields(settings, SERVED)
    return GPTJConfig.from_dict(settings)
