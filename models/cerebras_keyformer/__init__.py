"""Cerebras-GPT (cerebras/Cerebras-GPT-6.7B, the GPT-2 architecture) with an evicting cache."""

from cerebras_keyformer.modeling_cerebras import (
    MODEL,
    PATCHES,
    CerebrasKeyformerForCausalLM,
    make_config,
)

__all__ = ["MODEL", "PATCHES", "CerebrasKeyformerForCausalLM", "make_config"]
