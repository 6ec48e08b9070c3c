"""The download scripts, with a local folder or an HTTP server on 127.0.0.1 as the hub."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import logging
import os
import random
import re
import runpy
import shutil
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote, urlsplit

import datasets
import pyarrow
import pytest
from conftest import script as task_script
from huggingface_hub import close_session, constants
from originals import write_original
from pyarrow import parquet

from keyformer import InputError
from keyformer_evaluation.tasks import flags
from keyformer_evaluation.tasks.data import TASKS, load_items
from keyformer_evaluation.tasks.flags import run_main

ROOT = Path(__file__).resolve().parents[1]
CLOSED = "http://127.0.0.1:9"  # the discard port: nothing listens, so a connection is refused
CONVERTED = "refs/convert/parquet"
Files = dict[str, bytes]


def dump(value: object) -> bytes:
    return json.dumps(value).encode()


def script(folder: str, name: str):
    """A script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / folder)
        return importlib.import_module(f"download_{name}")


NAMES = ("cnndm", "govreport", "longbench", "xsum")
cnndm, govreport, longbench, xsum = (script("summarization/dataset_download", n) for n in NAMES)
orca, soda = (script("conversation/dataset_download", n) for n in ("orca", "soda"))
download_model = script("models/model_download", "model")
summarize = task_script("summarization", "summarize")


# ---------------------------------------------------------------- a stand-in for the hub


class FakeHub(ThreadingHTTPServer):
    """Serves repositories from memory at the few routes the hub client uses."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, Files] = {}
        self.refused: dict[str, str] = {}  # file path -> the hub's error code
        self.fetched: list[str] = []
        self.sent = 0  # bytes of files

    def sha(self, repo: str) -> str:
        """A commit id that changes with the content, as a real one does."""
        files = self.repos[repo]
        return hashlib.sha1(b"".join(files[name] for name in sorted(files))).hexdigest()


class HubHandler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test output quiet."""

    def do_GET(self) -> None:
        path = urlsplit(self.path).path.strip("/").removeprefix("api/")
        for repo in self.server.repos:
            if repo in path:
                return self.serve(repo, path.partition(repo)[2].strip("/"))
        self.refuse(401, "RepoNotFound")

    do_HEAD = do_GET

    def serve(self, repo: str, rest: str) -> None:
        files, sha = self.server.repos[repo], self.server.sha(repo)
        kind, _, rest = rest.partition("/")
        revision, name = map(unquote, (*rest.split("/", 1), "")[:2])
        if revision in (CONVERTED, sha[::-1]):  # the hub's own branch, without the script
            files, sha = {n: files[n] for n in files if not n.endswith(".py")}, sha[::-1]
        if name in self.server.refused:
            self.refuse(403, self.server.refused[name])
        elif revision not in ("", "main", CONVERTED, sha):
            self.refuse(404, "RevisionNotFound")
        elif kind in ("", "revision"):
            siblings = [{"rfilename": n, "size": len(data)} for n, data in files.items()]
            self.reply(200, dump({"id": repo, "sha": sha, "siblings": siblings}), {})
        elif kind == "tree" and not name:
            self.reply(200, dump([tree_entry(n, data) for n, data in files.items()]), {})
        elif kind == "resolve" and name in files:
            entry, body, status = tree_entry(name, files[name]), files[name], 200
            part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if part:
                body, status = body[int(part[1]) : int(part[2]) + 1], 206
            if self.command == "GET":
                self.server.fetched.append(name)
                self.server.sent += len(body)
            etag = entry.get("lfs", entry)["oid"]
            self.reply(status, body, {"ETag": f'"{etag}"', "X-Repo-Commit": sha})
        else:
            self.refuse(404, "EntryNotFound")

    def refuse(self, status: int, code: str) -> None:
        self.reply(status, b"{}", {"X-Error-Code": code})

    def reply(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


def tree_entry(name: str, data: bytes) -> dict[str, Any]:
    """A line of the hub's tree listing; weights are in LFS there, with a sha256."""
    git_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    entry: dict[str, Any] = {"type": "file", "path": name, "size": len(data), "oid": git_id}
    if name.endswith((".bin", ".safetensors", ".msgpack")):
        oid = hashlib.sha256(data).hexdigest()
        entry["lfs"] = {"oid": oid, "size": len(data), "pointerSize": 134}
    return entry


def set_hub(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Make url the hub, as HF_ENDPOINT would before the imports."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(datasets.config, "HF_ENDPOINT", url)


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch, capsys):
    """Caches and default output are in tmp_path, and there is no hub."""
    for module in (cnndm, govreport, longbench, xsum, orca, soda):  # these write next to themselves
        path = tmp_path / Path(module.__file__).relative_to(ROOT)
        monkeypatch.setattr(module, "__file__", str(path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "cache" / name)
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # asks another host
    for module in (constants, datasets.config):
        monkeypatch.setattr(module, "HF_HUB_OFFLINE", False)
    for library in ("datasets", "huggingface_hub"):  # what they log counts as output
        for handler in logging.getLogger(library).handlers:
            monkeypatch.setattr(handler, "stream", sys.stderr)
    set_hub(monkeypatch, CLOSED)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    close_session()  # the client reads the proxies once
    yield
    close_session()


@pytest.fixture
def hub(monkeypatch):
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    set_hub(monkeypatch, server.url)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fails(capsys):
    """A function that runs a main that must fail and returns its one line on stderr."""

    def run(main, *args: str | Path) -> str:
        with pytest.raises(SystemExit) as stopped:
            run_main(lambda _: main([str(arg) for arg in args]))
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and ": error: " in line
        return line

    return run


# ---------------------------------------------------------------- datasets


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = datasets.Dataset.from_list(rows)
    (rows.to_parquet if path.suffix == ".parquet" else rows.to_json)(path)


def rows_of(document: str, summary: str, count: int) -> list[dict[str, Any]]:
    return [{document: f"dóc {i}", summary: f"sum {i}", "id": str(i)} for i in range(count)]


DIALOGUES = [
    {"narrative": f"dóc {i}", "dialogue": [f"sum {i}", "b"], "speakers": ["User", "Assistant"]}
    for i in range(3)
]
QUESTIONS = [
    {"system_prompt": f"dóc {i}", "question": f"sum {i}", "response": "b", "id": str(i)}
    for i in range(3)
]


def card(names: tuple[str, ...], split: str) -> str:
    """The README.md of a mirror with a configuration in each folder of these names."""
    each = '- config_name: "{0}"\n  data_files:\n  - split: {1}\n    path: "{0}/*"\n'
    return "---\nconfigs:\n" + "".join(each.format(name, split) for name in names) + "---\n"


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture
def mirror(tmp_path) -> Path:
    """A local folder with 30 examples in the columns of XSum."""
    write_rows(tmp_path / "mirror" / "test.parquet", rows_of("document", "summary", 30))
    return tmp_path / "mirror"


@pytest.mark.parametrize(
    ("module", "file", "rows"),
    [
        (cnndm, "validation.parquet", rows_of("article", "highlights", 3)),
        (xsum, "test.jsonl", rows_of("document", "summary", 3)),
        (govreport, "test.parquet", rows_of("report", "summary", 3)),
        (soda, "test.parquet", [{**row, "head": "x"} for row in DIALOGUES]),
        (orca, orca.FILE, QUESTIONS),
    ],
)
def test_dataset_is_written_to_data_folder(tmp_path, module, file, rows) -> None:
    write_rows(tmp_path / "mirror" / file, rows)
    write_rows(tmp_path / "mirror" / Path(file).with_stem("train"), rows[:1])
    assert module.main(["--dataset_path", str(tmp_path / "mirror"), "--n_obs", "3"]) is None
    (path,) = tmp_path.glob("*/data/*")  # no temporary file is left
    name = module.__name__.removeprefix("download_") + "_eval.json"
    assert path == Path(module.__file__).parents[1] / "data" / name
    written = load_items(path, TASKS[path.parents[1].name])  # the task's name is the folder's
    if module in (soda, orca):
        assert written == DIALOGUES
    else:
        assert module.INSTRUCTION and written == [
            {"instruction": module.INSTRUCTION, "input": f"dóc {i}", "output": f"sum {i}"}
            for i in range(3)
        ]


def test_named_configuration_of_a_hub_copy_is_used(tmp_path) -> None:
    mirror = tmp_path / "mirror"
    for count, name in ((2, "2.0.0"), (3, "3.0.0")):  # the hub's copy has one a version
        write_rows(mirror / name / "all.parquet", rows_of("article", "highlights", count))
    (mirror / "README.md").write_text(card(("2.0.0", "3.0.0"), "validation"))
    cnndm.main(["--dataset_path", str(mirror), "--output", str(tmp_path / "out.json")])
    assert len(read(tmp_path / "out.json")) == 3


def test_n_obs_draws_at_random_with_seed(mirror, tmp_path) -> None:
    drawn = {}
    for run, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        out = tmp_path / run / "x.json"
        argv = ["--dataset_path", str(mirror), "--n_obs", "5", "--seed", seed]
        xsum.main([*argv, "--output", str(out)])
        drawn[run] = [e["input"] for e in read(out)]
    assert drawn["a"] == drawn["b"] != drawn["c"]
    xsum.main(["--dataset_path", str(mirror), "--n_obs", "31", "--output", str(tmp_path / "all")])
    assert len(read(tmp_path / "all")) == 30  # as many as there are
    assert len(set(drawn["a"])) == 5 and drawn["a"] != [f"dóc {i}" for i in range(5)]


@pytest.mark.parametrize(
    ("main", "args", "says"),
    [
        (xsum.main, ["--split", "dev"], "cannot load dev of"),
        (xsum.main, ["--n_obs", "0"], "got 0"),
        (xsum.main, ["--dataset_path", "/no/such/folder"], "no such dataset or folder"),
        (xsum.main, ["--dataset_path", "who/what"], "cannot reach the hub for who/what"),
        (govreport.main, [], "no column report (there are: document, summary, id)"),
        (soda.main, [], "no column narrative (there are: document, summary, id)"),
        (orca.main, ["--split", "test"], "no column system_prompt (there are: document, "),
        (orca.main, ["--dataset_path", "who/what"], "cannot reach the hub for who/what"),
    ],
)
def test_dataset_errors_are_one_line(mirror, tmp_path, fails, main, args, says) -> None:
    assert says in fails(main, "--dataset_path", mirror, *args)
    assert not list(tmp_path.glob("*/data/*"))


def test_unwritable_output_is_found_before_loading(tmp_path, fails) -> None:
    (tmp_path / "file").touch()
    argv = ("--dataset_path", "/no/such", "--output")
    line = fails(xsum.main, *argv, tmp_path / "file" / "x")
    assert f"cannot write to {tmp_path / 'file'}: " in line
    assert f"cannot write {tmp_path}: it is a folder" in fails(xsum.main, *argv, tmp_path)


def test_failed_write_keeps_the_old_file(mirror, tmp_path, monkeypatch) -> None:
    out = tmp_path / "out" / "x.json"
    out.parent.mkdir()
    out.write_text("old")
    monkeypatch.setattr(Path, "replace", Mock(side_effect=OSError("No space left on device")))
    with pytest.raises(InputError, match="No space"):
        xsum.main(["--dataset_path", str(mirror), "--output", str(out)])
    assert out.read_text() == "old" and os.listdir(out.parent) == ["x.json"]


def test_dataset_of_the_hub(hub, mirror, tmp_path, fails) -> None:
    hub.repos["EdinburghNLP/xsum"] = {  # its script must neither run nor stand in the way
        "README.md": b"",
        "xsum.py": b"raise SystemExit",
        "test.parquet": (mirror / "test.parquet").read_bytes(),
    }
    xsum.main([])
    assert len(read(tmp_path / "summarization" / "data" / "xsum_eval.json")) == 30
    assert "test.parquet" in hub.fetched and "xsum.py" not in hub.fetched


def test_script_run_in_any_folder_says_one_line(hub, tmp_path) -> None:
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(tmp_path), "HF_ENDPOINT": hub.url}
    command = [sys.executable, xsum.__spec__.origin, "--output", "x.json"]
    result = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    line = result.stderr.splitlines()[-1]  # some libraries say something when they are imported
    assert "Traceback" not in result.stderr
    assert result.returncode == 2 and not (tmp_path / "x.json").exists()
    assert line.startswith("download_xsum.py: error: no such dataset or folder")
    assert line.endswith("EdinburghNLP/xsum")


def longbench_rows(subset: str) -> list[dict[str, Any]]:
    question = {"qmsum": "What about the remote?", "samsum": "Dialogue: B\nSummary:"}
    row = {"input": question.get(subset, ""), "context": "long text", "answers": ["one", "two"]}
    return [{**row, "_id": str(i), "length": 2, "all_classes": None} for i in range(2)]


def longbench_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as files:
        for subset in longbench.INSTRUCTIONS:
            lines = b"\n".join(dump(row) for row in longbench_rows(subset))
            files.writestr(f"data/{subset}.jsonl", lines)
    return buffer.getvalue()


def test_longbench_subsets_of_a_local_zip(tmp_path, fails) -> None:
    argv = ["--dataset_path", str(tmp_path)]
    (tmp_path / "data.zip").write_bytes(longbench_zip())
    inputs = {}
    for subset in ("gov_report", "qmsum", "multi_news", "vcsum", "samsum"):
        longbench.main([*argv, "--subset", subset])
        written = read(tmp_path / "summarization" / "data" / f"{subset}_eval.json")
        assert [e["output"] for e in written] == ["one", "one"]
        inputs[subset] = written[0]["input"]
    assert inputs["gov_report"] == inputs["multi_news"] == inputs["vcsum"] == "long text"
    assert inputs["qmsum"] == "long text\n\nWhat about the remote?"
    assert inputs["samsum"] == "long text\n\nDialogue: B\nSummary:"
    assert "not train" in fails(longbench.main, *argv, "--split", "train")
    line = fails(longbench.main, *argv, "--subset", "hotpotqa")
    assert "hotpotqa" in line and all(subset in line for subset in inputs)
    (tmp_path / "data.zip").write_bytes(b"half a file")
    assert "cannot read gov_report of" in fails(longbench.main, *argv)


def test_longbench_mirror_without_the_zip(tmp_path) -> None:
    for subset in ("samsum", "qmsum"):
        write_rows(tmp_path / subset / "all.parquet", longbench_rows(subset))
    (tmp_path / "README.md").write_text(card(("samsum", "qmsum"), "test"))
    longbench.main(["--dataset_path", str(tmp_path), "--subset", "qmsum"])
    assert "remote" in read(tmp_path / "summarization" / "data" / "qmsum_eval.json")[0]["input"]


def test_longbench_of_the_hub(hub, tmp_path) -> None:
    hub.repos["zai-org/LongBench"] = {"LongBench.py": b"", "data.zip": longbench_zip()}
    longbench.main(["--subset", "samsum"])
    assert hub.fetched == ["data.zip"]
    assert len(read(tmp_path / "summarization" / "data" / "samsum_eval.json")) == 2


@pytest.mark.parametrize(
    ("module", "file", "rows", "changes"),
    [
        (
            soda,
            "test.jsonl",
            DIALOGUES,
            [{"narrative": " "}, {"dialogue": ["a"] * 3}, {"dialogue": ["a"], "speakers": ["A"]}],
        ),
        (orca, "train.jsonl", QUESTIONS, [{"question": ""}, {"response": ""}, {"response": None}]),
    ],
)
def test_what_is_no_dialogue_is_left_out(tmp_path, capsys, module, file, rows, changes) -> None:
    rows = [{**rows[0], **change} for change in changes] + rows
    write_rows(tmp_path / "mirror" / file, rows)
    argv = ["--dataset_path", str(tmp_path / "mirror"), "--n_obs", "3"]
    module.main([*argv, "--output", str(tmp_path / "x.json")])
    assert read(tmp_path / "x.json") == DIALOGUES
    assert "left out 3 of 6 " in capsys.readouterr().out


def test_orca_of_the_hub_is_read_in_part(hub, tmp_path, monkeypatch, fails) -> None:
    text = random.Random(0)
    rows = [
        {"system_prompt": " ", "question": str(i), "response": text.randbytes(1000).hex()}
        for i in range(4000)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / orca.FILE)  # one row group
    hub.repos["Open-Orca/OpenOrca"] = {
        orca.FILE: (tmp_path / orca.FILE).read_bytes(),
        "3_5M-GPT3_5-Augmented.parquet": b"",
    }
    monkeypatch.setattr(orca, "POOL", 50)
    for n_obs in (5, 60):
        orca.main(["--n_obs", str(n_obs)])
        written = read(tmp_path / "conversation" / "data" / "orca_eval.json")
        drawn = [int(item["dialogue"][0]) for item in written]
        assert len(set(drawn)) == n_obs and max(drawn) < max(50, n_obs)
        assert {item["narrative"] for item in written} == {orca.NARRATIVE}
    file = hub.repos["Open-Orca/OpenOrca"][orca.FILE]
    assert {*hub.fetched} == {orca.FILE} and hub.sent < len(file)  # in both runs together
    hub.refused[orca.FILE] = "GatedRepo"
    assert f"cannot read {orca.FILE} of Open-Orca/OpenOrca: " in fails(orca.main)


def test_orca_errors_are_one_line(tmp_path, fails) -> None:
    (tmp_path / orca.FILE).write_bytes(b"half a file")
    argv = ("--dataset_path", tmp_path)
    assert f"cannot read {orca.FILE} of {tmp_path}: " in fails(orca.main, *argv)
    assert "not test" in fails(orca.main, *argv, "--split", "test")


# ---------------------------------------------------------------- models

MPT = "mosaicml/mpt-7b"
SHARDS = ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin")
INDEX = "pytorch_model.bin.index.json"
SIDE = {
    *("config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json"),
    *("tokenizer_config.json", "download_info.json"),
}
COMPLETE = SIDE | {*SHARDS, INDEX}


@pytest.fixture
def mpt_files() -> Files:
    """The files of mosaicml/mpt-7b by name, with a few bytes in each."""
    code = ("adapt_tokenizer", "attention", "configuration_mpt", "modeling_mpt", "warnings")
    files = {f"{name}.py": b"raise SystemExit('remote code ran')" for name in code}
    files |= {".gitattributes": b"*.bin filter=lfs", "README.md": b"# MPT", "LICENSE": b"Apache"}
    for name in SIDE - {"download_info.json"}:
        files[name] = dump({"name": name, "model_type": "mpt"})
    for number, shard in enumerate(SHARDS):
        files[shard] = bytes([number]) * 5000
    weights = ("transformer.wte.weight", "transformer.blocks.1.norm_1.weight")
    files[INDEX] = dump({"weight_map": dict(zip(weights, SHARDS, strict=True))})
    return files


def argv(out: Path, *args: str, name: str = MPT) -> list[str]:
    return ["--model_name", name, "--output_dir", str(out), *args]


def test_model_comes_without_code_and_is_not_mixed(hub, mpt_files, tmp_path, fails) -> None:
    hub.repos[MPT] = mpt_files
    hub.repos["cerebras/Cerebras-GPT-6.7B"] = {**mpt_files, "config.json": b"{}"}
    out = tmp_path / "new" / "mpt"
    assert download_model.main(argv(out)) is None
    assert set(os.listdir(out)) == COMPLETE  # so no *.py and no .cache either
    for name in (*SHARDS, INDEX, "config.json"):
        assert (out / name).read_bytes() == mpt_files[name]
    record = {"model_name": MPT, "revision": hub.sha(MPT)}
    assert read(out / "download_info.json") == record

    hub.fetched.clear()
    download_model.main(argv(out))
    assert not {*SHARDS} & {*hub.fetched}  # a second run keeps weights that are there
    line = fails(download_model.main, *argv(out, name="cerebras/Cerebras-GPT-6.7B"))
    assert "holds another download" in line and MPT in line
    hub.repos[MPT] = {**mpt_files, "config.json": b"{}"}  # another commit of the same model
    assert "holds another download" in fails(download_model.main, *argv(out))
    (out / "download_info.json").unlink()
    assert "already holds config.json" in fails(download_model.main, *argv(out))
    assert (out / "config.json").read_bytes() == mpt_files["config.json"]
    assert set(os.listdir(out)) == COMPLETE - {"download_info.json"}
    cache = tmp_path / "home" / ".cache" / "huggingface"
    cache.mkdir(parents=True)
    assert "already holds .cache" in fails(download_model.main, *argv(tmp_path / "home"))
    assert cache.exists()


@pytest.mark.parametrize(
    ("name", "arch", "folder"),
    [
        (MPT, "mpt", "mpt-7b-keyformer"),
        ("EleutherAI/gpt-j-6B", "gptj", "gptj-keyformer"),
        ("cerebras/Cerebras-GPT-6.7B", "cerebras", "cerebras-keyformer"),
    ],
)
def test_the_released_commands_as_typed(hub, tmp_path, monkeypatch, name, arch, folder) -> None:
    """cd models/model_download; download; cd; mv; then the task scripts find model and data."""
    models = tmp_path / "models"
    for file in (
        ".gitignore",
        "models/model_download/download_model.py",
        f"models/{folder}/README.md",
    ):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    original = write_original(tmp_path / "hub", arch, "bin shards")
    hub.repos[name] = {path.name: path.read_bytes() for path in original.iterdir()}

    monkeypatch.chdir(models / "model_download")
    monkeypatch.setattr(sys, "argv", ["download_model.py", "--model_name", name])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path("download_model.py", run_name="__main__")
    assert stopped.value.code == 0
    fetched = {*os.listdir(models / "model_download" / "model")}
    # Nothing whose name has a dot first: mv model/* is all.
    code = {file for file in hub.repos[name] if file.endswith(".py")}
    assert fetched == hub.repos[name].keys() - code | {"download_info.json"}

    monkeypatch.chdir(tmp_path)
    commands = f"git init -q && mv models/model_download/model/* models/{folder}/"
    commands += f" && git ls-files --others --exclude-standard models/{folder}"
    seen = subprocess.check_output(commands, shell=True, text=True)
    assert seen.split() == [f"models/{folder}/README.md"]  # no weights are ever committed
    assert {*os.listdir(models / folder)} == fetched | {"README.md"}

    write_rows(tmp_path / "mirror" / "validation.jsonl", rows_of("article", "highlights", 2))
    cnndm.main(["--dataset_path", str(tmp_path / "mirror")])
    monkeypatch.setattr(flags, "MODELS", models)
    for which in (["--model_path", f"models/{folder}"], ["--model_name", folder]):
        more = ["--dataset_path", "summarization/data/cnn_eval.json", "--max_new_tokens", "2"]
        more += ["--save_path", "out.summary", "--score_path", "out.score", "--device", "cpu"]
        summarize.main([*which, *more, "--keyformer", "--causal_lm", "--early_stopping"])
        assert read(tmp_path / "out.score")["items"] == 2


def test_one_weight_format_comes_and_foreign_files_stay(hub, mpt_files, tmp_path) -> None:
    shard, index = "model-00001-of-00001.safetensors", "model.safetensors.index.json"
    more = ("flax_model.msgpack", "tf_model.h5", "onnx/model.onnx", "tokenizer/config.json")
    extra = dict.fromkeys((shard, *more, "vocab.json", "merges.txt", "training_args.bin"), b"x")
    extra[index] = dump({"weight_map": {"wte": shard}})
    hub.repos["EleutherAI/gpt-j-6B"] = {**mpt_files, **extra}
    (tmp_path / "gptj").mkdir()
    (tmp_path / "gptj" / "modeling.py").write_text("# mine")
    download_model.main(argv(tmp_path / "gptj", name="EleutherAI/gpt-j-6B"))
    wanted = SIDE | {shard, index, "vocab.json", "merges.txt", "modeling.py"}
    assert set(os.listdir(tmp_path / "gptj")) == wanted


def test_interrupted_download_is_resumed(hub, mpt_files, tmp_path, fails) -> None:
    hub.repos[MPT], hub.refused[SHARDS[1]] = mpt_files, "GatedRepo"
    assert "gated" in fails(download_model.main, *argv(tmp_path / "mpt"))
    hub.refused.clear()
    download_model.main(argv(tmp_path / "mpt"))
    assert [hub.fetched.count(shard) for shard in SHARDS] == [1, 1]
    assert not (tmp_path / "mpt" / ".cache").exists()


def test_model_errors_are_one_line_and_leave_nothing(
    hub, mpt_files, tmp_path, fails, monkeypatch
) -> None:
    out = tmp_path / "a" / "b"

    def line(*args: str, name: str = MPT) -> str:
        return fails(download_model.main, *argv(out, *args, name=name))

    unknown = line(name="gpt2")
    assert all(name in unknown for name in ("gpt2", MPT, "Cerebras-GPT-6.7B"))
    assert "was not found" in line()
    hub.repos[MPT] = mpt_files
    assert "no revision no/such" in line("--revision", "no/such")
    hub.refused = dict.fromkeys(mpt_files, "GatedRepo")  # listing is public, the files are not
    assert "gated" in line()
    hub.repos[MPT] = {"config.json": b"{}", "rust_model.ot": b"x"}
    assert "neither safetensors nor PyTorch weights" in line()
    set_hub(monkeypatch, CLOSED)
    closed = line()
    assert "was not downloaded" in closed and "refused" in closed
    assert not out.parent.exists()


def test_incomplete_checkpoint_is_reported(hub, mpt_files, tmp_path, fails) -> None:
    hub.repos[MPT] = {name: data for name, data in mpt_files.items() if name != SHARDS[0]}
    line = fails(download_model.main, *argv(tmp_path / "one"))
    assert f"names {SHARDS[0]}, which the repository lacks" in line
    hub.repos[MPT] = {**mpt_files, "config.json": b"{not json"}
    assert "is broken" in fails(download_model.main, *argv(tmp_path / "two"))
