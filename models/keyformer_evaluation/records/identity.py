"""What makes a result what it is: the weights, the settings, the item, and the code that computes.

Two results under one key are the same; change anything that could change one, and so does the key.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import json
import platform
from collections.abc import Iterable
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers.utils import cached_file

from keyformer.config import InputError, KeyformerConfig
from keyformer.served import PACKAGES

Settings = dict[str, Any]

LIBRARIES = ("torch", "transformers")
"""Whose versions can change a result."""

LOADERS = ("keyformer.integration", *PACKAGES.values())
"""What loads and computes every model."""


def item_keys(settings: Settings, items: Iterable[Any]) -> list[str]:
    """What results of items (JSON-like) under these settings are kept under."""
    common = digest(settings)
    return [digest([common, item]) for item in items]


def digest(content: Any) -> str:
    """A hash of JSON-like content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def noise_id(content: Any) -> int:
    """Which noise an item draws, below 2**32, by its content alone."""
    return int(digest(content)[:8], 16)


def own_code(config: KeyformerConfig) -> Settings:
    """What rules and policies do that are not of this package, by their files; empty if all are.

    Of one that has no file, as from an interactive session, by what its class compiles to.
    """
    chosen = [*(rule for rule, _ in config.rules), *([config.policy] if config.policy else [])]
    found = {}
    for cls in {type(one) for one in chosen}:
        if cls.__module__.startswith("keyformer."):
            continue
        try:
            content = Path(inspect.getfile(cls)).read_text()
        except (OSError, TypeError):
            codes = [of.__code__ for of in vars(cls).values() if inspect.isfunction(of)]
            content = repr([(code.co_code, code.co_consts, code.co_names) for code in codes])
        found[cls.__qualname__] = digest(content)
    return {"own code": found} if found else {}


def environment(device: torch.device, *modules: str) -> Settings:
    """What of libraries, hardware and this project's code can change a result.

    Parameters
    ----------
    device
        Where it is computed; of a GPU its name counts, of a CPU its architecture.
    modules
        Names of the modules that compute it, beside those that load models.
    """
    where = platform.machine()
    if device.type == "cuda":
        where = torch.cuda.get_device_name(device)
    return {
        "code": code_hash(*LOADERS, *modules),
        "device": f"{device.type}: {where}",
        **{name: version(name) for name in LIBRARIES},
    }


@lru_cache
def code_hash(*modules: str) -> str:
    """A hash of what modules of this project, and all of it that they import, do.

    Comments, docstrings and layout do not count.
    """
    found: dict[str, str] = {}
    asked = list(modules)
    while asked:
        name = asked.pop()
        if name not in found and (code := _code(name)) is not None:
            found[name], imported = code
            asked += imported
    return digest(found)


@lru_cache
def _code(name: str) -> tuple[str, list[str]] | None:
    """What a module of this project does, hashed, and what it imports; None of another's."""
    source = _source(name)
    if source is None:
        return None
    tree = ast.parse(source.read_bytes())
    imported = [*_imported(tree), *([name.rpartition(".")[0]] if "." in name else [])]
    return digest(_without_docstrings(tree)), imported


def _source(name: str) -> Path | None:
    """The file of a module of this project; None if it is another's, or no module."""
    if name.split(".")[0] not in _project():
        return None
    try:
        spec = find_spec(name)
    except ModuleNotFoundError:  # its parent is a module, no package
        return None
    return Path(spec.origin) if spec is not None and spec.origin else None


@lru_cache
def _project() -> frozenset[str]:
    """The packages beside this one, in the checkout or among other projects' that are installed."""
    beside = Path(__file__).parents[2].glob("*keyformer*/__init__.py")
    return frozenset(path.parent.name for path in beside)


def _imported(tree: ast.AST) -> Iterable[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            # What is imported from a package may be a module.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _without_docstrings(tree: ast.Module) -> str:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(line: ast.stmt) -> bool:
    return (
        isinstance(line, ast.Expr)
        and isinstance(line.value, ast.Constant)
        and isinstance(line.value.value, str)
    )


@lru_cache
def weights_hash(path: str) -> str:
    """Tells a checkpoint from every other: a hash of its files, or the hub's commit of it.

    Raises
    ------
    InputError
        If a file cannot be read.
    """
    folder = Path(path)
    if not folder.exists():
        # A commit of the hub names its content; load_model says what is wrong where there is none.
        try:
            config = cached_file(path, "config.json", _raise_exceptions_for_missing_entries=False)
        except OSError:
            config = None
        return f"{path}@{Path(config).parent.name}" if config else path
    files = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
    hashes = {}
    for file in files:
        if file.is_file() and file.suffix != ".md":
            try:
                with file.open("rb") as content:
                    name = str(file.relative_to(folder))
                    hashes[name] = hashlib.file_digest(content, "sha256").hexdigest()
            except OSError as error:
                raise InputError(f"cannot read {file}: {error.strerror or error}") from error
    return digest(hashes)
