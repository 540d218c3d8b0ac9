"""What the processes of a group say to each other on the CPU's side, without a device and without a pickle.

Nothing here is reached by a gradient. One process alone passes through all of it.
"""

import json
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from llm.base.errors import GroupError, LLMError, as_disk_error
from llm.distributed.process import place, rank, say, world

HUNG = timedelta(minutes=15)  # a step and an evaluation that take longer than this do not pass for a hung process
ANSWER = 10  # seconds that the main process has to say what it knows of the others
MAIN = 1000  # added to an exit status by the main process
PATIENCE = timedelta(days=365)  # the preparation of a large text takes as long as it takes


class Coordinator:
    """A CPU-side group beside the device's: what it agrees on waits for no device. One process agrees with itself."""

    def __init__(self) -> None:
        self.writes = rank() == 0  # whether this process leads those that share its disk
        self.one_disk = True
        alone = world() == 1
        self.group: Any = None if alone else dist.new_group(backend="gloo", timeout=HUNG)
        self.patient: Any = None if alone else dist.new_group(backend="gloo", timeout=PATIENCE)
        self.kv_store: Any = None if alone else dist.PrefixStore("council", dist.distributed_c10d._get_default_store())

    def largest(self, number: int, *, patient: bool = False, after: str = "") -> int:
        """The largest of every process's `number`; `after` tells the others how far this process has come.

        GroupError names the process that others wait for in vain.
        """
        if self.group is None:
            return number
        if after:
            self.kv_store.set(str(rank()), after)
        box = torch.tensor([number], dtype=torch.int64)
        try:
            dist.all_reduce(box, op=dist.ReduceOp.MAX, group=self.patient if patient else self.group)
        except RuntimeError as error:
            raise self.blamed(error) from error
        return int(box)

    def blamed(self, error: RuntimeError) -> Exception:
        """`error` itself, or the GroupError that it is where a peer has ended; it names the process.

        Who has left another note than this process of how far it has come is the one.
        """
        if self.group is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return error
        last = self._last_progress()
        if not last and rank() != 0:
            return GroupError("process 0 is gone or hangs; the same command goes on")
        others = [each for each in range(world()) if each != rank()]
        behind = [each for each in others if last.get(each) != last.get(rank())] or others
        said = ("one of " if len(behind) > 1 else "") + ", ".join(
            f"process {each} (last heard of after {last.get(each, 'its start')})" for each in behind
        )
        return GroupError(f"{said} is gone or hangs; the same command goes on ({str(error).splitlines()[0][:160]})")

    def _last_progress(self) -> dict[int, str]:
        """What each process last said; nothing where the main process, which keeps the notes, does not answer."""
        last: dict[int, str] = {}

        def ask() -> None:
            with suppress(RuntimeError):
                for each in range(world()):
                    if self.kv_store.check([str(each)]):
                        last[each] = self.kv_store.get(str(each)).decode()

        asking = Thread(target=ask, daemon=True)  # the store's own time-out does not hold where its host is halted
        asking.start()
        asking.join(ANSWER)
        return dict(last)

    def meet_on_disk(self, folder: Path) -> None:
        """Find out, by trying, which processes see the same `folder`: `writes` and `one_disk` say so from here on."""
        if self.group is None:
            return
        token = self.largest(secrets.randbits(60) if rank() == 0 else 0)
        mine = folder / f".here-{token}-{rank()}"
        leads = place().local_rank == 0  # processes of one machine share its disk
        if leads:
            folder.mkdir(parents=True, exist_ok=True)
            mine.touch()
        leaders = self.count(leads)
        seen = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(f".here-{token}-*"))
        self.writes = bool(seen) and seen[0] == rank()
        self.one_disk = self.largest(int(len(seen) < leaders)) == 0
        mine.unlink(missing_ok=True)

    def count(self, yes: bool) -> int:
        """How many processes say so."""
        if self.group is None:
            return int(yes)
        box = torch.tensor([int(yes)], dtype=torch.int64)
        dist.all_reduce(box, group=self.group)
        return int(box)

    def agree(self, what: str, facts: dict[str, Any], mend: str) -> None:
        """GroupError that names the first process whose `facts` are not the main process's, and the first fact."""
        if self.group is None:
            return
        facts = {name: str(value) for name, value in facts.items()}
        theirs = self.from_main(what, facts)
        odd = next((name for name in {**theirs, **facts} if theirs.get(name) != facts.get(name)), None)
        if odd is not None:
            line = f"process {rank()} has {odd} = {facts.get(odd)}, process 0 has {theirs.get(odd)}: {mend}"
            self.kv_store.set(f"{what} of {rank()}", line)
        if others := self.largest(0 if odd is None else world() - rank()):
            raise GroupError(self.kv_store.get(f"{what} of {world() - others}").decode())

    def from_main(self, what: str, value: Any) -> Any:
        """The main process's `value`, as JSON knows it; once for each name `what`."""
        if self.group is None:
            return value
        try:
            if rank() == 0:
                self.kv_store.set(what, json.dumps(value))
            return json.loads(self.kv_store.get(what))
        except RuntimeError as error:
            raise self.blamed(error) from error

    @contextmanager
    def error_barrier(self, *, patient: bool = False) -> Iterator[None]:
        """All processes leave the block, or all end: one that fails in it with an LLMError takes the others along.

        Those that only follow stay silent, as do those that fail where the main process fails too.
        """
        try:
            yield
        except (LLMError, OSError) as error:
            known = error if isinstance(error, LLMError) else as_disk_error(error)
            status = known.status if known else 1
            worst = self.largest(status + (MAIN if rank() == 0 else 0), patient=patient)
            if worst >= MAIN and rank() != 0:
                raise Followed(worst - MAIN) from error
            raise known or error from error
        if worst := self.largest(0, patient=patient):
            raise Followed(worst % MAIN)

    def leave(self) -> None:
        """Part, once all are ready to."""
        if self.group is not None:
            self.largest(0)
            dist.destroy_process_group()

    def first(self, act: Callable[[], Any]) -> Any:
        """What `act()` returns: done by each node's first process while the others wait as long as it takes."""
        result = None
        first = place().local_rank == 0
        with self.error_barrier(patient=True):
            if first:
                result = act()
            if place().local_world < world():
                say("waiting until every machine is as far")
        with self.error_barrier(patient=True):
            return result if first else act()


class Followed(GroupError):
    """Another process failed and has said why."""

    def __init__(self, status: int) -> None:
        super().__init__("")
        self.status = status
