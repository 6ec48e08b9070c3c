"""What the task scripts share: flags, data, generation loop, ROUGE, results."""
