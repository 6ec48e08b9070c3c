"""Small models with random weights of the families that any-model support names."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LAYERS, HEADS, KV_HEADS = 2, 4, 2
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "vocab_size": 61,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": KV_HEADS}
GEMMA = {**GROUPED, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 10}
HYBRID = {"layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"n_embd": 32, "n_head": HEADS, "n_layer": LAYERS, "n_positions": 256}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "llama yarn": {
        **GROUPED,
        "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4},
    },
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 8},
    "mistral": {**GROUPED, "sliding_window": None},
    "mistral window": {**GROUPED, "sliding_window": 16},
    "phi3": {**GROUPED, "sliding_window": None},
    "gemma2": {**GEMMA, **HYBRID},
    "gemma3_text": {**GEMMA, **HYBRID},
    "gpt_neox": {**COMMON, "rotary_pct": 0.25},
    "opt": {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt2": {**COMMON, **GPT2},
    "falcon": {**COMMON, "new_decoder_architecture": True, "num_kv_heads": KV_HEADS},
    "falcon multi-query": {**COMMON, "multi_query": True, "new_decoder_architecture": False},
    "falcon alibi": {**COMMON, "multi_query": False, "alibi": True, "bias": True},
    "bloom": {**COMMON, "n_head": HEADS, "n_layer": LAYERS},
}
"""By name, whose first word is the model_type, what makes it small."""


def small_model(name: str, **changes: Any) -> PreTrainedModel:
    """transformers' own model, its logits well apart."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split()[0], **{**FAMILIES[name], **changes})
    # Not all have sdpa, and with it no soft-capping; Falcon's eager attention adds ALiBi twice.
    attention = "sdpa" if name == "falcon alibi" else "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Norms around 1 or, in Gemma, 0; the rest large enough for texts to vary.
            parameter += torch.randn_like(parameter) * (0.1 if parameter.ndim == 1 else 0.3)
    return model
