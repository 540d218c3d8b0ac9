"""metrics.jsonl is whole whatever becomes of the trackers; they are copies in which no step goes back, and hold no key."""

import json
import os
import signal
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import llm.run_folder.metrics
from llm.config.reading import load
from llm.run_folder import checkpoint
from llm.training.monitor import Monitor
from tests.forks import Ended, ended, run, start, train, write_recipe, write_text

KEY = "ab12" * 10  # of the form of a real one
CLOSED = "http://127.0.0.1:9"  # the discard port, on which nothing listens


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(autouse=True)
def a_home_without_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nobody's key is used, nobody's W&B is reached, and W&B writes only into the run."""
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    for name in ("XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", CLOSED)
    monkeypatch.setattr(llm.run_folder.metrics, "WANDB_SECONDS", 2)
    yield
    outside = [path for path in tmp_path.rglob("*wandb*") if not path.is_relative_to(tmp_path / "runs" / "tiny")]
    assert not outside, outside


def recipe(folder: Path, text: Path, wandb: str = '"off"', **changes: object) -> Path:
    return write_recipe(folder, text, **{"tracking.wandb": wandb, "evaluate.prompts": "[My self Har]", **changes})


def killed(recipe: Path, after: int, folder: Path) -> None:
    """Run until step `after` is logged, then end as by a power cut."""
    log = Monitor.log

    def act() -> None:
        def last(self: Monitor, *given: Any) -> None:
            log(self, *given)
            if self.state.step == after:
                os.kill(os.getpid(), signal.SIGKILL)

        Monitor.log = last  # type: ignore[method-assign]
        train(recipe)()

    assert ended(start(act, folder), folder).status == -signal.SIGKILL


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The record, complete: every step's loss once, every evaluation, samples after each."""
    path = folder / "runs" / "tiny" / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [5, 10, 12]
    assert [line["step"] for line in lines if "sample" in line] == [5, 10, 12]
    return lines


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a W&B file, which is a log in LevelDB's form: a head, then blocks of 32 KiB with parts of records."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from wandb.proto import wandb_internal_pb2
    data, at, parts = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def told_wandb(folder: Path) -> tuple[set[str], list[dict[str, Any]]]:
    """Ids of the run, and its rows, over all starts in their order."""
    ids, rows = set(), []
    files = sorted(
        (folder / "runs" / "tiny" / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime
    )
    for path in files:
        for record in wandb_records(path):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            if record.HasField("history"):
                items = record.history.item
                rows.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return ids, rows


def no_step_goes_back(rows: list[dict[str, Any]]) -> None:
    for name in ("step", "_step"):
        steps = [row[name] for row in rows if name in row]
        assert steps == sorted(steps) and steps[-1] == 12, steps


def test_offline_stopped_and_resumed_it_is_one_run_whose_steps_never_go_back(tmp_path: Path, text: Path) -> None:
    started = recipe(tmp_path, text, "offline")
    assert run(train(started, stop_after=7), tmp_path).status == 75
    again = run(train(started), tmp_path)
    assert again.status == 0 and again.err == ""
    lines, (ids, rows) = metrics(tmp_path), told_wandb(tmp_path)
    assert ids == {json.loads((tmp_path / "runs/tiny/wandb.json").read_text())["id"]}
    no_step_goes_back(rows)
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [row["loss"] for row in rows if "loss" in row] == losses
    assert {"learning_rate", "gradient_norm", "tokens_per_second", "epoch", "utilisation"} <= rows[0].keys()
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [5, 10, 12]
    tables = [
        json.loads(path.read_text("utf-8")) for path in (tmp_path / "runs/tiny/wandb").rglob("samples*.table.json")
    ]
    whole = max(tables, key=lambda table: len(table["data"]))
    assert [row[0] for row in whole["data"]] == [5, 10, 12] and whole["columns"] == ["step", "prompt", "text"]


def test_killed_between_checkpoints_no_tracker_is_told_a_step_twice(tmp_path: Path, text: Path) -> None:
    started = recipe(tmp_path, text, "offline", **{"tracking.tensorboard": "true"})
    killed(started, 11, tmp_path)  # step 8 was saved at its step, step 10 as the best
    whole = checkpoint.folders(tmp_path / "runs" / "tiny")[0]
    whole.rename(whole.with_name("aside"))
    again = run(train(started), tmp_path)
    assert again.status == 0 and "from step 8" in again.out, again.err
    metrics(tmp_path)
    ids, rows = told_wandb(tmp_path)
    assert len(ids) == 1
    no_step_goes_back(rows)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))  # also those that the kill took along
    assert [row["step"] for row in rows if "bits_per_byte" in row] == [5, 10, 12]
    assert sorted(told_tensorboard(tmp_path)["bits_per_byte"]) == [5, 10, 12]
    assert set(told_tensorboard(tmp_path)["loss"]) == set(range(1, 13))


def test_without_a_key_it_is_kept_offline_and_said_in_one_line(tmp_path: Path, text: Path) -> None:
    done = run(train(recipe(tmp_path, text, "online")), tmp_path)
    assert done.status == 0 and done.err == ""
    assert len([line for line in done.out.splitlines() if "wandb" in line]) == 1
    assert "wandb has no key (`wandb login` stores one): the run is kept offline" in done.out
    metrics(tmp_path)
    no_step_goes_back(told_wandb(tmp_path)[1])


def test_without_a_network_it_is_kept_offline_and_the_key_is_in_no_file(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    done = run(train(recipe(tmp_path, text, "online")), tmp_path)
    assert done.status == 0, done.err
    assert done.out.count("wandb cannot be reached") == 1 and "left out" not in done.out
    metrics(tmp_path)
    ids, rows = told_wandb(tmp_path)
    assert len(ids) == 1
    no_step_goes_back(rows)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any("wandb" in str(path) for path in files)
    assert not [path for path in files if KEY.encode() in path.read_bytes()]


@pytest.mark.slow
def test_wandbs_own_variables_hold_and_its_name_of_a_run_is_found_again(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = recipe(tmp_path, text, "online")
    for name, value in {"MODE": "offline", "PROJECT": "ours", "NAME": "first", "API_KEY": KEY}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    assert run(train(started, stop_after=7), tmp_path).status == 75
    kept = tmp_path / "runs/tiny/wandb.json"
    id = json.loads(kept.read_text())["id"]
    kept.write_text("")
    done = run(train(started), tmp_path)
    assert done.status == 0 and "left out" not in done.out and "cannot be reached" not in done.out, done.out
    assert json.loads(kept.read_text())["id"] == id
    records = [each for path in (tmp_path / "runs/tiny/wandb").glob("*/*.wandb") for each in wandb_records(path)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {(each.run_id, each.project, each.display_name) for each in runs} == {(id, "ours", "first")}
    no_step_goes_back(told_wandb(tmp_path)[1])


def test_wandb_disabled_by_its_own_variable_is_off(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = run(train(recipe(tmp_path, text, "online")), tmp_path)
    assert done.status == 0 and "wandb" not in done.out
    assert not (tmp_path / "runs/tiny/wandb").exists()


def test_online_it_is_sent_what_its_server_lacks(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after step 9, of which W&B's server saw 5, and gone on with from step 8."""
    sent = []

    class Server:
        def __init__(self, *given: Any, **named: Any) -> None:
            self.run = SimpleNamespace(step=6, define_metric=lambda *given, **named: None)  # the next that it takes

        def start(self) -> None:
            pass

        def log(self, values: dict[str, Any], step: int) -> None:
            sent.append((step, values["loss"]))

        def finish(self) -> None:
            pass

    monkeypatch.setattr("accelerate.tracking.WandBTracker", Server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    folder = tmp_path / "runs/tiny"
    folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": step / 2}) for step in range(1, 10)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    def act() -> None:  # in a child, as W&B starts a service of its own
        llm.run_folder.metrics.Tracker(folder, load(recipe(tmp_path, text, "online")), 8, {}).close()
        assert sent == [(6, 3.0), (7, 3.5), (8, 4.0)]

    done = run(act, tmp_path)
    assert done.status == 0, done.err


class OddError(Exception):
    """What no list of errors would foresee."""


@pytest.mark.parametrize(
    "method", ["start", *(pytest.param(each, marks=pytest.mark.slow) for each in ("log", "log_table", "finish"))]
)
def test_a_tracker_that_raises_is_named_once_and_left_behind(tmp_path: Path, text: Path, method: str) -> None:
    from accelerate.tracking import WandBTracker

    def fails(self: Any, *given: Any, **named: Any) -> None:
        raise OddError("the moon is full")

    def act() -> None:
        setattr(WandBTracker, method, fails)
        train(recipe(tmp_path, text, "offline", **{"tracking.tensorboard": "true"}))()

    done = run(act, tmp_path)
    assert done.status == 0, done.err
    assert done.out.count("wandb is left out from here on (the moon is full)") == 1
    metrics(tmp_path)
    assert set(told_tensorboard(tmp_path)["loss"]) == set(range(1, 13))  # the other one goes on


def told_tensorboard(folder: Path) -> dict[str, list[int]]:
    """The steps of every scalar, over all starts in their order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    found: dict[str, list[int]] = {}
    paths = sorted((folder / "runs/tiny/tensorboard").glob("events*"), key=lambda path: path.stat().st_mtime)
    for path in paths:
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append(event.step)
    return found


def test_tensorboard_is_there_by_name(tmp_path: Path, text: Path) -> None:
    pytest.importorskip("tensorboard", reason="install the extra `tensorboard`")
    started = recipe(tmp_path, text, **{"tracking.tensorboard": "true"})
    assert run(train(started, stop_after=7), tmp_path).status == 75
    done = run(train(started), tmp_path)
    assert done.status == 0 and "left out" not in done.out, done.out
    told = told_tensorboard(tmp_path)
    assert told["loss"] == told["epoch"] == told["utilisation"] == list(range(1, 13))
    assert told["bits_per_byte"] == told["val_loss"] == told["best"] == [5, 10, 12]


def test_tensorboard_that_is_not_installed_is_one_line(tmp_path: Path, text: Path) -> None:
    def act() -> None:
        for name in ("torch.utils.tensorboard", "tensorboardX"):
            sys.modules[name] = None  # type: ignore[assignment]
        train(recipe(tmp_path, text, **{"tracking.tensorboard": "true"}))()

    done: Ended = run(act, tmp_path)
    assert done.status == 0 and done.out.count("tensorboard is left out from here on") == 1, done.err
    metrics(tmp_path)


def test_the_record_has_epochs_seen_the_best_so_far_and_the_machines_utilisation(tmp_path: Path, text: Path) -> None:
    started = recipe(tmp_path, text, **{"train.learning_rate": 1.5, "train.warmup": 0})  # too much: it gets worse again
    assert run(train(started), tmp_path).status == 0
    lines = metrics(tmp_path)
    losses = [line for line in lines if "loss" in line]
    windows = json.loads((tmp_path / "runs/tiny/shards.json").read_text())["files"]["train"]
    tokens = sum(file["tokens"] for file in windows)
    assert losses[-1]["epoch"] == pytest.approx(12 * 64 / tokens, rel=0.01)
    assert all(0 < line["utilisation"] < 1 for line in losses)
    best, low = [], float("inf")
    for line in (line for line in lines if "best" in line):
        best.append(line["best"] == (line["bits_per_byte"] < low))
        low = min(low, line["bits_per_byte"])
    assert all(best) and len(best) == 3
