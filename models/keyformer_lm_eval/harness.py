"""Running lm-eval from a script: the bundled tasks beside its own, errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from keyformer.config import InputError
from keyformer_lm_eval.model import KeyformerLM

TASKS = Path(__file__).parents[2] / "lm_eval_harness" / "tasks"
"""The bundled ones, of the repository's checkout; an installed wheel has none."""


def find_tasks(names: Sequence[str]) -> TaskManager:
    """The bundled tasks and, where they are asked for, lm-eval's own.

    Raises
    ------
    InputError
        If one of the names is neither a task nor a group of tasks.
    """
    bundled = _known(False)
    if all(bundled.match_tasks([name]) for name in names):
        return bundled
    manager = _known(True)
    for name in names:
        if not manager.match_tasks([name]):
            known = ", ".join(bundled.all_tasks) or f"none, as there is no folder {TASKS}"
            raise InputError(f"lm-eval has no task {name!r}; beside its own there are {known}")
    return manager


@cache
def _known(its_own: bool) -> TaskManager:
    """The bundled tasks, and lm-eval's own, which take seconds to read."""
    # What it warns of is how it is meant to be called, which is seen to here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    bundled = str(TASKS) if TASKS.is_dir() else None
    return TaskManager(include_path=bundled, include_defaults=its_own)


def evaluate(
    lm: KeyformerLM, names: Sequence[str], manager: TaskManager, shots: int, **options: Any
) -> dict[str, Any]:
    """Results of a model on tasks, as lm-eval returns them; {} but in the main process.

    Parameters
    ----------
    names
        Of tasks or groups that ``manager`` has; * and ? are wildcards.
    shots
        Examples in each prompt.
    options
        Passed to lm-eval's ``simple_evaluate``.

    Raises
    ------
    InputError
        If a task's dataset cannot be read, or has fewer examples than are asked for.
    """
    try:
        results = simple_evaluate(
            model=lm,
            tasks=manager.match_tasks(list(names)),
            num_fewshot=shots,
            task_manager=manager,
            **options,
        )
    except ValueError as error:
        if "larger than population" not in str(error):
            raise
        raise InputError(
            f"num_fewshot {shots} is more than the examples that {', '.join(names)} have"
        ) from error
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot read the data of {', '.join(names)}: {reason}") from error
    return results or {}
