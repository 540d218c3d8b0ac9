"""From text to batches: documents, tokenizers, shards, window order."""
