"""What plugin.yaml has lm-eval import."""

from keyformer_lm_eval import MODEL, register

__all__ = ["MODEL"]

register()
