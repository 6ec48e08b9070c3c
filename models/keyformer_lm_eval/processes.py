"""Sharing the documents of a task out over the processes of ``accelerate launch``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from lm_eval.api.filter import FilterEnsemble
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from keyformer.config import InputError


@cache
def share_alike() -> None:
    """Have lm-eval share documents out so that its results are those of a single process.

    It draws the examples of a prompt one document after another: here each process draws those
    of all documents and then takes its own. These follow each other, so that what is gathered
    process by process has the order of the documents. Answers to requests that fill up a smaller
    share are dropped.
    """
    build, iterate, apply_filters = Task.build_all_requests, Task.doc_iterator, FilterEnsemble.apply

    def build_all_requests(
        task: Task, *, rank: int = 0, world_size: int = 1, **options: Any
    ) -> None:
        build(task, **options)
        which = {name: options.get(name) for name in ("limit", "samples")}
        own = task.doc_iterator(rank=rank, world_size=world_size, **which)
        kept = {number for number, _ in own}
        task._instances = [one for one in task._instances if one.doc_id in kept]

    def doc_iterator(
        task: Task, *, rank: int = 0, world_size: int = 1, **options: Any
    ) -> Iterator[tuple[int, Any]]:
        documents = list(iterate(task, **options))
        count = len(documents)
        if count < world_size:
            raise InputError(
                f"the {count} documents of {task.task_name} cannot be shared out over"
                f" {world_size} processes"
            )
        return iter(documents[count * rank // world_size : count * (rank + 1) // world_size])

    def apply(filters: FilterEnsemble, instances: list[Instance]) -> None:
        for one in instances:
            del one.resps[one.repeats or len(one.resps) :]
        apply_filters(filters, instances)

    Task.build_all_requests, Task.doc_iterator = build_all_requests, doc_iterator
    FilterEnsemble.apply = apply
