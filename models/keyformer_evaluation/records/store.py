"""Finished items in a file: each kept as it is done, under a hash of all that made it.

The file is an SQLite database, which several processes of one host use at a time. Before a process
works on items it claims them, so that no other works on the same; the claims of a process that has
died are void.
"""

from __future__ import annotations

import json
import platform
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from keyformer.config import InputError

Result = dict[str, Any]
"""What was found out about one item."""

Source = dict[str, Any]
"""How a result came about: commit, versions, device."""

SCHEMA = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS sources (id INTEGER PRIMARY KEY, source TEXT UNIQUE NOT NULL);
CREATE TABLE IF NOT EXISTS items (
    key TEXT PRIMARY KEY, result TEXT NOT NULL, source INTEGER NOT NULL REFERENCES sources
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS claims (key TEXT PRIMARY KEY, owner TEXT NOT NULL) WITHOUT ROWID;
COMMIT;
"""

PATIENCE = 60
"""Seconds to wait for another process's turn to write."""


class Store:
    """Results by key.

    Parameters
    ----------
    path
        The file; made, its folders too, if there is none. None keeps results in memory.

    Raises
    ------
    InputError
        Here and in every method, if the file is not a store or the disk refuses.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.owner = _owner(psutil.Process())
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"cannot write to {path.parent}: {error.strerror}") from error
        with self._errors():
            file = ":memory:" if path is None else path
            self.connection = sqlite3.connect(file, timeout=PATIENCE, isolation_level=None)
            tables = {name for (name,) in self.connection.execute("SELECT name FROM sqlite_master")}
            if tables and "items" not in tables:
                raise sqlite3.DatabaseError("another program's database")
            self._prepare()

    def _prepare(self) -> None:
        """Make the file what this class expects; others may be doing so at the same time.

        SQLite waits by itself for everything but a change of the journal's mode.
        """
        patience = time.monotonic() + PATIENCE
        while True:
            try:
                self.connection.execute("PRAGMA journal_mode = WAL")
                break
            except sqlite3.OperationalError as error:
                busy = error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > patience:
                    raise
                time.sleep(0.02)
        self.connection.execute("PRAGMA synchronous = NORMAL")
        self.connection.executescript(SCHEMA)

    def results(self, keys: Iterable[str]) -> dict[str, Result]:
        """The results there are, by key."""
        with self._asking(keys) as asked:
            rows = asked("SELECT key, result FROM asked JOIN items USING (key)")
        return {key: json.loads(result) for key, result in rows}

    def found(self, keys: Iterable[str]) -> dict[str, tuple[Result, Source]]:
        """The results there are and how each came about, by key."""
        with self._asking(keys) as asked:
            rows = asked(
                "SELECT key, result, sources.source FROM asked JOIN items USING (key)"
                " JOIN sources ON sources.id = items.source"
            )
        return {key: (json.loads(result), json.loads(source)) for key, result, source in rows}

    def done(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that have a result."""
        with self._asking(keys) as asked:
            return {key for (key,) in asked("SELECT key FROM asked JOIN items USING (key)")}

    def sources(self, keys: Iterable[str]) -> list[tuple[Source, int]]:
        """How the results came about and how many did so, the most frequent first."""
        with self._asking(keys) as asked:
            rows = asked(
                "SELECT sources.source, count(*) FROM asked JOIN items USING (key)"
                " JOIN sources ON sources.id = items.source"
                " GROUP BY sources.id ORDER BY count(*) DESC, sources.id"
            )
        return [(json.loads(source), count) for source, count in rows]

    def claim(self, keys: Sequence[str], most: int | None = None) -> set[str]:
        """Take on the first of the keys that have no result and that nobody else works on.

        Parameters
        ----------
        most
            How many at most; None takes all.
        """
        with self._asking(keys, writes=True) as asked:
            done = {key for (key,) in asked("SELECT key FROM asked JOIN items USING (key)")}
            owners = dict(asked("SELECT key, owner FROM asked JOIN claims USING (key)"))
            others = {owner for owner in set(owners.values()) - {self.owner} if _lives(owner)}
            free = (k for k in dict.fromkeys(keys) if k not in done and owners.get(k) not in others)
            taken = set(islice(free, most))
            self.connection.executemany(
                "INSERT OR REPLACE INTO claims VALUES (?, ?)", [(key, self.owner) for key in taken]
            )
        return taken

    def add(self, results: Mapping[str, Result], source: Source) -> None:
        """Keep results, all or none, and give up the claims on them."""
        described = json.dumps(source, sort_keys=True)
        rows = [(key, json.dumps(result)) for key, result in results.items()]
        with self._asking(results, writes=True) as asked:
            self.connection.execute(
                "INSERT OR IGNORE INTO sources (source) VALUES (?)", [described]
            )
            self.connection.executemany(
                "INSERT OR IGNORE INTO items SELECT ?, ?, id FROM sources WHERE source = ?",
                [(*row, described) for row in rows],
            )
            asked("DELETE FROM claims WHERE key IN (SELECT key FROM asked)")

    def give_up(self) -> None:
        """Let others work on what this process has claimed and not finished."""
        with self._errors():
            self.connection.execute("DELETE FROM claims WHERE owner = ?", [self.owner])

    def forget(self, keys: Iterable[str]) -> None:
        """Drop the results of these keys."""
        with self._asking(keys, writes=True) as asked:
            asked("DELETE FROM items WHERE key IN (SELECT key FROM asked)")

    def close(self) -> None:
        """Give up the claims and close the file."""
        self.give_up()
        self.connection.close()

    @contextmanager
    def _asking(self, keys: Iterable[str], writes: bool = False) -> Iterator[Any]:
        """One transaction, with a table ``asked`` of these keys."""
        with self._errors():
            run = self.connection.execute
            run("CREATE TEMP TABLE IF NOT EXISTS asked (key TEXT PRIMARY KEY) WITHOUT ROWID")
            run("BEGIN IMMEDIATE" if writes else "BEGIN")
            try:
                run("DELETE FROM asked")
                self.connection.executemany(
                    "INSERT OR IGNORE INTO asked VALUES (?)", ((key,) for key in keys)
                )
                yield lambda query: run(query).fetchall()
            except BaseException:
                run("ROLLBACK")
                raise
            run("COMMIT")

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise InputError(f"cannot use {self.path}: {error}") from error
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path} is not a store of finished items: {error}") from error


def _owner(process: psutil.Process) -> str:
    """A process, told from a later one of the same number."""
    return f"{platform.node()} {process.pid} {process.create_time():.2f}"


def _lives(owner: str) -> bool:
    """Whether the process is of this host and still at work."""
    host, pid, _ = owner.rsplit(" ", 2)
    if host != platform.node():
        return False
    try:
        process = psutil.Process(int(pid))
        return _owner(process) == owner and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
