"""GPT-J (EleutherAI/gpt-j-6B and its relatives) with an evicting cache."""

from gptj_keyformer.modeling_gptj import MODEL, PATCHES, GPTJKeyformerForCausalLM, make_config

__all__ = ["MODEL", "PATCHES", "GPTJKeyformerForCausalLM", "make_config"]
