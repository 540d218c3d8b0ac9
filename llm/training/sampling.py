"""Sampled softmax: the pieces that the training loss weighs each target against."""

import numpy as np
import torch

from llm.base.hashing import mix
from llm.model.loss import Sampled
from llm.training.context import RunContext

COUNTED = 1 << 22  # tokens of the training side that tell how frequent each piece is, the first ones
POWER = 0.75  # a piece is drawn in proportion to its frequency to this power
SURE = 1 << 32  # stands for the inclusion probability 1, of a piece that is always drawn


class SampledSoftmax:
    """Draws pieces for each step, frequent ones more often or always. One drawn with probability p counts 1 / p.

    Systematic sampling (Madow, 1949): the pieces lie in a row, each as long as its inclusion probability, and a comb
    with teeth SURE apart picks those it hits. Its offset follows from (seed, step) alone, so all ranks draw alike.
    """

    def __init__(self, context: RunContext) -> None:
        self.device, self.seed = context.device, context.recipe.seed
        vocab_size, self.count = context.tokenizer.vocab_size, context.recipe.train.sampled_softmax
        self.covers_all = not 0 < self.count < vocab_size
        if not self.covers_all:
            train = context.shards.train
            counts = np.bincount(train.read(0, min(train.tokens, COUNTED)), minlength=vocab_size)
            self.pieces = np.argsort(-counts, kind="stable")
            chances = chances_of(counts[self.pieces], self.count)
            self.ends = chances.cumsum()
            self.log_weights = np.log(SURE / chances).astype(np.float32)

    def at(self, step: int) -> Sampled | None:
        """The pieces at update `step`; None: all."""
        if self.covers_all:
            return None
        comb = np.arange(self.count) * SURE + mix(self.seed, step) % SURE
        drawn = np.searchsorted(self.ends, comb, side="right")
        pieces, log_weights = torch.from_numpy(self.pieces[drawn]), torch.from_numpy(self.log_weights[drawn])
        return Sampled(pieces.to(self.device), log_weights.to(self.device))


def chances_of(counts: np.ndarray, drawn: int) -> np.ndarray:
    """The chance of each piece, at most SURE and in sum `drawn` times that: int64. `counts` fall."""
    wanted = (counts + 1.0) ** POWER
    sure, rest = 0, wanted.sum()
    while wanted[sure] * (drawn - sure) > rest:
        rest -= wanted[sure]
        sure += 1
    chances = np.minimum(SURE, wanted / rest * (drawn - sure) * SURE).astype(np.int64).clip(1)
    chances[:sure] = SURE
    missing = drawn * SURE - chances.sum()  # by rounding: less than one for each piece
    chances[sure:][: abs(missing)] += np.sign(missing)
    return chances
