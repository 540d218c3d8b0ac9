"""Values that several packages share."""

IGNORED = -100  # target value of positions without a loss

# Sizes of temporary tensors, which decide bits and which llm.model.cost counts without importing torch.
CHUNK_NUMBERS = {"cpu": 1 << 22, "cuda": 1 << 24}  # logits per chunk: a GPU needs larger ones to be busy
CACHED_NUMBERS = 1 << 18  # logits that a CPU takes through the softmax together: a megabyte in fp32
STACKED = 8  # most matrices of one shape that Muon orthogonalises together
STACKED_NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}  # and most numbers: more are no faster, and need six times as much
