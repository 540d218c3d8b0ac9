"""CPU-side (gloo) coordination of ranks; JSON, never pickle.

No gradient passes through here. A single process runs the same code, without communication.
"""

import json
import secrets
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist

from llm.base import atomic_io
from llm.base.errors import GroupError, LLMError, RecipeError, as_llm_error
from llm.distributed.process import place, rank, say, world

HUNG = timedelta(minutes=15)  # longer than any step or evaluation: a rank that is silent for this long has hung
ANSWER = 10  # seconds that the main process has to report the progress of the others
MAIN = 1000  # added to an exit status by the main process
PATIENCE = timedelta(days=365)  # preparing a large text may take arbitrarily long


class Coordinator:
    """A CPU-side process group next to the device's own, so that agreeing never synchronises a device."""

    def __init__(self) -> None:
        self.writes = rank() == 0  # whether this process writes for all that share its disk
        self.one_disk = True
        self.group: Any = None  # with one process there is nobody to talk to
        if world() > 1:
            self.group = dist.new_group(backend="gloo", timeout=HUNG)
            self.patient = dist.new_group(backend="gloo", timeout=PATIENCE)
            # A prefix of its own, because the store keeps the values of earlier runs of this launch.
            number = self.largest(secrets.randbits(60) if rank() == 0 else 0)
            self.kv_store = dist.PrefixStore(f"coordinator {number}", dist.distributed_c10d._get_default_store())

    def largest(self, number: int, *, patient: bool = False, after: str = "") -> int:
        """Maximum of `number` over all ranks; `after` records how far this rank has come.

        GroupError names the rank that the others wait for in vain.
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

    def blamed(self, error: RuntimeError, among: Sequence[int] = ()) -> Exception:
        """A GroupError that names the lost peer if `error` came from the group, otherwise `error` itself.

        The lost peer is a rank, `among` these or all, whose last recorded progress differs from this rank's.
        """
        if self.group is None or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            return error
        last = self._last_progress()
        if not last and rank() != 0:
            return GroupError("process 0 is gone or hangs: run the same command again to resume")
        others = [each for each in among or range(world()) if each != rank()]
        behind = [each for each in others if last.get(each) != last.get(rank())] or others
        named = (f"process {each} (last heard of after {last.get(each, 'its start')})" for each in behind)
        said, why = ("one of " if len(behind) > 1 else "") + ", ".join(named), str(error).splitlines()[0][:160]
        return GroupError(f"{said} is gone or hangs: run the same command again to resume ({why})")

    def _last_progress(self) -> dict[int, str]:
        """Each rank's last recorded progress; empty if the main process, which hosts the store, does not answer."""
        last: dict[int, str] = {}

        def ask() -> None:
            with suppress(RuntimeError):
                for each in range(world()):
                    if self.kv_store.check([str(each)]):
                        last[each] = self.kv_store.get(str(each)).decode()

        asking = Thread(target=ask, daemon=True)  # the store's own timeout fails if its host is halted
        asking.start()
        asking.join(ANSWER)
        return dict(last)

    def forget_progress(self) -> None:
        """Take back what this rank has recorded."""
        try:
            self.kv_store.delete_key(str(rank()))
        except RuntimeError as error:
            raise self.blamed(error) from error

    def meet_on_disk(self, folder: Path) -> None:
        """Find out which ranks share `folder`, by creating files there, and set `writes` and `one_disk` accordingly."""
        if self.group is None:
            return
        seen = self.sharers(folder)
        self.writes = bool(seen) and seen[0] == rank()
        self.one_disk = self.largest(int(len(seen) < len(self.leaders()))) == 0

    def leaders(self) -> list[int]:
        """The first rank of each machine."""
        mine = torch.tensor([place().local_rank], dtype=torch.int64)
        found = [torch.empty_like(mine) for _ in range(world())]
        try:
            dist.all_gather(found, mine, group=self.group)
        except RuntimeError as error:
            raise self.blamed(error) from error
        return [each for each, local_rank in enumerate(found) if int(local_rank) == 0]

    def sharers(self, folder: Path, *, needed: bool = True) -> list[int]:
        """First ranks of the machines that share `folder`; unless it is `needed`, without those that cannot write."""
        token = self.largest(secrets.randbits(60) if rank() == 0 else 0)
        mine = folder / f".here-{token}-{rank()}"
        try:
            with self.error_barrier():  # every machine has tried
                if place().local_rank == 0:  # the processes of a machine share its disk
                    with nullcontext() if needed else suppress(OSError, RecipeError):
                        atomic_io.make_folder(folder)
                        mine.touch()
            seen = sorted(int(path.name.rpartition("-")[2]) for path in folder.glob(f".here-{token}-*"))
            self.largest(0)  # every rank has looked
        finally:
            with suppress(OSError):
                mine.unlink()
        return seen

    def agree(self, what: str, facts: dict[str, Any], mend: str) -> None:
        """Raise GroupError if a rank's `facts` differ from the main process's, naming the first rank and fact."""
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
        """Broadcast the main process's `value` as JSON. A coordinator can use each name `what` once."""
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
        """If any rank raises an LLMError or OSError inside, all raise.

        Only the failing ranks print, and if the main process is among them, only it.
        """
        try:
            yield
        except (LLMError, OSError) as error:
            known = as_llm_error(error)
            status = known.status if known else 1
            prints = rank() == 0 and not isinstance(error, Followed)
            worst = self.largest(status + (MAIN if prints else 0), patient=patient)
            if worst >= MAIN and rank() != 0:
                raise Followed(worst - MAIN) from error
            if known is None or known is error:
                raise
            raise known from error
        if worst := self.largest(0, patient=patient):
            raise Followed(worst % MAIN)

    def leave(self) -> None:
        """Leave the process group once every rank is ready to."""
        if self.group is not None:
            self.largest(0)
            dist.destroy_process_group()

    def first(self, act: Callable[[], Any]) -> Any:
        """Result of `act()`, which each machine's first rank runs before the others do."""
        first = place().local_rank == 0
        with self.error_barrier(patient=True):
            result = act() if first else None
            if place().local_world < world():
                say("waiting for the other machines")
        with self.error_barrier(patient=True):
            return result if first else act()


class Followed(GroupError):
    """Another rank failed and has printed the reason."""

    def __init__(self, status: int) -> None:
        super().__init__("")
        self.status = status
