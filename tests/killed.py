"""Lets a script die at random moments and starts it again: killed.py DEATHS STORE SCRIPT ...

A child of this process runs the script, so that torch is imported once. A life that is done before
it dies leaves nothing to kill: the next one begins without the STORE. The last one ends by itself;
its exit code is this one's.
"""

from __future__ import annotations

import glob
import os
import random
import runpy
import signal
import sys
import time

import torch

import keyformer.evaluation.study  # noqa: F401  (imported once, for all lives)
import keyformer_lm_eval.harness  # noqa: F401

LONGEST = 1.5
"""Seconds that a life has at most before it is killed."""


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


def main(deaths: int, store: str, command: list[str]) -> int:
    """Kill as often, then let it end."""
    torch.set_num_threads(1)
    drawn = random.Random(0)
    died = 0
    while died < deaths:
        child = life(command)
        time.sleep(drawn.uniform(0, LONGEST))
        if os.waitpid(child, os.WNOHANG) != (0, 0):
            for file in glob.glob(f"{store}*"):
                os.remove(file)
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        died += 1
    _, status = os.waitpid(life(command), 0)
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
