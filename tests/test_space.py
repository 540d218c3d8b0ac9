"""A full disk is one clear line with status 5; what was saved stays, and after making room the same command goes on."""

import errno
import json
import os
import pwd
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm.run_folder import checkpoint
from tests.forks import Ended, digest, run, run_group, train, write_recipe, write_text

MB = 1 << 20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no file system may be mounted here: {mounted.stderr.decode(errors='replace').strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, text: Path) -> str:
    folder = tmp_path_factory.mktemp("whole")
    assert run(train(write_recipe(folder, text)), folder).status == 0
    return digest(folder)


def fill(disk: Path, leave: int) -> Path:
    """A file that leaves `leave` bytes free."""
    ballast = disk / "ballast"
    with ballast.open("ab") as file:
        os.posix_fallocate(file.fileno(), 0, file.tell() + shutil.disk_usage(disk).free - leave)
    return ballast


def full(ended: Ended, folder: Path, *words: str) -> None:
    assert ended.status == 5, ended.err
    assert ended.err.strip().count("\n") == 0 and all(word in ended.err for word in words), ended.err
    if (status := folder / "runs/tiny/status.json").exists():
        assert json.loads(status.read_text())["status"] == 5


def test_a_disk_too_small_for_the_next_checkpoint_is_said_before_it_is_begun(
    disk: Path, tmp_path: Path, text: Path, whole: str
) -> None:
    recipe = write_recipe(tmp_path, text)
    assert run(train(recipe, stop_after=5), disk).status == 75
    before = {path: path.read_bytes() for path in (disk / "runs/tiny/checkpoints").rglob("*") if path.is_file()}
    ballast = fill(disk, 300_000)
    ended = run(train(recipe), disk)
    full(ended, disk, "the checkpoint runs/tiny/checkpoints/step-000008 needs 0.5 MB, 0.", "MB are free", "Make room")
    assert {path: path.read_bytes() for path in before} == before
    assert len(checkpoint.folders(disk / "runs/tiny")) == len(before) // 7
    ballast.unlink()
    assert run(train(recipe), disk).status == 0
    assert digest(disk) == whole


def test_two_processes_on_a_full_disk_end_alike_and_one_speaks(
    disk: Path, tmp_path: Path, text: Path, whole: str
) -> None:
    recipe = write_recipe(tmp_path, text)
    assert [each.status for each in run_group(train(recipe, stop_after=5), disk, 2)] == [75, 75]
    ballast = fill(disk, 300_000)
    first, second = run_group(train(recipe), disk, 2)
    full(first, disk, "step-000008 needs", "are free")
    assert second.status == 5 and second.err == ""
    ballast.unlink()
    assert [each.status for each in run_group(train(recipe), disk, 2)] == [0, 0]
    assert digest(disk) == whole


def test_a_disk_that_fills_within_a_checkpoint_loses_none(disk: Path, tmp_path: Path, text: Path, whole: str) -> None:
    """Another program takes the room between the look at it and the writing."""
    recipe = write_recipe(tmp_path, text)

    def greedy() -> None:
        look = checkpoint._check_space

        def looked(folder: Path, size: int) -> None:
            look(folder, size)
            if folder.name == "step-000008":
                fill(disk, 100_000)

        checkpoint._check_space = looked
        train(recipe)()

    full(run(greedy, disk), disk, "the disk failed at ", "No space left on device", "are free", "make room")
    newest = checkpoint.newest(disk / "runs/tiny", print)
    assert newest is not None and newest.step == 5
    assert not list((disk / "runs/tiny/checkpoints").glob(".draft*")), "what was begun gives its room back"
    (disk / "ballast").unlink()
    assert run(train(recipe), disk).status == 0
    assert digest(disk) == whole


def test_a_disk_that_fills_in_the_record_loses_none(disk: Path, tmp_path: Path, text: Path, whole: str) -> None:
    recipe = write_recipe(tmp_path, text, **{"checkpoint.every": 3, "evaluate.every": 99})

    def greedy() -> None:
        import llm.run_folder.metrics

        log = llm.run_folder.metrics.Tracker.log

        def logged(self: llm.run_folder.metrics.Tracker, step: int, **values: object) -> None:
            if step == 5:
                while not (disk / "runs/tiny/checkpoints/step-000003").exists():  # which is written beside the training
                    time.sleep(0.01)
                print(file=sys.stderr, flush=True)  # room for the line that is to come
                fill(disk, 0)
                while (self.record.path.stat().st_size + 1) % 4096:  # the last page of the record is full as well
                    self.record.file.write(" ")
                    self.record.file.flush()
            log(self, step, **values)

        llm.run_folder.metrics.Tracker.log = logged  # type: ignore[method-assign]
        train(recipe)()

    full(run(greedy, disk), disk, "metrics.jsonl", "No space left on device, 0.0 MB are free", "make room")
    newest = checkpoint.newest(disk / "runs/tiny", print)
    assert newest is not None and newest.step == 3
    (disk / "ballast").unlink()
    assert run(train(recipe), disk).status == 0
    assert digest(disk) == whole
    lines = [json.loads(line) for line in (disk / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))


@pytest.mark.parametrize("leave", [0, 4096, 20_000, 40_000])
def test_a_full_disk_in_the_preparation(disk: Path, tmp_path: Path, text: Path, whole: str, leave: int) -> None:
    recipe = write_recipe(tmp_path, text, **{"text.cache": disk / "cache"})
    folder = tmp_path / "runs-elsewhere"
    folder.mkdir()
    ballast = fill(disk, leave)
    ended = run(train(recipe), folder)
    full(ended, folder, "are free", "ake room")
    ballast.unlink()
    assert run(train(recipe), folder).status == 0
    assert digest(folder) == whole
    assert not list((disk / "cache").rglob(".draft*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_a_failure_inside_a_library_is_a_failure_of_the_disk(tmp_path: Path, text: Path, code: int) -> None:
    """An Arrow write, as it fails within pyarrow."""

    def failing() -> None:
        import pyarrow

        def no_room(*arguments: object) -> None:
            raise OSError(code, os.strerror(code))

        pyarrow.ipc.new_stream = no_room
        train(write_recipe(tmp_path, text, **{"text.cache": tmp_path / "cache"}))()

    ended = run(failing, tmp_path)
    assert ended.status == 5 and ended.err.count("\n") == 1 and os.strerror(code) in ended.err, ended.err


def test_a_limit_on_the_size_of_files_is_one_line(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text)

    def act() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.RLIM_INFINITY))
        train(recipe)()

    done = run(act, tmp_path)
    assert done.status == 5 and done.err.count("\n") == 1 and "allow larger files (ulimit -f" in done.err, done.err
    done = run(train(recipe), tmp_path)
    assert done.status == 0 and digest(tmp_path).startswith("12:"), done.err


def test_a_prepared_cache_that_cannot_be_written_to_is_used(disk: Path, tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"text.cache": disk / "cache"})
    assert run(train(recipe, "run=first"), tmp_path).status == 0
    draft = disk / "cache/tokenizers/.draft-left"
    draft.mkdir()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run(train(recipe), tmp_path)
    assert done.status == 0 and "made before" in done.out, done.err
    other = run(train(recipe, "run=other", "tokenizer.vocabulary=330"), tmp_path)
    assert other.status == 5 and len(other.err.splitlines()) == 1 and "Read-only file system" in other.err, other.err


@pytest.mark.parametrize("home", [None, pytest.param("/proc", marks=pytest.mark.slow)])
def test_without_a_home_all_is_done_and_nothing_left_behind(tmp_path: Path, text: Path, home: str | None) -> None:
    """As for a user whom the system has no name for; /proc is a place where nobody may write."""
    recipe = write_recipe(tmp_path, text, **{"text.cache": "data", "tracking.wandb": "online"})

    def unknown(uid: int) -> None:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    def act() -> None:
        pwd.getpwuid = unknown  # type: ignore[assignment]
        for name in ("HOME", "USER", "LOGNAME", "XDG_CACHE_HOME", "HF_HOME", *(n for n in os.environ if "WANDB" in n)):
            os.environ.pop(name, None)
        os.environ.update({"HOME": home} if home else {})
        import datasets

        datasets.config.HF_DATASETS_CACHE = Path(f"{home or '~'}/.cache/huggingface/datasets")  # as when imported then
        train(recipe)()

    done = run(act, tmp_path)
    assert done.status == 0 and done.err == "" and "left out" not in done.out, (done.out, done.err)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs", "recipe.yaml", "out.txt", "err.txt"}
