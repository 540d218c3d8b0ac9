"""The files of a run: checkpoints, metrics, trace, model card."""
