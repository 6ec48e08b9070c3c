"""Writing results: whole files or nothing, over nothing of others, and how each came about."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from keyformer.config import InputError
from keyformer_evaluation.records.store import Source

LIBRARIES = ("keyformer", "torch", "transformers", "accelerate", "rouge-score", "numpy")


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Make sure that a file (or folder) can be written, before anything is computed for it.

    Raises
    ------
    InputError
        If its folder cannot be made or written to, or something else has the name.
    """
    path = Path(path)
    if os.path.isdir(path) and not folder:
        raise InputError(f"cannot write {path}: it is a folder")
    if os.path.exists(path) and not folder and not os.access(path, os.W_OK):
        raise InputError(f"cannot write {path}: it is read-only")
    if _is_stream(path) and not folder:
        return
    path = Path(os.path.realpath(path))
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {home}: {error.strerror}") from error
    try:
        with contextlib.suppress(FileNotFoundError):
            path.stat()
    except OSError as error:  # its name is too long, or a link to itself
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def check_record(
    path: str | Path,
    *files: str | Path,
    script: str | None = None,
    store: str | Path | None = None,
) -> None:
    """Make sure that a record and the files it goes with can be written, and nothing else is lost.

    What is there already may be replaced if the same script wrote it: a record whose command
    names the script, and files that this record lists, see :func:`write_record`, or all if it is
    one that lists none. An empty file, a device or a pipe holds nothing that could be lost.

    Parameters
    ----------
    script
        By default the one that runs.
    store
        That of finished items, which must be another file than all of them.

    Raises
    ------
    InputError
        If one cannot be written, holds something else, or two are one file.
    """
    script = script or Path(sys.argv[0]).name
    outputs = [Path(path), *map(Path, files)]
    for output in outputs:
        check_writable(output)
    kept = [output for output in outputs if not _is_stream(output)]
    distinct = kept if store is None else [*kept, store]
    if len({os.path.realpath(output) for output in distinct}) < len(distinct):
        raise InputError(f"the outputs {', '.join(map(str, distinct))} must be different files")
    record = _record_of(Path(path), script)
    for output in kept:
        listed = record is not None and (output == kept[0] or _lists(record, output))
        check_replaceable(output, listed, script)


def check_replaceable(path: str | Path, ours: bool, script: str | None = None) -> None:
    """Refuse to replace a file that is not ``ours`` to replace.

    Raises
    ------
    InputError
        If it holds something.
    """
    path = Path(path)
    if not ours and os.path.isfile(path) and path.stat().st_size and not _is_stream(path):
        script = script or Path(sys.argv[0]).name
        raise InputError(
            f"{path} was not written by {script}, or changed since: move it away, or name another"
        )


def _record_of(path: Path, script: str) -> dict[str, Any] | None:
    """What a file holds if it is a record of that script."""
    if _is_stream(path):
        return None
    try:
        record = json.loads(path.read_bytes())
        written_by = Path(shlex.split(record["command"])[1]).name
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    return record if written_by == script else None


def _lists(record: dict[str, Any], path: Path) -> bool:
    """Whether a record says that it is about this file as it is."""
    files = record.get("files")
    return files is None or _digest(path) in files.get(path.name, ())


def _digest(path: Path) -> str | None:
    return hashlib.sha256(path.read_bytes()).hexdigest() if os.path.isfile(path) else None


def _is_stream(path: Path) -> bool:
    """Whether a path is a device or a pipe, or the file that this process prints to."""
    if not os.path.exists(path) or os.path.isdir(path):
        return False
    return not os.path.isfile(path) or _printed_to(path) is not None


def _printed_to(path: Path) -> int | None:
    """This process's standard output or error if that is what the path names."""
    for number in (1, 2):
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(number), path.stat()):
                return number
    return None


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name and rename it, so that it is never seen half-written.

    Links are followed. A device, a pipe or what this process prints to is written to as it is.

    Raises
    ------
    InputError
        If the disk refuses; what the file held before is still there.
    """
    path = Path(path)
    try:
        if _is_stream(path):
            sys.stdout.flush()
            printed_to = _printed_to(path)
            with open(path if printed_to is None else os.dup(printed_to), "wb") as stream:
                write(stream)
            return
        path = Path(os.path.realpath(path))
        part = path.with_name(f".{os.getpid()}.part")
        try:
            with part.open("wb") as file:
                write(file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def write_record(path: str | Path, record: dict[str, Any], texts: Mapping[Path, str]) -> None:
    """Write a record and the texts it is about, and list these in it.

    ``files`` has for each name the SHA-256 of what the file holds and held before, so that a later
    run knows it, see :func:`check_record`, also where this one ends between the two.
    """
    earlier = _record_of(Path(path), Path(sys.argv[0]).name) or {}
    files = dict(earlier.get("files") or {})
    for file, text in texts.items():
        digests = [hashlib.sha256(_encoded(text)).hexdigest(), _digest(file)]
        files[file.name] = list(dict.fromkeys(filter(None, digests)))
    write_json(path, {**record, "files": files})
    for file, text in texts.items():
        write_text(file, text)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda file: file.write(_encoded(text)))


def _encoded(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, as a name of a file may hold, is escaped as in JSON."""
    return text.encode(errors="backslashreplace")


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


_UNDATED: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}}


def write_picture(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG or SVG, by the path's suffix; alike when drawn again."""
    picture = io.BytesIO()
    kind = path.suffix
    figure.savefig(picture, format=kind[1:], dpi=160, metadata=_UNDATED[kind])
    if kind == ".png":  # 256 colours are enough, and half the bytes
        from PIL import Image  # comes with matplotlib

        drawn, picture = Image.open(picture).convert("RGB"), io.BytesIO()
        drawn.quantize(256, dither=Image.Dither.NONE).save(picture, format="png", optimize=True)
    write_whole(path, lambda file: file.write(picture.getvalue()))


def run_record(device: torch.device | str) -> dict[str, Any]:
    """How a result of this very process came about: :func:`source`, command and time.

    Parameters
    ----------
    device
        Where the model is.
    """
    return record([(source(torch.device(device)), 1)])


def record(sources: Sequence[tuple[Source, int]]) -> dict[str, Any]:
    """How a result came about: command, time, and whence its items are.

    Parameters
    ----------
    sources
        Where items were computed and how many there, the most frequent first. Commit, versions
        and device are the first's; others are listed as "elsewhere", each with its items.
    """
    (most, _), *others = sources or [({}, 0)]
    elsewhere = [{"items": count, **other} for other, count in others]
    return {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        **most,
        **({"elsewhere": elsewhere} if elsewhere else {}),
    }


def source(device: torch.device) -> Source:
    """Where this process computes: commit, library versions, hardware."""
    return {
        "commit": _commit(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in LIBRARIES},
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {platform.machine()}, {torch.get_num_threads()} threads"


def dtype_name(dtype: torch.dtype) -> str:
    """As in ``float32``."""
    return str(dtype).removeprefix("torch.")


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the GPU's allocations, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@cache
def installed_version(name: str) -> str | None:
    """The installed version; None where a library is used from its folder."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """The commit this code stands at, "+changes" if files differ.

    Outside a checkout it is what the environment variable GIT_COMMIT says, or None.
    """

    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *arguments], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "HEAD") + ("+changes" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT")
