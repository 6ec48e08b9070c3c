"""lm-eval's own command, its arguments and output, with ``--model keyformer`` among its models."""

import sys

from keyformer_lm_eval import register


def main() -> None:
    """Register the model, then leave the command line to lm-eval."""
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit('keyformer-lm-eval: error: lm-eval is missing: pip install "keyformer[lm_eval]"')
    register()
    cli_evaluate()


if __name__ == "__main__":
    main()
