"""MPT (mosaicml/mpt-7b and its relatives) with an evicting cache."""

from mpt_keyformer.modeling_mpt import PATCHES, MptKeyformerForCausalLM, make_config

__all__ = ["PATCHES", "MptKeyformerForCausalLM", "make_config"]
