"""Sampled softmax: the pieces that the training loss weighs each target against while the rate is high."""

import numpy as np
import torch

from llm.base.hashing import mix
from llm.data.shuffle import permuted
from llm.model.loss import Sampled
from llm.training.context import RunContext

COUNTED = 1 << 22  # tokens of the training side that tell which pieces are frequent, the first ones
LEAST_RATE = 0.5  # of the peak; below it the softmax covers all pieces


class SampledSoftmax:
    """Half of the pieces are the most frequent ones, the others change with every step and stand for all the rest.

    They follow from (seed, step) alone: the same on every rank and for any micro-batch.
    """

    def __init__(self, context: RunContext) -> None:
        self.device, self.seed = context.device, context.recipe.seed
        vocab_size, pieces = context.tokenizer.vocab_size, context.recipe.train.sampled_softmax
        self.frequent = pieces // 2 if pieces < vocab_size else 0
        self.rare = pieces - self.frequent
        if self.frequent:
            train = context.shards.train
            counts = np.bincount(train.read(0, min(train.tokens, COUNTED)), minlength=vocab_size)
            self.pieces = np.argsort(-counts, kind="stable")
            log_weights = np.zeros(pieces, np.float32)
            log_weights[self.frequent :] = np.log((vocab_size - self.frequent) / self.rare)
            self.log_weights = torch.from_numpy(log_weights).to(self.device)

    def at(self, step: int, lr_factor: float) -> Sampled | None:
        """The pieces at update `step`; None: all."""
        if not self.frequent or lr_factor < LEAST_RATE:
            return None
        rest = len(self.pieces) - self.frequent
        drawn = self.frequent + permuted(np.arange(self.rare), rest, mix(self.seed, step))
        pieces = np.concatenate([self.pieces[: self.frequent], self.pieces[drawn]])
        return Sampled(torch.from_numpy(pieces).to(self.device), self.log_weights)
