"""lm-eval's ``--model keyformer``. Importing this package alone is cheap: no torch, no lm-eval."""

MODEL = "keyformer_lm_eval.model:KeyformerLM"


def register() -> None:
    """Put the model's name into lm-eval's registry; the model is imported only if asked for."""
    import lm_eval.models  # noqa: F401  (adds its own models, later only if there are none)
    from lm_eval.api.registry import model_registry

    if "keyformer" not in model_registry:
        model_registry.register("keyformer", target=MODEL)
