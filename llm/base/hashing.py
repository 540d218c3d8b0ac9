"""Integer hashing, from which the order of the data, initial weights and sampled pieces follow."""

MASK = (1 << 64) - 1


def mix(*words: int) -> int:
    """A 64-bit hash of integers: SplitMix64's finalizer, chained."""
    state = 0
    for word in words:
        state = (state + (word & MASK) + 0x9E3779B97F4A7C15) & MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
        state ^= state >> 31
    return state
