"""train.hours: the decay ends at the time given, whatever the machine's speed does, and the recorded plan replays."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.base.atomic_io import read_checksummed
from llm.optim.schedule import lr_factor, planned
from llm.optim.time_budget import TimeBudget
from tests.forks import digest, ended, run, run_group, start, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


def simulated(
    monkeypatch: pytest.MonkeyPatch, hours: float, speed: Callable[[float], float]
) -> tuple[TimeBudget, float]:
    """A budget lived through by a clock of its own: its plan, and the seconds after the last step."""
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    budget, step = TimeBudget(hours), 0
    budget.begin(0, 3 * speed(0.0))  # a cold start misjudges
    while step < planned(step, budget.plan):
        now += speed(now)
        step += 1
        pause = 5 * speed(now) if step % 100 == 0 else 0.0
        now += pause
        budget.paused(pause)
        if steps := budget.proposal(step):
            budget.revise(step, steps)
    return budget, now


@pytest.mark.parametrize("seed", range(5))
def test_it_lands_whatever_the_speed_does(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    chance = random.Random(seed)
    changes = sorted(chance.uniform(0, 3600) for _ in range(4))
    factors = [chance.uniform(0.3, 3) for _ in range(5)]

    def speed(now: float) -> float:
        return 0.5 * factors[sum(now > change for change in changes)] * chance.uniform(0.9, 1.1)

    budget, end = simulated(monkeypatch, 1.0, speed)
    assert end == pytest.approx(3600, rel=0.02)
    steps = budget.plan[-1][1]
    shares = [lr_factor(step, plan=budget.plan, warmup=0, decay=0.4) for step in range(steps)]
    assert shares[-1] < 0.02
    assert all(share == 1 for share in shares[: steps // 4])


def test_the_rate_follows_the_newest_plan_from_its_step_on() -> None:
    def shares(plan: list[tuple[int, int]]) -> list[float]:
        return [lr_factor(step, plan=plan, warmup=2, decay=0.5) for step in range(planned(99, plan))]

    changed = shares([(0, 20), (15, 30)])
    assert changed == shares([(0, 20)])[:15] + shares([(0, 30)])[15:]
    assert shares([(0, 20), (3, 20)]) == shares([(0, 20)])


def lands(folder: Path, seconds: float) -> float:
    record = read_checksummed(folder / "runs/tiny/plan.json")
    assert record["finished"]
    print(f"{record['seconds']:.2f} s of {seconds:.2f} s, plan {record['plan']}")
    return float(record["seconds"]) / seconds - 1


def recipe_of(folder: Path, text: Path, seconds: float, **changes: object) -> Path:
    return write_recipe(folder, text, **{"train.steps": None, "train.hours": f"{seconds:g}s", "tracking.every": 5, "checkpoint.every": 100,
                                         "evaluate.every": 200, "train.warmup": 0, **changes})  # fmt: skip


def replayed(folder: Path, recipe: Path) -> str:
    """The digest of another run along a copy of the plan."""
    (folder / "again/runs/tiny").mkdir(parents=True)
    shutil.copy(folder / "runs/tiny/plan.json", folder / "again/runs/tiny")
    assert run(train(recipe), folder / "again").status == 0
    return digest(folder / "again")


def test_a_budget_with_a_kill_and_a_stop_lands_and_its_plan_replays_to_the_bit(tmp_path: Path, text: Path) -> None:
    seconds = 8.0
    recipe = recipe_of(tmp_path, text, seconds)
    child = start(train(recipe), tmp_path)
    record = tmp_path / "runs/tiny/metrics.jsonl"
    until = time.monotonic() + 60
    while not record.exists() or not read_plan(tmp_path) or read_plan(tmp_path)["seconds"] < seconds / 4:
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    assert ended(child, tmp_path).status == -signal.SIGKILL
    before = read_plan(tmp_path)["plan"]
    child = start(train(recipe), tmp_path)
    while read_plan(tmp_path)["seconds"] < seconds / 2:
        time.sleep(0.05)
    os.kill(child, signal.SIGTERM)
    assert ended(child, tmp_path).status == 75
    done = run(train(recipe), tmp_path)
    assert done.status == 0, done.err
    plan = read_plan(tmp_path)["plan"]
    assert plan[: len(before)] == before, "what was planned is followed"
    assert abs(lands(tmp_path, seconds)) < 0.25, "a tiny run: its last evaluation is a great part"
    last = [json.loads(line)["step"] for line in record.read_text().splitlines()][-1]
    assert last == plan[-1][1]
    assert run(train(recipe), tmp_path).out.count("nothing to do") == 1
    assert replayed(tmp_path, recipe) == digest(tmp_path)


@pytest.mark.slow
def test_two_processes_share_one_plan_and_go_on_from_another_run(tmp_path: Path, text: Path) -> None:
    """Half of the decay is over this run's own steps: what came before it is not counted."""
    recipe = recipe_of(tmp_path, text, 2.0)
    assert run(train(recipe, "run=before", "train.steps=300"), tmp_path).status == 0
    for each in run_group(train(recipe, "from=before/step-000300"), tmp_path, 2):
        assert each.status == 0, each.err
    plan = read_plan(tmp_path)
    assert plan["finished"] and plan["plan"][0][0] == 300
    rates = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert next(line for line in rates if "learning_rate" in line)["learning_rate"] == pytest.approx(0.02)


def test_a_plan_that_is_damaged_or_of_another_time(tmp_path: Path, text: Path) -> None:
    recipe = recipe_of(tmp_path, text, 2.0)
    assert run(train(recipe, stop_after=5), tmp_path).status == 75
    other = run(train(recipe, "train.hours=9s"), tmp_path)
    assert other.status == 4 and "train.hours" in other.err and other.err.count("\n") == 1
    path = tmp_path / "runs/tiny/plan.json"
    path.write_bytes(path.read_bytes().replace(b"plan", b"plam", 1))
    done = run(train(recipe), tmp_path)
    assert done.status == 0 and "plan.json is damaged" in done.err
    assert read_plan(tmp_path)["finished"]


def read_plan(folder: Path) -> dict[str, Any]:
    path = folder / "runs/tiny/plan.json"
    return read_checksummed(path) if path.exists() else {}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["none", "load", "kill"])
def test_three_budgets_land_within_five_percent(tmp_path: Path, text: Path, fault: str) -> None:
    seconds, plan = 45.0, tmp_path / "runs/tiny/plan.json"
    recipe = recipe_of(tmp_path, text, seconds, **{"evaluate.every": 2000, "checkpoint.every": 1000})
    began, others = time.monotonic(), []
    child = start(train(recipe), tmp_path)

    def wait(share: float) -> None:
        while not plan.exists() or read_plan(tmp_path)["seconds"] < share * seconds:
            time.sleep(0.1)

    if fault == "load":  # a neighbour on every core from a third of the time to two thirds of it
        wait(1 / 3)
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
        wait(2 / 3)
        for other in others:
            other.kill()
            other.wait()
    if fault == "kill":
        wait(1 / 2)
        os.kill(child, signal.SIGKILL)
        ended(child, tmp_path)
        child = start(train(recipe), tmp_path)
    done = ended(child, tmp_path, seconds=4 * seconds)
    assert done.status == 0, done.err
    print(f"{fault}: {time.monotonic() - began:.1f} s from start to end")
    assert abs(lands(tmp_path, seconds)) < 0.05
    assert replayed(tmp_path, recipe) == digest(tmp_path)
