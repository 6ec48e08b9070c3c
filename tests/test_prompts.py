"""What items become: the paper's template, the tokenizer's chat template, or the document alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import script
from gguf_files import CHAT_TEMPLATE, SPECIAL, write_gguf
from originals import write_original
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from keyformer import InputError, KeyformerConfig, disable_keyformer, load_model
from keyformer_evaluation.tasks.data import (
    PROMPTS,
    TASKS,
    alpaca_prompt,
    encode,
    load_items,
    make_prompt,
    prompt_kind,
)
from keyformer_evaluation.tasks.flags import run_main

ARTICLES = Path(__file__).parents[1] / "summarization" / "data" / "articles.json"
TASK = TASKS["summarization"]
ITEM = {"instruction": "Sum up.", "input": "the recent tokens " * 50, "output": "tokens"}
DIALOGUE = {
    "narrative": "Ann lost the key.",
    "dialogue": ["Where is the key?", "Here."],
    "speakers": ["Ann", "Bob"],
}
OPENED, ANSWER = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
summarize, compare = (script("summarization", name) for name in ("summarize", "compare"))
dialogue = script("conversation", "dialogue")


@pytest.fixture(scope="module")
def chat_path(tmp_path_factory) -> Path:
    """A checkpoint folder of a chat model."""
    folder = tmp_path_factory.mktemp("chat")
    write_gguf(folder / "tiny.gguf")
    model, tokenizer = load_model(folder / "tiny.gguf", device="cpu")
    for part in (disable_keyformer(model), tokenizer):
        part.save_pretrained(folder / "model")
    return folder / "model"


@pytest.fixture
def tokenizer(chat_path) -> PreTrainedTokenizerBase:
    return load_model(chat_path, device="cpu")[1]


@pytest.fixture(scope="module")
def plain_path(tmp_path_factory) -> Path:
    """A checkpoint folder without a chat template."""
    return write_original(tmp_path_factory.mktemp("plain") / "mpt", "mpt", "safetensors")


def test_three_kinds(tokenizer) -> None:
    made = {kind: make_prompt(ITEM, TASK, tokenizer, kind=kind) for kind in PROMPTS}
    assert made == {
        "alpaca": alpaca_prompt("Sum up.", ITEM["input"]),
        "chat": f"{OPENED}Sum up.\n\n{ITEM['input']}{ANSWER}",
        "none": ITEM["input"],
    }
    assert make_prompt(ITEM, TASK, tokenizer) == made["chat"]
    said = "Continue the dialogue between Ann and Bob.\n\nAnn: Where is the key?\n"
    talk = TASKS["conversation"]
    assert {kind: make_prompt(DIALOGUE, talk, tokenizer, kind=kind) for kind in PROMPTS} == {
        "alpaca": f"Ann lost the key.\n\n{said}",
        "chat": f"{OPENED}Ann lost the key.\n\n{said}{ANSWER}",
        "none": "Ann lost the key.\n\nAnn: Where is the key?\n",
    }


def test_default_is_the_template_that_the_tokenizer_has(tokenizer) -> None:
    assert prompt_kind(None, tokenizer) == "chat"
    assert [prompt_kind(kind, tokenizer) for kind in PROMPTS] == [*PROMPTS]
    tokenizer.chat_template = None
    assert prompt_kind(None, tokenizer) == "alpaca"
    with pytest.raises(InputError, match="no chat template; allowed is alpaca, none"):
        make_prompt(ITEM, TASK, tokenizer, kind="chat")


@pytest.mark.parametrize("kind", PROMPTS)
def test_a_cut_leaves_the_template_whole(tokenizer, kind: str) -> None:
    whole = make_prompt(ITEM, TASK, tokenizer, kind=kind)
    head, tail = whole.split(ITEM["input"])
    overhead = len(encode(tokenizer, head + tail)["input_ids"])
    for longest in (overhead + 7, overhead + 30):
        cut = make_prompt(ITEM, TASK, tokenizer, longest, kind)
        assert overhead + 3 < len(encode(tokenizer, cut)["input_ids"]) <= longest
        assert cut.startswith(head) and cut.endswith(tail)
        assert ITEM["input"].startswith(cut.removeprefix(head).removesuffix(tail))
    assert make_prompt(ITEM, TASK, tokenizer, 10**4, kind) == whole
    if kind != "none":
        with pytest.raises(InputError, match="no room"):
            make_prompt(ITEM, TASK, tokenizer, overhead - 5, kind)


def test_a_chat_has_one_bos(tokenizer) -> None:
    """Of a tokenizer that adds it to every text, and a template that writes it."""
    bos = SPECIAL[0]
    tokenizer.bos_token, tokenizer.chat_template = bos, "{{ bos_token }}" + CHAT_TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, 0)]
    )
    for kind in PROMPTS:
        for longest in (None, 350):
            prompt = make_prompt(ITEM, TASK, tokenizer, longest, kind)
            for ids in (encode(tokenizer, prompt)["input_ids"], encode(tokenizer, [prompt])[0].ids):
                assert ids[0] == 0 and ids.count(0) == 1
                assert longest is None or len(ids) <= longest


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no\nusers') }}", "cannot be used: no users"),
        ("{% for %}", "cannot be used: "),
        ({"tools": CHAT_TEMPLATE}, "cannot be used: "),
    ],
)
def test_a_template_that_does_not_work_is_one_line(tokenizer, template, says: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InputError) as error:
        make_prompt(ITEM, TASK, tokenizer)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def run(tmp_path):
    """A function that runs summarize.py on one item; what it wrote."""
    data = tmp_path / "data.json"
    data.write_text(json.dumps([ITEM]))

    def run_with(model_path: Path, *flags: str):
        summarize.main(
            [
                *("--model_path", str(model_path), "--dataset_path", str(data), "--device", "cpu"),
                *("--save_path", str(tmp_path / "s.txt"), "--score_path", str(tmp_path / "s.json")),
                *("--max_new_tokens", "8", "--include_special_tokens", *flags),
            ]
        )
        return json.loads((tmp_path / "s.json").read_text()), (tmp_path / "s.txt").read_text()

    return run_with


def test_scripts_take_the_kind_and_record_it(run, chat_path, plain_path, tmp_path) -> None:
    whole = "--no-output_summaries_only"
    scores, text = run(chat_path, whole)
    assert scores["prompt"] == "chat" and text.startswith("<|im_start|>user Sum up. the recent")
    scores, text = run(chat_path, whole, "--prompt", "none", "--max_tokenizer_length", "20")
    assert scores["prompt"] == "none" and text.startswith("the recent tokens the recent")
    scores, text = run(plain_path, "--no_truncation", whole)
    assert scores["prompt"] == "alpaca" and text.startswith("Below is an instruction")
    compare.main(
        [
            *("--model_path", str(chat_path), "--dataset_path", str(tmp_path / "data.json")),
            *("--methods", "h2o", "--max_new_tokens", "2", "--device", "cpu"),
            *("--record", str(tmp_path / "r.json")),
        ]
    )
    assert json.loads((tmp_path / "r.json").read_text())["prompt"] == "chat"


def test_end_of_turn_ends_a_text(run, chat_path) -> None:
    """The token that generation_config.json calls so; here, one that the model really writes."""
    file = chat_path / "generation_config.json"
    before = file.read_text()
    assert json.loads(before)["eos_token_id"] == 2  # <|im_end|>
    scores, _ = run(chat_path, "--min_gen_length", "8")
    assert scores["gen_tokens"] == 8
    model, tokenizer = load_model(chat_path, KeyformerConfig.preset("full"), device="cpu")
    ids = encode(tokenizer, make_prompt(ITEM, TASK, tokenizer), return_tensors="pt")
    third = model.generate(**ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)[0, -1]
    file.write_text(json.dumps({**json.loads(before), "eos_token_id": [2, int(third)]}))
    try:
        scores, text = run(chat_path)
    finally:
        file.write_text(before)
    assert scores["gen_tokens"] <= 3 and text


def test_chat_without_a_template_is_one_line(run, plain_path, tmp_path, capsys) -> None:
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda _: run(plain_path, "--prompt", "chat"))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert line.endswith("the model's tokenizer has no chat template; allowed is alpaca, none")
    assert not (tmp_path / "s.txt").exists()


def test_talking_has_a_form_of_its_own() -> None:
    with pytest.raises(InputError, match="leave out --prompt"):
        dialogue.main(["--interactive", "--prompt", "none"])


def test_articles_are_summarized_in_a_sentence() -> None:
    items = load_items(ARTICLES, TASK)
    raw = json.loads(ARTICLES.read_text(encoding="utf-8"))
    assert [item["input"] for item in items] == [article["article"] for article in raw]
    assert [TASK.reference(item) for item in items] == [article["summary"] for article in raw]
    assert items[0]["instruction"] == "Summarize the following article in one sentence."
    assert items[0]["questions"] == raw[0]["questions"]
