"""The optimizer, the learning rate and the time budget."""
