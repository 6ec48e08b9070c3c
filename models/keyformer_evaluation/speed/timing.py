"""Time and memory of a device."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Record = dict[str, Any]
"""What was measured, by name: a row of a table."""


def median_ms(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Median of ``repeats`` timings after a warm-up, by the device's clock."""
    times = []
    for number in range(repeats + 2):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            elapsed = start.elapsed_time(end)
        else:
            began = time.perf_counter()
            run()
            elapsed = 1e3 * (time.perf_counter() - began)
        if number > 1:
            times.append(elapsed)
    return statistics.median(times)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device: torch.device) -> None:
    """Give back what dead models and caches held."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: torch.device) -> int:
    """Count the most memory anew; bytes in use, of which :func:`peak_gb` is told."""
    free(device)
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def peak_gb(device: torch.device, before: int) -> float | None:
    """Gigabytes above ``before`` bytes; None where allocations are not counted."""
    if device.type != "cuda":
        return None
    return (torch.cuda.max_memory_allocated(device) - before) / 1e9
