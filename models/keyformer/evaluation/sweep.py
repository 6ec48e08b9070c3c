"""Measuring many configurations on the same items: each once, remembered, with intervals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from keyformer.config import InputError, KeyformerConfig
from keyformer.evaluation.results import write_text

Labels = dict[str, Any]
PerItem = dict[str, list[float]]
"""For each metric its value on each item."""

RESAMPLES = 2000


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
    labels
        Those of the cell.
    seeds
        How many seeds it was measured with.
    values
        For each metric the mean over seeds and items, and a 95 % interval of it: percentiles
        over resamples of the items (bootstrap), a seed's share averaged out first.
    """

    labels: Labels
    seeds: int
    values: dict[str, tuple[float, float, float]]


class Store:
    """Finished measurements in a file, one JSON object a line; rewritten whole at each one.

    Raises
    ------
    InputError
        If the file holds something else.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, PerItem] = {}
        if path.exists():
            try:
                for line in path.read_text().splitlines():
                    entry = json.loads(line)
                    self.done[_name(entry["key"])] = entry["per_item"]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is not a file of finished measurements") from error

    def find(self, key: Labels) -> PerItem | None:
        """What was measured under ``key``, or None."""
        return self.done.get(_name(key))

    def add(self, key: Labels, per_item: PerItem) -> None:
        """Remember a measurement, also after the process is killed."""
        self.done[_name(key)] = per_item
        entries = ({"key": json.loads(key), "per_item": item} for key, item in self.done.items())
        write_text(self.path, "".join(json.dumps(entry) + "\n" for entry in entries))


def _name(key: Labels) -> str:
    return json.dumps(key, sort_keys=True)


def run_sweep(
    cells: Iterable[Cell],
    seeds: Sequence[int],
    measure: Callable[[KeyformerConfig], PerItem],
    store: Store,
    setting: Labels,
) -> list[Row]:
    """Measure every cell that ``store`` does not hold yet.

    Parameters
    ----------
    seeds
        For configurations that draw noise; the others are measured with the first.
    measure
        Runs the model under a configuration that has a seed.
    setting
        What else the results depend on (model, data, generation): part of their key.
    """
    runs = [
        (cell, replace(cell.config, seed=seed))
        for cell in cells
        for seed in (seeds if cell.config.draws_noise else seeds[:1])
    ]
    found: dict[int, list[PerItem]] = {}
    order: list[Cell] = []
    for cell, config in tqdm(runs, unit="run", disable=len(runs) < 2):
        key = {**setting, **asdict(config)}
        per_item = store.find(key)
        if per_item is None:
            per_item = measure(config)
            store.add(key, per_item)
        if id(cell) not in found:
            order.append(cell)
        found.setdefault(id(cell), []).append(per_item)
    return [summarize(cell.labels, found[id(cell)]) for cell in order]


def summarize(labels: Labels, by_seed: list[PerItem]) -> Row:
    """Mean and interval of each metric over seeds and items."""
    values = {}
    for metric in by_seed[0]:
        per_item = np.mean([measured[metric] for measured in by_seed], axis=0)
        drawn = np.random.default_rng(0).integers(len(per_item), size=(RESAMPLES, len(per_item)))
        low, high = np.percentile(per_item[drawn].mean(axis=1), [2.5, 97.5])
        values[metric] = (float(per_item.mean()), float(low), float(high))
    return Row(labels, len(by_seed), values)
