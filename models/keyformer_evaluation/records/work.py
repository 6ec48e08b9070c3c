"""Items to be computed: found in the store, or done by whichever process comes to them first."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm

from keyformer_evaluation.records.identity import Settings, item_keys
from keyformer_evaluation.records.processes import exchange, machine
from keyformer_evaluation.records.results import source
from keyformer_evaluation.records.store import Result, Store

LOOK = 0.5
"""Seconds between looks at what other processes have done."""


@dataclass(frozen=True)
class Job:
    """One computation on each of many items.

    Attributes
    ----------
    settings
        All that a result depends on beside the item, JSON-like.
    items
        JSON-like; equal ones are computed once.
    compute
        Given the numbers of some items, the result of each.
    batch_size
        Items at a time, as far as there are.
    costs
        How long each item takes, in no unit; those that take long go first. None keeps the order.
    group
        Jobs of one group have the same model in memory, so they follow one another.
    """

    settings: Settings
    items: Sequence[Any]
    compute: Callable[[Sequence[int]], Sequence[Result]]
    batch_size: int = 1
    costs: Sequence[float] | None = None
    group: str = ""

    @cached_property
    def keys(self) -> list[str]:
        """What each item's result is kept under."""
        return item_keys(self.settings, self.items)

    def cost(self, item: int) -> float:
        """That of one item."""
        return 1.0 if self.costs is None else self.costs[item]

    def batches(self) -> list[list[int]]:
        """The items in the order and company in which they are computed."""
        order = sorted(distinct(self.keys), key=lambda item: (-self.cost(item), item))
        return [order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)]


def distinct(keys: Sequence[str]) -> list[int]:
    """Where each key stands first, in order."""
    first: dict[str, int] = {}
    for at, key in enumerate(keys):
        first.setdefault(key, at)
    return list(first.values())


def keys_of(jobs: Iterable[Job]) -> list[str]:
    """What all results of jobs are kept under; equal ones as often as there are."""
    return [key for job in jobs for key in job.keys]


def finish(
    jobs: Sequence[Job],
    store: Store,
    device: torch.device,
    *,
    resume: bool = True,
    unit: str = "item",
) -> int:
    """See to it that every item has a result in the store; return how many had one before.

    Processes of a machine take batches from one list, those that take long first. What another
    process has claimed is left to it, and waited for; if it dies, its batch is taken over.

    Parameters
    ----------
    device
        Where this process computes; goes on record.
    resume
        Whether results that are there count; otherwise they are dropped.
    unit
        What the bar calls an item.

    Raises
    ------
    KeyboardInterrupt
        If the process is to stop, with a message that says what is kept.
    """
    state = PartialState()
    asked = keys_of(jobs)
    every = list(dict.fromkeys(asked))
    if not resume:
        if state.is_local_main_process:
            store.forget(every)
        state.wait_for_everyone()
    done = store.done(every)
    before = sum(key in done for key in asked)
    number, machines = machine()
    plan = [(job, batch) for job in jobs for batch in job.batches()]
    plan.sort(key=lambda entry: (entry[0].group, -sum(map(entry[0].cost, entry[1]))))
    plan = plan[number::machines]
    mine = list(dict.fromkeys(job.keys[item] for job, batch in plan for item in batch))
    record = source(device)
    bar = _Bar(store, every if machines == 1 else mine, unit, state.is_main_process)
    try:
        with bar:
            while not done.issuperset(mine):
                left = len(mine) - len(done.intersection(mine))
                for job, batch in plan:
                    wanted = [item for item in batch if job.keys[item] not in done]
                    claimed = store.claim([job.keys[item] for item in wanted])
                    taken = [item for item in wanted if job.keys[item] in claimed]
                    if taken:
                        results = job.compute(taken)
                        found = zip(taken, results, strict=True)
                        store.add({job.keys[item]: result for item, result in found}, record)
                        done |= claimed
                    bar.look()
                done = store.done(every)
                if len(mine) - len(done.intersection(mine)) == left:
                    time.sleep(LOOK)
                bar.look()
    except KeyboardInterrupt as stop:
        raise told(stop, f"{len(store.done(every))} of {len(every)}", store) from stop
    finally:
        store.give_up()
    if machines > 1:
        exchange(store.found(mine), store)
    return before


@contextmanager
def finishing(
    jobs: Sequence[Job],
    store: Store,
    device: torch.device,
    *,
    resume: bool = True,
    unit: str = "item",
) -> Iterator[tuple[int, bool]]:
    """As :func:`finish`, but where the process is to stop, it does so after the block.

    The block gets how many items had a result before, and whether all that there are is what was
    done until the stop.
    """
    before, stopped = 0, None
    try:
        before = finish(jobs, store, device, resume=resume, unit=unit)
    except KeyboardInterrupt as stop:
        stopped = stop
    yield before, stopped is not None
    if stopped is not None:
        raise stopped


def told(stop: KeyboardInterrupt, what: str, store: Store) -> KeyboardInterrupt:
    """A stop that says what is kept."""
    return type(stop)(f"{what} are kept in {store.path}, and the same command goes on")


class _Bar:
    """One bar over what all processes do, with the time left."""

    def __init__(self, store: Store, keys: Sequence[str], unit: str, shown: bool) -> None:
        self.store, self.keys, self.looked = store, keys, 0.0
        self.bar = tqdm(
            total=len(keys),
            initial=len(store.done(keys)),
            unit=unit,
            smoothing=0,
            disable=not shown,
        )

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *raised: object) -> None:
        self.look(now=True)
        self.bar.close()

    def look(self, now: bool = False) -> None:
        """Show what is done, unless it was looked at a moment ago."""
        if self.bar.disable or not (now or time.monotonic() > self.looked + LOOK):
            return
        self.bar.update(len(self.store.done(self.keys)) - self.bar.n)
        self.looked = time.monotonic()
