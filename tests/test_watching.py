"""A run survives what only watches it: evaluations, samples, the console, the shell it was started from."""

import errno
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

import llm.distributed.coordinator
import llm.training.evaluation
import llm.training.session
import llm.training.trainer
from llm.base import atomic_io, errors
from llm.distributed import environment
from llm.run_folder import checkpoint, loaded_run
from llm.run_folder.checkpoint import Draft
from llm.run_folder.record import read
from llm.training.evaluation import Evaluator
from llm.training.resume import Checkpoints
from llm.training.session import Start
from llm.training.trainer import Trainer
from tests.forks import ROOT, digest, ended, run, run_group, script, start, train, write_recipe, write_text
from tests.test_kills import FAULTS, faulty

PROMPT = "你好 My self"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def recipe_of(folder: Path, text: Path, **changes: object) -> Path:
    return write_recipe(folder, text, **{"evaluate.prompts": f"[{PROMPT}]", **changes})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """The undisturbed run, which is evaluated after steps 5, 10 and 12."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(train(recipe_of(folder, text)), folder).status == 0
    return folder


def record(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, each of them JSON as others read it."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    lines = (folder / "runs/tiny/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def events(folder: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["event"]) for line in record(folder) if "event" in line]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return [line for line in record(folder) if "val_loss" in line or "sample" in line]


def status(folder: Path) -> dict[str, Any]:
    return dict(atomic_io.read_json(folder / "runs/tiny/status.json"))


# ---------------------------------------------------------------------------------------------- evaluations


def garbage(path: Path) -> None:
    _overwrite(path, b"\xff")


def zeros(path: Path) -> None:
    _overwrite(path, b"\0")


def _overwrite(path: Path, byte: bytes) -> None:
    with path.open("r+b") as file:  # in place: it is the mapped file that is damaged
        file.seek(2000)
        file.write(byte * 400)


def truncated(path: Path) -> None:
    os.truncate(path, 700)


def during(recipe: Path, step: int, act: Callable[[], Any], rank: int = 0) -> Callable[[], None]:
    """The launch script, in which process `rank` does `act` in the middle of update `step`."""
    launch = script(ROOT / "launch" / "train.py", recipe)

    def child() -> None:
        update = Trainer.update

        def disturbed(self: Trainer, at: int) -> tuple[Tensor, Tensor]:
            result = update(self, at)
            if at + 1 == step and llm.distributed.process.rank() == rank:
                act()
            return result

        Trainer.update = disturbed  # type: ignore[method-assign]
        launch()

    return child


@pytest.mark.parametrize("damage", [garbage, truncated, pytest.param(zeros, marks=pytest.mark.slow)])
def test_a_validation_shard_damaged_in_mid_run_is_named_and_the_training_goes_on(
    tmp_path: Path, text: Path, whole: Path, damage: Callable[[Path], None]
) -> None:
    recipe = recipe_of(tmp_path, text, **{"text.cache": tmp_path / "cache"})
    sound = tmp_path / "sound.arrow"

    def shard() -> Path:
        return next((tmp_path / "cache").glob("shards/*/validation-00000.arrow"))

    def act() -> None:
        shutil.copy(shard(), sound)
        damage(shard())

    done = run(during(recipe, 4, act), tmp_path)
    assert done.status == 0, done.err
    told = [(step, event) for step, event in events(tmp_path) if "validation-00000.arrow was damaged" in event]
    assert [step for step, _ in told] == [5, 10, 12] and all("prepare the text again" in event for _, event in told)
    assert [line["step"] for line in evaluations(tmp_path)] == [5, 10, 12], "samples alone"
    assert digest(tmp_path) == digest(whole)
    measured = run(script("module:llm.evaluate", "tiny"), tmp_path)
    assert measured.status == 4 and "validation-00000.arrow " in measured.err and measured.err.count("\n") == 1
    # The file mended, the same command does the evaluation that is still due, of the last step.
    shutil.copy(sound, shard())
    assert run(train(recipe), tmp_path).status == 0
    for told, expected in zip(evaluations(tmp_path)[-2:], evaluations(whole)[-2:], strict=True):
        assert all(told.get(name) == expected.get(name) for name in ("step", "bits_per_byte", "sample"))
    assert "nothing to do" in run(train(recipe), tmp_path).out


def test_a_run_measured_at_its_start_alone_ends_as_any_other(tmp_path: Path, text: Path) -> None:
    other = write_text(tmp_path / "other.txt", documents=40)
    keys = {"text.cache": tmp_path / "cache", "evaluate.also": f"[{other}]"}

    def act() -> None:
        for shard in (tmp_path / "cache").glob("shards/*/validation-00000.arrow"):
            garbage(shard)

    done = run(during(recipe_of(tmp_path, text, **keys), 4, act), tmp_path)
    assert done.status == 0 and "Saved in" in done.out, done.err
    assert [line["step"] for line in evaluations(tmp_path) if "bits_per_byte" in line] == [0]


def test_the_weights_that_a_run_begins_with_are_no_checkpoint_of_its_own(tmp_path: Path, text: Path) -> None:
    """Where they are better than all that comes, the best is the best of the run's own everywhere."""
    other = write_text(tmp_path / "other.txt", documents=40)
    recipe = recipe_of(tmp_path, text)
    assert run(train(recipe), tmp_path).status == 0
    keys = ("run=worse", "model.from=runs/tiny/best", "train.learning_rate=0.5", f"evaluate.also=[{other}]")
    done = run(train(recipe, *keys), tmp_path)
    assert done.status == 0 and "before its first step" in done.out, done.err
    lines = read(tmp_path / "runs/worse").evaluations
    best = min(lines[1:], key=lambda line: line["bits_per_byte"])
    assert lines[0]["step"] == 0 and lines[0]["bits_per_byte"] < best["bits_per_byte"] and not lines[0]["best"]
    assert read(tmp_path / "runs/worse").best["step"] == best["step"]
    assert loaded_run.open_run("worse", runs=tmp_path / "runs").checkpoint.step == best["step"]
    assert "after step 0," not in done.out and "train.epochs=0" not in done.out


def spoiling_evaluation(recipe: Path, value: float, rank: int = 0) -> Callable[[], None]:
    def act() -> None:
        forward = llm.training.trainer.Transformer.forward

        def spoilt(
            self: Any, tokens: Tensor, targets: Tensor, windows: Tensor | None = None, segments: Tensor | None = None
        ) -> Tensor:
            return forward(self, tokens, targets, windows, segments) * (value if windows is None else 1.0)

        if llm.distributed.process.rank() == rank:
            llm.training.trainer.Transformer.forward = spoilt  # type: ignore[method-assign]
        train(recipe)()

    return act


@pytest.mark.parametrize(("value", "world"), [(float("nan"), 1), (float("inf"), 2)])
def test_a_validation_loss_that_is_not_finite_is_an_event_and_spoils_no_checkpoint(
    tmp_path: Path, text: Path, value: float, world: int
) -> None:
    recipe = recipe_of(tmp_path, text)
    for each in run_group(spoiling_evaluation(recipe, value, rank=world - 1), tmp_path, world):
        assert each.status == 0, each.err
    assert [step for step, event in events(tmp_path) if "not finite" in event] == [5, 10, 12]
    assert not [line for line in record(tmp_path) if "val_loss" in line]
    found = [checkpoint.open_checkpoint(folder) for folder in checkpoint.folders(tmp_path / "runs/tiny")]
    assert [each.step for each in found] == [12, 10, 8, 5, 4]
    assert all(each.bits_per_byte is None for each in found) and checkpoint.best(tmp_path / "runs/tiny") is None
    assert "Not evaluated." in (found[0].folder / "README.md").read_text()


@pytest.mark.parametrize("world", [1, 2])
def test_what_fails_in_an_evaluation_or_a_sample_is_an_event(
    tmp_path: Path, text: Path, whole: Path, world: int
) -> None:
    recipe = recipe_of(tmp_path, text)

    def act() -> None:
        def fails(*given: Any, **named: Any) -> list[str]:
            raise IndexError("the moon is full")

        def no_windows(*given: Any) -> Any:
            raise IndexError("the moon is full")
            yield

        llm.training.evaluation.continuations = fails
        if llm.distributed.process.rank() == world - 1:
            llm.training.evaluation.eval_batches = no_windows
        train(recipe)()

    for each in run_group(act, tmp_path, world):
        assert each.status == 0, each.err
    why = "IndexError: the moon is full" if world == 1 else "another process failed in it"
    expected = [(step, event) for step in (5, 10, 12)
                for event in (f"no evaluation: {why}", "no samples: IndexError: the moon is full")]  # fmt: skip
    assert events(tmp_path) == expected
    if world == 1:
        assert digest(tmp_path) == digest(whole)


def test_samples_keep_their_terminal_and_each_prompt_has_its_own(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text, **{"evaluate.prompts": r'["\e[2J\e[?25l", "twice", "twice"]'})
    done = run(train(recipe), tmp_path)
    assert done.status == 0 and "\x1b" not in done.out and r"  \x1b[2J\x1b[?25l|" in done.out, (done.out, done.err)
    prompts = [line["prompt"] for line in record(tmp_path) if "sample" in line]
    assert prompts[:3] == ["\x1b[2J\x1b[?25l", "twice", "twice"] and done.out.count("\n  twice|") * 3 == 2 * len(
        prompts
    )


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "lock", "status.json", "recipe.yaml", "identity.json", "shards.json"]
)
def test_a_folder_in_place_of_a_file_of_the_run_is_one_line(whole: Path, tmp_path: Path, text: Path, name: str) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / "runs/tiny" / name).unlink()
    (tmp_path / "runs/tiny" / name).mkdir()
    done = run(train(recipe_of(tmp_path, text)), tmp_path)
    assert done.status in (0, 2, 4) and "Traceback" not in done.err and done.err.count("\n") <= 2, done.err


@pytest.mark.parametrize("shard", ["full", pytest.param("hybrid", marks=pytest.mark.slow)])
def test_a_dealt_model_in_bf16_speaks(tmp_path: Path, text: Path, shard: str) -> None:
    recipe = recipe_of(tmp_path, text, **{
        "machine.precision": "bf16", "machine.shard": shard, "train.steps": 2, "train.warmup": 1, "evaluate.every": 1})  # fmt: skip
    for each in run_group(train(recipe), tmp_path, 2):
        assert each.status == 0, each.err
    assert [line["step"] for line in record(tmp_path) if "sample" in line] == [1, 2]
    assert not events(tmp_path)


# ---------------------------------------------------------------------------------- a checkpoint and its evaluation


METHODS = {"evaluate": Evaluator, "_samples": Evaluator, "complete": Checkpoints}


def killed_at(recipe: Path, step: int, method: str, rank: int = 0) -> Callable[[], None]:
    """The launch script, in which process `rank` ends as by SIGKILL where it begins this method after `step` updates."""

    def act() -> None:
        real = getattr(METHODS[method], method)

        def dies(self: Any, *given: Any) -> Any:
            if self.state.step == step and llm.distributed.process.rank() == rank:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(self, *given)

        setattr(METHODS[method], method, dies)
        train(recipe)()

    return act


def same_run(folder: Path, whole: Path) -> None:
    """Digest, evaluations, fingerprints, and what the checkpoints' manifests and cards say."""
    assert digest(folder) == digest(whole)
    assert evaluations(folder) == evaluations(whole)
    runs = [each / "runs/tiny" for each in (folder, whole)]
    one, other = ((each / "fingerprints.jsonl").read_text() for each in runs)
    assert one == other
    for found, expected in zip(*map(checkpoint.folders, runs), strict=True):
        manifests = [checkpoint.open_checkpoint(each).manifest for each in (found, expected)]
        for each in manifests:
            each.pop("machine")
        assert manifests[0] == manifests[1], found


@pytest.mark.parametrize(
    ("method", "step", "world"),
    [
        ("evaluate", 12, 1),
        ("complete", 5, 1),
        pytest.param("_samples", 12, 1, marks=pytest.mark.slow),
        pytest.param("_samples", 10, 2, marks=pytest.mark.slow),
        pytest.param("complete", 12, 2, marks=pytest.mark.slow),
    ],
)
def test_killed_between_a_checkpoint_and_its_evaluation_the_evaluation_is_done_again(
    tmp_path: Path, text: Path, whole: Path, method: str, step: int, world: int
) -> None:
    recipe = recipe_of(tmp_path, text)
    if world > 1:
        (tmp_path / "whole").mkdir()
        for each in run_group(train(recipe), tmp_path / "whole", world):
            assert each.status == 0, each.err
        whole = tmp_path / "whole"
    first = run_group(killed_at(recipe, step, method), tmp_path, world)
    assert first[0].status == -signal.SIGKILL
    newest = checkpoint.newest(tmp_path / "runs/tiny", print)
    assert newest is not None and newest.step == step and not newest.manifest["metrics"], "no step is lost"
    assert (newest.folder / "README.md").is_file()
    for each in run_group(train(recipe), tmp_path, world):
        assert each.status == 0 and each.err == "", each.err
    same_run(tmp_path, whole)


def test_a_fault_at_any_operation_of_adding_an_evaluation_leaves_the_checkpoint_valid(
    tmp_path: Path, text: Path, whole: Path
) -> None:
    recipe = recipe_of(tmp_path, text)
    (tmp_path / "run").mkdir()
    complete = Checkpoints.complete

    def split(self: Checkpoints) -> None:
        if self.state.step != 10:
            return complete(self)

        def in_copy(at: int, kind: str, when: str) -> Path:
            copy = tmp_path / f"copy-{at}-{kind}-{when}"
            shutil.copytree(tmp_path / "run", copy)

            def act() -> None:
                os.chdir(copy)

                def status() -> None:
                    with llm.training.session._status(self.context.folder, Start(begun=True)):
                        begun = faulty(at, kind, when)
                        complete(self)
                        (copy / "begun.json").write_text(json.dumps(begun))

                errors.run(status)

            (copy / "status.txt").write_text(str(ended(start(act, copy), copy).status))
            return copy

        for at in range(len(json.loads((in_copy(-1, "exit", "before") / "begun.json").read_text()))):
            in_copy(at, FAULTS[at % 3], ("before", "half", "after")[at // 3 % 3])
        os._exit(0)

    def act() -> None:
        Checkpoints.complete = split  # type: ignore[method-assign]
        train(recipe)()

    assert run(act, tmp_path / "run").status == 0
    copies = sorted(tmp_path.glob("copy-*"))
    assert len(copies) > 8
    for number, copy in enumerate(copies):
        if "copy--1" not in copy.name:
            said = int((copy / "status.txt").read_text())
            assert said == (9 if "exit" in copy.name else 5), (copy.name, (copy / "err.txt").read_text())
        newest = checkpoint.newest(copy / "runs/tiny", print)
        assert newest is not None and newest.step == 10, copy.name
        if number % 8 == 0:
            assert run(train(recipe), copy).status == 0
            same_run(copy, whole)
            assert not list((copy / "runs").rglob(f"{atomic_io.DRAFT}*")), copy.name


def test_an_evaluation_that_was_told_is_changed_without_a_moment_of_damage(whole: Path, tmp_path: Path) -> None:
    """The card is named by the manifest, so that it must not change under it."""
    folder = tmp_path / "step-000012"
    shutil.copytree(checkpoint.folder_of(whole / "runs/tiny", 12), folder)
    write_checksummed, seen = atomic_io.write_checksummed, []

    def watched(path: Path, value: dict[str, Any]) -> None:
        checkpoint.open_checkpoint(folder)
        write_checksummed(path, value)
        seen.append(checkpoint.open_checkpoint(folder).manifest["metrics"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(atomic_io, "write_checksummed", watched)
        checkpoint.amend(folder, {"README.md": b"another"}, metrics={"bits_per_byte": 1.0})
    assert seen[-1] == {"bits_per_byte": 1.0} and len(seen) == 2


def test_no_number_that_is_not_finite_is_written_as_json(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        atomic_io.write_json(tmp_path / "value.json", {"loss": float("nan")})
    (tmp_path / "theirs.json").write_text('{"loss": NaN}')
    with pytest.raises(errors.RefusedError, match="not JSON"):
        atomic_io.read_json(tmp_path / "theirs.json")
    lines = atomic_io.Lines(tmp_path / "lines.jsonl")
    lines.append({"step": 3, "loss": float("-inf")})
    lines.close()
    assert (tmp_path / "lines.jsonl").read_text() == '{"step": 3, "loss": null}\n'


# ---------------------------------------------------------------------------------------------- the console


def without_reader(*outputs: int) -> None:
    """From here on nobody reads these outputs of this process."""
    read, write = os.pipe()
    os.close(read)
    for output in outputs:
        os.dup2(write, output)


@pytest.mark.parametrize("outputs", [(1,), (1, 2)])
def test_a_training_goes_on_without_its_console(
    tmp_path: Path, text: Path, whole: Path, outputs: tuple[int, ...]
) -> None:
    recipe = recipe_of(tmp_path, text)
    done = run(during(recipe, 3, lambda: without_reader(*outputs)), tmp_path)
    assert done.status == 0 and status(tmp_path) == {"status": 0, "message": "finished"}
    same_run(tmp_path, whole)


def test_a_stopped_training_is_saved_though_its_terminal_is_gone(tmp_path: Path, text: Path) -> None:
    def hang_up() -> None:
        without_reader(1, 2)
        os.kill(os.getpid(), signal.SIGHUP)

    assert run(during(recipe_of(tmp_path, text), 3, hang_up), tmp_path).status == 75
    assert digest(tmp_path).startswith("3:") and "SIGHUP" in status(tmp_path)["message"]


def closed(act: Callable[[], None]) -> Callable[[], None]:
    def without() -> None:
        sys.stdin = sys.stdout = sys.stderr = None  # type: ignore[assignment]  # as after `<&- >&- 2>&-`
        act()

    return without


def test_a_training_needs_no_console_at_all(tmp_path: Path, text: Path, whole: Path) -> None:
    assert run(closed(train(recipe_of(tmp_path, text))), tmp_path).status == 0
    assert digest(tmp_path) == digest(whole)
    for command in (("sample", "tiny", "--prompt", "The river"), ("sample", "tiny"), ("evaluate", "tiny")):
        assert run(closed(script(f"module:llm.{command[0]}", *command[1:])), tmp_path).status == 0, command


def in_ascii(act: Callable[[], None]) -> Callable[[], None]:
    def encoded() -> None:
        sys.stdout, sys.stderr = (os.fdopen(n, "w", encoding="ascii", closefd=False) for n in (1, 2))
        act()

    return encoded


def test_no_letter_ends_a_run_or_a_command(tmp_path: Path, text: Path, whole: Path) -> None:
    done = run(in_ascii(train(recipe_of(tmp_path, text))), tmp_path)
    assert done.status == 0 and "\\u4f60" in done.out, done.err
    assert digest(tmp_path) == digest(whole)
    commands = [("llm.sample", "tiny", "--prompt", PROMPT, "--tokens", "4"), ("llm.show", "tiny", "--step", "3"),
                ("llm.evaluate", "tiny", "--text", tmp_path / "你好.txt"), ("llm.evaluate", "你好")]  # fmt: skip
    (tmp_path / "你好.txt").write_text("你好" * 40, encoding="utf-8")
    for number, (name, *arguments) in enumerate(commands):
        done = run(in_ascii(script(f"module:{name}", *arguments)), tmp_path)
        assert done.status == (2 if number == 3 else 0) and "Traceback" not in done.err, (name, done.err)


def test_a_broken_pipe_that_is_not_the_consoles_is_no_success() -> None:
    def main() -> None:
        raise BrokenPipeError(errno.EPIPE, "a process that encodes")

    with pytest.raises(BrokenPipeError):
        errors.run(main)


# ---------------------------------------------------------------------------------------------- how it ended


@pytest.mark.parametrize(
    "error", [ValueError("the\nmoon is full"), AssertionError(), OSError(errno.ENOTTY, "no terminal")]
)
def test_whatever_ends_a_run_is_told_in_its_status(tmp_path: Path, text: Path, error: Exception) -> None:
    def act() -> None:
        raise error

    done = run(during(recipe_of(tmp_path, text), 3, act), tmp_path)
    assert done.status == 1
    said = status(tmp_path)
    assert said["status"] == 1 and said["message"].startswith(type(error).__name__) and "\n" not in said["message"]
    assert ("moon is full" in said["message"]) == isinstance(error, ValueError)


@pytest.mark.parametrize("length", [{}, {"train.steps": None, "train.hours": "3s"}])
def test_a_run_folder_that_was_removed_is_told_and_not_made_again(
    tmp_path: Path, text: Path, length: dict[str, object]
) -> None:
    def remove() -> None:
        shutil.rmtree("runs/tiny")

    done = run(during(recipe_of(tmp_path, text, **length), 3, remove), tmp_path)
    assert done.status == 5 and done.err.startswith("error: runs/tiny was removed while it trained"), done.err
    assert done.err.count("\n") == 1 and not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("part", ["fill", "finish"])
def test_a_run_folder_that_is_removed_during_a_save_is_told(tmp_path: Path, text: Path, part: str) -> None:
    launch, act = train(recipe_of(tmp_path, text)), getattr(Draft, part)

    def child() -> None:
        def removed(self: Draft) -> None:
            shutil.rmtree("runs/tiny")
            act(self)

        setattr(Draft, part, removed)
        launch()

    done = run(child, tmp_path)
    assert done.status == 5 and "error: runs/tiny was removed while it trained" in done.err, done.err
    assert done.err.count("\n") == 1


def test_a_dropped_connection_saves_and_stops_but_under_nohup_the_run_goes_on(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text)
    hang_up = during(recipe, 3, lambda: os.kill(os.getpid(), signal.SIGHUP))

    def under_nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        hang_up()

    (tmp_path / "nohup").mkdir()
    assert run(under_nohup, tmp_path / "nohup").status == 0
    stopped = run(hang_up, tmp_path)
    assert stopped.status == 75 and "stopped (SIGHUP) after step 3 of 12" in stopped.err
    assert status(tmp_path)["status"] == 75
    assert run(train(recipe), tmp_path).status == 0
    assert digest(tmp_path) == digest(tmp_path / "nohup")


def test_a_run_survives_the_shell_it_was_started_from_whatever_that_exports(tmp_path: Path, text: Path) -> None:
    """This process stands for a shell; its child for one that ends while the run is under way."""
    recipe, gone = recipe_of(tmp_path, text), tmp_path / "gone"

    def wait() -> None:
        (tmp_path / "training").touch()
        while not gone.exists():
            time.sleep(0.01)

    def shell() -> None:
        start(during(recipe, 3, wait), tmp_path, {"ACCELERATE_MIXED_PRECISION": "no"}, "-run")
        while not (tmp_path / "training").exists():
            time.sleep(0.01)

    assert run(shell, tmp_path).status == 0
    time.sleep(0.2)
    gone.touch()
    until = time.monotonic() + 60
    while status(tmp_path)["status"] is None and time.monotonic() < until:
        time.sleep(0.05)
    assert status(tmp_path) == {"status": 0, "message": "finished"}


@pytest.mark.parametrize(
    ("line", "launcher"),
    [
        (["/bin/python", "/bin/accelerate", "launch", "train.py"], True),
        (["python", "-m", "accelerate.commands.launch", "train.py"], True),
        (["python", "/bin/torchrun", "--nproc_per_node", "2"], True),
        (["python", "-m", "torch.distributed.run"], True),
        (["bash", "nightly-accelerate.sh"], False),
        (["bash"], False),
        ([], False),
    ],
)
def test_the_parents_end_is_heard_of_where_it_is_a_launcher(
    monkeypatch: pytest.MonkeyPatch, line: list[str], launcher: bool
) -> None:
    monkeypatch.setattr(environment, "parents_line", lambda: line)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    asked: list[Any] = []

    class Libc:
        def prctl(self, *given: Any) -> None:
            asked.append(given)

    monkeypatch.setattr("ctypes.CDLL", lambda *given, **named: Libc())
    environment.die_with_parent()
    assert asked == ([(1, signal.SIGTERM)] if launcher and sys.platform == "linux" else [])
