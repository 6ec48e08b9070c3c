"""Shapes of models whose weights are random: what they weigh and cost is what counts."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

SHAPES: dict[str, dict[str, Any]] = {
    "mpt-7b": {
        "model_type": "mpt",
        "d_model": 4096,
        "n_heads": 32,
        "n_layers": 32,
        "vocab_size": 50432,
        "max_seq_len": 32768,
    },
    "gpt-j-6b": {"model_type": "gptj", "n_positions": 16384},
    "cerebras-gpt-6.7b": {
        "model_type": "gpt2",
        "n_embd": 4096,
        "n_head": 32,
        "n_layer": 32,
        "n_positions": 16384,
        "activation_function": "gelu",
    },
    "llama-3-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "model_type": "mpt",
        "d_model": 64,
        "n_heads": 2,
        "n_layers": 2,
        "vocab_size": 64,
        "max_seq_len": 65536,
    },
    "tiny-llama": {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 65536,
    },
}
"""Of the paper's models, with tables of positions that the longest measurement fits in; of one
whose query heads share keys and values; and of one that is small enough for a CPU."""

TINY = ("tiny", "tiny-llama")
"""Those that only show that a script works."""


def model_config(shape: str) -> Any:
    """transformers' configuration of one of ``SHAPES``."""
    settings = dict(SHAPES[shape])
    return AutoConfig.for_model(settings.pop("model_type"), **settings)
