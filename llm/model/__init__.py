"""The transformer, its loss and its cost."""
