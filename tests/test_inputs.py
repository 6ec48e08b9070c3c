# ruff: noqa: RUF001 - letters of other scripts that look like ours
"""What users give and what they have already: each kind of input that once went wrong."""

from __future__ import annotations

import json
import math
import os
import stat
import subprocess
import sys
import threading
from collections import deque
from pathlib import Path

import pytest
from conftest import Forked, script
from originals import write_original
from rouge_score.tokenizers import DefaultTokenizer

from keyformer import InputError
from keyformer_evaluation.records import results
from keyformer_evaluation.speed.script import Speed
from keyformer_evaluation.studies.study import Study
from keyformer_evaluation.tasks.data import TASKS, load_items
from keyformer_evaluation.tasks.flags import run_main
from keyformer_evaluation.tasks.rouge import UnicodeTokenizer, rouge
from tiny import corpus, train

ROOT = Path(__file__).parents[1]
TASK = TASKS["summarization"]
ITEM = {"instruction": "Sum up.", "input": "the key tokens", "output": "key tokens"}


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("inputs") / "mpt", "mpt", "safetensors")


@pytest.fixture
def refused(monkeypatch, capsys):
    """A function that runs a script and gives the one line with which it refuses its input."""

    def run(folder: str, name: str, *argv: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda _: deque(script(folder, name).main(list(argv)) or ()))
        lines = capsys.readouterr().err.splitlines()
        lines = [line for line in lines if line and "Loading weights" not in line]
        assert stopped.value.code == 2
        assert len(lines) == 1, lines
        return lines[0]

    return run


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("text", ["one\u2028two", "one\u2029two", "one\u0085two", "one\rtwo\x1c"])
def test_b6_texts_with_ends_of_lines_within(tmp_path, text: str, lines: bool) -> None:
    """Raw in a string of JSON, they are text; a byte order mark before it is nothing."""
    items = [{**ITEM, "input": text}, ITEM]
    dumped = [json.dumps(item, ensure_ascii=False) for item in items]
    content = "\n".join(dumped) + "\n" if lines else f"[{', '.join(dumped)}]"
    for mark in ("", "\ufeff"):
        (tmp_path / "data.json").write_bytes((mark + content).encode())
        assert load_items(tmp_path / "data.json", TASK) == items


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("input", r'"half \ud83d"', "half of a surrogate pair"),
        ("input", "9" * 5000, "too many digits"),
        ("more", "-" + "9" * 5000, "too many digits"),
        ("more", "[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ("more", '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply"),
    ],
)
def test_b7_json_that_cannot_be_read_is_named(tmp_path, field, value, says, lines) -> None:
    good = json.dumps(ITEM)
    bad = good[:-1] + f', "{field}": {value}}}'
    path = tmp_path / "data.json"
    path.write_text("\n".join([good, bad]) if lines else f"[{good},\n {bad}]")
    with pytest.raises(InputError, match=rf"item 1.* {says}") as error:
        load_items(path, TASK)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_b7_surrogates_in_a_dialogue_are_named(tmp_path) -> None:
    item = {"narrative": "A.", "dialogue": ["Hi.", "\udc00"], "speakers": ["A", "B"]}
    (tmp_path / "data.json").write_text(json.dumps([item]))
    with pytest.raises(InputError, match="item 0 has a field 'dialogue' with half"):
        load_items(tmp_path / "data.json", TASKS["conversation"])


def test_b9_a_line_that_is_not_utf8_does_not_end_a_chat(model_path, tmp_path) -> None:
    """Nor do the lines around it get lost, which came in the same bytes."""
    command = [str(ROOT / "conversation" / "dialogue.py"), "--interactive"]
    command += ["--model_path", str(model_path), "--device", "cpu", "--max_new_tokens", "3"]
    command += ["--speakers", "Ann", "Bob", "--narrative", "They talk.", "--kv_budget", "30"]
    said = b"the key\nna\xefve\nthe tokens\n"
    code, printed, errors = Forked(command, tmp_path, said).wait()
    assert code == 0, errors
    assert printed.count("is not UTF-8") == 1 and printed.count("Bob:") == 2
    command += ["--narrative", os.fsdecode(b"na\xefve")]
    code, _, errors = Forked(command, tmp_path, said).wait()
    assert code == 2 and "--narrative" in errors.splitlines()[-1]


TEXTS = {
    "Russian": "Мост закрыт, потому что река вышла из берегов.",
    "Chinese": "这座桥已经关闭，因为河水泛滥。",
    "Japanese": "川が氾濫したため、橋は閉鎖されています。",
    "Thai": "สะพานปิดเพราะน้ำท่วม",
    "Hindi": "नदी में बाढ़ के कारण पुल बंद है।",
    "Arabic": "الجسر مغلق لأن النهر فاض.",
    "Greek": "Η γέφυρα είναι κλειστή.",
    "Korean": "강물이 넘쳐 다리가 폐쇄되었습니다.",
}


@pytest.mark.parametrize("language", TEXTS)
def test_b16_rouge_reads_all_scripts(language: str, caplog) -> None:
    text = TEXTS[language]
    assert set(rouge([text], [text])[0].values()) == {0}
    assert len(caplog.records) <= 1  # the same warning comes once a process
    (same,) = rouge([text], [text], "unicode")
    assert list(same.values()) == pytest.approx([100] * 4)
    half, other = rouge([text[: len(text) // 2], "closed"], [text, text], "unicode")
    assert 40 < half["rouge1"] < 80
    assert set(other.values()) == {0}


def test_b16_a_warning_says_what_is_dropped(caplog) -> None:
    russian = TEXTS["Russian"]
    rouge(["key"] * 3, [russian, "the key", russian + "!"])
    (record,) = caplog.records
    assert "2 of 3 references" in record.getMessage()
    assert "--rouge_tokenizer unicode" in record.getMessage()
    caplog.clear()
    rouge(["key"], ["naïve café, 1234"])
    rouge([russian], [russian], "unicode")
    assert not caplog.records


def test_b16_words_and_characters() -> None:
    tokens = UnicodeTokenizer().tokenize
    assert tokens("Мосты, мОст-2") == ["мосты", "мост", "2"]
    assert tokens("桥abc关2闭") == ["桥", "abc", "关", "2", "闭"]
    assert tokens("ไทยa") == ["ไ", "ท", "ย", "a"]
    assert tokens("हिन्दी में") == ["हिन्दी", "में"]
    english = (ROOT / "README.md").read_text().encode("ascii", "ignore").decode()
    assert tokens(english) == DefaultTokenizer(use_stemmer=True).tokenize(english)


@pytest.mark.parametrize("name", ["summarize", "compare"])
def test_b16_the_flag_reaches_the_scores(name: str, model_path, tmp_path, capsys) -> None:
    items = [{**ITEM, "output": TEXTS["Thai"]}]
    (tmp_path / "data.json").write_text(json.dumps(items))
    argv = ["--model_path", str(model_path), "--dataset_path", str(tmp_path / "data.json")]
    argv += ["--device", "cpu", "--max_new_tokens", "2", "--rouge_tokenizer", "unicode"]
    record = str(tmp_path / "scores.json")
    if name == "compare":
        argv += ["--methods", "full", "--record", record]
    else:
        argv += ["--save_path", str(tmp_path / "s.txt"), "--score_path", record]
    script("summarization", name).main(argv)
    assert json.loads(Path(record).read_text())["rouge_tokenizer"] == "unicode"
    assert "ROUGE drops" not in capsys.readouterr().err


BOUNDED = {
    ("summarization", "summarize"): [
        *(("--seed", "4294967296"), ("--seed", "-1"), ("--kv_budget", "9" * 20)),
        *(("--kv_budget", "0"), ("--tau_init", "1e300"), ("--tau_end", "1e-45")),
        *(("--tau_end", "inf"), ("--kv_cache", "nan"), ("--kv_cache", "1e400")),
        *(("--recent", "-0.1"), ("--prefill_chunk", "9" * 5000), ("--temperature", "1e-45")),
        *(("--temperature", "inf"), ("--top_p", "nan"), ("--top_k", "9" * 20)),
        *(("--num_return_sequences", "100000000"), ("--beam", "100000000")),
        *(("--bs", "9" * 20), ("--bs", "1.5"), ("--n_obs", "-3"), ("--n_obs", "9" * 20)),
        *(("--max_tokenizer_length", "9" * 12), ("--no_repeat_ngram_size", "-1")),
        *(("--repetition_penalty", "1e300"), ("--repetition_penalty", "0")),
        *(("--max_new_tokens", "9" * 20), ("--max_gen_length", "9" * 20)),
        *(("--min_gen_length", "-1"), ("--eos_token_id", "9" * 20), ("--eos_token_id", "-1")),
    ],
    ("summarization", "compare"): [
        *(("--seeds", "-1"), ("--seeds", "4294967296"), ("--kv_cache", "101")),
        *(("--recent", "nan"), ("--prefill_chunk", "0"), ("--n_obs", "0"), ("--bs", "0")),
        *(("--beam", "9" * 9), ("--max_new_tokens", "0"), ("--show", "-1")),
    ],
    ("conversation", "dialogue"): [("--seed", "9" * 30), ("--temperature", "1e-45")],
    ("conversation", "compare"): [("--seeds", "-1")],
    ("paper", "table4"): [
        *(("--seeds", "-1"), ("--bs", "0"), ("--beam", "9" * 9), ("--max_new_tokens", "0")),
        ("--n_obs", "9" * 20),
    ],
    ("paper", "table2"): [("--n_obs", "-1"), ("--seeds", "4294967296")],
    ("paper", "fig4"): [("--layer", "-1"), ("--head", "9" * 20)],
    ("paper", "kept_tokens"): [
        *(("--item", "-1"), ("--seed", "-1"), ("--max_new_tokens", "65536")),
        ("--tau_init", "1e300"),
    ],
    ("paper", "fig1"): [("--length", "0"), ("--stretch", "-1"), ("--kv_cache", "nan")],
    ("benchmarks", "decode"): [
        *(("--prompt", "0"), ("--batch", "9" * 20), ("--repeats", "0"), ("--recent", "101")),
    ],
    ("benchmarks", "long_prompt"): [("--tokens", "9" * 12), ("--max_new_tokens", "0")],
    ("benchmarks", "quantized_weights"): [
        *(("--kv_cache", "0"), ("--n_obs", "0"), ("--bs", "x"), ("--beam", "9" * 9)),
    ],
    ("lm_eval_harness", "run_lm_eval_harness"): [
        *(("--num_fewshot", "99999"), ("--num_fewshot", "-1"), ("--limit", "0")),
        *(("--bs", "9" * 20), ("--max_length", "1"), ("--seed", "4294967296")),
    ],
}


@pytest.mark.parametrize(("folder", "name"), BOUNDED)
def test_b10_numbers_are_bounded_where_flags_are_parsed(
    folder: str, name: str, refused, monkeypatch
) -> None:
    """One line that names flag and value, before anything is read, loaded or written."""
    for flag, value in BOUNDED[folder, name]:
        line = refused(folder, name, flag, value)
        assert line.startswith(f"{name}.py: error: {flag} must be "), line
        assert value[:40] in line and len(line) < 200


def test_b10_the_ends_of_the_bounds_work(model_path, tmp_path) -> None:
    """What is allowed gives a result, and no number that is none."""
    most = str(2**31 - 1)
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))
    argv = ["--model_path", str(model_path), "--dataset_path", str(tmp_path / "data.json")]
    argv += ["--device", "cpu", "--max_new_tokens", "3", "--output_sequence_scores"]
    argv += ["--save_path", str(tmp_path / "s.txt"), "--score_path", str(tmp_path / "s.json")]
    for more in (
        ["--keyformer", "--kv_budget", most, "--tau_init", "1e-4", "--tau_end", "1e4"],
        ["--keyformer", "--prefill_chunk", most, "--tau_init", "1e4", "--tau_end", "1e-4"],
        ["--keyformer", "--kv_cache", "1e-320", "--recent", "1e-320", "--seed", str(2**32 - 1)],
        ["--do_sample", "--top_k", most, "--temperature", "1e-4", "--no_repeat_ngram_size", most],
        ["--do_sample", "--top_p", "1e-320", "--temperature", "1e4", "--min_gen_length", "3"],
        ["--repetition_penalty", "1e4", "--do_sample", "--num_return_sequences", "256"],
        ["--repetition_penalty", "1e-4", "--beam", "64", "--bs", most, "--eos_token_id", most],
    ):
        script("summarization", "summarize").main([*argv, *more])
        found = json.loads((tmp_path / "s.json").read_text())
        assert all(map(math.isfinite, found["sequence_scores"][0]))


def test_b10_beams_bound_what_they_return(refused) -> None:
    flags = ("--do_sample", "--beam", "4", "--num_return_sequences", "8")
    assert "--num_return_sequences 8" in refused("summarization", "summarize", *flags)


@pytest.fixture
def summarize(model_path, tmp_path, monkeypatch):
    """A function that runs summarize.py on one document, which is at data.json."""
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))

    def run(*more: str, script_name: str = "summarize.py") -> None:
        monkeypatch.setattr(sys, "argv", [script_name])
        script("summarization", "summarize").main(arguments(model_path, tmp_path, *more))

    return run


def arguments(model_path: Path, folder: Path, *more: str) -> list[str]:
    argv = ["--model_path", str(model_path), "--dataset_path", str(folder / "data.json")]
    argv += ["--save_path", str(folder / "s.txt"), "--score_path", str(folder / "s.json")]
    return [*argv, "--device", "cpu", "--max_new_tokens", "2", *more]


AFTER = """
import runpy, sys
print("before", flush=True)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that prints something and then is the one that its arguments say."""


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--save_path", "data.json"),
        ("--score_path", "data.json"),
        ("--save_path", "s.json"),
        ("--save_path", "mine.txt"),
        ("--score_path", "mine.txt"),
        ("--score_path", "other.json"),
        ("--save_path", "link"),
        ("--save_path", "hard"),
        ("--save_path", "folder"),
        ("--save_path", "n" * 300),
        ("--save_path", "{model}/config.json"),
        ("--save_path", "{model}/tokenizer.json"),
        ("--save_path", "loop"),
    ],
)
def test_b2_outputs_that_would_replace_something_are_refused(
    flag, name, model_path, tmp_path, refused
) -> None:
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))
    (tmp_path / "mine.txt").write_text("my notes\n")
    (tmp_path / "other.json").write_text('{"command": "python compare.py --record other.json"}')
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("data.json")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "hard").hardlink_to(tmp_path / "mine.txt")
    path = str(tmp_path / name.format(model=model_path))

    def contents() -> dict[Path, bytes]:
        folders = (tmp_path, model_path)
        return {f: f.read_bytes() for of in folders for f in of.iterdir() if f.is_file()}

    before = contents()
    # Before a model is loaded: there is none.
    more = [flag, path, "--model_path", "nowhere"]
    line = refused("summarization", "summarize", *arguments(model_path, tmp_path, *more))
    assert "nowhere" not in line and name.format(model=model_path)[:9] in line
    assert contents() == before and (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("flag", ["--save_path", "--score_path"])
def test_b2_the_store_is_another_file(flag, model_path, tmp_path, refused) -> None:
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))
    path = str(tmp_path / "both")
    more = [flag, path, "--store", path, "--model_path", "nowhere"]
    line = refused("summarization", "summarize", *arguments(model_path, tmp_path, *more))
    assert "must be different files" in line and "nowhere" not in line
    assert not (tmp_path / "both").exists()


def test_b2_the_same_command_works_again_and_others_files_stay(
    summarize, tmp_path, model_path, refused
) -> None:
    texts, scores = tmp_path / "s.txt", tmp_path / "s.json"
    summarize()
    first = texts.read_text()
    summarize("--save_path", str(tmp_path / "other.txt"))  # on the same --score_path
    summarize()
    assert texts.read_text() == first
    texts.write_text("what I think of them\n")
    line = refused("summarization", "summarize", *arguments(model_path, tmp_path))
    assert f"{texts} was not written by summarize.py, or changed since: move it away" in line
    assert texts.read_text() == "what I think of them\n"
    texts.unlink()
    scores.rename(tmp_path / "kept.json")
    summarize()
    texts.write_text("")  # as mktemp leaves one: nothing is lost
    summarize()


def test_b2_a_run_that_ends_between_its_files_can_be_repeated(summarize, monkeypatch) -> None:
    summarize()
    write = results.write_text
    monkeypatch.setattr(results, "write_text", lambda path, text: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        summarize("--max_new_tokens", "9")
    monkeypatch.setattr(
        results, "write_text", lambda path, text: write(path, text) if "{" in text else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        summarize("--max_new_tokens", "9")
    monkeypatch.setattr(results, "write_text", write)
    summarize()


def test_b2_links_are_followed(summarize, tmp_path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "link.txt").symlink_to("away/texts.txt")  # which is not there yet
    for _ in range(2):
        summarize("--save_path", str(tmp_path / "link.txt"))
        assert (tmp_path / "link.txt").is_symlink()
        assert (tmp_path / "away" / "texts.txt").read_text().count("\n") == 1


def test_b2_devices_and_pipes_are_written_to(model_path, tmp_path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([ITEM]))
    command = [str(ROOT / "summarization" / "summarize.py")]
    more = ["--save_path", "/dev/null", "--score_path", "/dev/stdout"]
    command += arguments(model_path, tmp_path, *more)
    pipe, read = tmp_path / "piped" / "stdout", []
    pipe.parent.mkdir()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert Forked(command, pipe.parent).poll(block=True) == 0
    reader.join(timeout=30)
    assert '"rouge1":' in read[0] and "texts in /dev/null" in read[0]
    (tmp_path / "after.py").write_text(AFTER)  # a file in the place of a terminal
    code, shown, _ = Forked([str(tmp_path / "after.py"), *command], tmp_path / "filed").wait()
    assert code == 0
    assert shown.startswith("before\n{") and "texts in /dev/null" in shown
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_b2_a_named_pipe_stays_one(summarize, tmp_path) -> None:
    pipe, read = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    summarize("--save_path", str(pipe))
    reader.join(timeout=30)
    assert stat.S_ISFIFO(pipe.stat().st_mode) and read[0].count("\n") == 1


def test_b2_attentions_replace_attentions_only(summarize, tmp_path, monkeypatch) -> None:
    folder = tmp_path / "attentions"
    flags = ["--save_attentions", "--attentions_path", str(folder)]
    for _ in range(2):
        summarize(*flags)
    with pytest.raises(InputError, match="it is a folder"):
        summarize(*flags, "--save_path", str(folder))
    (folder / "000000.npz").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"000000\.npz was not written by summarize\.py"):
        summarize(*flags)


RECORDS = {
    ("summarization", "compare"): ("--record", ["--dataset_path", "{data}"]),
    ("benchmarks", "quantized_weights"): ("--record", ["--dataset_path", "{data}"]),
    ("benchmarks", "long_prompt"): ("--record", []),
    ("benchmarks", "decode"): ("--output", ["--model", "tiny"]),
    ("paper", "fig10"): ("--output", ["--model", "tiny"]),
    ("paper", "kept_tokens"): ("--out", ["--dataset_path", "{data}"]),
    ("lm_eval_harness", "run_lm_eval_harness"): ("--out", []),
    ("paper", "table4"): ("--out", ["--dataset_path", "{data}"]),
    ("paper", "fig3"): ("--out", ["--dataset_path", "{data}"]),
}


@pytest.mark.parametrize(("folder", "name"), RECORDS)
def test_b2_no_script_replaces_what_another_wrote(folder, name, tmp_path, refused) -> None:
    flag, more = RECORDS[folder, name]
    data = tmp_path / "data.json"
    data.write_text(json.dumps([ITEM]))
    mine = {
        "table4": tmp_path / "table4.png",
        "fig3": tmp_path / "fig3b.csv",
        "fig10": tmp_path / "mine.svg",
        "run_lm_eval_harness": tmp_path / "record.json",
    }.get(name, tmp_path / "mine.json")
    mine.write_text(json.dumps({"command": "python other.py"}))
    out = mine if flag != "--out" or name == "kept_tokens" else tmp_path
    out = out.with_suffix(".json") if name == "fig10" else out
    argv = [argument.format(data=data) for argument in more]
    if flag != "--output":
        argv += ["--model_path", "nowhere"]
    line = refused(folder, name, *argv, "--device", "cpu", flag, str(out))
    assert f"{mine} was not written by {name}.py" in line
    assert json.loads(mine.read_text()) == {"command": "python other.py"}


def test_b2_a_page_may_be_replaced_but_not_the_template(tmp_path, monkeypatch, refused) -> None:
    page = tmp_path / "page.html"
    template = ROOT / "paper" / "kept_tokens.html"
    page.write_text(template.read_text().replace("DATA", "{}", 1))
    kept_tokens = script("paper", "kept_tokens")
    assert kept_tokens.is_page(page) and not kept_tokens.is_page(template)
    line = refused("paper", "kept_tokens", "--out", str(template), "--model_path", "nowhere")
    assert "kept_tokens.html was not written" in line


def test_b2_a_dataset_is_made_again_but_replaces_no_other(tmp_path) -> None:
    path = tmp_path / "data.json"
    for _ in range(2):
        corpus.main(["--n", "3", "--output", str(path)])
    with pytest.raises(InputError, match=r"data\.json"):
        corpus.main(["--n", "4", "--output", str(path)])
    assert len(json.loads(path.read_text())) == 3


SMALL = [
    *("--device", "cpu", "--workers", "0", "--steps", "2", "--eval_documents", "2"),
    *("--tokenizer_documents", "100", "--d_model", "16", "--n_layers", "1", "--n_heads", "2"),
    *("--batch_tokens", "2048", "--vocab_size", "1500"),
]


def test_b3_training_replaces_its_own_files_only(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(train.Batches, "POOL", 16)
    folder = tmp_path / "model"
    folder.mkdir()
    for _ in range(2):
        train.main([*SMALL, "--output_dir", str(folder)])
        (folder / "notes.txt").write_text("mine")
        (folder / "runs").mkdir(exist_ok=True)
        (tmp_path / "model.partial").mkdir(exist_ok=True)
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "runs").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"model", "model.partial"}
    assert {"config.json", "model.safetensors", "README.md"} <= set(os.listdir(folder))
    assert not [name for name in os.listdir(folder) if name.startswith(".")]


@pytest.mark.parametrize("held", ["notes.txt", "config.json", "README.md"])
def test_b3_a_folder_of_something_else_is_refused(held: str, tmp_path, capsys) -> None:
    (tmp_path / held).write_text("{}")
    with pytest.raises(SystemExit) as stopped:
        train.main([*SMALL, "--output_dir", str(tmp_path)])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert os.listdir(tmp_path) == [held] and (tmp_path / held).read_text() == "{}"


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        *((["--lr", value], "--lr") for value in ("nan", "inf", "0", "-1", "1e9")),
        *((["--max_minutes", value], "--max_minutes") for value in ("nan", "inf", "0")),
        *((["--prompt_weight", value], "--prompt_weight") for value in ("nan", "-1")),
        *(
            ([f"--{name}", "-1"], f"--{name}")
            for name in (
                *("steps", "batch_tokens", "warmup", "ramp", "d_model", "n_layers", "n_heads"),
                *("vocab_size", "tokenizer_documents", "eval_documents", "seed", "workers"),
                "log_every",
            )
        ),
        *(([f"--{name}", "0"], f"--{name}") for name in ("d_model", "n_heads", "n_layers")),
        *((["--vocab_size", value], "--vocab_size") for value in ("0", "256", "40000")),
        (["--d_model", "17"], "--d_model must be a multiple of --n_heads 2, got 17"),
        (["--arch", "gptj", "--d_model", "12"], "--d_model"),
        (["--arch", "cerebras", "--vocab_size", "257"], "--vocab_size 257 makes documents"),
        (["--arch", "gptj", "--vocab_size", "257"], "2048 positions"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "toaster"], "toaster"),
        (["--workers", "9" * 9], "--workers"),
        (["--output_dir", "{file}/model"], "cannot write"),
        (["--output_dir", "{file}"], "cannot write"),
        (["--output_dir", "/proc/model"], "cannot write"),
    ],
)
def test_b11_training_is_refused_before_it_begins(
    flags, says, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(train, "train", lambda *_: pytest.fail("it trains"))
    (tmp_path / "file").write_text("mine")
    argv = [*SMALL, "--output_dir", str(tmp_path / "model")]
    argv += [flag.format(file=tmp_path / "file") for flag in flags]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda _: train.main(argv))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and says in line


@pytest.mark.parametrize(
    ("name", "model"), [("decode", "tiny"), ("prefill", "tiny-llama"), ("generate", "tiny")]
)
def test_b17_tiny_benchmarks_run_at_their_defaults(name, model, tmp_path, monkeypatch) -> None:
    output = ["--output", str(tmp_path / "record.json"), "--repeats", "1"]
    script("benchmarks", name).main(["--model", model, "--device", "cpu", *output])
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert {row["engine"] for row in rows} >= {"stock", "full", "keyformer"}


@pytest.mark.parametrize(
    ("folder", "name", "flags"),
    [
        ("benchmarks", "decode", ["--prompt", "100000"]),
        ("benchmarks", "prefill", ["--prompt", "8", "65537"]),
        ("benchmarks", "generate", ["--prompt", "60000", "--new", "6000"]),
        ("paper", "fig1", ["--length", "65537"]),
        ("paper", "fig9_table1", ["--prompt", "40000"]),
    ],
)
def test_b17_texts_without_positions_are_refused(folder, name, flags, tmp_path, refused) -> None:
    output = ["--output", str(tmp_path / "record.json")]
    line = refused(folder, name, "--model", "tiny", "--device", "cpu", *flags, *output)
    assert "--model tiny has 65536 positions" in line


def test_b17_no_run_replaces_a_committed_record_unasked() -> None:
    """What is written by default is beside them, in a folder that git ignores."""
    for folder, name in (("benchmarks", "decode"), ("paper", "fig10")):
        speed = Speed(name, None, ["--device", "cpu"], ROOT / folder)
        assert speed.flags.output == ROOT / folder / "results" / "local" / f"{name}.json"
    for more, place in ([], "local"), (["--quick"], "quick"):
        study = Study("table4", None, [*more, "--device", "cpu"], {})
        assert study.flags.out == ROOT / "paper" / "results" / place
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    for folder in ("benchmarks/results/local", "paper/results/local", "paper/results/quick"):
        assert f"/{folder}/" in ignored


WITHOUT = """
import runpy, sys
for name in list(sys.modules):
    if name.partition(".")[0] in {{"keyformer", "keyformer_lm_eval", *{names!r}}}:
        del sys.modules[name]
for name in {names!r}:
    sys.modules[name] = None
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that imports this project anew where modules are missing."""


@pytest.mark.parametrize(
    ("path", "without", "says"),
    [
        ("benchmarks/decode.py", ["matplotlib"], None),
        ("paper/kept_tokens.py", ["matplotlib"], None),
        ("paper/fig1.py", ["matplotlib"], 'pip install -c constraints.txt -e ".[paper]"'),
        ("paper/table4.py", ["matplotlib"], 'pip install -c constraints.txt -e ".[paper]"'),
        ("paper/table2.py", ["lm_eval"], 'pip install -c constraints.txt -e ".[lm_eval]"'),
    ],
)
def test_b17_without_the_extras(path: str, without: list[str], says: str | None, tmp_path) -> None:
    (tmp_path / "without.py").write_text(WITHOUT.format(names=without))
    command = [str(tmp_path / "without.py"), str(ROOT / path), "--help"]
    code, _, errors = Forked(command, tmp_path).wait()
    if says is None:
        assert code == 0, errors
    else:
        (line,) = errors.splitlines()
        assert code == 2 and says in line and f"{without[0]} is not installed" in line


def started(*command: str) -> subprocess.CompletedProcess:
    """What a fresh interpreter says."""
    return subprocess.run([sys.executable, *command], capture_output=True, text=True)


def test_b19_nothing_is_said_of_torchao() -> None:
    """transformers imports it wherever it is installed, and it speaks of what is not asked for."""
    done = started("-c", "import keyformer")
    assert done.returncode == 0 and done.stderr == ""


FIRST = """
import os, runpy, sys
class Watch:
    def find_spec(self, name, *more):
        if name in ("transformers", "torchao"):
            os._exit(0 if "keyformer.quiet" in sys.modules else 1)
sys.meta_path.insert(0, Watch())
sys.argv = sys.argv[1:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
raise SystemExit("transformers is not imported")
"""
"""A script up to its first import of transformers: whether what keeps torchao quiet is there."""

COMMANDS = (
    *("summarization/summarize.py", "conversation/dialogue.py", "benchmarks/quantized_weights.py"),
    *("benchmarks/decode.py", "models/tiny/train.py", "paper/table4.py"),
)


@pytest.mark.parametrize("path", COMMANDS)
def test_b19_no_command_imports_transformers_before_it_is_quiet(path: str) -> None:
    done = started("-c", FIRST, str(ROOT / path), "--help")
    assert done.returncode == 0, done


def test_b19_real_warnings_of_torchao_are_heard(tmp_path) -> None:
    (tmp_path / "warns.py").write_text(
        "import keyformer, logging; logging.getLogger('torchao').warning('Failed to load all');"
        "logging.getLogger('torchao.quantization').warning('int8 is slow here')"
    )
    _, _, errors = Forked([str(tmp_path / "warns.py")], tmp_path).wait()
    assert errors.splitlines() == ["Failed to load all", "int8 is slow here"]
