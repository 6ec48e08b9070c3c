"""Runs scripts in forks of itself, so that torch is imported once: a line of JSON a request.

``{"command": [...], "folder": ..., "environment": {...}}`` starts a script, whose stdout and stderr
go to files of the folder and which reads the one named stdin, if there is one, and prints its pid;
``{"pid": ..., "block": ...}`` prints its exit code, that of a signal negative, or null while it
runs. It runs nothing itself and so has no threads, which a fork would cut off with what they hold.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

import peft  # noqa: F401  (transformers imports it where it seeds)
import torch.utils.collect_env

import keyformer_lm_eval.harness  # noqa: F401
from keyformer_evaluation.records.identity import code_hash


def run(command: list[str], folder: Path, environment: dict[str, str]) -> NoReturn:
    """Be the process of a script, as from a terminal."""
    code: Any = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.environ.update(environment)
        given = folder / "stdin"
        os.dup2(os.open(given if given.exists() else os.devnull, os.O_RDONLY), 0)
        sys.stdin = os.fdopen(0, closefd=False)
        for number, name in enumerate(("stdout", "stderr"), start=1):
            os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = command
        sys.path[0] = str(Path(command[0]).parent)
        runpy.run_path(command[0], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Answer until there are no more requests."""
    # lm-eval asks pip what is installed, with each result.
    torch.utils.collect_env.get_pretty_env_info = str
    # Remembers modules.
    code_hash("keyformer_evaluation.studies.study", "keyformer_lm_eval.harness")
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        if "command" in request:
            answer: int | None = os.fork()
            if not answer:
                run(request["command"], Path(request["folder"]), request["environment"])
        else:
            pid, status = os.waitpid(request["pid"], 0 if request["block"] else os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
