"""Kernels that begin as the one before them ends: programmatic dependent launch (PDL).

From Hopper on a kernel may be launched once all programs of the one before have said that
theirs is nearly done. What it does before it waits for their results, setting up and getting
going, then costs no time.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until all that was launched before is done, and what it has written can be read."""
    if EARLY:
        gdc_wait()


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """Say that the next kernel may be launched; its programs will :func:`wait`."""
    if EARLY:
        gdc_launch_dependents()


def early(device: torch.device) -> dict[str, bool]:
    """How a kernel that calls :func:`wait` is launched on a device."""
    return {"EARLY": True, "launch_pdl": True} if _overlaps(device) else {"EARLY": False}


@functools.cache
def _overlaps(device: torch.device) -> bool:
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
