"""Keyformer: a key/value cache that keeps the key tokens and the recent ones."""

from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import enable_keyformer, load_model

__all__ = ["InputError", "KeyformerCache", "KeyformerConfig", "enable_keyformer", "load_model"]
