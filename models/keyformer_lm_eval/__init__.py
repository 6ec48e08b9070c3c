"""lm-eval's ``--model keyformer``. Importing this package alone is cheap: no torch, no lm-eval."""

import sys


def register() -> None:
    """Put the model's name into lm-eval's registry, where lm-eval is what is running.

    torch calls this when it is imported, as a plugin; lm-eval's command imports torch before it
    looks the name up. The model itself is imported only if it is asked for.
    """
    if "lm_eval" in sys.modules:
        import lm_eval.models  # noqa: F401  (adds its own models, later only if there are none)
        from lm_eval.api.registry import model_registry

        model_registry.register("keyformer", target="keyformer_lm_eval.model:KeyformerLM")
