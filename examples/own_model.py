"""Any model of transformers, as it is loaded, and then with a fifth of its cache."""

from collections.abc import Sequence

from transformers import AutoModelForCausalLM, AutoTokenizer

from keyformer import InputError, KeyformerCache, KeyformerConfig, enable_keyformer
from keyformer_evaluation.tasks.flags import run_main
from shared import model_path, report


def main(argv: Sequence[str] | None = None) -> None:
    path = model_path(__doc__, argv)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load {path}: {str(error).splitlines()[0]}") from error

    # The model is changed in place: from now on `generate` evicts.
    enable_keyformer(model)

    inputs = tokenizer(report(), return_tensors="pt", return_token_type_ids=False)
    prompt = inputs["input_ids"].shape[1]
    for name, config in (
        ("everything", KeyformerConfig.preset("full")),
        ("a fifth", KeyformerConfig.preset("keyformer", kv_cache=20, recent=30, seed=0)),
    ):
        # A cache of one's own, to look at afterwards; without it `generate` makes one.
        cache = KeyformerCache(model.config, config)
        output = model.generate(**inputs, past_key_values=cache, max_new_tokens=24, do_sample=False)
        text = tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
        print(f"{name} of {prompt} tokens is {cache.memory_bytes():,} bytes: {text!r}")


if __name__ == "__main__":
    run_main(main)
