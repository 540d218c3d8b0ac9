"""Whenever a run is killed, and at whichever durable operation it fails, the same command ends in the same bits."""

import errno
import json
import os
import random
import re
import select
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import llm.training.session
from llm.base import atomic_io, errors
from llm.config.reading import load
from llm.data.pipeline import prepare_text
from llm.run_folder import checkpoint
from llm.run_folder.background import BackgroundWork
from llm.training.resume import Checkpoints
from tests.forks import digest, ended, run, run_group, start, start_group, train, write_recipe, write_text

SEED = int(os.environ.get("SEED", "20260"))
OPERATIONS = ("_write", "_write_at", "_flush", "_rename", "_remove")
EVERY = 4  # steps between checkpoints, in every recipe here


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The undisturbed run, with every checkpoint kept."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = write_recipe(folder, text, **{"checkpoint.every": EVERY, "checkpoint.keep": 99})
    for each in run_group(train(recipe), folder, 1):
        assert each.status == 0, each.err
    return folder


def digests(folder: Path) -> dict[int, str]:
    """Of every valid checkpoint, by its step."""
    found = map(checkpoint.open_checkpoint, checkpoint.folders(folder / "runs/tiny"))
    return {each.step: each.digest for each in found}


# ---------------------------------------------------------------------------------------------- kills


def tells_of_saves(pipe: int, *, beside: bool) -> None:
    """This process writes a dot to `pipe` before each durable operation of its saves, and an e after each save.

    `beside`: only of those that a thread does while the training goes on.
    """
    inside: list[bool] = []

    def told(real: Callable[..., None]) -> Callable[..., None]:
        def act(*arguments: Any, **options: Any) -> None:
            inside.append(True)
            try:
                real(*arguments, **options)
            finally:
                inside.pop()
            os.write(pipe, b"e")

        return act

    def telling(real: Callable[..., None]) -> Callable[..., None]:
        def operation(*arguments: Any) -> None:
            if inside:
                os.write(pipe, b".")
                time.sleep(0.001)  # for the signal to arrive where it is meant to
            real(*arguments)

        return operation

    for name in OPERATIONS:
        setattr(atomic_io, name, telling(getattr(atomic_io, name)))
    BackgroundWork._do = told(BackgroundWork._do)  # type: ignore[method-assign]
    if not beside:
        Checkpoints.save = told(Checkpoints.save)  # type: ignore[method-assign]


def kill_at_random(
    folder: Path, recipe: Path, world: int, chance: random.Random, *, teller: int | None = None
) -> tuple[str, bool]:
    """Start the run and SIGKILL one of its processes, nine times in ten within a save. When, and whether it was so.

    With `teller`, always while that process writes beside the training, whichever process is killed.
    """
    read, write = os.pipe()
    victim, act, beside = chance.randrange(world), train(recipe), teller is not None
    teller = victim if teller is None else teller

    def watched() -> None:
        if llm.distributed.process.rank() == teller:
            tells_of_saves(write, beside=beside)
        act()

    children = start_group(watched, folder, world)
    os.close(write)
    try:
        if beside or chance.random() < 0.9:
            operations = chance.randrange(1, 120 if teller == 0 else 15)  # about forty in a save, where it leads
            told = b"".join(os.read(read, 1) for _ in range(operations))
            pause = chance.uniform(0, 0.001)
            moment = f"process {victim}, {1000 * pause:.2f} ms after operation {operations} of the saves"
        else:
            told, pause = b"", chance.uniform(0, 1.2)
            moment = f"{pause:.2f} s after the start"
        time.sleep(pause)
        while beside and select.select([read], [], [], 0)[0] and (more := os.read(read, 1 << 16)):
            told += more
    finally:
        os.kill(children[victim], signal.SIGKILL)
    inside = told.endswith(b".")
    for rank, child in enumerate(children):
        tag = "" if world == 1 else f"-{rank}"
        status = ended(child, folder, tag).status
        assert status in (0, 1, 6, -signal.SIGKILL), (moment, rank, status)
    told += os.read(read, 1 << 16)
    os.close(read)
    return moment, inside if beside else told.endswith(b".")


def steps_done(folder: Path) -> int:
    """How far the killed run had come, by its record."""
    path = folder / "runs/tiny/metrics.jsonl"
    return max((line["step"] for line in atomic_io.read_lines(path)), default=0) if path.exists() else 0


def ends_the_same(folder: Path, recipe: Path, whole: Path, world: int, moment: str, every: int = EVERY) -> int:
    """The steps that the same command did again after a kill; the run has ended as the undisturbed one."""
    done = steps_done(folder)
    again = run_group(train(recipe), folder, world)
    assert [each.status for each in again] == [0] * world, (moment, again[0].err)
    begun = int(found[1]) if (found := re.search(r"from step (\d+)", again[0].out)) else 0
    if "nothing to do" in again[0].out:
        begun = done
    # One interval, and what was trained while a checkpoint was written, for which the next one waits.
    assert 0 <= done - begun <= 2 * every, (moment, "steps redone", done, begun)
    assert digest(folder) == digest(whole), moment
    assert not list((folder / "runs").rglob(f"{atomic_io.DRAFT}*")), "swept"
    return done - begun


def one_kill(folder: Path, text: Path, whole: Path, number: int, world: int) -> None:
    chance = random.Random(SEED * 1000 + number)
    folder.mkdir()
    recipe = write_recipe(folder, text, **{"checkpoint.every": EVERY, "checkpoint.keep": 1, "machine.micro_batch": 2})
    moment, inside = kill_at_random(folder, recipe, world, chance)
    redone = ends_the_same(folder, recipe, whole, world, moment)
    print(f"kill {number} on {world}: {moment}, {'inside a save' if inside else 'between'}; redone {redone} steps")


@pytest.mark.parametrize(
    ("number", "world"),
    [(0, 1), (1, 1), (6, 2)]
    + [
        pytest.param(number, world, marks=pytest.mark.slow)
        for number, world in ((2, 1), (3, 1), (4, 1), (5, 1), (7, 2), (8, 2), (9, 2))
    ],
)
def test_killed_at_a_random_moment_it_ends_in_the_same_bits(
    tmp_path: Path, text: Path, whole: Path, number: int, world: int
) -> None:
    print(f"SEED={SEED}")
    one_kill(tmp_path / "killed", text, whole, number, world)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "world"), [(n, 1) for n in range(10, 40)] + [(n, 2) for n in range(40, 60)])
def test_50_times_killed_at_a_random_moment_it_ends_in_the_same_bits(
    tmp_path: Path, text: Path, whole: Path, number: int, world: int
) -> None:
    print(f"SEED={SEED}")
    one_kill(tmp_path / "killed", text, whole, number, world)


SHARDED = "machine.shard=full"
BESIDE = [(1, ""), (1, ""), (1, ""), (2, ""), (2, SHARDED)]  # processes, override


def kill_beside(folder: Path, text: Path, whole: Path, number: int) -> None:
    """One kill while a thread writes a checkpoint and the training goes on; moments that miss that are drawn again."""
    chance, (world, override) = random.Random(SEED * 1000 + number), BESIDE[number % len(BESIDE)]
    key, _, value = override.partition("=")
    for attempt in range(20):
        (there := folder / str(attempt)).mkdir(parents=True)
        recipe = write_recipe(there, text, **{
            "checkpoint.every": 2, "evaluate.every": 99, "checkpoint.keep": 1, **({key: value} if key else {})})  # fmt: skip
        teller = chance.randrange(world) if override else 0
        moment, inside = kill_at_random(there, recipe, world, chance, teller=teller)
        redone = ends_the_same(there, recipe, whole, world, moment, every=2)
        if inside:
            print(f"kill {number} on {world} {override}: {moment}, after {attempt} others; redone {redone} steps")
            return
    raise AssertionError("no kill was within a save")


@pytest.mark.parametrize("number", [0, 4, *(pytest.param(number, marks=pytest.mark.slow) for number in (1, 2, 3))])
def test_killed_while_a_checkpoint_is_written_beside_the_training_nothing_is_lost(
    tmp_path: Path, text: Path, whole: Path, number: int
) -> None:
    kill_beside(tmp_path / "killed", text, whole, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", range(5, 55))
def test_50_times_killed_while_a_checkpoint_is_written_beside_the_training_nothing_is_lost(
    tmp_path: Path, text: Path, whole: Path, number: int
) -> None:
    kill_beside(tmp_path / "killed", text, whole, number)


# ---------------------------------------------------------------------------------------------- faults

FAULTS = ("exit", "ENOSPC", "EIO")
Plan = tuple[int, str, str]  # operation, kind, when


def faulty(at: int, kind: str, when: str) -> list[str]:
    """Let durable operation number `at` of this process fail from here on; the list of those begun grows."""
    begun: list[str] = []

    def guarded(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            begun.append(name)
            if len(begun) != at + 1:
                return real(*arguments, **options)
            if when == "after" or (when == "half" and name not in ("_write", "_write_at", "_remove")):
                real(*arguments, **options)
            elif when == "half" and name == "_write":
                data = b"".join(arguments[1])
                arguments[0].write_bytes(data[: len(data) // 2])
            elif when == "half" and name == "_write_at":
                real(arguments[0], list(arguments[1])[:1])
            elif when == "half" and arguments[0].is_dir():
                next(arguments[0].iterdir()).unlink()
            if kind == "exit":
                os._exit(9)
            code = getattr(errno, kind)
            raise OSError(code, os.strerror(code))

        return operation

    for name in OPERATIONS:
        setattr(atomic_io, name, guarded(name, getattr(atomic_io, name)))
    os.truncate = guarded("truncate", os.truncate)
    Path.mkdir = guarded("mkdir", Path.mkdir)  # type: ignore[method-assign]
    return begun


def save_with(folder: Path, recipe: Path, copies: Path, plans: Callable[[int], list[Plan]]) -> None:
    """At the second save of a run, fork one process for each plan, which saves with that fault, in a copy of the folder.

    It is a process that has trained that is forked, so that a fault costs a copy and a save. `plans` is asked with the
    number of durable operations of the save.
    """
    save = Checkpoints.save

    def split(self: Checkpoints, *, evaluation_due: bool, in_background: bool) -> None:
        if self.state.step != 2 * EVERY:
            return save(self, evaluation_due=evaluation_due, in_background=in_background)
        assert in_background
        self.writing.wait()

        def in_copy(plan: Plan) -> Path:
            copy = copies / "-".join(map(str, plan))
            shutil.copytree(folder, copy)

            def act() -> None:
                os.chdir(copy)

                def status() -> None:
                    with llm.training.session._status(self.context.folder, llm.training.session.Start(begun=True)):
                        begun = faulty(*plan)
                        save(self, evaluation_due=evaluation_due, in_background=in_background)
                        self.writing.wait()
                        (copy / "begun.json").write_text(json.dumps(begun))

                errors.run(status)

            (copy / "status.txt").write_text(str(ended(start(act, copy), copy).status))
            return copy

        operations = json.loads((in_copy((-1, "exit", "before")) / "begun.json").read_text())
        for plan in plans(len(operations)):
            in_copy(plan)
        os._exit(0)

    def act() -> None:
        Checkpoints.save = split  # type: ignore[method-assign]
        train(recipe)()

    assert run(act, folder).status == 0, (folder / "err.txt").read_text()


def every_fault(folder: Path, text: Path, whole: Path, moments: tuple[str, ...], restart_each: int) -> None:
    (folder / "run").mkdir()
    recipe = write_recipe(folder, text, **{"checkpoint.every": EVERY, "checkpoint.keep": 1, "evaluate.every": 99})
    save_with(
        folder / "run",
        recipe,
        folder / "copies",
        lambda count: [(at, kind, when) for at in range(count) for kind in FAULTS for when in moments],
    )
    undisturbed = digests(whole)
    counted = folder / "copies" / "-1-exit-before"
    operations = json.loads((counted / "begun.json").read_text())
    assert set(operations) == {*OPERATIONS, "truncate", "mkdir"} and len(operations) > 35
    assert digests(counted).keys() == {8}, "retention has removed the one before"
    copies = sorted(path for path in (folder / "copies").iterdir() if path != counted)
    assert len(copies) == len(operations) * len(FAULTS) * len(moments)
    for number, copy in enumerate(copies):
        status, err = int((copy / "status.txt").read_text()), (copy / "err.txt").read_text()
        if "exit" in copy.name:
            assert status == 9, (copy.name, err)
        else:
            assert status == 5 and err.startswith("error: the disk failed") and err.count("\n") == 1, (copy.name, err)
            assert json.loads((copy / "runs/tiny/status.json").read_text())["status"] == 5
        found = digests(copy)  # raises where what bears a checkpoint's name is not whole
        assert max(found) >= 4 and all(undisturbed[step] == each for step, each in found.items()), copy.name
        if number % restart_each == 0:
            again = run(train(recipe), copy)
            assert again.status == 0, (copy.name, again.err)
            assert digest(copy) == digest(whole), copy.name
            assert digests(copy).keys() == {12}, copy.name
            assert not list((copy / "runs").rglob(f"{atomic_io.DRAFT}*")), copy.name
    print(f"{len(copies)} faults in {len(operations)} operations; {len(copies) // restart_each} started again")


def test_a_fault_at_any_operation_of_a_save_loses_no_valid_checkpoint(tmp_path: Path, text: Path, whole: Path) -> None:
    every_fault(tmp_path, text, whole, ("before",), restart_each=15)


@pytest.mark.slow
def test_after_a_fault_at_any_operation_the_same_command_ends_in_the_same_bits(
    tmp_path: Path, text: Path, whole: Path
) -> None:
    every_fault(tmp_path, text, whole, ("before", "half", "after"), restart_each=1)


def test_retention_counts_no_damaged_checkpoint(tmp_path: Path, text: Path, whole: Path) -> None:
    """Stopped between a checkpoint that it resumed from and a later, damaged one: the damaged one is not the one kept."""
    recipe = write_recipe(tmp_path, text, **{"checkpoint.every": EVERY, "checkpoint.keep": 1, "evaluate.every": 99})
    assert run(train(recipe, stop_after=6), tmp_path).status == 75
    folder = checkpoint.folder_of(tmp_path / "runs/tiny", 6)
    shutil.copytree(checkpoint.folder_of(whole / "runs/tiny", 4), checkpoint.folder_of(tmp_path / "runs/tiny", 4))
    (folder / checkpoint.WEIGHTS).write_bytes(b"damaged")
    stopped = run(train(recipe, stop_after=5), tmp_path)
    assert stopped.status == 75 and "step-000006 is passed over" in stopped.err
    assert max(each.step for each in [checkpoint.newest(tmp_path / "runs/tiny", print)] if each) == 5
    done = run(train(recipe), tmp_path)
    assert done.status == 0 and "from step 5" in done.out
    assert digest(tmp_path) == digest(whole)


# ---------------------------------------------------------------------------------------------- a preparation


def prepares(folder: Path, text: Path) -> Callable[[], None]:
    recipe = load(write_recipe(folder, text, **{"text.cache": folder / "cache"}))
    return lambda: errors.run(lambda: prepare_text(recipe, print) and None)


def cache_files(folder: Path) -> dict[str, str]:
    """Of the cache by name and digest, but for locks; a draft would be among them."""
    files = [path for path in (folder / "cache").rglob("*") if path.is_file() and path.parent.name != "locks"]
    return {str(path.relative_to(folder)): atomic_io.sha256(path) for path in files}


@pytest.mark.parametrize("each", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_fault_at_any_operation_of_a_preparation_loses_nothing(tmp_path: Path, text: Path, each: int) -> None:
    """The same command then makes the same bytes and leaves no draft."""
    (tmp_path / "whole").mkdir()
    counted = tmp_path / "counted.json"

    def counting() -> None:
        begun = faulty(-1, "exit", "before")
        try:
            prepares(tmp_path / "whole", text)()
        finally:
            counted.write_text(json.dumps(begun))

    assert run(counting, tmp_path).status == 0
    operations = json.loads(counted.read_text())
    for at in range(len(operations) - 1, -1, -each):
        kind, when = FAULTS[at % 3], ("before", "half", "after")[at // 3 % 3]
        folder = tmp_path / f"{at}-{kind}-{when}"
        folder.mkdir()
        act = prepares(folder, text)

        def failing(at: int = at, kind: str = kind, when: str = when, act: Callable[[], None] = act) -> None:
            faulty(at, kind, when)
            act()

        ended = run(failing, folder)
        if kind == "exit":
            assert ended.status == 9
        else:
            assert ended.status == 5 and ended.err.count("\n") == 1 and "the disk failed" in ended.err, ended.err
        assert run(act, folder).status == 0
        assert cache_files(folder) == cache_files(tmp_path / "whole"), folder.name
    print(f"faults in {-(-len(operations) // each)} of {len(operations)} operations of a preparation")


@pytest.mark.slow
def test_a_preparation_killed_10_times_makes_the_same_bytes(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    text = write_text(tmp_path / "text.txt", documents=4000)
    (tmp_path / "whole").mkdir()
    began = time.monotonic()
    assert run(prepares(tmp_path / "whole", text), tmp_path / "whole").status == 0
    seconds = time.monotonic() - began
    for number in range(10):
        folder = tmp_path / str(number)
        folder.mkdir()
        act = prepares(folder, text)
        child = start(act, folder)
        time.sleep(chance.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        ended(child, folder)
        assert run(act, folder).status == 0
        assert cache_files(folder) == cache_files(tmp_path / "whole"), number
    print(f"SEED={SEED}: 10 of 10 killed within {seconds:.1f} s made the same bytes")
