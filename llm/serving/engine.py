"""The engine: answers many requests at once, in slots that each joins and leaves at any step.

The event loop owns all state; one worker thread runs the model, a step at a time, while the loop serves connections.
So there are no locks, and a request that is cancelled is gone by the next step.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from llm.base.errors import LLMError, reason
from llm.inference.fast_decode import SLOTS, prepare_weights
from llm.inference.generation import choose, generator_of
from llm.inference.sampling import Sampling
from llm.inference.slots import Slots
from llm.run_folder.loaded_run import LoadedRun

MOST_CHECKPOINTS = 3  # in memory at once: the newest, and those that still answer


class BusyError(LLMError):
    """The queue is full."""


class EngineError(LLMError):
    """The model failed on a request."""


@dataclass(frozen=True)
class Token:
    """A token and its log-probability, with those of the likeliest alternatives."""

    id: int
    logprob: float | None = None
    likeliest: dict[int, float] = field(default_factory=dict)


class Checkpoint:
    """A loaded checkpoint with its slots, which take memory once the first text joins."""

    def __init__(self, run: LoadedRun, int8: bool) -> None:
        self.run, self.int8 = run, int8
        self.jobs: dict[int, Job] = {}  # by slot
        self.waiting = 0
        self._slots: Slots | None = None

    @property
    def slots(self) -> Slots:
        if self._slots is None:
            if self.int8:
                prepare_weights(self.run.model, int8=True)
            self._slots = Slots(self.run.model, SLOTS)
        return self._slots

    @property
    def is_idle(self) -> bool:
        return not self.jobs and not self.waiting


@dataclass(eq=False)
class Job:
    """One text to continue: `prompt` ids, at most `tokens` new ones. `seed` and `row` as of `generation.generate`.

    `likeliest` asks for log-probabilities: of this many tokens beside the chosen one; None: of none. `echo` asks for
    those of the prompt too. New tokens go to `out`, then None or, where the model fails, an EngineError. A full context
    continues from its last half.
    """

    checkpoint: Checkpoint
    prompt: list[int]
    tokens: int
    sampling: Sampling
    seed: int
    out: "asyncio.Queue[tuple[Job, Token | EngineError | None]]"
    row: int = 0
    ends: tuple[int, ...] = ()
    banned: tuple[int, ...] = ()
    likeliest: int | None = None
    echo: bool = False
    finish: Literal["", "stop", "length"] = ""
    cancelled: bool = False

    def __post_init__(self) -> None:
        self.text, self.count, self.occurred = list(self.prompt), 0, set(self.prompt)
        self.generator: Generator = generator_of(self.seed, self.row)
        self.echoed: list[Token] = []  # of the prompt, once the first token is there
        self.began = time.perf_counter()


class Engine:
    """Runs jobs over the newest checkpoint; `queue` jobs may wait beside those in slots. `int8` as of `prepare`."""

    def __init__(self, run: LoadedRun, queue: int, *, int8: bool = False) -> None:
        self.checkpoints, self.queue, self.waiting = [Checkpoint(run, int8)], queue, deque[Job]()
        self.int8 = int8
        self.counts: Counter[str] = Counter()  # of /metrics
        self._wake, self._worker = asyncio.Event(), ThreadPoolExecutor(1, "model")
        self._pace = 1.0  # seconds that a job takes in its slot, a moving average

    @property
    def newest(self) -> Checkpoint:
        return self.checkpoints[-1]

    @property
    def running(self) -> int:
        return sum(len(each.jobs) for each in self.checkpoints)

    @property
    def retry_after(self) -> int:
        """Seconds after which a place in the queue should be free."""
        return max(1, min(60, round(self._pace * (len(self.waiting) + 1) / SLOTS)))

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue jobs, all or none. BusyError where they do not fit now."""
        if len(self.newest.jobs) + len(self.waiting) + len(jobs) > SLOTS + self.queue:
            raise BusyError(f"{len(self.waiting)} requests are waiting already: try again in {self.retry_after} s")
        for job in jobs:
            if job.checkpoint not in self.checkpoints:  # swapped away while the text was encoded for it
                self.checkpoints.insert(0, job.checkpoint)
            job.checkpoint.waiting += 1
            self.waiting.append(job)
        self._wake.set()

    def cancel(self, job: Job) -> None:
        """Free the job's place before the next step. One that has ended stays as it is."""
        job.cancelled = True
        if job in self.waiting:
            self.waiting.remove(job)
            job.checkpoint.waiting -= 1
        self._wake.set()

    def can_swap(self) -> bool:
        return len(self.checkpoints) < MOST_CHECKPOINTS

    def swap(self, run: LoadedRun) -> None:
        """Answer new requests from another checkpoint; jobs that were submitted before stay with theirs."""
        self.checkpoints.append(Checkpoint(run, self.int8))
        self.counts["swaps"] += 1
        self._wake.set()  # `run` tidies between steps: the step in progress still needs the rows it began with

    async def run(self) -> None:
        """Work until cancelled."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                self._tidy()
                self._join()
                busy = [each for each in self.checkpoints if each.jobs]
                if not busy:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                for checkpoint in busy:
                    try:
                        found = await loop.run_in_executor(self._worker, _advance, checkpoint)
                    except (RuntimeError, MemoryError) as error:  # such as memory that ran out
                        self._fail(checkpoint, error)
                    else:
                        self._deliver(checkpoint, found)
                await asyncio.sleep(0)  # the answers are written while the model rests: both need the interpreter
        finally:
            self._worker.shutdown(wait=False, cancel_futures=True)

    def _tidy(self) -> None:
        """Free the slots of cancelled jobs, and the checkpoints that have none left."""
        for each in self.checkpoints:
            each.jobs = {row: job for row, job in each.jobs.items() if not job.cancelled}
        self.checkpoints = [each for each in self.checkpoints if each is self.newest or not each.is_idle]

    def _join(self) -> None:
        """Move waiting jobs to free slots: one a step, as others go on meanwhile; more where more wait than go on."""
        most = max(1, len(self.waiting) - self.running)
        for job in list(self.waiting):
            jobs = job.checkpoint.jobs
            if not most:
                return
            if len(jobs) < SLOTS:
                most -= 1
                self.waiting.remove(job)
                job.checkpoint.waiting -= 1
                jobs[next(row for row in range(SLOTS) if row not in jobs)] = job

    def _deliver(self, checkpoint: Checkpoint, found: dict[int, Token]) -> None:
        for row, token in found.items():
            job = checkpoint.jobs[row]
            job.count += 1
            if job.count == 1:
                self.counts["first_token_seconds"] += time.perf_counter() - job.began  # type: ignore[assignment]
                self.counts["first_tokens"] += 1
                self.counts["prompt_tokens"] += len(job.prompt)
            if job.tokens and token.id in job.ends:
                job.finish = "stop"
            elif job.tokens:
                job.text.append(token.id)
                job.occurred.add(token.id)
                job.out.put_nowait((job, token))
                self.counts["generated_tokens"] += 1
            if job.count >= job.tokens and not job.finish:
                job.finish = "length"
            if job.finish:
                del checkpoint.jobs[row]
                job.out.put_nowait((job, None))
                self._pace += 0.1 * (time.perf_counter() - job.began - self._pace)

    def _fail(self, checkpoint: Checkpoint, error: BaseException) -> None:
        self.counts["failures"] += 1
        for job in checkpoint.jobs.values():
            job.out.put_nowait((job, EngineError(f"the model failed: {reason(error)}")))
        checkpoint.jobs.clear()


@torch.no_grad()
def _advance(checkpoint: Checkpoint) -> dict[int, Token]:
    """Run in the worker: a step of all rows, and the first token of each that joins. The new token of each row."""
    slots, jobs = checkpoint.slots, dict(checkpoint.jobs)
    context = checkpoint.run.model.shape.context
    full = {row: job for row, job in jobs.items() if job.count == 0 or len(job.text) > context}
    going = {row: job.text[-1] for row, job in jobs.items() if row not in full}
    logits = dict(zip(going, slots.step(going), strict=True)) if going else {}
    for job in full.values():
        if not job.count and job.echo and job.likeliest is not None:
            job.echoed = _echoed(checkpoint, job)
        if job.count:
            job.text = job.text[-(context // 2) :]
    logits |= slots.join({row: job.text for row, job in full.items()})
    return _chosen(jobs, logits)


def _chosen(jobs: dict[int, Job], logits: dict[int, Tensor]) -> dict[int, Token]:
    """The next token of each row; rows of equal settings are chosen together."""
    groups: dict[tuple[Sampling, tuple[int, ...]], list[int]] = {}
    for row, job in jobs.items():
        groups.setdefault((job.sampling, job.banned), []).append(row)
    found = {}
    for (sampling, banned), rows in groups.items():
        given = torch.stack([logits[row] for row in rows]).float()
        allowed = given.index_fill(1, torch.tensor(banned, device=given.device), -torch.inf) if banned else given
        by_row, generators = [jobs[row].occurred for row in rows], [jobs[row].generator for row in rows]
        ids = choose(allowed, by_row, sampling, generators).tolist()
        for row, id, line in zip(rows, ids, given, strict=True):
            wanted = jobs[row].likeliest
            found[row] = Token(id) if wanted is None else _token(id, line.log_softmax(-1), wanted)
    return found


def _token(id: int, logprobs: Tensor, count: int) -> Token:
    values, ids = logprobs.topk(min(count, len(logprobs)))
    return Token(id, float(logprobs[id]), dict(zip(ids.tolist(), values.tolist(), strict=True)))


def _echoed(checkpoint: Checkpoint, job: Job) -> list[Token]:
    """The prompt's tokens with their log-probabilities; the first has none."""
    model = checkpoint.run.model
    ids = torch.tensor(job.prompt, device=model.lm_head.weight.device)
    lines = model.logits(ids[None])[0, :-1].float().log_softmax(-1)
    return [Token(job.prompt[0])] + [
        _token(id, line, job.likeliest or 0) for id, line in zip(job.prompt[1:], lines, strict=True)
    ]
