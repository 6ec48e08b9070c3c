"""A rule of one's own for who stays: tokens whose keys are short (the idea of arXiv 2406.11430)."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from keyformer import KeyformerConfig, load_model
from keyformer.rules import Rule
from keyformer.rules.rule import Candidates
from keyformer_evaluation.tasks.flags import run_main
from shared import model_path, report


@dataclass(frozen=True)
class ShortKeys(Rule):
    """A token is worth more the shorter its key. The recent window stays whatever it says."""

    def score(self, tokens: Candidates) -> Tensor:
        return -tokens.keys.norm(dim=-1)


def main(argv: Sequence[str] | None = None) -> None:
    config = KeyformerConfig(kv_cache=20, recent=30, noise="none", tau_end=1, rule=ShortKeys())
    model, tokenizer = load_model(model_path(__doc__, argv), config, device="cpu", dtype="float32")
    inputs = tokenizer(report(), return_tensors="pt", return_token_type_ids=False)
    output = model.generate(
        **inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True
    )
    ids = output.sequences[0]
    for number, layer in enumerate(output.past_key_values.layers):
        # Each head holds tokens of its own choice; these are the first head's.
        kept = layer.positions[0, 0].sort().values
        print(f"layer {number} keeps {len(kept)} of {len(ids)}: {tokenizer.decode(ids[kept])!r}")


if __name__ == "__main__":
    run_main(main)
