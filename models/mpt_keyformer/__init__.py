"""MPT (mosaicml/mpt-7b and its relatives) with an evicting cache."""

from mpt_keyformer.modeling_mpt import MODEL, PATCHES, MptKeyformerForCausalLM, make_config

__all__ = ["MODEL", "PATCHES", "MptKeyformerForCausalLM", "make_config"]
