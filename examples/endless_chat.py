"""A chat that may go on for ever: its cache has 128 slots a head, and never grows."""

from collections.abc import Sequence

import torch

from keyformer import KeyformerCache, KeyformerConfig, load_model
from keyformer_evaluation.tasks.flags import run_main
from shared import model_path

SAID = ("Hello, I am Ada.", "What is a bridge for?", "Name a river.", "Tell me about ships.") * 4


def main(argv: Sequence[str] | None = None) -> None:
    model, tokenizer = load_model(model_path(__doc__, argv), device="cpu", dtype="float32")
    # Positions are places in the cache, so that no table of positions ends.
    config = KeyformerConfig.preset("h2o", kv_budget=128, recent=50, positions="new")
    cache = KeyformerCache(model.config, config)
    unfed = torch.zeros(1, 0, dtype=torch.int64)
    for said in SAID:
        turn = f"\nUser: {said}\nAssistant:"
        ids = tokenizer(turn, return_tensors="pt", add_special_tokens=False)["input_ids"]
        # Only what the cache has not seen is fed; the mask counts what it has.
        ids = torch.cat([unfed, ids], dim=1)
        mask = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.int64)
        output = model.generate(
            ids, attention_mask=mask, past_key_values=cache, max_new_tokens=16, do_sample=False
        )
        unfed = output[:, -1:]  # the last token that was generated has not been fed back
        answer = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        seen, size = cache.get_seq_length(), cache.memory_bytes()
        print(f"{seen} tokens in {size:,} bytes. {said} -> {answer.strip()!r}")


if __name__ == "__main__":
    run_main(main)
