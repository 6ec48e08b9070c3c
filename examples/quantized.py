"""Weights in 8 bits, and half of the cache in 4. Needs the extra `quantize`."""

from collections.abc import Sequence

from keyformer import KeyformerCache, KeyformerConfig, load_model
from keyformer.quantize import weight_bytes
from keyformer_evaluation.tasks.flags import run_main
from shared import model_path, report


def main(argv: Sequence[str] | None = None) -> None:
    path = model_path(__doc__, argv)
    for weights, elements in ((None, "auto"), ("int8", "int4")):
        config = KeyformerConfig(kv_cache=50, cache_dtype=elements, seed=0)
        # "bnb-8bit" and "bnb-4bit" are bitsandbytes', "int8" is torchao's; all run on a CPU too.
        model, tokenizer = load_model(path, config, device="cpu", dtype="float32", quantize=weights)
        inputs = tokenizer(report(), return_tensors="pt", return_token_type_ids=False)
        cache = KeyformerCache(model.config, config)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        sizes = f"{weight_bytes(model):,} bytes of weights, {cache.memory_bytes():,} of cache"
        print(f"weights {weights or 'float32'}, cache {elements}: {sizes}: {text!r}")


if __name__ == "__main__":
    run_main(main)
