"""Falcon (tiiuae/falcon-7b and its relatives) with an evicting cache."""

from falcon_keyformer.modeling_falcon import (
    MODEL,
    PATCHES,
    FalconKeyformerForCausalLM,
    make_config,
)

__all__ = ["MODEL", "PATCHES", "FalconKeyformerForCausalLM", "make_config"]
