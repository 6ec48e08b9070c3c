"""Tiny models that know made-up news reports and dialogues: their corpus and training script."""
