"""Measuring many configurations: each once, remembered, in several processes, with intervals."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from keyformer.config import KeyformerConfig
from keyformer_evaluation.records.identity import Settings, environment, own_code, weights_hash
from keyformer_evaluation.records.processes import own_device
from keyformer_evaluation.records.store import Result, Source, Store
from keyformer_evaluation.records.work import Job, finish, keys_of

Labels = dict[str, Any]
PerItem = dict[str, list[float]]
"""For each metric its value on each item."""
Estimate = tuple[float, float, float]
"""A mean and the two ends of its 95 % interval."""

RESAMPLES = 2000


class Measure(Protocol):
    """What is measured of a configuration; :mod:`.measures` has them."""

    @property
    def setting(self) -> Settings:
        """All that the results depend on beside configuration, item, code and device."""

    @property
    def contents(self) -> Sequence[Any]:
        """What the items are, JSON-like."""

    @property
    def costs(self) -> Sequence[float]:
        """How long each item takes, in no unit."""

    @property
    def path(self) -> str:
        """The model's."""

    @property
    def bs(self) -> int:
        """Items measured at a time."""

    def __call__(
        self, config: KeyformerConfig, device: torch.device, items: Sequence[int]
    ) -> Sequence[Result]:
        """The measurement of some items, by their numbers: for each metric a value or a list."""


def plain(value: Any) -> Any:
    """A whole number as an int: 60 % is 60.0 %."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True, eq=False)
class Run:
    """One measurement: of a configuration that has a seed."""

    measure: Measure
    config: KeyformerConfig

    def job(self, device: torch.device) -> Job:
        """It as work on items, for a process that computes on this device."""
        measure, config = self.measure, self.config
        settings = {name: plain(value) for name, value in config.plain().items()}
        if not config.draws_noise:
            settings["seed"] = None
        return Job(
            settings={
                "measure": type(measure).__name__,
                "weights": weights_hash(measure.path),
                **measure.setting,
                **settings,
                **environment(device, type(measure).__module__),
                **own_code(config),
            },
            items=measure.contents,
            compute=lambda items: measure(config, device, items),
            batch_size=measure.bs,
            costs=measure.costs,
            group=measure.path,
        )


@dataclass(frozen=True)
class Cell:
    """One configuration of a sweep.

    Attributes
    ----------
    labels
        What distinguishes it in tables and figures.
    config
        Measured under each seed if it draws noise, else once.
    """

    labels: Labels
    config: KeyformerConfig


@dataclass(frozen=True)
class Shown:
    """What a record and a picture show of a cell.

    Attributes
    ----------
    labels
        Those of the cell.
    values
        For each metric its mean over the items with an interval, see :func:`estimate`.
    """

    labels: Labels
    values: dict[str, Estimate]


@dataclass(frozen=True)
class Row(Shown):
    """A cell's result over all seeds.

    Attributes
    ----------
    config
        That of the cell.
    seeds
        How many seeds it was measured with.
    per_item
        Each metric's value on each item, the mean over seeds.
    """

    config: KeyformerConfig
    seeds: int
    per_item: dict[str, np.ndarray]


def estimate(per_item: np.ndarray) -> Estimate:
    """The mean and its 95 % interval: percentiles over resamples of the items (bootstrap)."""
    low, high = np.percentile(_resamples(len(per_item)) @ per_item, [2.5, 97.5])
    return float(per_item.mean()), float(low), float(high)


@lru_cache
def _resamples(items: int) -> np.ndarray:
    """The weight of each item in each resample, (resamples, items)."""
    drawn = np.random.default_rng(0).integers(items, size=(RESAMPLES, items))
    return np.stack([np.bincount(of, minlength=items) for of in drawn]) / items


def summarize(cell: Cell, by_seed: Sequence[PerItem]) -> Row:
    """Mean and interval of each metric; a seed's share is averaged out first."""
    per_item = {
        metric: np.mean([measured[metric] for measured in by_seed], axis=0) for metric in by_seed[0]
    }
    values = {metric: estimate(values) for metric, values in per_item.items()}
    return Row(cell.labels, values, cell.config, len(by_seed), per_item)


class Found:
    """What runs measured, and how their results came about.

    Attributes
    ----------
    keys
        Of all their items in the store.
    """

    def __init__(self, jobs: Mapping[Run, Job], store: Store) -> None:
        self.keys = keys_of(jobs.values())
        results = store.results(self.keys)
        self.per_item = {
            run: _joined([results[key] for key in job.keys]) for run, job in jobs.items()
        }
        self.store = store

    def __getitem__(self, run: Run) -> PerItem:
        return self.per_item[run]


def sources(found: Iterable[Found]) -> list[tuple[Source, int]]:
    """Where all items of several requests were measured, and how many there."""
    stores: dict[Store, dict[str, None]] = {}
    for of in found:
        stores.setdefault(of.store, {}).update(dict.fromkeys(of.keys))
    counted = [entry for store, keys in stores.items() for entry in store.sources(keys)]
    return sorted(counted, key=lambda entry: -entry[1])


def _joined(results: Sequence[Result]) -> PerItem:
    """Each metric's values over items, of which each has one or several."""
    return {
        metric: [value for of in results for value in np.atleast_1d(of[metric]).tolist()]
        for metric in results[0]
    }


@dataclass(frozen=True)
class Request:
    """What a study asks for: to be resumed with what was found once all runs are done.

    Attributes
    ----------
    store
        The store's file.
    device
        Where models run; None or "cuda" gives each process a GPU of its own.
    resume
        Whether results that the store has count.
    """

    runs: list[Run]
    store: Path
    device: str | None
    resume: bool = True

    @property
    def where(self) -> tuple[Path, str | None, bool]:
        """All but the runs."""
        return self.store, self.device, self.resume


Steps = Generator[Request, Found, None]
"""A study at work: it yields requests, and ends when its results are written."""


def carry_out(studies: Iterable[Steps]) -> None:
    """Run studies to their ends, what they ask for measured round by round.

    In a round the items of all runs are one list, shared by all processes; a run that several
    studies ask for is done once.

    Raises
    ------
    InputError
        If a study, a run or a store raises it; what was measured before stays in the store.
    KeyboardInterrupt
        If the process is to stop; that too.
    """
    stores: dict[Path, Store] = {}
    begun: set[str] = set()
    asked = [(study, request) for study in studies if (request := next(study, None)) is not None]
    while asked:
        answers = []
        for where in dict.fromkeys(request.where for _, request in asked):
            path, device_name, resume = where
            device = own_device(device_name)
            if path not in stores:
                stores[path] = Store(path)
            store = stores[path]
            for study, request in asked:
                if request.where == where:
                    jobs = {run: run.job(device) for run in request.runs}
                    answers.append((study, jobs, store))
            jobs_here = [job for _, of, at in answers if at is store for job in of.values()]
            # What this very call has measured counts in any case.
            new = [job for job in jobs_here if not begun.issuperset(job.keys)]
            begun.update(keys_of(new))
            if new:
                finish(new, store, device, resume=resume)
        asked = []
        for study, jobs, store in answers:
            try:
                asked.append((study, study.send(Found(jobs, store))))
            except StopIteration:
                continue
    for store in stores.values():
        store.close()
