"""paper/: every sweep from flags to files, resumed where it was stopped."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shutil
import sqlite3
import subprocess
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from conftest import Forked, script
from matplotlib.axes import Axes
from originals import ORIGINALS, write_original

from keyformer import InputError, KeyformerCache, KeyformerConfig, load_model
from keyformer_evaluation.records.identity import weights_hash
from keyformer_evaluation.studies import measures, study
from keyformer_evaluation.studies.measures import (
    Attention,
    Continued,
    Likelihood,
    Rouge,
    Softmax,
)
from keyformer_evaluation.studies.pictures import LOOKS, looks_of
from keyformer_evaluation.studies.published import papers_model
from keyformer_evaluation.studies.study import BUNDLED, BUNDLED_MODELS, PAPER, Study
from keyformer_evaluation.studies.sweep import Cell, Request, Row, Run, Steps, carry_out, summarize
from keyformer_evaluation.studies.tables import alike, difference
from keyformer_evaluation.studies.written import Written, read_written
from keyformer_evaluation.tasks.data import TASKS, encode
from keyformer_evaluation.tasks.generation import Generated

ROOT = Path(__file__).parents[1]
STUDIES = {
    "beyond": 48,
    "cache_dtype": 21,
    "fig3": 4,
    "fig4": 4,
    "fig5": 7,
    "fig7": 25,
    "fig8": 16,
    "key_set": 4,
    "recent_ratio": 19,
    "table3": 7,
    "table4": 4,
    "temperature": 16,
}
"""Each script's number of rows, of one model and task; of fig3 its part c."""


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


def run(name: str, flags: list[str]) -> None:
    """A script of paper/ with these flags."""
    carry_out([script("paper", name).main(flags)])


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def test_all_together_are_quick_and_complete(tmp_path) -> None:
    """paper/all.sh --quick: every script writes its files; the model is the first bundled one."""
    flags = ["--quick", "--device", "cpu"]
    shape = {"n_layers": 4, "n_heads": 8}  # as many as fig4 looks at by default
    # A tokenizer that knows the documents' words: each cell reads fewer tokens.
    shape |= {"vocab_size": 1500, "texts": "".join(path.read_text() for path in BUNDLED.values())}
    model = write_original(tmp_path / "mpt-7b-keyformer", "mpt", "bin", **shape)
    assert Study("table4", None, flags, {}).flags.model_path == [str(BUNDLED_MODELS[0])]
    out = tmp_path / "out"
    command = [str(ROOT / "paper" / "all.sh"), *flags, "--model_path", str(model)]
    command += ["--out", str(out)]
    environment = {**os.environ, "PYTHON": "echo"}
    made = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    code, printed, errors = Forked(made.stdout.split(), tmp_path / "says").wait()
    assert code == 0, errors
    for name, count in STUDIES.items():
        name = {"fig3": "fig3c"}.get(name, name)
        record = json.loads((out / f"{name}.json").read_text())
        rows = rows_of(out, name)
        if name != "fig4":  # whose table has a line for each weight
            assert len(rows) == len(record["rows"])
            for row in rows:
                metric = "rouge2" if row["rouge2"] else "bits"
                low, high = float(row[f"{metric}_low"]), float(row[f"{metric}_high"])
                assert low <= float(row[metric]) <= high
        assert len(record["rows"]) == count * (2 if name == "fig7" else 1)
        assert {"commit", "versions", "device", "items", "seeds", "dtype"} <= set(record)
        assert record["command"].startswith(f"python paper/{name.removesuffix('c')}.py ")
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert b"</svg>" in (out / f"{name}.svg").read_bytes()
    for answer in ("Does Gumbel noise beat none?", "dynamic - frozen", "No setting beats all"):
        assert answer in printed
    constant = next(line for line in printed.splitlines() if "constant - none" in line)
    after = printed.split(constant)[1].splitlines()[2]
    assert after.endswith("equal on every document")


@pytest.mark.parametrize("name", ["fig3", "fig4", "table4"])
def test_finished_study_is_not_measured_again(name, flags, tmp_path, monkeypatch) -> None:
    more = ["--layer", "1", "--head", "0"] if name == "fig4" else []
    run(name, [*flags, *more])
    files = {path: path.read_bytes() for path in (tmp_path / "out").glob("*.csv")}
    assert files
    for measure in (Rouge, Attention, Softmax):
        monkeypatch.setattr(measure, "__call__", lambda *_: pytest.fail("measured again"))
    run(name, [*flags, *more])
    assert {path: path.read_bytes() for path in files} == files


def test_papers_numbers_stand_beside_its_models_alone(flags, capsys, monkeypatch) -> None:
    """Whatever the folder's name, which here is that of MPT-7B."""
    monkeypatch.setattr(Written, "write", lambda *_: None)
    run("table4", flags)
    assert "paper: " not in capsys.readouterr().out
    monkeypatch.setattr(study, "papers_model", lambda path: "MPT-7B")
    run("table4", flags)
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("gaussian")]
    assert "paper: ROUGE-2" in printed and len(lines) == 1 and lines[0].split()[-1] == "10.17"


def test_papers_models_are_told_by_their_configurations(model_path, tmp_path) -> None:
    names = {"mpt": "MPT-7B", "gptj": "GPT-J-6B", "cerebras": "Cerebras-GPT-6.7B"}
    for arch, original in ORIGINALS.items():
        folder = tmp_path / arch
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(original.fields))
        assert papers_model(str(folder)) == names[arch]
    note = tmp_path / "mpt" / "download_info.json"
    for name, expected in (("mosaicml/mpt-7b", "MPT-7B"), ("mosaicml/mpt-7b-chat", None)):
        note.write_text(json.dumps({"model_name": name, "revision": "a1"}))
        assert papers_model(str(tmp_path / "mpt")) == expected
    story = {**ORIGINALS["mpt"].fields, "max_seq_len": 65536}
    (tmp_path / "gptj" / "config.json").write_text(json.dumps(story))
    for other in (tmp_path / "gptj", model_path, tmp_path / "none", *BUNDLED_MODELS):
        assert papers_model(str(other)) is None


def test_settings_of_the_paper(model_path, tmp_path, monkeypatch) -> None:
    """They reach what is generated, what it is kept by, and the record."""
    item = {"instruction": "Sum up.", "input": "the key tokens. " * 600, "output": "the"}
    (tmp_path / "cnndm_eval.json").write_text(json.dumps([item]))
    flags = ["--model_path", str(model_path), "--seeds", "0", "--device", "cpu"]
    flags += ["--dataset_path", str(tmp_path / "cnndm_eval.json"), "--out", str(tmp_path / "out")]
    asked = []

    def generate(model, tokenizer, prompts, config, **options):
        asked.append((len(encode(tokenizer, prompts[0])["input_ids"]), options))
        return [Generated(["the"], None, 1, 1.0, 1.0, 1.0) for _ in prompts]

    monkeypatch.setattr(measures, "generate", generate)
    monkeypatch.setattr(Written, "write", lambda *_: None)
    run("table4", [*flags, "--settings", "paper"])
    count, (tokens, options) = len(asked), asked[-1]
    assert 1900 < tokens <= 1920
    assert options["num_beams"] == 4 and options["early_stopping"]
    assert (options["min_new_tokens"], options["max_new_tokens"]) == (30, 128)
    record = json.loads((tmp_path / "out" / "table4.json").read_text())
    lengths = {"max_new_tokens": {"summarization": 128}}
    expected = {"settings": "paper", **PAPER, **lengths}
    assert {name: record[name] for name in expected} == expected

    flags += ["--prompt", "alpaca"]
    each = ("--max_tokenizer_length=1920", "--beam=4", "--early_stopping", "--min_gen_length=30")
    run("table4", [*flags, *each])
    assert len(asked) == count  # the same, flag by flag: all is in the store
    for three in combinations(each, 3):  # and measured anew where one differs
        run("table4", [*flags, *three])
    assert len(asked) == 5 * count
    run("table4", flags)
    tokens, options = asked[-1]
    assert tokens > 1920 and options["num_beams"] == 1 and not options["early_stopping"]
    assert options["min_new_tokens"] is None and len(asked) == 6 * count


@dataclass(frozen=True)
class Counted:
    """A measure that is quickly done, and says of what."""

    path: str
    calls: list[tuple[str, int | None, list[int]]]
    costs: tuple[float, ...] = (1.0, 2.0)
    bs: int = 2
    setting: ClassVar[dict[str, str]] = {}
    contents: ClassVar[list[str]] = ["an item", "another"]

    def __call__(self, config: KeyformerConfig, device: torch.device, items) -> list[dict]:
        self.calls.append((config.noise, config.seed, items))
        return [{"rouge2": float(item)} for item in items]

    def __hash__(self) -> int:
        return hash(self.path)


def requested(measure, noises, seeds, store: Path) -> Steps:
    configs = [KeyformerConfig(noise=noise, seed=seed) for noise in noises for seed in seeds]
    runs = [Run(measure, config) for config in configs]
    found = yield Request(runs, store, "cpu")
    assert all(found[run] == {"rouge2": [0.0, 1.0]} for run in runs)


def test_studies_share_what_they_have_in_common(tmp_path) -> None:
    """Models one after the other, of each what takes long first, and nothing twice."""
    calls: list = []
    store = tmp_path / "s.sqlite"
    a, b = Counted("a", calls), Counted("b", calls, costs=(9.0, 1.0), bs=1)
    carry_out(
        [
            requested(a, ["none", "gumbel"], [5], store),
            requested(b, ["constant"], [5], store),
            requested(a, ["gumbel"], [5, 6], store),
        ]
    )
    assert calls == [
        ("none", 5, [1, 0]),
        ("gumbel", 5, [1, 0]),
        ("gumbel", 6, [1, 0]),
        ("constant", 5, [0]),
        ("constant", 5, [1]),
    ]
    carry_out([requested(a, ["none"], [5, 7], store)])  # what draws no noise knows no seed
    assert len(calls) == 5 and items_in(store) == 8


def items_in(store: Path) -> int:
    """How many items a store has."""
    with sqlite3.connect(store) as connection:
        return connection.execute("SELECT count(*) FROM items").fetchone()[0]


def test_seeds_are_for_what_draws_noise(flags, tmp_path) -> None:
    run("table4", flags)
    assert [(row["noise"], row["seeds"]) for row in rows_of(tmp_path / "out", "table4")] == [
        ("gumbel", "2"),
        ("gaussian", "2"),
        ("constant", "1"),
        ("none", "1"),
    ]


def test_another_checkpoint_in_the_folder_is_measured_anew(flags, tmp_path) -> None:
    model = shutil.copytree(flags[1], tmp_path / "model")
    flags[1] = str(model)
    run("table4", flags)
    weights_hash.cache_clear()
    (weights,) = Path(model).glob("*.bin")
    state = torch.load(weights)
    torch.save({name: 2 * tensor for name, tensor in state.items()}, weights)
    run("table4", flags)
    assert items_in(tmp_path / "out" / "measured.sqlite") == 2 * 2 * 6


def row(values: list[float]) -> Row:
    return summarize(Cell({}, KeyformerConfig()), [{"rouge2": values}])


def test_interval_is_that_of_the_mean() -> None:
    """Percentiles over resampled items agree with the normal approximation."""
    values = np.random.default_rng(3).normal(50, 10, size=400)
    mean, low, high = row(list(values)).values["rouge2"]
    spread = 1.96 * values.std() / 20
    assert mean == pytest.approx(values.mean())
    assert low == pytest.approx(mean - spread, abs=0.15)
    assert high == pytest.approx(mean + spread, abs=0.15)
    by_seed = [{"x": [1.0, 3.0]}, {"x": [3.0, 1.0]}]
    same = summarize(Cell({}, KeyformerConfig()), by_seed).values["x"]
    assert same == pytest.approx((2.0, 2.0, 2.0))  # seeds are averaged before items are drawn


def test_rows_share_a_letter_where_intervals_overlap() -> None:
    spans = [(0, 2), (1, 4), (3, 5), (6, 7), (1.5, 3.5), (5, 5.5)]
    rows = [
        Row({}, {"x": ((low + high) / 2, low, high)}, KeyformerConfig(), 1, {})
        for low, high in spans
    ]
    letters = alike(rows, "x")
    for (a, (low, high)), (b, (other_low, other_high)) in product(enumerate(spans), repeat=2):
        overlap = low <= other_high and other_low <= high
        assert bool(set(letters[a]) & set(letters[b])) == overlap


def test_difference_is_paired() -> None:
    """A small step on every item shows, however much the items differ."""
    values = np.random.default_rng(3).normal(50, 10, size=100)
    mean, low, high = difference(row(list(values + 0.5)), row(list(values)))
    assert (mean, low, high) == pytest.approx((0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("kind", "metric", "unit"), [(Likelihood, "bits", math.log(2)), (Continued, "nll", 1)]
)
def test_likelihood_of_a_full_cache_is_that_of_the_whole_text(
    model_path, kind, metric, unit
) -> None:
    """Token by token through slots, in a padded batch: as one forward pass over each text; of a
    text's second half, or of its last 20 tokens."""
    items = [
        {"instruction": "Sum up.", "input": "key tokens stay. " * n, "output": ""}
        for n in (3, 5, 9)
    ]
    measure = kind(str(model_path), "float32", "summarization", items, 3, 1, 20)
    found = measure(KeyformerConfig.preset("full"), torch.device("cpu"), range(3))
    means = [of[metric] for of in found]
    stock, tokenizer = load_model(model_path, dtype="float32", device="cpu")
    lengths = []
    for item, found in zip(items, means, strict=True):
        before = TASKS["summarization"].prompt(item).partition(item["input"])[0]
        opening = tokenizer(before)["input_ids"]
        document = tokenizer(item["input"])["input_ids"]
        half = len(document) - len(document) // 2
        second = half if kind is Likelihood else min(20, half)
        lengths.append(second)
        ids = torch.tensor([opening + document])
        with torch.no_grad():
            logits = stock(ids, use_cache=False).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        assert found == pytest.approx(float(lost[-second:].mean()) / unit, abs=1e-4)
    assert lengths[0] < 20 and (lengths[-1] == 20) == (kind is Continued)


def test_documents_end_where_the_positions_do(tmp_path) -> None:
    """What a model was trained with is all that is read and predicted."""
    path = write_original(tmp_path / "model", "cerebras", "bin")
    text = {"instruction": "Sum up.", "input": "key tokens stay. " * 99, "output": ""}
    measure = Continued(str(path), "float32", "summarization", [text], 1, 1, 12)
    model, _ = measure.load(torch.device("cpu"))
    read = []
    model.register_forward_hook(lambda *call: read.append(call[2].logits.shape), always_call=True)
    measure(KeyformerConfig.preset("full"), torch.device("cpu"), [0])
    assert len(read) == 12
    long = {**text, "instruction": "Sum up. " * 999}
    with pytest.raises(InputError, match="leave no room for a document after the"):
        replace(measure, items=[long])(KeyformerConfig.preset("full"), torch.device("cpu"), [0])


def test_the_frontier_is_drawn_from_the_tables(tmp_path, capsys) -> None:
    """Of the methods and sizes that both have; what is missing is named, and nothing written."""
    frontier = script("paper", "frontier")
    (tmp_path / "news").mkdir()

    def table(name: str, task: str, metric: str, rows: dict[tuple[str, str], float]) -> None:
        ends = ("", "_low", "_high")
        lines = [",".join(["model", "task", "method", "kv_cache", *(metric + of for of in ends)])]
        lines += [f"m,{task},{of},{at},{v},{v - 1},{v + 2}" for (of, at), v in rows.items()]
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    with pytest.raises(InputError, match=r"no summaries\.csv"):
        frontier.main([str(tmp_path)])
    found = {("full", ""): 90, ("h2o", "50"): 20, ("h2o", "20"): 10, ("recall", "50"): 80}
    table("retrieval.csv", "needle", "answered", found)
    lost = {("full", ""): 0, ("h2o", "50"): 0.5, ("h2o", "20"): 1.5, ("window", "50"): 3}
    table("news/summaries.csv", "reference", "nll_minus_full", lost)
    with pytest.raises(InputError, match=r"--datasets must be of news, .* got xsum"):
        frontier.main([str(tmp_path), "--datasets", "xsum"])
    assert not list(tmp_path.glob("frontier.*"))
    tables = [frontier.read(tmp_path / name) for name in ("retrieval.csv", "news/summaries.csv")]
    assert frontier.points(*tables, "reference", "50") == {
        "full": ((90, 89, 92), (0, -1, 2)),
        "h2o": ((20, 19, 22), (0.5, -0.5, 2.5)),
    }
    frontier.main([str(tmp_path)])
    picture = (tmp_path / "frontier.svg").read_text()
    assert all(text in picture for text in ("cache 50 % of the prompt", "news, summaries", "H2O"))
    assert "recall" not in picture
    assert "frontier.{png,svg,json}" in capsys.readouterr().out
    summaries = tmp_path / "news" / "summaries.csv"
    good = summaries.read_text()
    for bad, says in (
        ("a,b\n1,2\n", "cannot read results from .*KeyError"),
        (good.replace("1.5", "abc"), "cannot read results from .*abc"),
        (good.replace(",20,", ",ten,"), "cannot read results from .*ten"),
        (good.splitlines()[0] + "\n", "have no needles and losses"),
        (good + good.splitlines()[1].replace("m,", "other,", 1) + "\n", "several models, m, other"),
    ):
        summaries.write_text(bad)
        with pytest.raises(InputError, match=says):
            frontier.main([str(tmp_path)])
    assert (tmp_path / "frontier.svg").read_text() == picture


COMMITTED = sorted(
    record
    for record in (ROOT / "paper" / "results").rglob("*.json")
    if record.with_suffix(".png").exists() and "local" not in record.parts
)


@pytest.fixture(scope="module")
def redraw():
    return script("paper", "redraw")


@pytest.mark.parametrize("record", COMMITTED, ids=lambda path: path.stem)
def test_committed_records_are_drawn_again(redraw, record) -> None:
    """Each has its title, its setting, and something in every panel that is seen."""
    figure = redraw.figure_of(read_written(record))
    title, about, *_ = (text.get_text() for text in figure.texts)
    assert title and re.search("NVIDIA|H200", about)
    for ax in filter(Axes.get_visible, figure.axes):
        assert ax.lines or ax.patches or ax.images or ax.collections
        assert ax.get_xlabel() or ax.get_subplotspec().rowspan.stop < ax.get_gridspec().nrows
    assert len(COMMITTED) >= 32


def test_a_picture_drawn_again_is_the_one_of_the_run(redraw, flags, tmp_path) -> None:
    """To the byte; the record and the table stay."""
    run("table4", [*flags, "--seeds", "0", "--n_obs", "1"])
    out = tmp_path / "out"
    before = {path: path.read_bytes() for path in out.glob("table4.*")}
    assert {path.suffix for path in before} == {".json", ".csv", ".png", ".svg"}
    for kind in (".png", ".svg"):
        (out / "table4").with_suffix(kind).write_bytes(b"")
    redraw.main([str(out)])
    assert {path: path.read_bytes() for path in before} == before


def test_of_a_folder_what_has_a_picture_is_drawn_again(redraw, tmp_path) -> None:
    """A record that is named by itself in any case."""
    (tmp_path / "more").mkdir()
    for name in ("a.json", "a.png", "b.json", "more/c.json", "more/c.png"):
        (tmp_path / name).write_text("")
    assert [*redraw.records(tmp_path)] == [tmp_path / "a.json", tmp_path / "more" / "c.json"]
    assert [*redraw.records(tmp_path / "b.json")] == [tmp_path / "b.json"]


def test_what_cannot_be_drawn_again_is_named(redraw, tmp_path) -> None:
    """Before anything is written."""
    results = ROOT / "paper" / "results"
    record = json.loads((results / "table4.json").read_text())
    path = tmp_path / "table4.json"
    with pytest.raises(InputError, match="cannot read a record from"):
        redraw.main([str(path)])
    for bad, says in (
        ("[]", "holds no object"),
        ("{}", "names no command"),
        (json.dumps({**record, "command": "python other.py"}), "other.py is no script"),
        (json.dumps({**record, "rows": [{"noise": "none"}]}), "cannot draw"),
        (json.dumps({**record, "command": "python paper/together.py"}), "together.py is no script"),
    ):
        path.write_text(bad)
        with pytest.raises(InputError, match=says):
            redraw.main([str(results / "fig3c.json"), str(path)])
    with pytest.raises(InputError, match="has no record with a picture"):
        redraw.main([str(tmp_path)])
    assert [*tmp_path.iterdir()] == [path]


def test_a_method_looks_alike_in_every_figure() -> None:
    """And unlike any other; full attention is black."""
    looks = [(look.color, look.marker) for look in LOOKS.values()]
    assert len({color for color, _ in looks}) == len(looks)
    assert LOOKS["full"].color == "#000000"
    found = looks_of(["mine", "h2o", "other", "mine"])
    assert found["h2o"] == LOOKS["h2o"] and list(found) == ["mine", "h2o", "other"]
    assert len({look.color for look in [*found.values(), *LOOKS.values()]}) == len(LOOKS) + 2


def test_the_headline_is_drawn_from_records(tmp_path, capsys) -> None:
    """Its numbers are theirs; a record of something else is refused, and nothing written."""
    headline = script("paper", "headline")
    with pytest.raises(InputError, match="lack what is drawn"):
        headline.main(["--out", str(tmp_path), "--decode", str(headline.RECORDS["retrieval"])])
    assert not list(tmp_path.iterdir())
    headline.main(["--out", str(tmp_path)])
    picture = (tmp_path / "headline.svg").read_text()
    decode = json.loads(headline.RECORDS["decode"].read_text())["rows"]
    for engine in headline.ENGINES:
        ms = next(row["ms"] for row in decode if row["engine"] == engine)
        assert f">{ms:.1f}</text>" in picture
    record = json.loads((tmp_path / "headline.json").read_text())
    assert [(tmp_path / path).resolve() for path in record["drawn_from"]] == [
        *headline.RECORDS.values()
    ]


def test_sparsity_and_mass_of_attention(model_path) -> None:
    """Figure 3 against loops over the weights of one forward pass."""
    item = {
        "instruction": "Sum up.",
        "input": "key tokens stay. " * 5,
        "output": "recent ones too.",
    }
    measure = Attention(str(model_path), "float32", "summarization", [item], 1, 1, 50)
    (found,) = measure(KeyformerConfig.preset("full"), torch.device("cpu"), [0])
    model, tokenizer = load_model(model_path, dtype="float32", device="cpu")
    prompt = tokenizer(TASKS["summarization"].prompt(item))["input_ids"]
    ids = torch.tensor([prompt + tokenizer(item["output"])["input_ids"]])
    with torch.no_grad():
        cache = KeyformerCache(model.config, KeyformerConfig.preset("full"))
        weights = model(ids, past_key_values=cache, output_attentions=True).attentions
    masses = []
    for layer, of_layer in enumerate(weights):
        small, all_seen = 0, 0
        for query in range(len(prompt), ids.shape[1]):
            for head in of_layer[0, :, query, : query + 1].numpy():
                small += (head < 0.01 * head.max()).sum()
                all_seen += len(head)
                masses.append(np.sort(head)[::-1][: round(0.4 * len(head))].sum())
        assert found[f"layer{layer:02}"] == pytest.approx(100 * small / all_seen, abs=1e-3)
    assert found["mass040"] == pytest.approx(100 * np.mean(masses), abs=1e-2)
    assert found["mass100"] == pytest.approx(100, abs=1e-3)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["--settings", "paper"],
            "--max_new_tokens 3 contradicts --settings paper, where max_new_tokens is 128",
        ),
        (["--settings", "paper", "--beam", "1"], "--beam 1 contradicts"),
        (["--settings", "paper", "--no-early_stopping"], "--no-early_stopping contradicts"),
        (["--min_gen_length", "4"], "--min_gen_length 4 is more than the 3 tokens"),
        (["--bs", "0"], "--bs"),
        (["--task", "summarization", "conversation"], "--dataset_path"),
        (["--model_path", "nowhere"], "nowhere"),
        (["--device", "tpu"], "tpu"),
    ],
)
def test_bad_input_is_named(flags, more, says) -> None:
    with pytest.raises(InputError, match=says):
        run("table4", [*flags, *more])


@pytest.mark.parametrize(
    ("name", "more", "says"),
    [
        ("fig4", ["--layer", "-1"], "--layer"),
        ("fig4", ["--layer", "9"], "--layer must be from 0 to 1"),
        ("fig4", ["--layer", "0", "--head", "9"], "--head must be from 0 to"),
        ("beyond", ["--task", "summarization"], "--search_path"),
    ],
)
def test_bad_input_of_one_script(flags, name, more, says) -> None:
    with pytest.raises(InputError, match=says):
        run(name, [*flags, *more])


def test_together_takes_scripts_alone(tmp_path) -> None:
    commands = tmp_path / "commands.txt"
    commands.write_text("conftest.py\n")
    with pytest.raises(InputError, match=r"conftest\.py"):
        script("paper", "together").main([str(commands)])
    with pytest.raises(InputError, match=r"cannot read commands from 'no\.txt'"):
        script("paper", "together").main(["no.txt"])


def test_a_file_of_something_else_is_not_overwritten(flags, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "measured.sqlite").write_text("my notes\n")
    with pytest.raises(InputError, match=r"measured\.sqlite is not a store"):
        run("table4", flags)
    assert (tmp_path / "out" / "measured.sqlite").read_text() == "my notes\n"
