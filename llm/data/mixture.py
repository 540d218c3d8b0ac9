"""Mixtures: the texts of text.sources, each prepared by itself, and the source that stands at each position.

Each source has its own shards, so that other weights encode nothing anew, and its own order of windows, which begins an
epoch of its own whenever it ends. Sources alternate by a pattern of PERIOD positions that the seed rotates: which one
stands at a position, and how many of its windows stand before, follow from (seed, position) alone.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np

from llm.base.errors import RecipeError
from llm.base.hashing import mix
from llm.config.schema import Recipe, TextSource
from llm.data import packing
from llm.data.packing import PackedShuffle
from llm.data.shards import AnyShards, MixedShards, Split
from llm.data.shuffle import WindowShuffle

PERIOD = 1 << 16  # positions after which the pattern of sources repeats; shares are multiples of 1 / PERIOD

Order: TypeAlias = "WindowShuffle | PackedShuffle | MixedShuffle"


# ---------------------------------------------------------------------------------------------- shares


def shares(recipe: Recipe, windows: Mapping[str, float]) -> dict[str, float]:
    """The share of each source of the run's windows, given the windows of one epoch of each; they sum to 1.

    Sources with `epochs` alone get what makes them be read so often, the others divide the rest by their weights, none
    beyond its cap. Without any weight, all are scaled to the run. RecipeError where that cannot be.
    """
    total, sources = recipe.train.steps * recipe.windows_per_step, recipe.text.sources
    wished = {each.name: _limit(each, windows) for each in sources if each.weight is None}
    weighted = [each for each in sources if each.weight is not None]
    if not weighted:
        return {name: count / sum(wished.values()) for name, count in wished.items()}
    if wished and (asked := sum(wished.values())) >= total:
        fault = f"the epochs of {', '.join(wished)} in text.sources take {asked:,.0f} windows of the run's {total:,}"
        raise RecipeError(f"{fault}, and leave none for the others: ask for fewer, or train longer")
    found = {name: count / total for name, count in wished.items()}
    while True:
        rest, whole = 1 - sum(found.values()), sum(each.weight or 0 for each in weighted)
        over = [each for each in weighted if _share(each, rest, whole) * total > _limit(each, windows)]
        if not over:
            return found | {each.name: _share(each, rest, whole) for each in weighted}
        found |= {each.name: _limit(each, windows) / total for each in over}
        weighted = [each for each in weighted if each not in over]
        if not weighted:
            most = int(sum(found.values()) * recipe.train.steps)
            fault = f"all text.sources are at their epochs after {most:,} of {recipe.train.steps:,} steps"
            raise RecipeError(f"{fault}: raise one's epochs{f', or use at most train.steps={most}' if most else ''}")


def _share(source: TextSource, rest: float, weights: float) -> float:
    return (source.weight or 0) * rest / weights


def _limit(source: TextSource, windows: Mapping[str, float]) -> float:
    """The windows that the source's `epochs` come to."""
    return windows[source.name] * source.epochs if source.epochs is not None else float("inf")


def pattern(shares: list[float]) -> np.ndarray:
    """The number of the source at each of PERIOD positions: (PERIOD,) of int64; each is there at least once.

    The j-th window of a source with n of them stands at (j + 1/2) / n (Webster's rule): in any row of positions a
    source of share s has its due within 1 + s x sources windows, beside the rounding of shares to 1 / PERIOD.
    """
    due = np.array(shares) / sum(shares) * PERIOD
    counts = np.maximum(1, due.astype(np.int64))
    counts[np.argsort(counts - due, kind="stable")[: max(0, PERIOD - counts.sum())]] += 1  # the largest remainders
    counts[counts.argmax()] += PERIOD - counts.sum()  # where tiny shares were made one
    places = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


# ---------------------------------------------------------------------------------------------- order


@dataclass(frozen=True)
class MixedShuffle:
    """The order of the windows of several sources, each with its own. The interface of WindowShuffle."""

    seed: int
    sources: dict[str, tuple[WindowShuffle | PackedShuffle, Split]]  # of each its order and its training side
    shares: dict[str, float]  # by the same names

    @property
    def windows(self) -> int:
        """Windows of one epoch of all sources."""
        return sum(order.windows for order, _ in self.sources.values())

    @cached_property
    def _pattern(self) -> np.ndarray:
        whole = pattern([self.shares[name] for name in self.sources])
        return np.roll(whole, -(mix(self.seed, 2) % PERIOD))

    @cached_property
    def _before(self) -> np.ndarray:
        """At each position of the pattern, and at its end, the windows of each source before: (PERIOD + 1, sources)."""
        here = self._pattern[:, None] == np.arange(len(self.sources))
        return np.concatenate([np.zeros((1, len(self.sources)), np.int64), here.cumsum(0)])

    @cached_property
    def _begins(self) -> np.ndarray:
        """Where the tokens of each source begin in all of them end to end."""
        return np.cumsum([0] + [side.tokens for _, side in self.sources.values()])

    def read_before(self, position: int) -> np.ndarray:
        """How many windows of each source stand before `position`: (sources,) of int64."""
        periods, at = divmod(position, PERIOD)
        whole: np.ndarray = periods * self._before[-1] + self._before[at]
        return whole

    def places(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The number of the source at each of `positions`, and the position in that source's own order."""
        periods, at = np.divmod(positions, PERIOD)
        which = self._pattern[at]
        return which, periods * self._before[-1][which] + self._before[at, which]

    def place(self, position: int) -> tuple[str, int, WindowShuffle | PackedShuffle]:
        """The source at `position`, the position in its own order, and that order."""
        which, inner = self.places(np.array([position]))
        name = list(self.sources)[int(which[0])]
        return name, int(inner[0]), self.sources[name][0]

    def starts(self, positions: np.ndarray) -> np.ndarray:
        """First token of the window at each of `positions`, in the training sides end to end."""
        which, inner = self.places(positions)
        found = np.empty(positions.shape, np.int64)
        for number, (order, _) in enumerate(self.sources.values()):
            here = which == number
            found[here] = self._begins[number] + order.starts(inner[here])
        return found

    def ids(self, side: Split, position: int) -> np.ndarray:
        name, inner, order = self.place(position)
        return order.ids(self.sources[name][1], inner)

    def rows(self, side: Split, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """As of WindowShuffle; with segments if one of these windows holds conversations, in texts one a window."""
        which, inner = self.places(positions)
        found = []
        for number, (order, own) in enumerate(self.sources.values()):
            if (here := np.flatnonzero(which == number)).size:
                found.append((here, order.rows(own, inner[here])))
        back = np.argsort(np.concatenate([here for here, _ in found]))
        tokens, targets = (np.concatenate([rows[column] for _, rows in found])[back] for column in (0, 1))
        if all(segments is None for _, (*_, segments) in found):
            return tokens, targets, None
        filled = [np.zeros_like(row) if segments is None else segments for _, (row, _, segments) in found]
        return tokens, targets, np.concatenate(filled)[back]


def orders_of(recipe: Recipe, shards: MixedShards) -> dict[str, tuple[WindowShuffle | PackedShuffle, Split]]:
    """The order of each source by itself."""
    found = {}
    for name, each in shards.sources.items():
        seed = mix(recipe.seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        found[name] = packing.order_of(replace(recipe, seed=seed), each), each.train
    return found


def order_of(recipe: Recipe, shards: AnyShards) -> Order:
    """The order of the training windows. RecipeError where the epochs of text.sources cannot be had."""
    if not isinstance(shards, MixedShards):
        return packing.order_of(recipe, shards)
    orders = orders_of(recipe, shards)
    windows = {name: order.windows for name, (order, _) in orders.items()}
    return MixedShuffle(recipe.seed, orders, shares(recipe, windows))


def tokens_per_epoch(recipe: Recipe, shards: AnyShards) -> int:
    """The tokens that an epoch of the text, or of all sources, reads."""
    if isinstance(shards, MixedShards):
        return sum(packing.tokens_per_epoch(recipe, each) for each in shards.sources.values())
    return packing.tokens_per_epoch(recipe, shards)


def lines(recipe: Recipe, order: Order, steps: int) -> list[str]:
    """The mixture that a run of `steps` will read, for people, and the sources that differ from what was asked for."""
    if not isinstance(order, MixedShuffle):
        return []
    each, said = [], []
    weights = sum(source.weight or 0 for source in recipe.text.sources)
    rest = 1 - sum(order.shares[source.name] for source in recipe.text.sources if not source.weight)
    read = order.read_before(steps * recipe.windows_per_step)
    for source, count in zip(recipe.text.sources, read.tolist(), strict=True):
        epochs = count / order.sources[source.name][0].windows
        each.append(f"{source.name} {order.shares[source.name]:.1%} of the windows, {epochs:.2f} epochs")
        asked = rest * (source.weight or 0) / (weights or 1)
        if source.weight and source.epochs and order.shares[source.name] < asked * (1 - 1e-9):
            said.append(
                f"{source.name} would be read more than text.sources.{source.name}.epochs = {source.epochs:g} times: "
                f"its share is {order.shares[source.name]:.1%} instead of {asked:.1%}"
            )
        elif not source.weight and source.epochs and abs(epochs / source.epochs - 1) > 0.01:
            longer = "longer" if epochs > source.epochs else "shorter"
            said.append(f"{source.name} is read {epochs:.2g} times instead of {source.epochs:g}: the run is {longer}")
    return [f"mixture: {'; '.join(each)}", *said]
