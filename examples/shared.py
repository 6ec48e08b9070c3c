"""What the examples share: the model they take, and a text long enough to evict some of."""

import json
from collections.abc import Sequence
from pathlib import Path

from keyformer import InputError
from keyformer_evaluation.tasks.flags import Parser

ROOT = Path(__file__).parents[1]
REAL = ROOT / "models" / "smollm2-135m"  # where models/model_download/download_model.py puts it
BUNDLED = ROOT / "models" / "mpt-tiny-keyformer"


def model_path(description: str | None, argv: Sequence[str] | None) -> str:
    """What ``--model`` says, by default the real model, or the bundled one where it is not."""
    parser = Parser(description=description)
    default = str(REAL if REAL.is_dir() else BUNDLED)
    parser.add_argument("--model", default=default, help="folder or name (default: %(default)s)")
    path = Path(name := parser.parse_args(argv).model)
    if path.is_file() or (path.is_absolute() and not path.exists()):
        raise InputError(f"--model must be a folder or a name on the hub, got {name}")
    return name


def report() -> str:
    """A report of some 900 tokens that asks for its summary."""
    file = ROOT / "summarization" / "data" / "sample_eval.json"
    item = json.loads(file.read_text())[0]
    return (
        f"### Instruction:\n{item['instruction']}\n\n### Input:\n{item['input']}\n\n### Response:\n"
    )
