"""Tiny models of made-up reports, dialogues and questions: their corpus and training script."""
