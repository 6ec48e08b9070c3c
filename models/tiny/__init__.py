"""A tiny MPT that summarizes made-up news reports: its corpus and its training script."""
