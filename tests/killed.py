"""Lets a script die at random moments, and starts it again: python killed.py DEATHS SCRIPT ...

A child of this process runs the script, so that torch is imported once. The last life ends by
itself; its exit code is this one's.
"""

from __future__ import annotations

import os
import random
import runpy
import signal
import sys
import time

import torch

import keyformer.evaluation.study  # noqa: F401  (imported once, for all lives)
import keyformer_lm_eval.harness  # noqa: F401


def life(command: list[str]) -> int:
    """The process of one run."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = command
        try:
            runpy.run_path(command[0], run_name="__main__")
        except SystemExit as ended:
            os._exit(ended.code or 0)
        os._exit(0)
    return child


def main(deaths: int, command: list[str]) -> int:
    """Kill as often, each time a moment later than one batch takes at most, then let it end."""
    torch.set_num_threads(1)
    drawn = random.Random(0)
    died, longest = 0, 0.5
    while died < deaths:
        began = time.monotonic()
        child = life(command)
        time.sleep(drawn.uniform(0, longest))
        if os.waitpid(child, os.WNOHANG) != (0, 0):  # it was done: nothing left to kill
            break
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        died += 1
        longest = min(longest * 1.2, 3.0) if time.monotonic() - began < 3 else longest
    print(died)
    _, status = os.waitpid(life(command), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
