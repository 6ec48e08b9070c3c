"""Draw pictures again from the records they belong to; nothing is measured, no record changes.

Of a folder all records that have a picture, its subfolders' too; a record that is named by itself
gets its picture in any case.
"""

from __future__ import annotations

import runpy
import shlex
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from keyformer.config import InputError
from keyformer_evaluation.records.results import check_writable
from keyformer_evaluation.studies.written import PICTURES, Pictures, Written, read_written
from keyformer_evaluation.tasks import flags as flag

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def main(argv: Sequence[str] | None = None) -> None:
    """Read and draw all, then write."""
    parser = flag.Parser(prog="redraw.py", description=__doc__)
    parser.add_argument("records", nargs="+", type=Path, help="JSON files or folders of such")
    flags = parser.parse_args(argv)
    drawn = [
        (written, figure_of(written))
        for path in dict.fromkeys(path for given in flags.records for path in records(given))
        for written in [read_written(path)]
    ]
    for written, _ in drawn:
        for kind in PICTURES:
            check_writable(written.path.with_suffix(kind))
    for written, figure in drawn:
        written.write(figure)
        print(f"pictures: {written.path.with_suffix('.{png,svg}')}")


def records(given: Path) -> Iterator[Path]:
    """The file, or those of a folder that have a picture.

    Raises
    ------
    InputError
        If a folder has none.
    """
    if not given.is_dir():
        yield given
        return
    found = [path for path in sorted(given.rglob("*.json")) if path.with_suffix(".png").exists()]
    if not found:
        raise InputError(f"{given} has no record with a picture")
    yield from found


def figure_of(written: Written) -> Figure:
    """What the script that wrote the record draws of it.

    Raises
    ------
    InputError
        If no script of this folder did, or the record lacks something.
    """
    if not isinstance(written.record.get("command"), str):
        raise InputError(f"{written.path} names no command: no script of paper/ wrote it")
    try:
        script = Path(shlex.split(written.record["command"])[1])
        of_part = pictures(script.name)
        part = written.path.stem.removeprefix(script.stem)
        return of_part[part if part in of_part else ""](written)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"cannot draw {written.path}: {error!r}") from error


@cache
def pictures(name: str) -> Pictures:
    """Those of a script of this folder, by its name."""
    script = Path(__file__).with_name(name)
    found = runpy.run_path(str(script)).get("PICTURES") if script.is_file() else None
    if not found:
        raise ValueError(f"{name} is no script of {script.parent} that draws")
    return found


if __name__ == "__main__":
    flag.run_main(main)
