"""verify tells a recipe that keeps its promises from one that does not; show names where two runs part."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm import verify
from llm.base import atomic_io
from llm.base.errors import RecipeError, RefusedError
from llm.config import packaged
from llm.run_folder import checkpoint, loaded_run, verification
from llm.run_folder.step_texts import step_texts
from llm.run_folder.trace import compare_runs
from llm.training import proof
from tests import plants
from tests.forks import count_threads, run, run_group, script, train, write_recipe, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=20)


def verdicts(folder: Path, text: Path, fault: Callable[[], None] | None = None, *overrides: str) -> dict[str, str]:
    """What verify says of the tiny recipe, whose children are forked here, with `fault` planted in them."""
    changes = {"train.steps": 12, "train.tokens_per_step": 128, "machine.micro_batch": 4, "model.dropout": 0.1}
    recipe = write_recipe(folder, text, **changes)

    def start(arguments: list[str], world: int, status: int) -> None:
        def act() -> None:
            import sys

            if fault is not None:
                fault()
            sys.argv = ["-c", *arguments]
            proof.child()

        for ended in run_group(act, folder, world):
            assert ended.status == status, ended.err

    found = proof.verify_recipe(recipe, list(overrides), 6, start)
    return {verdict.promise: verdict.fault for verdict in found}


@pytest.mark.parametrize("exact", [False, True])
def test_a_sound_recipe_keeps_all_promises(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, exact: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    found = verdicts(tmp_path, text, None, *(["machine.exact=true"] if exact else ["tokenizer.vocabulary=auto"]))
    assert len(found) == (2 if exact else 3) and not any(found.values()), found
    assert not list(Path("runs").iterdir())  # nothing of it is left


def test_a_mixture_whose_epochs_no_trial_can_hold_is_verified_and_no_other_run_is_touched(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (mine := tmp_path / "runs/tiny-verify-whole/mine").mkdir(parents=True)
    (other := tmp_path / "other.txt").write_text(text.read_text().replace("river", "lake"))
    sources = [
        f"text.sources.a.files={text}",
        "text.sources.a.epochs=20",
        f"text.sources.b.files={other}",
        "text.sources.b.weight=1",
    ]
    found = verdicts(tmp_path, text, None, *sources, "train.steps=2000")
    assert found and not any(found.values()) and list(Path("runs").iterdir()) == [mine.parent.relative_to(tmp_path)]


def test_where_bits_are_compared_all_trials_have_one_number_of_threads(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, threads = proof.Trials.train, {}

    def noting(self: proof.Trials, name: str, *changes: str, **more: int) -> Path:
        folder = real(self, name, *changes, **more)
        threads[name] = json.loads((folder / "machine.json").read_text())["threads"]
        return folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(proof.Trials, "train", noting)
    monkeypatch.setattr("llm.distributed.threads.threads_per_process", _share)
    found = verdicts(tmp_path, text, count_threads, "machine.exact=true", "machine.threads=auto")
    assert threads == {"whole": 2, "resumed": 2, "two-processes": 2} and not any(found.values()), (threads, found)


def _share() -> int:
    """Threads of each process on a machine of two cores."""
    return 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def test_a_run_of_one_step_is_verified_and_a_trial_that_fails_ends_the_others(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert not any(verdicts(tmp_path, text, None, "train.steps=1", "train.warmup=0").values())
    started, popen = [], subprocess.Popen

    def sleeping(command: list[str], env: dict[str, str], **more: Any) -> Any:
        code = "import time; time.sleep(60)" if env["RANK"] == "1" else "raise SystemExit('of its own')"
        started.append(popen([sys.executable, "-c", code], env=env, **more))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", sleeping)
    with pytest.raises(RefusedError, match="of its own"):
        proof.start_processes([], 2, 0)
    assert [process.returncode for process in started] == [1, -signal.SIGKILL]


FAST = [plants.lost_moments, plants.mask_by_row]


@pytest.mark.parametrize("fault", [
    *FAST, *(pytest.param(fault, marks=pytest.mark.slow) for fault in plants.FAULTS if fault not in FAST)])  # fmt: skip
def test_a_planted_fault_is_caught(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None]
) -> None:
    monkeypatch.chdir(tmp_path)
    found = verdicts(tmp_path, text, fault)
    assert any(found.values()), fault.__name__
    assert all("step" in said for said in found.values() if said), found


def test_show_prints_what_the_trainer_read(tmp_path: Path, text: Path) -> None:
    """On two processes, across an epoch's end, after a resume: the texts that the trainer saw, each in its place."""
    from llm.data import batches

    recipe = write_recipe(tmp_path, text, **{"train.tokens_per_step": 384, "machine.micro_batch": 6})
    real = batches.BatchLoader.at

    def spying(stop: int | None) -> Callable[[], None]:
        def act() -> None:
            def at(self: batches.BatchLoader, step: int):  # type: ignore[no-untyped-def]
                for number, batch in enumerate(real(self, step)):
                    for row, position in zip(batch.tokens.tolist(), batch.windows.tolist(), strict=True):
                        with Path(f"read-{self.rank}.jsonl").open("a") as file:
                            file.write(json.dumps([step, self.rank, number, position, row]) + "\n")
                    yield batch

            batches.BatchLoader.at = at  # type: ignore[method-assign]
            train(recipe, stop_after=stop)()

        return act

    run_group(spying(5), tmp_path, 2)
    run_group(spying(None), tmp_path, 2)
    from llm.data.tokenizer import Tokenizer

    tokenizer = Tokenizer.load(tmp_path / "runs/tiny/tokenizer/tokenizer.model")
    lines = [json.loads(line) for rank in (0, 1) for line in (tmp_path / f"read-{rank}.jsonl").read_text().splitlines()]
    for outside in (0, 13):
        assert run(script("module:llm.show", "tiny", "--step", outside), tmp_path).status == 2
    for step in (0, 5, 10, 11):  # updates done before
        named = ["tiny"] if step else []  # the last run is the only one
        ended = run(script("module:llm.show", *named, "--step", step + 1, "--characters", "0"), tmp_path)
        assert ended.status == 0, ended.err
        read = [line for line in lines if line[0] == step]
        assert len(read) == 24
        for _, rank, number, position, row in read:
            head = f"--- process {rank}, micro-batch {number}, position {position}, epoch "
            shown = ended.out.partition(head)[2].partition("\n")[2]
            assert shown.startswith(tokenizer.decode(row))


CHANGES = [  # override, the first step at which the run is another one, and what is said of it
    ("seed=2", 1, "other windows"), ("train.learning_rate=0.021", 1, "other weights"),
    ("model.dropout=0.2", 1, "losses"), ("train.warmup=3", 1, "other weights"), ("train.clip=0.01", 1, "other weights"),
    ("model.layers=3", 1, "other weights"), ("train.weight_decay=0.3", 1, "other weights"),
    ("train.optimizer=adamw", 1, "losses"), ("train.skip=[4-5]", 4, "other windows"),
    ("train.decay=0.6", 5, "other weights")]  # fmt: skip


def test_show_names_the_first_step_at_which_two_runs_part(tmp_path: Path, text: Path) -> None:
    recipe = write_recipe(tmp_path, text, **{"train.warmup": 2})
    for name, override in [
        ("a", "seed=1"),
        ("same", "seed=1"),
        *((f"b{i}", change[0]) for i, change in enumerate(CHANGES)),
    ]:
        ended = run(train(recipe, override, f"run={name}"), tmp_path)
        assert ended.status == 0, ended.err
    runs = tmp_path / "runs"
    assert "agree to the bit in all 12 common steps" in compare_runs(runs / "a", runs / "same")[-1]
    for number, (override, step, what) in enumerate(CHANGES):
        *keys, last = compare_runs(runs / "a", runs / f"b{number}")
        assert any(key.startswith(override.partition("=")[0]) for key in keys), override
        assert f"part at step {step}: " in last and what in last, (override, last)
    sources = ["text.files=[]", f"text.sources.notes.files={text}", "text.sources.notes.weight=1"]
    assert run(train(recipe, *sources, "run=mixed"), tmp_path).status == 0
    for pair in (("a", "mixed"), ("mixed", "a")):  # a key that only one of them has
        assert any(line.startswith("text.sources.notes") for line in compare_runs(*(runs / name for name in pair)))


def test_verify_reads_a_run_again_and_names_what_is_damaged(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(train(write_recipe(tmp_path, text)), tmp_path).status == 0
    assert not any(verdict.fault for verdict in verification.verify_run("tiny"))
    path = checkpoint.folders(Path("runs/tiny"))[1] / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    record = Path("runs/tiny/fingerprints.jsonl")
    record.write_text(record.read_text().replace('"step": 3,', '"step": 3, "x": 1,'))
    faults = [verdict.fault for verdict in verification.verify_run("tiny") if verdict.fault]
    assert len(faults) == 2 and "model.safetensors is damaged" in faults[0] and "step 3" in faults[1]
    record.write_text('{"step": 1}\n')
    with pytest.raises(RefusedError, match=r"fingerprints\.jsonl is damaged"):
        compare_runs(Path("runs/tiny"), Path("runs/tiny"))
    with pytest.raises(RecipeError, match=r"seed=2: overrides are for a recipe, and tiny names a run"):
        verify.main(["tiny", "seed=2"])
    with pytest.raises(RecipeError, match=r"there is no run '' under runs/ here: there are tiny"):
        loaded_run.find("")
    for number in range(11):
        (tmp_path / f"runs/x{number}/checkpoints/step-000001").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"there are tiny, x0, .*, x7 and 2 more$"):
        loaded_run.find("nobody")
    with pytest.raises(RecipeError, match=r"'runs/tinny/best' under runs/ here: did you mean tiny\?"):
        loaded_run.find("runs/tinny/best")
    with pytest.raises(RecipeError, match=r"--world = 3: 4 windows .* name a divisor of 2"):
        next(step_texts(Path("runs/tiny"), 1, 3))
    settings = {"micro_batch": 4, "world": 1}
    atomic_io.write_checksummed(Path("runs/tiny/machine.json"), settings)
    with pytest.raises(RecipeError, match=r"--world = 3: .* only 1 process can share"):
        next(step_texts(Path("runs/tiny"), 1, 3))


def test_a_run_extended_from_its_stable_phase_is_the_longer_run(tmp_path: Path, text: Path) -> None:
    """Up to where their schedules differ, and to the bit; the child's record says where it came from."""
    recipe = write_recipe(tmp_path, text, **{"train.decay": 0.5, "checkpoint.every": 4})
    assert run(train(recipe), tmp_path).status == 0
    assert run(train(recipe, "run=longer", "train.steps=40"), tmp_path).status == 0
    assert run(train(recipe, "run=extended", "train.steps=40", "from=tiny/step-000004"), tmp_path).status == 0
    last = compare_runs(tmp_path / "runs/longer", tmp_path / "runs/extended")[-1]
    assert "agree to the bit in all 36 common steps" in last
    newest = checkpoint.newest(tmp_path / "runs/extended", print)
    assert newest is not None
    parent = newest.manifest["parent"]
    assert parent["from"] == "tiny/step-000004" and parent["science"]["train.steps"] == 12
    with pytest.raises(
        RecipeError, match=r"--step = 4: extended began at step 5, from tiny/step-000004: name that run"
    ):
        next(step_texts(tmp_path / "runs/extended", 4))
    assert next(step_texts(tmp_path / "runs/extended", 5)) == "step 5 of extended reads:"


def test_a_trial_ends_as_its_cause_says_and_a_packaged_recipe_is_found_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = write_recipe(tmp_path, tmp_path / "none.txt")
    with pytest.raises(RecipeError, match=r"ended with status 2: .*none\.txt is not there") as error:
        proof.verify_recipe(recipe, [], 4)
    assert "error:" not in str(error.value)
    asked: list[Any] = []
    monkeypatch.setattr(proof, "verify_recipe", lambda *given: asked.append(given) or [])
    verify.main(["quickstart", "train.steps=9"])
    assert asked == [(packaged.recipes("quickstart"), ["train.steps=9"], 8)]
    (tmp_path / "runs/quickstart").mkdir(parents=True)
    with pytest.raises(RecipeError, match="overrides are for a recipe"):  # then the run is meant
        verify.main(["quickstart", "train.steps=9"])
