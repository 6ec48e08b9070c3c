"""The tiny models' corpus (what it promises about splits and layout) and their training script."""

import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from keyformer import InputError
from keyformer_evaluation.tasks.data import TASKS, load_items
from tiny import corpus, templates, train

EVAL = [corpus.item("eval", i) for i in range(1000)]
TRAIN = [corpus.item("train", i) for i in range(3000)]
EVAL_DIALOGUES = [corpus.item("eval", i, kind="dialogue") for i in range(600)]
TRAIN_DIALOGUES = [corpus.item("train", i, kind="dialogue") for i in range(2000)]
EVAL_QUESTIONS = {
    shape: [corpus.item("eval", i, kind=shape) for i in range(400)] for shape in corpus.SHAPES
}
TRAIN_QUESTIONS = [
    corpus.item("train", i, kind=shape) for shape in corpus.SHAPES for i in range(400)
]


@pytest.fixture(scope="module")
def tokenizer():
    return train.fit_tokenizer(2048, 1500)


def test_a_document_is_a_function_of_split_index_and_kind():
    assert corpus.document("eval", 7) == corpus.document("eval", 7)
    assert corpus.document("eval", 7) != corpus.document("eval", 8)
    assert corpus.document("eval", 7) != corpus.document("train", 7)
    assert set(corpus.document("train", 0)) == {"instruction", "input", "output"}
    dialogue = corpus.document("train", 0, kind="dialogue")
    assert set(dialogue) == {"narrative", "dialogue", "speakers"}
    with pytest.raises(ValueError, match="split"):
        corpus.document("test", 0)
    with pytest.raises(ValueError, match="kind"):
        corpus.document("train", 0, kind="poem")


def test_less_filler_shortens_a_document_and_keeps_its_facts():
    for kind in corpus.KINDS:
        full, bare = (corpus.item("train", 3, filler, kind) for filler in (1.0, 0.05))
        assert len(bare.text) < len(full.text)
        assert {k: v for k, (v, _) in bare.facts.items()} == {
            k: v for k, (v, _) in full.facts.items()
        }


def test_every_event_type_and_situation_occurs():
    assert len(corpus.NEWS) >= 10
    assert len({frozenset(made.facts) for made in EVAL}) == len(corpus.NEWS)
    assert len(corpus.DIALOGUES) >= 10
    assert len({frozenset(made.facts) for made in EVAL_DIALOGUES}) == len(corpus.DIALOGUES)


def full_names(made: list[corpus.Item], first: list[str], second: list[str], glue: str) -> set[str]:
    pattern = r"\b(?=([A-Z]\w+ [A-Z]\w+))" if glue else r"\b([A-Z]\w+)"
    found = re.findall(pattern, json.dumps([item.document for item in made]))
    return {a + glue + b for a in first for b in second}.intersection(found)


@pytest.mark.parametrize(
    ("first", "second", "glue"),
    [
        (templates.FIRST, templates.LAST, " "),
        (templates.PLACE_A, templates.PLACE_B, ""),
        (templates.RIVER_A, templates.RIVER_B, ""),
        (templates.ORG_A, templates.ORG_B, " "),
    ],
)
def test_splits_share_no_full_name(first, second, glue):
    questions = [made for of_shape in EVAL_QUESTIONS.values() for made in of_shape]
    held_out = full_names(EVAL + EVAL_DIALOGUES + questions, first, second, glue)
    seen = full_names(TRAIN + TRAIN_DIALOGUES + TRAIN_QUESTIONS, first, second, glue)
    assert len(held_out) > 20
    assert len(seen) > 100
    assert not held_out & seen


def test_splits_share_no_combination_of_facts():
    def combinations(made: corpus.Item) -> set[tuple[str, str]]:
        values = [value for value, _ in made.facts.values()]
        named = [value for value in values if value[0].isupper()]
        return {(name, value) for name in named for value in values if name != value}

    held_out = set().union(*map(combinations, EVAL))
    assert not held_out & set().union(*map(combinations, TRAIN))


def test_every_fact_is_stated_in_text_and_summary():
    for made in EVAL + EVAL_DIALOGUES:
        text, answer = made.text.lower(), made.document.get("output", "").lower()
        assert len(made.facts) >= 10
        assert made.last.keys() == made.facts.keys()
        for name, (value, first) in made.facts.items():
            for at in (first, made.last[name]):
                assert text[at : at + len(value)] == value.lower()
            assert value.lower() in answer or not answer


def test_nothing_states_a_name_or_a_figure_before_its_key_sentence():
    for made in EVAL:
        for name, (value, first) in made.facts.items():
            if re.match(r"[A-Z]|\d.* ", value):  # a figure alone may occur by chance
                stated = [
                    found.start() for found in re.finditer(rf"\b{re.escape(value)}\b", made.text)
                ]
                assert (stated[0], stated[-1]) == (first, made.last[name])


def test_a_report_comes_back_to_most_of_its_facts_in_its_first_part():
    facts = [(first, made.last[name], len(made.text)) for made in EVAL
             for name, (_, first) in made.facts.items()]  # fmt: skip
    again = [last / size for first, last, size in facts if last != first]
    assert 0.66 < len(again) / len(facts) < 0.75
    assert sum(place < 0.6 for place in again) / len(again) > 0.9


def test_a_window_on_the_last_half_misses_half_of_the_facts():
    first = [at / len(made.text) for made in EVAL for _, at in made.facts.values()]
    assert 0.7 < sum(place < 0.5 for place in first) / len(first) < 0.85
    last = [at / len(made.text) for made in EVAL for at in made.last.values()]
    assert 0.48 < sum(place < 0.5 for place in last) / len(last) < 0.65
    for made in EVAL:
        assert sum(at < 0.65 * len(made.text) for at in made.last.values()) >= 3


def test_summaries_are_short_and_dense():
    shares = []
    for made in EVAL:
        words = re.findall(r"[a-z0-9]+", made.document["output"].lower())
        assert 35 <= len(words) <= 80
        known = " ".join(value for value, _ in made.facts.values()).lower()
        facts = set(re.findall(r"[a-z0-9]+", known)) - {"a", "the", "of"}
        pairs = list(pairwise(words))
        shares.append(sum(a in facts or b in facts for a, b in pairs) / len(pairs))
    assert sum(shares) / len(shares) > 0.7


def test_two_people_take_turns_and_state_the_facts_again():
    for made in EVAL_DIALOGUES:
        turns, speakers = made.document["dialogue"], made.document["speakers"]
        assert len(turns) == len(speakers)
        assert 6 <= len(turns) <= 10
        assert len(set(speakers)) == 2
        assert all(a != b for a, b in pairwise(speakers))
        for name in speakers:
            assert re.search(rf"\b{name} [A-Z]", made.text)
        values = [value for value, _ in made.facts.values()]
        assert not any(value in turns[0] for value in values)
        spoken = " ".join(turns[1:]).lower()
        assert sum(value.lower() in spoken for value in values) >= 0.8 * len(values)


def test_the_first_turn_and_the_narrative_decide_the_other_turns():
    def wordings(template: templates.Template) -> set[str]:
        texts = {""}
        for kind, value in template:
            options = set().union(*map(wordings, value)) if kind == "choice" else {value}
            texts = {text + option for text in texts for option in options}
        return texts

    for situation in corpus.DIALOGUES.values():
        known = {name for name, _ in situation.slot} | {"a", "b", "a_full", "b_full"}
        first = [wordings(talk[0]) for talk in situation.talk]
        assert len(first) == 3
        assert len(set().union(*first)) == sum(map(len, first))
        for turn in (turn for talk in situation.talk for turn in talk[1:]):
            assert all(kind == "text" or value in known for kind, value in turn)


@pytest.mark.parametrize("shape", list(corpus.SHAPES))
def test_choices_differ_and_the_right_one_states_facts_of_the_report(shape):
    golds = []
    for made in EVAL_QUESTIONS[shape]:
        choices, gold = corpus.options(shape, made.document)
        golds.append(gold)
        assert len(set(choices)) == len(choices) == corpus.SHAPES[shape].choices
        for prompt, _ in choices:
            assert prompt.startswith(made.text + "\n")
        before, after = choices[gold]
        values = [v for v, _ in made.facts.values() if v in before[len(made.text) :] + after]
        assert values or shape == "copa"  # a premise may name no fact, the choice always does
        if shape != "winogrande":
            assert any(value in after for value, _ in made.facts.values())
    for gold in range(corpus.SHAPES[shape].choices):
        assert golds.count(gold) / len(golds) == pytest.approx(1 / len(set(golds)), abs=0.08)


def test_both_names_for_a_gap_are_in_the_report_and_one_of_them_is_a_fact_of_the_event():
    main, aside = 0, 0
    for made in EVAL_QUESTIONS["winogrande"]:
        document = made.document
        options = [document["option1"], document["option2"]]
        assert all(option in made.text for option in options)
        roles = [name for option in options for name, (v, _) in made.facts.items() if v == option]
        right = options[int(document["answer"]) - 1]
        is_aside = any(made.facts.get(pool, ("",))[0] == right for pool in corpus.BYSTANDERS)
        assert sum(role not in corpus.BYSTANDERS for role in roles) >= 1
        main, aside = main + (not is_aside), aside + is_aside
    assert min(main, aside) > 100


def test_questions_come_after_up_to_five_answered_ones():
    for shape in corpus.SHAPES:
        for shots in range(6):
            index = 12 + shots
            prompt, answer = train.few_shot(shape, "eval", index, 1.0)
            blocks = (prompt + answer).split("\n\n")
            assert len(blocks) == shots + 1
            for i, block in enumerate(blocks):
                document = corpus.document("eval", index * 6 + i, kind=shape)
                choices, gold = corpus.options(shape, document)
                assert block == " ".join(choices[gold])
            assert answer == " " + choices[gold][1]


def test_text_lengths(tokenizer):
    lengths = sorted(len(tokenizer.encode(made.text).ids) for made in EVAL[:400])
    assert 350 < lengths[0] < lengths[40] < 500
    assert 780 < lengths[-40] < lengths[-1] < 950
    lengths = sorted(len(tokenizer.encode(made.text).ids) for made in EVAL_DIALOGUES[:400])
    assert 130 < lengths[0] < lengths[-1] < 310
    five_shot = [
        len(tokenizer.encode("".join(train.few_shot(shape, "eval", 5 + 6 * i, 1.0))).ids)
        for shape in corpus.SHAPES
        for i in range(50)
    ]
    assert 700 < min(five_shot) < max(five_shot) < 1240  # the smallest table has 1280 places


def test_digits_stand_alone_and_text_survives(tokenizer):
    text = 'On Friday, 1,234 "crowns" in Alderwick.'
    encoded = tokenizer.encode(text)
    assert [token for token in encoded.tokens if token.isdigit()] == list("1234")
    assert tokenizer.decode(encoded.ids) == text


def test_command_line(tmp_path, capsys):
    out = tmp_path / "sub" / "eval.json"
    for kind, task in (("news", "summarization"), ("dialogue", "conversation")):
        out.unlink(missing_ok=True)
        corpus.main(["--kind", kind, "--split", "eval", "--n", "3", "--output", str(out)])
        items = json.loads(out.read_text())
        assert items == [corpus.document("eval", i, kind=kind) for i in range(3)]
        assert items == load_items(out, TASKS[task])
    capsys.readouterr()
    lines = tmp_path / "questions.jsonl"
    corpus.main(["--kind", "piqa", "--n", "3", "--start", "4", "--output", str(lines)])
    made = [json.loads(line) for line in lines.read_text().splitlines()]
    assert made == [corpus.document("eval", i, kind="piqa") for i in (4, 5, 6)]
    capsys.readouterr()
    bad = [["--n", "0"], ["--split", "all"], ["--n", "x"], ["--kind", "poem"]]
    for arguments in bad:
        with pytest.raises(SystemExit) as exit_info:
            corpus.main(["--output", str(out), *arguments])
        assert exit_info.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(InputError, match="cannot write"):
        corpus.main(["--output", "/dev/null/x"])


def test_training_mixes_kinds_and_uses_each_document_once(tokenizer, monkeypatch):
    monkeypatch.setattr(train.Batches, "POOL", 20)

    def rows_of(count: int) -> list[train.Row]:
        rows: list[train.Row] = []
        loader = iter(train.Batches(tokenizer, first=40, batch_tokens=8192, ramp=1))
        while len(rows) < count:
            ids, parts = next(loader)
            assert ids.shape == parts.shape
            assert ids.numel() <= 8192
            assert ids.shape[1] % train.PAD_TO == 0
            for row, part in zip(ids, parts, strict=True):
                rows.append((row[part > 0].tolist(), int((part == train.PROMPT).sum())))
        return sorted(rows)

    def wanted(numbers: Iterable[int]) -> list[train.Row]:
        rows = []
        for n in numbers:
            if n % 4 < 3:
                kind, name = (("news", "summarization"), ("dialogue", "conversation"))[n % 4 == 2]
                made = corpus.document("train", n, kind=kind)
                prompt, answer = TASKS[name].prompt(made), TASKS[name].reference(made)
            else:
                shape = ("copa", "openbookqa", "winogrande", "piqa")[n // 4 % 4]
                prompt, answer = train.few_shot(shape, "train", n // 16, 1.0)
            ids = [tokenizer.encode(text).ids for text in (prompt, answer)]
            rows.append((ids[0] + ids[1] + [0], len(ids[0])))
        return sorted(rows)

    assert rows_of(40) == wanted(range(40, 80))
    monkeypatch.setattr(train, "get_worker_info", lambda: SimpleNamespace(id=1, num_workers=3))
    assert rows_of(40) == wanted([*range(60, 80), *range(120, 140)])


@pytest.mark.parametrize("name", list(train.ARCHS))
def test_training_forward_equals_the_stock_model(name):
    torch.manual_seed(0)
    arch = train.ARCHS[name]
    args = SimpleNamespace(d_model=64, n_layers=3, n_heads=8)
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = arch.build(args, {"vocab_size": 100, **tokens}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # large scores: attention far from uniform
    ids = torch.randint(0, 100, (2, 96))
    with torch.no_grad():
        ours = arch.hidden(model, ids, torch.float32)
        model.set_attn_implementation("eager")
        stock = model.transformer(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", list(train.ARCHS))
def test_models_are_small_and_tied(name):
    args = train.parse_args(["--arch", name])
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    model = train.ARCHS[name].build(args, {"vocab_size": args.vocab_size, **tokens})
    assert sum(p.numel() for p in model.parameters()) < 5.9e6  # 2 bytes each: below 12 MB
    assert model.lm_head.weight is model.transformer.wte.weight
    assert args.output_dir == Path(f"models/{name}-tiny-keyformer")


@pytest.mark.parametrize("name", list(train.ARCHS))
def test_three_steps_write_a_loadable_folder(name, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(train.Batches, "POOL", 32)
    folder = tmp_path / "model"
    sizes = "--d_model 32 --n_layers 2 --n_heads 4 --batch_tokens 3072 --ramp 9000"
    run = "--device cpu --workers 0 --steps 3 --log_every 1 --eval_documents 3 --warmup 1"
    argv = ["--arch", name, *sizes.split(), *run.split(), "--tokenizer_documents", "300"]
    train.main([*argv, "--output_dir", str(folder)])
    log = capsys.readouterr().out
    assert "step 3 " in log
    assert not list(tmp_path.glob("*.partial"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.dtype, model.config.use_cache) == (torch.float16, True)
    assert tokenizer.padding_side == "left"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == model.generation_config.eos_token_id
    assert tokenizer.tokenize("1,234")[-3:] == ["2", "3", "4"]
    ids = tokenizer("Flooding", return_tensors="pt").input_ids
    assert (
        model.float().generate(ids, max_new_tokens=2, do_sample=False).shape[1] <= ids.shape[1] + 2
    )
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense:")
    for kind in corpus.KINDS:
        loss = re.search(rf"held-out {kind}: .*response (\d+\.\d+)", log)
        assert loss
        assert f"| {kind} | {loss[1]} |" in card
    with pytest.raises(SystemExit) as exit_info:
        train.main([*argv, "--output_dir", str(tmp_path)])
    assert exit_info.value.code == 2


ROOT = Path(__file__).parents[1]
COMMITTED = {
    "summarization/data/sample_eval.json": ("news", "eval", 0, 200),
    "conversation/data/sample_eval.json": ("dialogue", "eval", 0, 200),
}
for shape in corpus.SHAPES:
    COMMITTED[f"lm_eval_harness/data/{shape}.jsonl"] = (shape, "eval", 0, 200)
    COMMITTED[f"lm_eval_harness/data/{shape}_train.jsonl"] = (shape, "train", 1_000_000, 50)


@pytest.mark.parametrize("path", COMMITTED)
def test_committed_data_is_what_the_corpus_writes(path):
    kind, split, start, number = COMMITTED[path]
    text = (ROOT / path).read_text()
    found = map(json.loads, text.splitlines()) if path.endswith("l") else json.loads(text)
    assert list(found) == [corpus.document(split, start + i, kind=kind) for i in range(number)]
