"""The processes that ``accelerate launch`` starts, and how a script ends."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env

from keyformer.config import InputError
from keyformer.integration import check_device
from keyformer_evaluation.records.store import Result, Source, Store

LONGEST = timedelta(days=30)
"""How long machines wait for each other's items."""


def is_main() -> bool:
    """Whether this process is the one that prints and writes; before any device is chosen."""
    return os.environ.get("RANK", "0") == "0"


def processes(device: str | None = None) -> PartialState:
    """accelerate's view of the processes that share the work, this one among them.

    Each has a device of its own; on machines without a GPU, or where accelerate was told so, they
    share the CPU.

    Parameters
    ----------
    device
        None, or a kind such as "cpu" or "cuda"; of a process alone also "cuda:1".

    Raises
    ------
    InputError
        If several processes are to share one named GPU, or there is no such device.
    """
    several = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if several and device is not None and torch.device(device).index is not None:
        raise InputError(
            f"--device {device}: each of several processes takes a device of its own; say"
            f" {device.split(':')[0]}, or nothing"
        )
    on_cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or check_device(device).type == "cpu"
    return PartialState(cpu=on_cpu, timeout=LONGEST)


def own_device(device: str | None) -> torch.device:
    """Where this process's model goes."""
    state = processes(device)
    if state.num_processes > 1:
        return state.device
    return check_device("cpu" if state.device.type == "cpu" else device)


def machine() -> tuple[int, int]:
    """This machine's number, and how many there are."""
    return int(os.environ.get("GROUP_RANK", "0")), int(os.environ.get("GROUP_WORLD_SIZE", "1"))


def exchange(found: dict[str, tuple[Result, Source]], store: Store) -> None:
    """Let every machine's store have what each machine has found.

    Parameters
    ----------
    found
        Of this machine's store; every process of a machine may give it, one of them does.
    """
    state = PartialState()
    mine = [found] if state.is_local_main_process else []
    for others in gather_object(mine):
        for key, (result, source) in others.items():
            if key not in found and state.is_local_main_process:
                store.add({key: result}, source)
    state.wait_for_everyone()


def leave() -> None:
    """Take leave of the other processes, if there are any."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
