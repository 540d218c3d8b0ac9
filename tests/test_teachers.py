"""train.teachers: a run learns from finished runs beside its text, and resumes to the bit."""

import json
import os
import shutil
from pathlib import Path

import pytest

import llm
from llm.base.errors import RecipeError
from llm.config.schema import Train
from llm.training import teachers
from tests.examples.relu_squared import relu_squared
from tests.forks import digest, run, run_group, script, train, write_recipe, write_text

TAUGHT = {
    "run": "pupil",
    "train.teachers": "[runs/tiny/best, runs/wide/newest]",
    "train.teachers_last": 0.3,
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two teachers of different sizes in runs/."""
    here = tmp_path_factory.mktemp("teachers")
    write_text(here / "text.txt")
    for changes in ({}, {"run": "wide", "model.dim": 64, "model.layers": 1}):
        assert run(train(write_recipe(here, here / "text.txt", **{"train.steps": 4} | changes)), here).status == 0
    return here


def copied(here: Path, to: Path) -> Path:
    shutil.copytree(here, to, dirs_exist_ok=True)
    return to


@pytest.mark.parametrize(
    ("world", "shard", "pieces"),
    [(1, "none", 60), *(pytest.param(2, shard, 0, marks=pytest.mark.slow) for shard in ("none", "full"))],
)
def test_stopped_it_ends_in_the_same_bits(here: Path, tmp_path: Path, world: int, shard: str, pieces: int) -> None:
    changes = {**TAUGHT, "train.steps": 6, "machine.shard": shard, "train.sampled_softmax": pieces}
    for name, stops in {"whole": (None,), "parts": (2, 3, None)}.items():
        folder = copied(here, tmp_path / name)
        recipe = write_recipe(folder, folder / "text.txt", **changes)
        for stop in stops:
            for each in run_group(train(recipe, stop_after=stop), folder, world):
                assert each.status == (75 if stop else 0), each.err
    assert digest(tmp_path / "whole", run="pupil") == digest(tmp_path / "parts", run="pupil")
    alone = copied(here, tmp_path / "alone")
    recipe = write_recipe(alone, alone / "text.txt", **changes | {"train.teachers": "[]"})
    assert all(each.status == 0 for each in run_group(train(recipe), alone, world))
    assert digest(alone, run="pupil") != digest(tmp_path / "whole", run="pupil")


@pytest.mark.parametrize(("first", "last"), [(0.6, 0.0), (0.9, 0.9), (0.2, 1.0)])
def test_the_share_goes_from_the_first_to_the_last_as_the_rate_falls(first: float, last: float) -> None:
    train_ = Train(steps=10, teachers=("x",), teachers_share=first, teachers_last=last)
    shares = [teachers.share(train_, factor) for factor in (1.0, 0.5, 0.0)]
    assert shares == pytest.approx([first, (first + last) / 2, last])


def test_its_teachers_are_told_and_kept(here: Path, tmp_path: Path) -> None:
    folder = copied(here, tmp_path / "run")
    recipe = write_recipe(folder, folder / "text.txt", **TAUGHT, **{"train.steps": 4})
    first = run(train(recipe, stop_after=2), folder)
    assert first.status == 75 and "teachers: runs/tiny/best, runs/wide/newest" in first.out
    found = folder / "runs/pupil/checkpoints/step-000002"
    assert len(json.loads((found / "checkpoint.json").read_text())["teachers"]) == 2
    assert "runs/tiny/best" in (found / "README.md").read_text()
    longer = write_recipe(
        folder, folder / "text.txt", **{"run": "wide2", "model.dim": 64, "model.layers": 1, "train.steps": 5}
    )
    assert run(train(longer), folder).status == 0
    shutil.rmtree(folder / "runs/wide")
    (folder / "runs/wide2").rename(folder / "runs/wide")
    other = run(train(write_recipe(folder, folder / "text.txt", **TAUGHT, **{"train.steps": 4})), folder)
    assert other.status == 4 and "runs/wide/newest no longer has the weights" in other.err
    assert len(other.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("changes", "status", "said"),
    [
        ({"train.teachers": "[runs/nobody/best]"}, 2, "nobody"),
        ({"train.teachers": "[runs/tiny/best]", "tokenizer.vocabulary": 420}, 4, "another tokenizer"),
        ({"train.teachers": "[runs/tiny/best]", "run": "tiny"}, 4, "train.teachers = nothing"),
        ({"train.teachers": f"[{'x' * 300}]"}, 2, "is not there"),
        ({"train.teachers": "[runs/tiny/step-000003]"}, 2, "step-000003/config.json is not there"),
        ({"train.teachers": "[flipped]"}, 4, "step-000004/model.safetensors is damaged"),
        ({"train.teachers": "[vast]"}, 4, "lacks weights"),
    ],
)
def test_what_cannot_teach_is_refused_in_one_line(
    here: Path, tmp_path: Path, changes: dict[str, object], status: int, said: str
) -> None:
    folder = copied(here, tmp_path / "run")
    for name in ("flipped", "vast"):
        found = shutil.copytree(
            folder / "runs/tiny/checkpoints/step-000004", folder / "runs" / name / "checkpoints/step-000004"
        )
        shutil.copytree(folder / "runs/tiny/tokenizer", folder / "runs" / name / "tokenizer")
        changes = {
            key: str(value).replace(f"[{name}]", f"[{found.relative_to(folder)}]") for key, value in changes.items()
        }
    flipped, vast = (folder / f"runs/{name}/checkpoints/step-000004" for name in ("flipped", "vast"))
    weights = bytearray((flipped / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (flipped / "model.safetensors").write_bytes(weights)
    config = json.loads((vast / "config.json").read_text())
    (vast / "config.json").write_text(json.dumps(config | {"intermediate_size": 1 << 24, "num_hidden_layers": 200}))
    recipe = write_recipe(folder, folder / "text.txt", **{"run": "pupil", "train.steps": 4} | changes)
    found = run(train(recipe), folder)
    assert (found.status, len(found.err.splitlines())) == (status, 1) and said in found.err, found.err


@pytest.mark.parametrize("key", ["train.teachers", "model.from"])
def test_a_run_and_what_was_exported_of_another_teach_each_other(here: Path, tmp_path: Path, key: str) -> None:
    """Their tokenizers are read by two libraries, and have the same pieces."""
    folder = copied(here, tmp_path / "run")
    assert run(script("module:llm.export", "tiny", "--to", "exported"), folder).status == 0
    changes = {"model.from": "runs/tiny/best", "train.teachers": "runs/tiny/best", key: "exported"}
    changes |= {"run": "pupil", "train.steps": 4}
    found = run(train(write_recipe(folder, folder / "text.txt", **changes)), folder)
    assert found.status == 0 and f"teachers: {changes['train.teachers']}" in found.out, found.err


@pytest.mark.parametrize("change", ["fewer", "swapped", "marks"])
def test_an_exported_folder_of_other_pieces_is_refused(here: Path, tmp_path: Path, change: str) -> None:
    folder = copied(here, tmp_path / "run")
    assert run(script("module:llm.export", "tiny", "--to", "exported"), folder).status == 0
    path = folder / "exported/tokenizer.json"
    found = json.loads(path.read_text())
    vocabulary, marks = found["model"]["vocab"], found["added_tokens"]
    first, second = list(vocabulary)[-2:]
    if change == "swapped":
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    elif change == "marks":
        marks[-1]["content"], marks[-2]["content"] = marks[-2]["content"], marks[-1]["content"]
    else:
        del vocabulary[second]
        found["model"]["merges"] = [
            each for each in found["model"]["merges"] if "".join(each).replace(" ", "") != second
        ]
    path.write_text(json.dumps(found))
    changes = {"run": "pupil", "train.steps": 4, "train.teachers": "exported"}
    ended = run(train(write_recipe(folder, folder / "text.txt", **changes)), folder)
    assert ended.status == 4 and "another tokenizer" in ended.err and len(ended.err.splitlines()) == 1, ended.err


@pytest.mark.parametrize("length", [{"train.steps": 4}, {"train.steps": None, "train.hours": "2s"}])
def test_a_finished_run_needs_its_teachers_no_more(here: Path, tmp_path: Path, length: dict[str, object]) -> None:
    folder = copied(here, tmp_path / "run")
    recipe = write_recipe(folder, folder / "text.txt", **TAUGHT | length)
    assert run(train(recipe), folder).status == 0
    shutil.rmtree(folder / "runs/wide")
    again = run(train(recipe), folder)
    assert again.status == 0 and "is finished" in again.out, again.err


@pytest.mark.parametrize("key", ["train.teachers", "model.from"])
def test_machines_that_hold_others_are_refused(here: Path, tmp_path: Path, key: str) -> None:
    """Each of two machines has a folder of its own, with another run under the name of the teacher."""
    disks = [copied(here, tmp_path / f"disk{rank}") for rank in range(2)]
    other = {"run": "other", "train.steps": 5}
    assert run(train(write_recipe(disks[1], disks[1] / "text.txt", **other)), disks[1]).status == 0
    shutil.rmtree(disks[1] / "runs/tiny")
    (disks[1] / "runs/other").rename(disks[1] / "runs/tiny")
    changes = {
        "run": "pupil",
        "train.steps": 4,
        key: "runs/tiny/newest",
        "text.cache": "cache",
        "text.files": "[text.txt]",
    }
    recipe = write_recipe(tmp_path, Path("text.txt"), **changes)

    def act() -> None:
        os.chdir(disks[int(os.environ["RANK"])])
        train(recipe)()

    found = run_group(act, tmp_path, 2, node=1)
    assert [each.status for each in found] == [6, 6], [each.err for each in found]
    assert "process 1 has" in found[0].err and "give every machine the same files" in found[0].err


def test_a_model_of_ones_own_has_no_teacher(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = copied(here, tmp_path / "run")
    monkeypatch.chdir(folder)
    recipe = llm.load_recipe(write_recipe(folder, folder / "text.txt", **TAUGHT))
    with pytest.raises(RecipeError, match=r"train\.teachers .* model="):
        llm.train(recipe, model=relu_squared)
