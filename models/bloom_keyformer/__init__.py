"""Bloom (bigscience/bloom and its relatives) with an evicting cache."""

from bloom_keyformer.modeling_bloom import MODEL, PATCHES, BloomKeyformerForCausalLM, make_config

__all__ = ["MODEL", "PATCHES", "BloomKeyformerForCausalLM", "make_config"]
