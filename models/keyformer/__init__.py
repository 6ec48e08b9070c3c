"""Keyformer: a key/value cache that keeps the key tokens and the recent ones."""

import keyformer.quiet  # noqa: F401 - before transformers

# isort: split
from keyformer.cache import KeyformerCache
from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import disable_keyformer, enable_keyformer, load_model

__all__ = [
    "InputError",
    "KeyformerCache",
    "KeyformerConfig",
    "disable_keyformer",
    "enable_keyformer",
    "load_model",
]
