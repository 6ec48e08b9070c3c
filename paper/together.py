"""Run several scripts of this folder as one: python paper/together.py COMMANDS [flags]

COMMANDS is a file with a command a line, a script's name with its flags; the flags given here
follow those of each.
What the scripts measure is one list, which processes of `accelerate launch` share, and what two of
them measure is measured once.
"""

from __future__ import annotations

import runpy
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from keyformer.config import InputError
from keyformer_evaluation.studies.sweep import carry_out
from keyformer_evaluation.tasks.flags import run_main


def main(argv: Sequence[str] | None = None) -> None:
    """Read commands and carry them out."""
    path, *flags = (sys.argv[1:] if argv is None else argv) or [""]
    try:
        commands = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read commands from {path!r}: {error}") from error
    studies = []
    for line in commands:
        name, *own = shlex.split(line) or [""]
        script = Path(__file__).with_name(name)
        if script.suffix != ".py" or not script.exists():
            raise InputError(f"a command must begin with a script of {script.parent}, got {line!r}")
        studies.append(runpy.run_path(str(script))["main"]([*own, *flags]))
    carry_out(studies)


if __name__ == "__main__":
    run_main(main)
