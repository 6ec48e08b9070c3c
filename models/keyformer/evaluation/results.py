"""Writing results: whole files or nothing, and a record of how each came about."""

from __future__ import annotations

import io
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

import torch

from keyformer.config import InputError
from keyformer.evaluation.store import Source

LIBRARIES = ("keyformer", "torch", "transformers", "accelerate", "rouge-score", "numpy")


def check_writable(path: str | Path, *, folder: bool = False) -> None:
    """Make sure that a file (or folder) can be written, before anything is computed for it.

    Raises
    ------
    InputError
        If its folder cannot be made or written to, or something else has the name.
    """
    path = Path(path)
    if path.is_dir() and not folder:
        raise InputError(f"cannot write {path}: it is a folder")
    home = path if folder else path.parent
    try:
        home.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=home):
            pass
    except OSError as error:
        raise InputError(f"cannot write to {home}: {error.strerror}") from error


def write_whole(path: str | Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name and rename it, so that it is never seen half-written.

    Raises
    ------
    InputError
        If the disk refuses; what the file held before is still there.
    """
    path = Path(path)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            write(file)
        part.replace(path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole, in UTF-8."""
    write_whole(path, lambda file: file.write(text.encode()))


def write_json(path: str | Path, content: Any) -> None:
    """Write indented JSON, whole."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


_UNDATED: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}}


def write_picture(path: Path, figure: Any) -> None:
    """A matplotlib figure as PNG or SVG, by the path's suffix; alike when drawn again."""
    picture = io.BytesIO()
    kind = path.suffix
    figure.savefig(picture, format=kind[1:], dpi=160, metadata=_UNDATED[kind])
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
        "versions": {name: _version(name) for name in LIBRARIES},
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or the processor's architecture and thread count."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}: {platform.machine()}, {torch.get_num_threads()} threads"


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory in use so far: the GPU's allocations, or the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _version(name: str) -> str | None:
    """The installed version; None where a library is used from its folder."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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
