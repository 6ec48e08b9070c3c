"""Running lm-eval from a script: the bundled tasks beside its own, errors as one line."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate
from lm_eval.tasks import TaskManager

from keyformer.config import InputError
from keyformer_lm_eval.model import KeyformerLM

TASKS = Path(__file__).parents[2] / "lm_eval_harness" / "tasks"


def find_tasks(names: Sequence[str]) -> TaskManager:
    """lm-eval's tasks and the bundled ones.

    Raises
    ------
    InputError
        If one of the names is neither a task nor a group of tasks.
    """
    # What it warns of is how it is meant to be called, which is seen to here.
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = TaskManager(include_path=str(TASKS))
    bundled = ", ".join(sorted(file.stem for file in TASKS.glob("*.yaml")))
    for name in names:
        if not manager.match_tasks([name]):
            raise InputError(f"lm-eval has no task {name!r}; those that come along are {bundled}")
    return manager


def evaluate(
    lm: KeyformerLM, names: Sequence[str], manager: TaskManager, shots: int, **options: Any
) -> dict[str, Any]:
    """Results of a model on tasks, as lm-eval returns them.

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
        If a task's dataset cannot be read.
    """
    try:
        return simple_evaluate(
            model=lm,
            tasks=manager.match_tasks(list(names)),
            num_fewshot=shots,
            task_manager=manager,
            **options,
        )
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"cannot read the data of {', '.join(names)}: {reason}") from error
