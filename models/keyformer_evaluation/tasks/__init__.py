"""The task scripts: their flags and data, generation, scores."""
