"""Measuring many configurations: each once, remembered, in several processes, with intervals."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from tqdm import tqdm

from keyformer.config import InputError, KeyformerConfig
from keyformer.integration import check_device

Labels = dict[str, Any]
PerItem = dict[str, list[float]]
"""For each metric its value on each item."""
Estimate = tuple[float, float, float]
"""A mean and the two ends of its 95 % interval."""

RESAMPLES = 2000


class Measure(Protocol):
    """What is measured of a configuration: :mod:`keyformer.evaluation.measures` has them."""

    @property
    def setting(self) -> Labels:
        """All that the result depends on beside the configuration."""

    @property
    def cost(self) -> float:
        """How long a run takes, in no unit."""

    def __call__(self, config: KeyformerConfig, device: torch.device) -> PerItem:
        """The measurement."""


def plain(value: Any) -> Any:
    """A whole number as an int: 60 % is 60.0 %."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


@dataclass(frozen=True)
class Run:
    """One measurement: of a configuration that has a seed."""

    measure: Measure
    config: KeyformerConfig

    @cached_property
    def key(self) -> str:
        """What tells this measurement from others, as JSON."""
        settings = {name: plain(value) for name, value in asdict(self.config).items()}
        return json.dumps({**self.measure.setting, **settings}, sort_keys=True)


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
class Row:
    """A cell's result over all seeds.

    Attributes
    ----------
    labels, config
        Those of the cell.
    seeds
        How many seeds it was measured with.
    per_item
        Each metric's value on each item, the mean over seeds.
    values
        For each metric its mean over the items with an interval, see :func:`estimate`.
    """

    labels: Labels
    config: KeyformerConfig
    seeds: int
    per_item: dict[str, np.ndarray]
    values: dict[str, Estimate]


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
    return Row(cell.labels, cell.config, len(by_seed), per_item, values)


class Store:
    """Finished measurements in a file, one JSON object a line, each added as it is done.

    Raises
    ------
    InputError
        If the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, PerItem] = {}
        if not path.exists():
            return
        content = path.read_text()
        whole = content[: content.rfind("\n") + 1]  # a kill can cut the last line short
        try:
            for line in whole.splitlines():
                entry = json.loads(line)
                self.done[json.dumps(entry["key"], sort_keys=True)] = entry["per_item"]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not a file of finished measurements") from error
        if whole != content:
            path.write_text(whole)

    def __contains__(self, run: Run) -> bool:
        return run.key in self.done

    def __getitem__(self, run: Run) -> PerItem:
        return self.done[run.key]

    def add(self, run: Run, per_item: PerItem) -> None:
        """Remember a measurement, also after the process is killed."""
        line = json.dumps({"key": json.loads(run.key), "per_item": per_item})
        try:
            with self.path.open("a") as file:
                file.write(line + "\n")
        except OSError as error:
            raise InputError(f"cannot write {self.path}: {error.strerror or error}") from error
        self.done[run.key] = per_item


@dataclass(frozen=True)
class Request:
    """What a study asks for: to be resumed with the store once all runs are in it.

    Attributes
    ----------
    store
        The store's file.
    jobs
        Processes that measure; with 1 it is this one.
    device
        Where models run; None or "cuda" spreads the processes over all GPUs.
    """

    runs: list[Run]
    store: Path
    jobs: int
    device: str | None


Steps = Generator[Request, Store, None]
"""A study at work: it yields requests, and ends when its results are written."""


def carry_out(studies: Iterable[Steps]) -> None:
    """Run studies to their ends, what they ask for measured from one queue.

    Runs that take long start first, and a run that several studies ask for is done once.

    Raises
    ------
    InputError
        If a study, a run or a store raises it; what was measured before stays in the store.
    """
    stores: dict[Path, Store] = {}
    asked: list[tuple[Steps, Request]] = []
    for study in studies:
        _resume(study, None, asked)
    if not asked:
        return
    workers = _Workers(asked[0][1].jobs, asked[0][1].device)
    known: set[str] = set()
    with workers, tqdm(unit="run", smoothing=0) as bar:

        def enqueue(request: Request) -> None:
            store = stores.setdefault(request.store, Store(request.store))
            for run in request.runs:
                if run not in store and run.key not in known:
                    known.add(run.key)
                    workers.add(run, store)
            bar.total = len(known)
            bar.refresh()

        for _, request in asked:
            enqueue(request)
        while asked:
            served = next(
                (
                    entry
                    for entry in asked
                    if all(run in stores[entry[1].store] for run in entry[1].runs)
                ),
                None,
            )
            if served is None:
                run, store, per_item = workers.result()
                store.add(run, per_item)
                bar.update()
                continue
            asked.remove(served)
            bar.clear()
            before = len(asked)
            _resume(served[0], stores[served[1].store], asked)
            for _, request in asked[before:]:
                enqueue(request)


def _resume(study: Steps, store: Store | None, asked: list[tuple[Steps, Request]]) -> None:
    try:
        request = next(study) if store is None else study.send(store)
    except StopIteration:
        return
    asked.append((study, request))


class _Workers:
    """A queue of runs, the longest first, and the processes that take from it."""

    def __init__(self, jobs: int, device: str | None) -> None:
        self.jobs = jobs
        where = check_device(device)
        self.devices = [where]
        if where.type == "cuda" and where.index is None:
            self.devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
        self.queue: list[tuple[Run, Store]] = []
        self.running: dict[Future[PerItem], tuple[Run, Store]] = {}
        self.pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> _Workers:
        if self.jobs > 1:
            context = multiprocessing.get_context("spawn")
            numbers = context.Queue()
            for number in range(self.jobs):
                numbers.put(number)
            self.pool = ProcessPoolExecutor(
                self.jobs, context, _begin_worker, (numbers, self.devices, self.jobs)
            )
        return self

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def add(self, run: Run, store: Store) -> None:
        self.queue.append((run, store))
        # Runs on the same model stay together: a process holds one at a time.
        self.queue.sort(
            key=lambda entry: (-entry[0].measure.cost, entry[0].measure.setting["model"])
        )

    def result(self) -> tuple[Run, Store, PerItem]:
        """The next finished run."""
        if self.pool is None:
            run, store = self.queue.pop(0)
            return run, store, run.measure(run.config, self.devices[0])
        # Enough in advance that processes stay busy while a study draws its figure.
        while self.queue and len(self.running) < 4 * self.jobs:
            run, store = self.queue.pop(0)
            self.running[self.pool.submit(_work, run)] = run, store
        done = next(iter(wait(self.running, return_when=FIRST_COMPLETED).done))
        run, store = self.running.pop(done)
        return run, store, done.result()


_worker_device = torch.device("cpu")


def _begin_worker(numbers: Any, devices: list[torch.device], jobs: int) -> None:
    """Take a device in turn, and end with the parent, also where that is killed."""
    global _worker_device
    _worker_device = devices[numbers.get() % len(devices)]
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _work(run: Run) -> PerItem:
    try:
        return run.measure(run.config, _worker_device)
    finally:
        if _worker_device.type == "cuda":
            torch.cuda.empty_cache()  # the other processes on this GPU need it
