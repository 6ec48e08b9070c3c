"""Nothing lost, nothing counted twice: stores, kills, several processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import Forked, forked_ranks, script
from originals import write_original

from keyformer import InputError
from keyformer_evaluation.records import identity
from keyformer_evaluation.records.store import Store, _owner

ROOT = Path(__file__).parents[1]
SENTENCE = "the key tokens and the recent tokens of a text that is read word by word"
DEATHS = 3

MEASURED = {"seconds", "tokens_per_second", "date", "peak_memory_bytes"}
MEASURED |= {"items_from_store", "requests_from_store"}
"""What differs from run to run."""


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> Path:
    return write_original(tmp_path_factory.mktemp("resume") / "mpt-7b-keyformer", "mpt", "bin")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory) -> dict[str, Path]:
    """Of each task, of texts of different lengths, two of them alike."""
    folder = tmp_path_factory.mktemp("data")
    words = SENTENCE.split()
    texts = [" ".join(words[n % 5 :] * (1 + n % 4)) for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 4)]
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
    assert name == "run_lm_eval_harness"
    flags = ["--tasks", "tiny_copa", "--limit", "6", "--bs", "2", "--device", "cpu", "--keyformer"]
    return [str(ROOT / "lm_eval_harness" / f"{name}.py"), *model, *flags, *store, "--out", str(out)]


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


SCRIPTS = ("summarize", "dialogue", "compare", "table4", "run_lm_eval_harness")


DIES = """
import os, runpy, signal, sqlite3, sys
import torch
left, counted = int(sys.argv[1]), sys.argv[2]
seen = 0
def event(*given):
    global seen
    seen += 1
    if seen > left:
        os.kill(os.getpid(), signal.SIGKILL)
def connect(*given, **named):
    made = opened(*given, **named)
    made.set_progress_handler(event, 50)
    return made
def files(name, given):
    if name in ("open", "os.mkdir", "os.rename", "os.remove", "sqlite3.connect"):
        event()
def linear(*given):
    event()
    return forward(*given)
opened, forward = sqlite3.connect, torch.nn.Linear.forward
sqlite3.connect, torch.nn.Linear.forward = connect, linear
sys.addaudithook(files)
sys.argv = sys.argv[3:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    total, left = seen, float("inf")
    with open(counted, "w") as file:
        file.write(str(total))
"""
"""A script that is killed at one of its events: a layer, a file that is opened, part of a query."""


@pytest.mark.parametrize("name", SCRIPTS)
def test_b15_killed_at_random_moments(name, model_path, datasets, tmp_path) -> None:
    """The last life's results are those of a run that nobody killed, and no item is lost.

    A life that ends before it is killed leaves nothing to kill: the next begins without a store.
    """
    whole, out, count = tmp_path / "whole", tmp_path / "killed", tmp_path / "events"
    for folder in (whole, out):
        folder.mkdir()
    (tmp_path / "dies.py").write_text(DIES)

    def live(events: int, folder: Path) -> int:
        own = [str(tmp_path / "dies.py"), str(events), str(count)]
        of = [*own, *command(name, model_path, datasets, folder)]
        code, _, errors = Forked(of, tmp_path / "says").wait()
        assert code in (0, -signal.SIGKILL), errors
        return code

    assert live(10**9, whole) == 0
    drawn, most = random.Random(0), int(count.read_text())
    died, left = 0, most
    while died < DEATHS:
        if live(drawn.randrange(left), out):
            died, left = died + 1, left * 2 // 3  # a life that goes on has less to do
        else:
            left = most
            for file in out.glob("s.sqlite*"):
                file.unlink()
    assert live(10**9, out) == 0
    assert results(out) == results(whole)
    assert stored(out) == stored(whole)


HALTS = """
import os, runpy, signal, sys
import torch
from keyformer_evaluation.records.store import Store
add, forward, calls = Store.add, torch.nn.Linear.forward, []
def add_one(*given):
    add(*given)
    calls.append(0)
def halt(*given):
    calls[:] = [call + 1 for call in calls]
    if 5 in calls:
        {how}
    return forward(*given)
Store.add, torch.nn.Linear.forward = add_one, halt
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""A script that halts in the forward that follows an item it has finished."""


def halting(how: str, of: list[str], folder: Path) -> list[str]:
    """The command of a script that halts so."""
    folder.mkdir(exist_ok=True)
    (folder / "halts.py").write_text(HALTS.format(how=how))
    return [str(folder / "halts.py"), *of]


def launched(processes: int, of: list[str], folder: Path) -> Forked:
    """accelerate's launcher, with as many processes of a script on this machine's CPU."""
    folder.mkdir(exist_ok=True)
    launcher = folder / "launch.py"
    launcher.write_text("from accelerate.commands.launch import main\nmain()\n")
    flags = ["--multi_gpu", "--main_process_port", "0", "--num_processes", str(processes)]
    return Forked([str(launcher), *flags, *of], folder)


def test_texts_depend_on_no_batch_and_no_process(model_path, datasets, tmp_path) -> None:
    """keyformer with a seed: 1, 2 and 3 processes, batches of 1, 4 and 7."""
    texts = {}
    for processes, batch in ((1, 1), (1, 4), (1, 7), (2, 4), (3, 1)):
        out = tmp_path / f"{processes} {batch}"
        out.mkdir()
        of = [*command("summarize", model_path, datasets, out), "--bs", str(batch)]
        if processes == 1:
            script("summarization", "summarize").main(of[1:])
        else:
            ended = forked_ranks(of, out / "says", processes)
            assert [code for code, _, _ in ended] == [0] * processes, ended
            scores = json.loads((out / "scores.json").read_text())
            assert (scores["items"], scores["unfinished"]) == (11, 0)
            assert sum("[00:00<?" in said for _, _, said in ended) == 1  # one shows a bar
        texts[processes, batch] = (out / "texts.txt").read_text()
        assert len(stored(out)) == 10  # of which two items are alike
    assert len(set(texts.values())) == 1


def test_one_of_two_processes_is_killed(model_path, datasets, tmp_path) -> None:
    """The launcher names it; the same command finishes, with what an undisturbed run gives."""
    out = tmp_path / "killed"
    out.mkdir()
    of = [*command("summarize", model_path, datasets, out), "--bs", "1"]
    waiting = halting("while True: signal.pause()", of, tmp_path / "halts")
    first = launched(2, waiting, tmp_path / "launcher")
    try:
        while count(out) < 2:  # one of each: then both of them wait
            assert first.poll() is None, first.wait()
            time.sleep(0.05)
        at_work(first.pid)[-1].kill()
        code, _, errors = first.wait()
    finally:
        if first.poll() is None:
            os.kill(first.pid, signal.SIGTERM)  # which ends the others
    assert code != 0 and "SIGKILL" in errors
    assert count(out) == 2
    ended = forked_ranks(of, out / "says", 2)
    assert [code for code, _, _ in ended] == [0, 0], ended
    alone = tmp_path / "alone"
    alone.mkdir()
    of = [*command("summarize", model_path, datasets, alone), "--bs", "1"]
    script("summarization", "summarize").main(of[1:])
    assert (out / "texts.txt").read_bytes() == (alone / "texts.txt").read_bytes()
    assert stored(out) == stored(alone)
    assert json.loads((out / "scores.json").read_text())["items_from_store"] >= 2


def at_work(launcher: int) -> list[psutil.Process]:
    """The processes that run the script; others of the launcher's may end while they are listed."""
    found = []
    for child in psutil.Process(launcher).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            if "LOCAL_RANK" in child.environ():
                found.append(child)
    return found


def count(out: Path) -> int:
    """Finished items so far."""
    try:
        return len(stored(out))
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize(
    ("name", "signal_", "code"),
    [("summarize", signal.SIGINT, 130), ("compare", signal.SIGTERM, 143)],
)
def test_b8_stopped(name, signal_, code, model_path, datasets, tmp_path) -> None:
    """One line, what is done written, and the same command goes on."""
    of = [*command(name, model_path, datasets, tmp_path), "--bs", "1"]
    stopping = halting(f"os.kill(os.getpid(), {int(signal_)})", of, tmp_path / "halts")
    ended, _, errors = Forked(stopping, tmp_path / "says").wait()
    assert ended == code, errors
    last = errors.splitlines()[-1]
    kept = count(tmp_path)
    assert kept == 1
    assert f"{name}.py: stopped: {kept} of " in last and "the same command goes on" in last
    assert "Traceback" not in errors
    if name == "summarize":
        scores = json.loads((tmp_path / "scores.json").read_text())
        assert len((tmp_path / "texts.txt").read_text().splitlines()) == scores["items"]
        assert scores["items"] + scores["unfinished"] == 11 and scores["items"] >= kept
    ended, _, errors = Forked(of, tmp_path / "says").wait()
    assert ended == 0, errors
    assert count(tmp_path) == (10 if name == "summarize" else 20)


def test_no_resume_starts_anew(model_path, datasets, tmp_path, capsys) -> None:
    of = command("summarize", model_path, datasets, tmp_path)[1:]
    main = script("summarization", "summarize").main
    before = []
    for more, kept in (([], 0), ([], 11), (["--no-resume"], 0), (["--seed", "4"], 0)):
        main([*of, *more])
        scores = json.loads((tmp_path / "scores.json").read_text())
        before.append(scores["items_from_store"])
        assert scores["items"] == 11
        assert ("items were done before" in capsys.readouterr().out) == bool(kept)
    assert before == [0, 11, 0, 0]


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "deep" / "s.sqlite")


def another(store: Store, owner: str) -> Store:
    """The same file, as another process has it."""
    other = Store(store.path)
    other.owner = owner
    return other


def test_b14_an_item_is_claimed_by_one(store) -> None:
    sleeper = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    other = another(store, _owner(psutil.Process(sleeper.pid)))
    assert other.claim(["a", "b"]) == {"a", "b"}
    assert store.claim(["a", "b", "c"]) == {"c"}
    other.add({"a": {"x": 1}}, {"device": "there"})
    store.add({"c": {"x": 3}, "a": {"x": 2}}, {"device": "here"})
    assert store.results("abc") == {"a": {"x": 1}, "c": {"x": 3}}
    assert store.sources("abc") == [({"device": "there"}, 1), ({"device": "here"}, 1)]
    sleeper.kill()  # and not waited for: a zombie still has its number
    while psutil.Process(sleeper.pid).status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert store.claim(["a", "b"]) == {"b"}
    sleeper.wait()
    assert another(store, "elsewhere 1 0.00").claim(["b"]) == set()
    store.give_up()
    assert another(store, "elsewhere 1 0.00").claim(["b"]) == {"b"}
    assert store.claim(["b"]) == {"b"}  # of a host that is none


def take_all(path: Path, taken) -> None:
    store = Store(path)
    for number in range(0, 300, 3):
        keys = store.claim([str(number + more) for more in range(3)])
        store.add({key: {} for key in keys}, {"device": store.owner})
        for key in keys:
            taken.put(key)


def test_claims_of_many_processes(tmp_path) -> None:
    """Three processes share items out, each item once."""
    fork = multiprocessing.get_context("fork")
    taken, path = fork.SimpleQueue(), tmp_path / "s.sqlite"
    workers = [fork.Process(target=take_all, args=(path, taken)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    found = []
    while not taken.empty():
        found.append(taken.get())
    assert sorted(found) == sorted(map(str, range(300)))
    assert sum(count for _, count in Store(path).sources(found)) == 300


def open_all(paths: list[Path], together) -> None:
    for path in paths:
        together.wait()
        Store(path).close()


def test_b14_many_processes_make_one_store(tmp_path) -> None:
    """Three that open it at the same time, sixty times: all of them can."""
    fork = multiprocessing.get_context("fork")
    together = fork.Barrier(3, timeout=60)  # if one of them fails, so do all
    paths = [tmp_path / f"{number}.sqlite" for number in range(60)]
    workers = [fork.Process(target=open_all, args=(paths, together)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]


@pytest.mark.parametrize("content", [b"my notes\n", b"SQLite format 3\x00" + bytes(200)])
def test_what_is_no_store_is_left_alone(tmp_path, content) -> None:
    path = tmp_path / "s.sqlite"
    path.write_bytes(content)
    with pytest.raises(InputError, match="is not a store of finished items"):
        Store(path)
    assert path.read_bytes() == content


def test_another_programs_database_is_left_alone(tmp_path) -> None:
    path = tmp_path / "s.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(InputError, match="another program's"):
        Store(path)
    assert path.read_bytes() == before


def test_b13_the_key_holds_what_makes_a_result(monkeypatch, tmp_path) -> None:
    """Code counts, its comments, docstrings and layout do not; nor does code that is not used."""
    folder = tmp_path / "room"
    folder.mkdir()
    (folder / "__init__.py").write_text("")
    (folder / "uses.py").write_text('"""Says."""\nfrom room import used\n\n\nX = used.Y\n')
    (folder / "used.py").write_text("Y = 1\n")
    (folder / "other.py").write_text("Z = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(identity, "_project", lambda: {"room"})

    def hashed() -> str:
        identity.code_hash.cache_clear()
        identity._code.cache_clear()
        return identity.code_hash("room.uses")

    first = hashed()
    (folder / "other.py").write_text("Z = 2\n")
    (folder / "used.py").write_text('"""What."""\n\nY = 1  # one\n')
    assert hashed() == first
    (folder / "used.py").write_text("Y = 2\n")
    assert hashed() != first


def test_b13_weights_and_libraries_count(model_path, monkeypatch) -> None:
    of = identity.weights_hash(str(model_path))
    assert of == identity.weights_hash(str(model_path))
    settings = identity.environment(torch.device("cpu"), "keyformer_evaluation.tasks.generation")
    assert {"code", "device", "torch", "transformers"} == set(settings)
    first = identity.item_keys({**settings, "weights": of}, ["text"])
    assert first == identity.item_keys({"weights": of, **settings}, ["text"])
    for name in ("code", "device", "torch", "transformers", "weights"):
        assert identity.item_keys({**settings, "weights": of, name: "x"}, ["text"]) != first


def test_b13_records_name_where_items_were_measured(model_path, datasets, tmp_path) -> None:
    of = command("summarize", model_path, datasets, tmp_path)[1:]
    main = script("summarization", "summarize").main
    main([*of, "--n_obs", "4"])
    here = json.loads((tmp_path / "scores.json").read_text())
    assert "elsewhere" not in here
    with sqlite3.connect(tmp_path / "s.sqlite") as connection:
        connection.execute(
            "UPDATE sources SET source = ?", [json.dumps({"commit": "old", "device": "cpu: x"})]
        )
    main(of)
    scores = json.loads((tmp_path / "scores.json").read_text())
    (other,) = scores["elsewhere"]
    assert scores["commit"] == here["commit"] and other["commit"] == "old"
    assert other["items"] == 4 and scores["items_from_store"] == 5  # of which two are alike
