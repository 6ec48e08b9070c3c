"""lm_eval_harness/ and table 2: prompts, flags, files, and the released order of arguments."""

from __future__ import annotations

import csv
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Forked, forked_ranks, script
from lm_eval.api.model import LM
from lm_eval.tasks import TaskManager
from originals import write_original

from keyformer import InputError, KeyformerConfig, load_model
from keyformer.quantize import weight_bytes
from keyformer_evaluation.studies import study
from keyformer_evaluation.studies.sweep import carry_out
from keyformer_evaluation.studies.written import Written
from keyformer_evaluation.tasks.flags import run_main
from keyformer_lm_eval.harness import evaluate, find_tasks
from keyformer_lm_eval.measure import Accuracy
from tiny.corpus import SHAPES, options

ROOT = Path(__file__).parents[1]
HARNESS = ROOT / "lm_eval_harness"
harness = script("lm_eval_harness", "run_lm_eval_harness")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    """Its tokenizer knows the tasks' words, so that prompts are short."""
    folder = tmp_path_factory.mktemp("harness") / "mpt-7b-keyformer"
    texts = "".join((HARNESS / "data" / f"{shape}.jsonl").read_text() for shape in SHAPES)
    return str(write_original(folder, "mpt", "safetensors", texts=texts, vocab_size=1500))


@pytest.fixture(scope="module", autouse=True)
def few_of_lm_evals_own():
    """Of the thousands of files of its tasks those of one that this project names."""
    manager = sys.modules[TaskManager.__module__]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(manager, "__file__", str(Path(manager.__file__).parent / "piqa" / "x.py"))
        yield
    find_tasks.__globals__["_known"].cache_clear()


class Asked(LM):
    """A model that likes the longest continuation, and remembers what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.requests: list[tuple[str, str]] = []

    def loglikelihood(self, requests):
        self.requests += [request.args for request in requests]
        return [(float(len(request.args[1])), False) for request in requests]

    def loglikelihood_rolling(self, requests):
        raise AssertionError

    generate_until = loglikelihood_rolling


def documents(name: str) -> list[dict]:
    return [json.loads(line) for line in (HARNESS / "data" / f"{name}.jsonl").open()]


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_are_those_the_models_were_trained_on(shape: str) -> None:
    """Every question's prompts and continuations; with shots, others before them are solved."""
    task, asked = f"tiny_{shape}", Asked()
    results = evaluate(asked, [task], find_tasks([task]), 0, bootstrap_iters=0)
    expected = [options(shape, document) for document in documents(shape)]
    pairs = [(prompt, f" {end}") for choices, _ in expected for prompt, end in choices]
    assert asked.requests == pairs
    right = [
        max(range(len(choices)), key=lambda i: len(choices[i][1])) == gold
        for choices, gold in expected
    ]
    assert results["results"][task]["acc,none"] == pytest.approx(sum(right) / len(right))

    asked.requests.clear()
    evaluate(asked, [task], find_tasks([task]), 5, bootstrap_iters=0, limit=3)
    solved = {
        " ".join(choices[gold])
        for choices, gold in (options(shape, one) for one in documents(f"{shape}_train"))
    }
    for (prompt, end), (alone, its_end) in zip(asked.requests, pairs, strict=False):
        *examples, last = prompt.split("\n\n")
        assert (last, end) == (alone, its_end)
        assert len(set(examples)) == 5 and solved.issuperset(examples)


def run(model_path: str, out: Path, *flags: str) -> dict:
    """The script on the CPU, with few documents; its record."""
    argv = ["--model_path", model_path, "--device", "cpu", "--limit", "2", "--out", str(out)]
    harness.main([*argv, *flags])
    return json.loads((out / "record.json").read_text())


def test_files_of_a_run(model_path, tmp_path, capsys) -> None:
    """lm-eval's results and samples of each task, and how they came about."""
    flags = ["--tasks", "tiny_copa", "tiny_wino*", "--keyformer", "--kv_cache", "40"]
    record = run(model_path, tmp_path, *flags, "--bs", "3", "--seed", "5")
    assert record["method"] == "keyformer" and record["config"]["kv_cache"] == 40
    assert record["config"]["seed"] == 5 and record["dtype"] == "float32"
    assert {"commit", "versions", "device", "command", "lm_eval", "peak_memory_bytes"} <= set(
        record
    )
    assert set(record["results"]) == {"tiny_copa", "tiny_winogrande"}
    (results,) = tmp_path.glob("*/results_*.json")
    saved = json.loads(results.read_text())
    assert saved["results"]["tiny_copa"]["acc,none"] in (0, 0.5, 1)
    assert saved["config"]["model_args"]["kv_cache"] == 40
    samples = [path.read_text().splitlines() for path in tmp_path.glob("*/samples_tiny_*.jsonl")]
    assert [len(lines) for lines in samples] == [2, 2]
    assert "tiny_winogrande" in capsys.readouterr().out


def test_chunks_and_method_are_the_models(model_path, tmp_path) -> None:
    """Full attention gives the same likelihoods in chunks; an evicting method gives others."""
    found = []
    for flags in ([], ["--prefill_chunk", "10"], ["--attention", "h2o", "--kv_cache", "20"]):
        out = tmp_path / str(len(found))
        run(model_path, out, "--tasks", "tiny_copa", *flags)
        (samples,) = out.glob("*/samples_*.jsonl")
        lines = map(json.loads, samples.read_text().splitlines())
        found.append([float(answer[0]) for line in lines for answer in line["filtered_resps"]])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
    assert found[2] != pytest.approx(found[0], abs=1e-3)


def test_b1_quantized_weights_are_loaded_and_recorded(model_path, tmp_path) -> None:
    """Fewer bytes than unquantized, in the record and in lm-eval's own results."""
    records = {
        kind: run(model_path, tmp_path / str(kind), "--tasks", "tiny_copa", *flags)
        for kind, flags in ((None, ()), ("int8", ("--quantize", "int8")))
    }
    assert {kind: record["quantize"] for kind, record in records.items()} == {
        None: None,
        "int8": "int8",
    }
    layers = load_model(model_path, device="cpu", dtype="float32", quantize="int8")[0]
    assert records["int8"]["weight_bytes"] == weight_bytes(layers)
    assert records["int8"]["weight_bytes"] < records[None]["weight_bytes"]
    for kind, record in records.items():
        (results,) = (tmp_path / str(kind)).glob("*/results_*.json")
        config = json.loads(results.read_text())["config"]
        assert config["model_args"]["quantize"] == kind
        assert config["weight_bytes"] == record["weight_bytes"]


def test_two_processes_write_what_one_writes(model_path, tmp_path, capsys) -> None:
    """Three documents, so that one of them has two: samples, results and what is printed."""
    flags = ["--model_path", model_path, "--device", "cpu", "--keyformer", "--kv_cache", "40"]
    flags += ["--tasks", "tiny_copa", "--num_fewshot", "2", "--limit", "3", "--bs", "1"]
    one, two = tmp_path / "one", tmp_path / "two"
    harness.main([*flags, "--out", str(one)])
    command = [str(HARNESS / "run_lm_eval_harness.py"), *flags, "--out", str(two)]
    ended = forked_ranks(command, tmp_path / "says", 2)
    assert [code for code, _, _ in ended] == [0, 0], ended
    printed = "".join(out for _, out, _ in ended)
    assert printed.replace(str(two), str(one)) == capsys.readouterr().out
    records = [json.loads((out / "record.json").read_text()) for out in (one, two)]
    assert [record["processes"] for record in records] == [1, 2]
    assert records[0]["results"] == records[1]["results"]
    samples = [path.read_text() for out in (one, two) for path in out.glob("*/samples_*.jsonl")]
    assert len(samples) == 2 and samples[0] == samples[1]


def test_more_processes_than_documents_are_an_error(model_path, tmp_path, tmp_path_factory) -> None:
    says = tmp_path_factory.mktemp("says")
    flags = ["--model_path", model_path, "--tasks", "tiny_copa", "--out", str(tmp_path)]
    command = [str(HARNESS / "run_lm_eval_harness.py"), *flags, "--limit", "1"]
    for code, _, errors in forked_ranks(command, says, 2):
        assert code == 2
        assert "the 1 documents of tiny_copa cannot be shared out over 2 processes" in errors
    assert not list(tmp_path.glob("*"))


BAD = [
    (["--tasks", "tiny_copa", "copper"], "'copper'"),
    (["--num_fewshot", "-1"], "--num_fewshot must be at least 0, got -1"),
    (["--limit", "0"], "--limit"),
    (["--bs", "0"], "--bs"),
    (["--max_length", "1"], "--max_length"),
    (["--prefill_chunk", "0"], "prefill_chunk"),
    (["--kv_cache", "0"], "kv_cache"),
    (["--attention", "snapkv"], "snapkv"),
    (["--model_type", "llama"], "--model_type llama contradicts"),
    (["--model_type", "gptj"], "--model_type gptj contradicts the checkpoint, which is a mpt"),
    (["--model_path", "nowhere/model"], "nowhere/model"),
    (["--model_parallelize"], "--device"),
    (["--no-causal_lm"], "encoder-decoder"),
    (["--dtype", "float8"], "float8"),
    (["--device", "cuda:99"], "device 'cuda:99' is not available"),
    (["--device", "cuda:99", "--dtype", "float32"], "device 'cuda:99' is not available"),
    (["--out", "{file}/out"], "file"),
]


@pytest.mark.parametrize(("flags", "says"), BAD)
def test_bad_input_is_one_line_and_exit_code_2(
    flags, says, model_path, tmp_path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("kept")
    argv = ["--model_path", model_path, "--device", "cpu", "--out", str(tmp_path / "out")]
    argv += ["--tasks", "tiny_copa", *(part.format(file=tmp_path / "file") for part in flags)]
    monkeypatch.setattr(sys, "argv", ["run_lm_eval_harness.py", *argv])
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda _: harness.main(argv))
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if "Loading weights" not in line]  # its progress bar
    assert stopped.value.code == 2
    assert len(lines) == 1 and says in lines[0]
    assert not list(tmp_path.glob("out/*")) and (tmp_path / "file").read_text() == "kept"


def test_data_that_cannot_be_had_are_one_line(model_path, tmp_path) -> None:
    """The paper's tasks are on the hub, which the tests do not reach."""
    with pytest.raises(InputError, match="cannot read the data of piqa: "):
        run(model_path, tmp_path, "--tasks", "piqa")
    assert not list(tmp_path.glob("*"))


def shell(name: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = ["bash", str(HARNESS / name), *arguments]
    environment = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_run_sh_takes_the_released_order_of_arguments() -> None:
    nine = ["copa", "5", "gpt-j", "models/gptj", "gptj", "float16", "0", "60", "20"]
    line = shell("run.sh", *nine, "--limit", "3", PYTHON="echo", OUT_DIR="out").stdout
    flags = line.split()[1:]
    assert flags == [
        *("--tasks", "copa", "--num_fewshot", "5", "--model_name", "gpt-j"),
        *("--model_path", "models/gptj", "--model_type", "gptj", "--dtype", "float16"),
        *("--attention", "full", "--kv_cache", "60", "--recent", "20"),
        *("--out", "out/gpt-j/copa-5/full", "--limit", "3"),
    ]
    assert "--attention keyformer" in shell("run.sh", *nine[:6], "1", PYTHON="echo").stdout
    wrong = shell("run.sh", *nine[:6], "yes")
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and "'yes'" in wrong.stderr
    lines = shell("experiments.sh", PYTHON="echo").stdout.splitlines()
    assert len(set(lines)) == len(lines) == 16
    assert all("--kv_cache 50 --recent 30" in line for line in lines)


def test_run_sh_without_network(tmp_path) -> None:
    """Its defaults, on two questions."""
    defaults = shell("run.sh", PYTHON="echo").stdout.split()[1:]
    command = [str(HARNESS / "run_lm_eval_harness.py"), *defaults, "--out", str(tmp_path)]
    code, _, errors = Forked([*command, "--limit", "2", "--device", "cpu"], tmp_path).wait()
    assert code == 0, errors
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["tasks"] == ["tiny_copa"] and record["method"] == "keyformer"
    assert record["model"] == "mpt-tiny-keyformer" and record["config"]["kv_cache"] == 50


def test_table_2(model_path, tmp_path, capsys, monkeypatch) -> None:
    """Each task, shots and method; nothing is measured twice. The paper's numbers are beside its
    own models and tasks alone."""
    table2 = script("paper", "table2")
    flags = ["--model_path", model_path, "--tasks", "tiny_copa", "--n_obs", "1"]
    flags += ["--seeds", "0", "1", "--device", "cpu", "--out", str(tmp_path)]
    carry_out([table2.main(flags)])
    capsys.readouterr()
    monkeypatch.setattr(Accuracy, "__call__", lambda *_: pytest.fail("measured again"))
    carry_out([table2.main(flags)])
    printed = capsys.readouterr().out
    assert "paper: accuracy, %" not in printed
    assert table2.PAPER["MPT-7B", "copa"][5, "h2o"] == (82.0,)
    assert table2.PAPER["Cerebras-GPT-6.7B", "piqa"][0, "keyformer"] == (73.0,)
    monkeypatch.setattr(study, "papers_model", lambda path: "MPT-7B")
    numbers = {**table2.PAPER, ("MPT-7B", "tiny_copa"): table2.PAPER["MPT-7B", "copa"]}
    monkeypatch.setattr(table2, "PAPER", numbers)
    monkeypatch.setattr(Written, "write", lambda *_: None)
    carry_out([table2.main(flags)])
    lines = capsys.readouterr().out.splitlines()
    head = next(at for at, line in enumerate(lines) if line.endswith("paper: accuracy, %"))
    beside = [line.split()[-1] for line in lines[head + 1 : head + 7]]
    assert beside == ["80.00", "75.00", "76.00", "83.00", "82.00", "84.00"]
    with (tmp_path / "table2.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["accuracy"] for row in rows} <= {"0.0", "50.0", "100.0"}
    assert [row["seeds"] for row in rows[:3]] == ["1", "1", "2"]
    assert "Is Keyformer better than H2O at 5 shots?" in printed
    record = json.loads((tmp_path / "table2.json").read_text())
    assert record["command"].startswith("python paper/table2.py --model_path")
    assert record["rows"][2]["config"]["kv_cache"] == 50
    assert (tmp_path / "table2.png").read_bytes().startswith(b"\x89PNG")


def test_accuracy_is_of_multiple_choice_tasks(model_path) -> None:
    measure = Accuracy(model_path, "float32", "tiny", shots=0, limit=1, bs=1)
    with pytest.raises(InputError, match="'tiny' is not one of multiple choice"):
        measure(KeyformerConfig.preset("full"), torch.device("cpu"), [0])


def test_b10_more_examples_than_a_task_has(model_path, tmp_path) -> None:
    flags = ["--model_path", model_path, "--tasks", "tiny_copa", "--limit", "1", "--device", "cpu"]
    with pytest.raises(InputError, match="num_fewshot 900 is more than the examples"):
        harness.main([*flags, "--out", str(tmp_path), "--num_fewshot", "900"])


def test_b13_the_record_names_where_requests_were_answered(model_path, tmp_path) -> None:
    flags = ["--model_path", model_path, "--tasks", "tiny_copa", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "out"), "--store", str(tmp_path / "s.sqlite")]
    harness.main([*flags, "--limit", "1"])
    first = json.loads((tmp_path / "out" / "record.json").read_text())
    with sqlite3.connect(tmp_path / "s.sqlite") as connection:
        connection.execute("UPDATE sources SET source = ?", [json.dumps({"commit": "old"})])
    harness.main([*flags, "--limit", "3"])
    record = json.loads((tmp_path / "out" / "record.json").read_text())
    assert "elsewhere" not in first and first["requests_from_store"] == 0
    assert record["elsewhere"] == [{"items": 1, "commit": "old"}]
    assert record["commit"] == first["commit"] and record["requests_from_store"] == 1
