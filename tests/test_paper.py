"""paper/: every sweep from flags to files, resumed where it was stopped."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import script
from originals import write_original

from keyformer import InputError, KeyformerConfig
from keyformer.evaluation import study
from keyformer.evaluation.sweep import Cell, Store, run_sweep, summarize

ROOT = Path(__file__).parents[1]
CELLS = {
    "fig5": 7,
    "fig7": 25,
    "key_set": 4,
    "recent_ratio": 19,
    "table3": 7,
    "table4": 4,
    "temperature": 16,
}
"""Each sweep's number of configurations."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("paper") / "mpt-7b-keyformer", "mpt", "bin")


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.json"
    text = "the key tokens and the recent tokens "
    items = [{"instruction": "Sum up.", "input": text * n, "output": text} for n in (2, 3, 4)]
    path.write_text(json.dumps(items))
    return path


@pytest.fixture
def flags(model_path, dataset_path, tmp_path) -> list[str]:
    return [
        *("--model_path", str(model_path), "--dataset_path", str(dataset_path)),
        *("--n_obs", "2", "--seeds", "0", "1", "--device", "cpu", "--max_new_tokens", "3"),
        *("--bs", "2", "--out", str(tmp_path / "out")),
    ]


@pytest.mark.parametrize("name", CELLS)
def test_sweep_writes_table_record_and_pictures(name, flags, tmp_path, monkeypatch, capsys) -> None:
    sweep = script("paper", name)
    sweep.main(flags)
    out = tmp_path / "out"
    printed = capsys.readouterr().out
    assert "mpt-7b-keyformer, summarization" in printed
    with (out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == CELLS[name]
    assert all(
        float(row["rouge2_low"]) <= float(row["rouge2"]) <= float(row["rouge2_high"])
        for row in rows
    )
    record = json.loads((out / f"{name}.json").read_text())
    assert record["items"] == {"summarization": 2} and len(record["rows"]) == CELLS[name]
    assert {"command", "commit", "versions", "device"} <= set(record)
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert b"</svg>" in (out / f"{name}.svg").read_bytes()

    monkeypatch.setattr(study, "generate", lambda *_, **__: pytest.fail("measured again"))
    sweep.main(flags)
    with (out / f"{name}.csv").open() as file:
        assert list(csv.DictReader(file)) == rows


def test_papers_numbers_stand_beside(flags, capsys) -> None:
    script("paper", "table4").main(flags)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("gaussian")]
    assert len(lines) == 1 and lines[0].split()[-1] == "10.17"


KILLED = """
import os, runpy, signal, sys
from keyformer.evaluation import study
generate, calls = study.generate, []
def killed_at_the_third(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(*args, **kwargs)
study.generate = killed_at_the_third
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_killed_sweep_continues(flags, tmp_path, monkeypatch) -> None:
    """What was measured before a kill is not measured again, and the results are the same."""
    command = [sys.executable, "-c", KILLED, str(ROOT / "paper" / "table4.py"), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    store = tmp_path / "out" / "table4.jsonl"
    before = store.read_text().splitlines()
    assert len(before) == 2 and not store.with_suffix(".csv").exists()
    calls = []
    generate = study.generate
    monkeypatch.setattr(study, "generate", lambda *a, **k: calls.append(1) or generate(*a, **k))
    script("paper", "table4").main(flags)
    after = store.read_text().splitlines()
    assert after[:2] == before and len(after) == 6 and len(calls) == 4
    fresh = tmp_path / "fresh"
    script("paper", "table4").main([*flags[:-1], str(fresh)])
    assert (fresh / "table4.csv").read_text() == (tmp_path / "out" / "table4.csv").read_text()


def test_seeds_are_for_what_draws_noise(tmp_path) -> None:
    calls = []

    def measure(config: KeyformerConfig) -> dict[str, list[float]]:
        calls.append((config.noise, config.seed))
        return {"rouge2": [1.0, 2.0]}

    cells = [Cell({"noise": noise}, KeyformerConfig(noise=noise)) for noise in ("none", "gumbel")]
    store = Store(tmp_path / "s.jsonl")
    rows = run_sweep(cells, [5, 6], measure, store, {"model": "a"})
    assert calls == [("none", 5), ("gumbel", 5), ("gumbel", 6)]
    assert [(row.labels["noise"], row.seeds) for row in rows] == [("none", 1), ("gumbel", 2)]
    run_sweep(cells, [5, 6], measure, Store(tmp_path / "s.jsonl"), {"model": "a"})
    assert len(calls) == 3
    run_sweep(cells[:1], [5], measure, Store(tmp_path / "s.jsonl"), {"model": "b"})
    assert len(calls) == 4  # another model is another measurement


def test_interval_is_that_of_the_mean() -> None:
    """Percentiles over resampled items agree with the normal approximation."""
    values = np.random.default_rng(3).normal(50, 10, size=400)
    mean, low, high = summarize({}, [{"x": list(values)}]).values["x"]
    spread = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - spread, abs=0.15)
    assert high == pytest.approx(mean + spread, abs=0.15)
    alike = summarize({}, [{"x": [1.0, 3.0]}, {"x": [3.0, 1.0]}]).values["x"]
    assert alike == (2.0, 2.0, 2.0)  # seeds are averaged before items are drawn


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--n_obs", "9"], "n_obs"),
        (["--bs", "0"], "--bs"),
        (["--task", "summarization", "conversation"], "--dataset_path"),
        (["--model_path", "nowhere"], "nowhere"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_named(flags, more, says) -> None:
    with pytest.raises(InputError, match=says):
        script("paper", "table4").main([*flags, *more])


def test_a_file_of_something_else_is_not_overwritten(flags, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table4.jsonl").write_text("my notes\n")
    with pytest.raises(InputError, match=r"table4\.jsonl"):
        script("paper", "table4").main(flags)
    assert (tmp_path / "out" / "table4.jsonl").read_text() == "my notes\n"
