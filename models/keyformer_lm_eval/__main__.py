"""lm-eval's own command, its arguments and output, with ``--model keyformer`` among its models."""

import sys

from keyformer_lm_eval import register


def main() -> None:
    """Register the model, then leave the command line to lm-eval.

    Input that cannot be used is one line and exit code 2, as in every script.
    """
    try:
        from lm_eval.__main__ import cli_evaluate
    except ModuleNotFoundError as error:
        if error.name != "lm_eval":
            raise
        sys.exit('keyformer-lm-eval: error: lm-eval is missing: pip install "keyformer[lm_eval]"')
    from keyformer_evaluation.tasks.flags import run_main

    register()
    run_main(lambda _: cli_evaluate())


if __name__ == "__main__":
    main()
