"""Several machines of a launch encode one text: blocks of documents are dealt to them in turn, exchanged in rounds.

Each machine reads the whole text, as only that tells where a block begins, but encodes only its own blocks. Every
machine then has all of them in their order, so that each disk gets the bytes that a single process writes.
"""

import json
from collections.abc import Iterator
from itertools import islice, zip_longest
from typing import Any, Protocol

import numpy as np

from llm.base.errors import GroupError

ROUND = 16  # blocks that all machines together exchange at once, at least one each

Block = dict[str, Any]  # of one side: text and lengths of its documents; once encoded, their tokens and starts
ARRAYS = ("tokens", "starts", "parts", "keys", "sizes")


class Team(Protocol):
    """The machines as distributed.team.Team has them. All make the same exchanges in the same order."""

    ranks: list[int]  # of their first processes
    rank: int  # of this machine among them
    writes: bool  # False where another one writes to the same cache

    def exchange(self, part: bytes) -> list[bytes]:
        """Every machine's part. GroupError if one has failed or is gone."""


def told(team: Team | None, value: Any) -> list[Any]:
    """The `value` of each machine, a JSON value."""
    return [json.loads(each) for each in team.exchange(json.dumps(value).encode())] if team else [value]


def agree(team: Team, found: list[dict[str, str]]) -> None:
    """GroupError names the first machine whose fingerprints are not those of the first one."""
    for rank, mine in zip(team.ranks, found, strict=True):
        odd = next((name for name, value in mine.items() if value != found[0][name]), None)
        if odd:
            both = f"process {rank} has {odd} fingerprint = {mine[odd]}, process {team.ranks[0]} has {found[0][odd]}"
            raise GroupError(f"{both}: give every machine the same files")


class Shared:
    """The blocks of one text. `text_bytes` counts what each machine has encoded."""

    def __init__(self, team: Team) -> None:
        self._team, self._machines = team, len(team.ranks)
        self.text_bytes = [0] * self._machines

    def own(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Those that this machine encodes."""
        return islice(blocks, self._team.rank, None, self._machines)

    def all(self, encoded: Iterator[Block]) -> Iterator[Block]:
        """The blocks of all machines in order, given this one's."""
        most = max(1, ROUND // self._machines)
        while True:
            rounds = [_unpacked(each) for each in self._team.exchange(_packed(list(islice(encoded, most))))]
            for row in zip_longest(*rounds):
                for machine, block in enumerate(row):
                    if block is not None:
                        self.text_bytes[machine] += block["text_bytes"]
                        yield block
            if any(len(each) < most for each in rounds):
                return


def _packed(blocks: list[Block]) -> bytes:
    from safetensors.numpy import save

    arrays: dict[str, np.ndarray] = {}
    for number, block in enumerate(blocks):
        arrays |= {f"{number}/{block['side']}/{name}": block[name] for name in ARRAYS if name in block}
    return save(arrays)


def _unpacked(part: bytes) -> list[Block]:
    from safetensors.numpy import load

    blocks: dict[int, Block] = {}
    for key, array in load(part).items():
        number, side, name = key.split("/")
        blocks.setdefault(int(number), {"side": side})[name] = array
    for block in blocks.values():
        block["text_bytes"] = int(block["sizes"].sum())
    return [blocks[number] for number in range(len(blocks))]
