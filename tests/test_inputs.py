"""What users give and what they have already: each kind of input that once went wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import script
from originals import write_original
from rouge_score.tokenizers import DefaultTokenizer

from keyformer import InputError
from keyformer.evaluation.data import TASKS, load_items
from keyformer.evaluation.flags import run_main
from keyformer.evaluation.rouge import UnicodeTokenizer, rouge

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
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda _: script(folder, name).main(list(argv)))
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
    ("value", "says"),
    [
        (r'"half \ud83d"', "half of a surrogate pair"),
        ("9" * 5000, "too many digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("field", ["input", "more"])
def test_b7_json_that_cannot_be_read_is_named(tmp_path, field, value, says, lines) -> None:
    if field == "more" and "surrogate" in says:
        pytest.skip("nobody reads that")
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


def test_b9_a_line_that_is_not_utf8_does_not_end_a_chat(model_path) -> None:
    """Nor do the lines around it get lost, which came in the same bytes."""
    command = [sys.executable, str(ROOT / "conversation" / "dialogue.py"), "--interactive"]
    command += ["--model_path", str(model_path), "--device", "cpu", "--max_new_tokens", "3"]
    command += ["--speakers", "Ann", "Bob", "--narrative", "They talk.", "--kv_budget", "30"]
    said = b"the key\nna\xefve\nthe tokens\n"
    done = subprocess.run(command, input=said, capture_output=True)
    printed = done.stdout.decode()
    assert done.returncode == 0, done.stderr.decode()
    assert printed.count("is not UTF-8") == 1 and printed.count("Bob:") == 2
    done = subprocess.run([*command, "--narrative", b"na\xefve"], input=said, capture_output=True)
    assert done.returncode == 2 and b"--narrative" in done.stderr.splitlines()[-1]


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
    assert tokens("น้ำ") == ["น้", "ํา"] or len(tokens("น้ำ")) == 2
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
