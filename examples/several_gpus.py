"""A model's layers over all GPUs that there are; each layer's cache lies where the layer does."""

from collections import Counter
from collections.abc import Sequence

from keyformer import KeyformerCache, KeyformerConfig, load_model
from keyformer_evaluation.tasks.flags import run_main
from shared import model_path, report


def main(argv: Sequence[str] | None = None) -> None:
    config = KeyformerConfig(kv_cache=50, seed=0)
    # accelerate spreads the layers; without a GPU all of them come to the CPU. The task scripts
    # do the same for --model_parallelize.
    model, tokenizer = load_model(model_path(__doc__, argv), config, device_map="auto")
    inputs = tokenizer(report(), return_tensors="pt", return_token_type_ids=False)
    inputs = inputs.to(model.device)  # that of the first layer
    cache = KeyformerCache(model.config, config)
    output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
    on = Counter(str(layer.positions.device) for layer in cache.layers)
    places = ", ".join(f"{count} on {device}" for device, count in on.items())
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"caches of {len(cache.layers)} layers: {places}: {text!r}")


if __name__ == "__main__":
    run_main(main)
