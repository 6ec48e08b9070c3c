"""conversation/dialogue.py: a dataset of dialogues, and a chat that never grows."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Forked, script
from originals import ORIGINALS, write_original

from keyformer import InputError, KeyformerConfig, load_model
from keyformer_evaluation.tasks import run
from keyformer_evaluation.tasks.chat import Chat
from keyformer_evaluation.tasks.data import TASKS, load_items
from keyformer_evaluation.tasks.flags import run_main

ROOT = Path(__file__).parents[1]
TASK = TASKS["conversation"]
ITEM = {
    "narrative": "Ann lost the key. Bob has another.",
    "dialogue": ["Where is the key?", "Here, Ann.", "Thank you, Bob."],
    "speakers": ["Ann", "Bob", "Ann"],
}
PROMPT = (
    "Ann lost the key. Bob has another.\n\n"
    "Continue the dialogue between Ann and Bob.\n\n"
    "Ann: Where is the key?\n"
)
dialogue = script("conversation", "dialogue")


@pytest.fixture(scope="module")
def model_path(arch, tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("conversation") / arch, arch, "safetensors")


@pytest.fixture(scope="module")
def dataset_path(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "dialogues.json"
    longer = {**ITEM, "narrative": ITEM["narrative"] * 9}
    path.write_text(json.dumps([ITEM, longer, {**ITEM, "speakers": ["A", "B", "C"]}]))
    return path


def test_prompt_and_reference() -> None:
    assert TASK.prompt(ITEM) == PROMPT
    assert TASK.reference(ITEM) == "Bob: Here, Ann.\nAnn: Thank you, Bob."
    three = {**ITEM, "speakers": ["A", "B", "C"]}
    assert "between A and B and C." in TASK.prompt(three)


def test_names_before_turns_do_not_count() -> None:
    text = "Bob: Here.\n Ann: Bob: no.\nCarl: A key\nTo Ann: key"
    assert TASK.scored(ITEM, text) == "Here.\nBob: no.\nCarl: A key\nTo Ann: key"


@pytest.mark.parametrize("method", ["full", "window", "keyformer"])
def test_dialogues_run_like_summaries(
    method: str, model_path, dataset_path, tmp_path, monkeypatch
) -> None:
    prompts = []
    generate = run.generate

    def keep(model, tokenizer, batch, *args, **kwargs):
        prompts.extend(batch)
        return generate(model, tokenizer, batch, *args, **kwargs)

    monkeypatch.setattr(run, "generate", keep)
    out = [tmp_path / "texts.txt", tmp_path / "scores.json"]
    dialogue.main(
        [
            *("--model_path", str(model_path), "--dataset_path", str(dataset_path)),
            *("--save_path", str(out[0]), "--score_path", str(out[1]), "--device", "cpu"),
            *("--attention", method, "--kv_cache", "50", "--bs", "2", "--max_new_tokens", "6"),
        ]
    )
    assert len(out[0].read_text().splitlines()) == 3
    scores = json.loads(out[1].read_text())
    assert scores["task"] == "conversation" and scores["method"] == method
    assert PROMPT in prompts


def without(name: str) -> dict:
    return {key: value for key, value in ITEM.items() if key != name}


@pytest.mark.parametrize(
    ("item", "says"),
    [
        (without("speakers"), "item 1 lacks the field 'speakers'"),
        (without("narrative"), "item 1 lacks the field 'narrative'"),
        ({**ITEM, "dialogue": "Hello."}, "item 1 has a field 'dialogue' that is not a list of"),
        ({**ITEM, "speakers": ["Ann", 7, "Ann"]}, "'speakers' that is not a list of texts"),
        ({**ITEM, "speakers": ["Ann", "Bob"]}, "unequal length: dialogue, speakers"),
        ({**ITEM, "dialogue": ["Hi."], "speakers": ["Ann"]}, "fewer than two turns in 'dialogue'"),
        ({**ITEM, "narrative": " "}, "item 1 has an empty field 'narrative'"),
    ],
)
def test_unusable_dialogues_are_named(tmp_path, item: dict, says: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([ITEM, item]))
    with pytest.raises(InputError, match=re.escape(says)):
        load_items(path, TASK)


def chat_with(path: Path, config: KeyformerConfig, **options) -> Chat:
    model, tokenizer = load_model(path, config, dtype="float32", device="cpu")
    return Chat(model, tokenizer, config, ITEM["narrative"], ("Ann", "Bob"), **options)


SAID = ["Where is the key?", "the recent tokens", "and", "the key tokens and the recent tokens"]


@pytest.mark.parametrize("length", [5, 24])
def test_chat_equals_one_long_text(model_path, arch: str, length: int) -> None:
    """With a full cache, each reply is what the stock model adds to the whole transcript."""
    chat = chat_with(model_path, KeyformerConfig.preset("full"), max_new_tokens=length)
    stock = ORIGINALS[arch].model.from_pretrained(model_path, dtype=torch.float32).eval()
    stock.generation_config.use_cache = True
    transcript = torch.zeros(1, 0, dtype=torch.long)
    before = TASK.prompt(ITEM).removesuffix("Ann: Where is the key?\n")
    for said in SAID:
        text = f"{before}Ann: {said}\nBob:"
        ids = chat.tokenizer(text, return_tensors="pt")["input_ids"]
        transcript = torch.cat([transcript, ids], dim=-1)
        longer = stock.generate(transcript, max_new_tokens=length, pad_token_id=0)
        new = longer[0, transcript.shape[1] :]
        for count, token in enumerate(new, start=1):
            if "\n" in chat.tokenizer.decode(token):
                new = new[:count]
                break
        reply = chat.tokenizer.decode(new, skip_special_tokens=True)
        assert chat.reply(said) == reply.strip()
        fed = new[:-1] if new[-1] == 0 else new  # the end of a text is left out
        transcript = torch.cat([transcript, fed[None]], dim=-1)
        before = "" if reply.endswith("\n") else "\n"


def test_chat_begins_with_the_start_token(model_path) -> None:
    chat = chat_with(model_path, KeyformerConfig.preset("full"), max_new_tokens=2, start_token=7)
    fed = []
    chat.cache.observer = lambda layer, at, _: layer or fed.append(len(at[0]))
    chat.reply("the key")
    chat.reply("the key")
    first, second = (count for count in fed if count > 1)
    text = f"{TASK.prompt(ITEM).removesuffix('Where is the key?' + chr(10))}the key{chr(10)}Bob:"
    assert first == 1 + len(chat.tokenizer(text)["input_ids"]) > second


@pytest.mark.parametrize("method", ["window", "keyformer"])
def test_chat_never_grows(model_path, method: str) -> None:
    """After 20 turns the memory is what it was when the budget had filled."""
    config = KeyformerConfig.preset(method, kv_budget=40, positions="new", seed=0)
    chat = chat_with(model_path, config, max_new_tokens=3, min_new_tokens=3)

    def held() -> int:
        """Bytes of every tensor that is alive."""
        gc.collect()
        tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        storages = [tensor.untyped_storage() for tensor in tensors]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    def say(turn: int) -> None:
        chat.reply(" ".join([SAID[turn % 2]] * 28))

    say(0)
    filled, memory, seen = chat.cache.memory_bytes(), held(), chat.cache.get_seq_length()
    assert all((layer.positions >= 0).all() for layer in chat.cache.layers)
    for turn in range(1, 20):
        say(turn)
    assert chat.cache.get_seq_length() > seen + 19 * 120 > ORIGINALS["gptj"].fields["n_positions"]
    assert chat.cache.memory_bytes() == filled
    assert held() <= memory + 1024  # the unfed token of a turn
    assert all(layer.keys.shape[2] == 40 for layer in chat.cache.layers)


def talk(monkeypatch, capsys, lines: list[str], *flags: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(line + "\n" for line in lines)))
    dialogue.main(["--interactive", "--device", "cpu", "--max_new_tokens", "5", *flags])
    return capsys.readouterr().out


def test_interactive(model_path, dataset_path, monkeypatch, capsys) -> None:
    flags = ["--model_path", str(model_path), "--dataset_path", str(dataset_path)]
    printed = talk(monkeypatch, capsys, ["Hello", "", "the key"], *flags, "--kv_budget", "30")
    assert printed.startswith(ITEM["narrative"])
    assert printed.count("Bob:") == 2 and printed.count("Ann: ") == 4
    sizes = []
    for lines in (["Hello"] * 2, ["Hello"] * 9):
        chosen = ["--speakers", "Me", "You", "--narrative", "We talk.", "--positions", "new"]
        printed = talk(monkeypatch, capsys, lines, *flags, *chosen, "--kv_budget", "30")
        assert printed.startswith("We talk.\n\nMe: You:")
        last = printed.splitlines()[-1].replace(",", "")
        sizes.append(re.fullmatch(r"(\d+) tokens went through a cache of (\d+) KiB", last).groups())
    assert int(sizes[0][0]) < int(sizes[1][0]) and sizes[0][1] == sizes[1][1]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--narrative", "We talk."], "--interactive"),
        (["--interactive", "--beam", "4"], "--beam must be 1"),
        (["--interactive", "--clean_up_tokenization_spaces"], "leave out --clean_up"),
        (["--interactive", "--decoder_start_token_id", "9999"], "got 9999"),
        (["--interactive", "--do_sample", "--num_return_sequences", "2"], "--num_return_sequences"),
        (["--interactive", "--kv_budget", "0"], "kv_budget"),
        (["--interactive", "--dataset_path", "nowhere.json"], "nowhere.json"),
        (["--interactive", "--speakers", "Ann"], "--speakers"),
        (["--interactive", "--kv_budget", "3000", "--max_new_tokens", "4000"], "positions"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    flags, says, tmp_path, dataset_path, monkeypatch, capsys
) -> None:
    path = write_original(tmp_path / "gptj", "gptj", "bin")
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
    given = ["--model_path", str(path), "--device", "cpu"]
    if "--dataset_path" not in flags:
        given += ["--dataset_path", str(dataset_path)]
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda _: dialogue.main([*given, *flags]))
    printed = capsys.readouterr().err.strip().splitlines()
    lines = [line for line in printed if "Loading weights" not in line]  # its progress bar
    assert stopped.value.code == 2
    assert len(lines) == 1 and says in lines[0]


@pytest.mark.parametrize("task", ["summarization", "conversation"])
def test_task_scripts_pass_on_settings(task: str, tmp_path, dataset_path) -> None:
    """The shell scripts run a model on a dataset with settings from the environment."""
    model = write_original(tmp_path / "mpt", "mpt", "bin")
    summaries = tmp_path / "reports.json"
    summaries.write_text(json.dumps([{"instruction": "", "input": "a key", "output": "key"}] * 3))
    data = dataset_path if task == "conversation" else summaries
    settings = {"MODEL_PATH": model, "DATASET_PATH": data, "OUT_DIR": tmp_path, "KV_CACHE": 40}
    settings |= {"ATTENTION": "h2o", "PYTHON": "echo", "MAX_NEW_TOKENS": 4, "BEAM": 2}
    made = subprocess.run(
        ["bash", str(ROOT / task / f"run_{task}_task.sh"), "--n_obs", "2", "--device", "cpu"],
        env={**os.environ, **{name: str(value) for name, value in settings.items()}},
        capture_output=True,
        text=True,
    )
    assert made.returncode == 0, made.stderr
    code, _, errors = Forked(made.stdout.split(), tmp_path / "says").wait()
    assert code == 0, errors
    out = tmp_path / "mpt" / data.stem / "h2o-40"
    scores = json.loads((out / "scores.json").read_text())
    assert scores["task"] == task and scores["config"]["kv_cache"] == 40
    assert scores["gen_num"] == 2 and scores["method"] == "h2o"
