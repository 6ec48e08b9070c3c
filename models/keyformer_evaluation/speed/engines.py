"""Engines side by side: the same random weights in transformers' own model and an evicting one."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation import CompileConfig

from keyformer.cache import KeyformerCache
from keyformer.config import KeyformerConfig
from keyformer.integration import enable_keyformer
from keyformer_evaluation.speed.shapes import model_config

ENGINES = ("stock", "static", "full", "window", "h2o", "keyformer")
"""transformers' own model, the same with a static cache and its decode step compiled, and methods
of this one: full keeps all, window scores nothing."""

Method = KeyformerConfig | Literal["static"] | None
"""What an engine does: a method of this repository; "static"; or None, stock transformers."""


class Engines:
    """One model under every engine, and what is fed to it.

    Parameters
    ----------
    shape
        Key of ``SHAPES``.

    Attributes
    ----------
    stock, evicting
        The two models, which share their weights.
    layers, heads, kv_heads, head_dim
        The model's sizes.
    """

    def __init__(self, shape: str, dtype: torch.dtype, device: torch.device) -> None:
        self.shape, self.device = shape, device
        config = model_config(shape)
        config.update({"use_cache": True, "eos_token_id": None, "pad_token_id": 0})
        torch.manual_seed(0)
        with torch.device(device):
            self.stock = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        shared = {id(t): t for t in (*self.stock.parameters(), *self.stock.buffers())}
        self.evicting = enable_keyformer(copy.deepcopy(self.stock, shared))
        self.layers, self.heads = config.num_hidden_layers, config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_dim = config.hidden_size // self.heads

    def model(self, config: Method) -> PreTrainedModel:
        """The model that runs a method."""
        if not isinstance(config, KeyformerConfig):
            return self.stock
        return enable_keyformer(self.evicting, config)

    def compiled(self) -> Callable[..., Any]:
        """stock's forward as transformers compiles it for the steps of ``generate``."""
        return self.stock.get_compiled_call(CompileConfig())

    def cache(self, config: Method, new_tokens: int = 1, prompt: int = 0) -> Any:
        """An empty cache for a prompt and ``new_tokens`` after it; a static one for ``prompt``."""
        if config is None:
            return DynamicCache(config=self.stock.config)
        if config == "static":
            return StaticCache(config=self.stock.config, max_cache_len=prompt + new_tokens)
        cache = KeyformerCache(self.evicting.config, config)
        cache.max_new_tokens = new_tokens
        return cache

    def filled(self, config: Method, batch: int, length: int, new_tokens: int = 1) -> Any:
        """transformers' cache with random keys and values, as after prompts of any length."""
        cache = self.cache(config, new_tokens, length)
        shape = (batch, self.kv_heads, length, self.head_dim)
        for layer in range(self.layers):
            pair = torch.randn(2, *shape, dtype=self.stock.dtype, device=self.device)
            cache.update(*pair, layer)
        return cache

    def tokens(self, batch: int, length: int) -> Tensor:
        """Random ones, (batch, length)."""
        vocabulary = self.stock.config.vocab_size
        return torch.randint(1, vocabulary, (batch, length), device=self.device)
