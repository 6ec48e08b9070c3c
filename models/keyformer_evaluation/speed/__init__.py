"""How fast models with random weights are: engines side by side, and the floor under each."""
