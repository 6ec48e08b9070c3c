"""What the download_*.py scripts share: their flags, loading a split, and writing it.

The task scripts read what is written here: a JSON list of objects with the task's fields. Nothing
else in keyformer imports this module, because the datasets library takes long to import.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import datasets
from datasets.exceptions import DatasetsError
from huggingface_hub import HfApi, errors
from huggingface_hub.utils import disable_progress_bars

from keyformer import InputError
from keyformer_evaluation.records.results import check_writable, write_json
from keyformer_evaluation.tasks.data import sample
from keyformer_evaluation.tasks.flags import Parser

Row = dict[str, Any]
Example = dict[str, str | list[str]]


def data_file(script: str, name: str) -> Path:
    """A file of the folder data/ that is next to the folder of a script."""
    return Path(script).resolve().parents[1] / "data" / name


def build_parser(
    description: str | None, dataset_path: str, split: str, n_obs: int | None = None
) -> Parser:
    """The flags that all datasets share, with the defaults of one."""
    parser = Parser(description=description)
    parser.add_argument("--dataset_path", default=dataset_path, help="hub name or local folder")
    parser.add_argument("--split", default=split, help="split to write (default: %(default)s)")
    parser.add_argument(
        "--n_obs",
        type=int,
        default=n_obs,
        help=f"draw this many at random (default: {n_obs or 'all'})",
    )
    parser.add_argument("--seed", type=int, default=42, help="of that draw (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="file to write (default: in ../data/)")
    return parser


def export(
    flags: argparse.Namespace,
    default_output: Path,
    load: Callable[[], Sequence[Row]],
    columns: Sequence[str],
    convert: Callable[[Row], Example],
    usable: Callable[[Row], bool] | None = None,
) -> None:
    """Load, sample, convert and write.

    Parameters
    ----------
    usable
        Says of a row whether the task can read it; the others are left out before the draw and
        counted. By default all are usable.

    Raises
    ------
    InputError
        If the output cannot be written, or the dataset not be loaded or lacks a column.
    """
    output = flags.output or default_output
    if not sys.stderr.isatty():  # progress bars would fill a log file
        datasets.disable_progress_bars()
        disable_progress_bars()
    check_writable(output)  # before minutes of download, not after
    print(f"reading {flags.dataset_path}, split {flags.split}", flush=True)
    rows = load()
    missing = [name for name in columns if len(rows) and name not in rows[0]]
    if missing:
        raise InputError(f"no column {missing[0]} (there are: {', '.join(rows[0])})")
    kept: Sequence[int] = range(len(rows))
    if usable:
        kept = [index for index, row in enumerate(rows) if usable(row)]
        print(f"left out {len(rows) - len(kept)} of {len(rows)} examples that the task cannot read")
    drawn = sample(kept, flags.n_obs, flags.seed)
    write_json(output, [convert(rows[index]) for index in drawn])
    print(f"wrote {len(drawn)} of {len(kept)} examples to {output}")


def load_rows(path: str, split: str, config: str | None = None) -> Sequence[Row]:
    """One split of a hub dataset or of a local folder.

    Raises
    ------
    InputError
        If it cannot be reached or has no such split.
    """
    # A loading script no longer runs; next to it, the hub keeps a parquet copy on this branch.
    scripted = f"{Path(path).name}.py" in list_files(path)
    revision = "refs/convert/parquet" if scripted else None
    try:
        # Not every copy has named configurations, so ask before naming one.
        known = datasets.get_dataset_config_names(path, revision=revision)
        name = config if config in known else None
        return datasets.load_dataset(path, name, split=split, revision=revision)
    except (errors.HTTPError, OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise InputError(f"cannot load {split} of {path}: {one_line(error)}") from error


def list_files(path: str) -> list[str]:
    """The file names of a local folder or a hub dataset.

    Raises
    ------
    InputError
        If there is no such dataset, or the hub cannot be reached.
    """
    if Path(path).is_dir():
        return os.listdir(path)
    try:  # this fails at once without a network, where the loaders retry for half a minute
        return [file.rfilename for file in HfApi().dataset_info(path, timeout=30).siblings or []]
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise InputError(f"no such dataset or folder, or no access to it: {path}") from error
    except (errors.HTTPError, OSError) as error:
        raise InputError(f"cannot reach the hub for {path}: {one_line(error)}") from error


def one_line(error: Exception) -> str:
    """The error's text on one line."""
    return " ".join(str(error).split()) or type(error).__name__
