"""Nothing lost, nothing counted twice: stores, kills, several processes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import script
from originals import write_original

from keyformer import InputError
from keyformer.evaluation import identity
from keyformer.evaluation.store import Store

ROOT = Path(__file__).parents[1]
WORDS = "the key tokens and the recent tokens of a text that is read word by word".split()
DEATHS = 20
MEASURED = {"seconds", "tokens_per_second", "date", "peak_memory_bytes", "items_from_store"}
"""What differs from run to run."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("resume") / "mpt-7b-keyformer", "mpt", "bin")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    """Of each task, of texts of different lengths, two of them alike."""
    folder = tmp_path_factory.mktemp("data")
    texts = [" ".join(WORDS[n % 5 :] * (1 + n % 4)) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4)]
    news = [{"instruction": "Sum up.", "input": text, "output": "the key"} for text in texts]
    talk = [
        {"narrative": text, "dialogue": ["the key", "a text"], "speakers": ["A", "B"]}
        for text in texts
    ]
    found = {"summarization": folder / "news.json", "conversation": folder / "talk.json"}
    for path, items in zip(found.values(), (news, talk), strict=True):
        path.write_text(json.dumps(items))
    return found


def command(name: str, model_path: Path, datasets, out: Path) -> list[str]:
    """One of the scripts on few and small items, its results in ``out``."""
    small = ["--device", "cpu", "--max_new_tokens", "3", "--bs", "2"]
    task = "conversation" if name == "dialogue" else "summarization"
    data = ["--dataset_path", str(datasets[task])]
    model = ["--model_path", str(model_path)]
    store = ["--store", str(out / "s.sqlite")]
    if name in ("summarize", "dialogue"):
        files = ["--save_path", str(out / "texts.txt"), "--score_path", str(out / "scores.json")]
        flags = [*model, *data, *small, *store, *files, "--keyformer", "--seed", "3"]
        return [str(ROOT / task / f"{name}.py"), *flags]
    if name == "compare":
        flags = ["--methods", "full", "keyformer", "--record", str(out / "rows.json")]
        return [str(ROOT / task / "compare.py"), *model, *data, *small, *store, *flags]
    if name == "table4":
        flags = ["--out", str(out), "--seeds", "0", "--n_obs", "4"]
        return [str(ROOT / "paper" / "table4.py"), *model, *data, *small, *store, *flags]
    raise ValueError(name)


def results(out: Path) -> dict[str, object]:
    """Everything a script wrote but its pictures, without what differs from run to run."""

    def plain(value):
        if isinstance(value, dict):
            return {name: plain(of) for name, of in value.items() if name not in MEASURED}
        return [plain(of) for of in value] if isinstance(value, list) else value

    found: dict[str, object] = {}
    for path in sorted(out.iterdir()):
        if path.suffix in (".txt", ".csv"):
            found[path.name] = path.read_bytes()
        elif path.suffix == ".json":
            found[path.name] = plain(json.loads(path.read_text().replace(str(out), "OUT")))
    return found


def stored(out: Path) -> list[str]:
    with sqlite3.connect(out / "s.sqlite") as connection:
        return [key for (key,) in connection.execute("SELECT key FROM items ORDER BY key")]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPTS = ("summarize", "dialogue", "compare", "table4")


@pytest.mark.parametrize("name", SCRIPTS)
def test_killed_at_random_moments(name, model_path, datasets, tmp_path) -> None:
    """The last life's results are those of a run that nobody killed, and no item is lost."""
    outs = []
    for deaths in (0, DEATHS):
        out = tmp_path / str(deaths)
        out.mkdir()
        killer = [sys.executable, str(ROOT / "tests" / "killed.py"), str(deaths)]
        of = command(name, model_path, datasets, out)
        done = subprocess.run([*killer, *of], capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        outs.append(out)
    assert int(done.stdout.splitlines()[-1]) > 3
    for out in outs:
        for path in out.glob("*.json"):
            text = path.read_text().replace(str(out), "OUT")
            path.write_text(text)
    assert results(outs[0]) == results(outs[1])
    assert stored(outs[0]) == stored(outs[1])
