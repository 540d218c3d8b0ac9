"""Whatever is damaged, missing, swapped or made to hurt is noticed and named; nothing that is valid is lost by it."""

import json
import os
import random
import resource
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from llm.base import atomic_io
from llm.base.errors import LLMError, RecipeError, RefusedError
from llm.config.reading import load, with_checksum
from llm.data.pipeline import prepare_text
from llm.data.tokenizer import Tokenizer
from llm.model import hf_config
from llm.run_folder import checkpoint, loaded_run, record, tensor_files, trace
from tests.forks import digest, run, run_group, script, train, write_recipe, write_text

SEED = int(os.environ.get("SEED", "20260"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a text, its cache, and a finished run with checkpoints of steps 4, 5, 8, 10 and 12."""
    folder = tmp_path_factory.mktemp("trained")
    text = write_text(folder / "text.txt")
    ended = run(train(write_recipe(folder, text, **{"text.cache": "cache"})), folder)
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, in which the test is run."""
    shutil.copytree(trained, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return Path()


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


# ---------------------------------------------------------------------------------------------- flipped bits


def places(folder: Path) -> dict[str, tuple[list[Path], Callable[[Path], None]]]:
    """Files by kind, and who reads them."""
    newest = checkpoint.folders(folder / "runs/tiny")[0]
    text = load(folder / "recipe.yaml")
    cache = folder / "cache"

    def opened(path: Path) -> None:
        checkpoint.open_checkpoint(path.parent)

    def sampled(path: Path) -> None:
        loaded_run.open_run("tiny")

    def prepared(path: Path) -> None:
        prepare_text(text, lambda line: None)

    return {
        "weights": ([newest / checkpoint.WEIGHTS], opened),
        "moments": ([newest / checkpoint.MOMENTS], opened),
        "manifest": ([newest / checkpoint.MANIFEST], opened),
        "config": ([path for path in newest.glob("*.json") if path.name != checkpoint.MANIFEST], opened),
        "the run's tokenizer": (list((folder / "runs/tiny/tokenizer").glob("*.model")), sampled),
        "the run's recipe": ([folder / "runs/tiny/recipe.yaml"], sampled),
        "shards": (list(cache.glob("shards/*/*.arrow")), prepared),
        "shards' manifest": (list(cache.glob("shards/*/manifest.json")), prepared),
        "the cache's tokenizer": (list(cache.glob("tokenizers/*/*.model")), prepared),
        "the tokenizer's manifest": (list(cache.glob("tokenizers/*/manifest.json")), prepared),
        "the text's record": (list(cache.glob("texts/*.json")), prepared),
        "survey": (list(cache.glob("surveys/*.json")), lambda path: dict(atomic_io.read_checksummed(path)) and None),
        "machine.json": (
            [folder / "runs/tiny/machine.json"],
            lambda path: dict(atomic_io.read_checksummed(path)) and None,
        ),
        "identity.json": ([folder / "runs/tiny/identity.json"], lambda path: checkpoint.identity(path.parent) and None),
        "shards.json": (
            [folder / "runs/tiny/shards.json"],
            lambda path: dict(atomic_io.read_checksummed(path)) and None,
        ),
    }


def flips(folder: Path, count: int) -> None:
    chance = random.Random(SEED)
    print(f"SEED={SEED}")
    kinds = places(folder)
    for number in range(count):
        kind = list(kinds)[number % len(kinds)]
        files, read = kinds[kind]
        path = chance.choice(files)
        bit = chance.randrange(path.stat().st_size * 8)
        flip(path, bit)
        with pytest.raises(LLMError) as raised:
            read(path)
        said = str(raised.value)
        assert path.name in said and raised.value.status in (2, 4), (kind, bit, said)
        flip(path, bit)
        if number < len(kinds):
            read(path)
    print(f"{count} of {count} flipped bits noticed and named")


def test_a_flipped_bit_anywhere_is_noticed_and_named(here: Path) -> None:
    flips(here, 70)


@pytest.mark.slow
def test_200_flipped_bits_are_noticed_and_named(here: Path) -> None:
    flips(here, 210)


def test_verify_names_a_damaged_shard(here: Path) -> None:
    path = next(here.glob("cache/shards/*/train-00000.arrow"))
    flip(path, 8 * 5000 + 3)
    ended = run(script("module:llm.prepare", "recipe.yaml", "--verify"), Path.cwd())
    assert ended.status == 4 and "train-00000.arrow is missing or damaged (sha256)" in ended.err
    assert ended.err.count("\n") == 1
    ended = run(train(Path("recipe.yaml"), "run=other"), Path.cwd())
    assert ended.status == 4 and "train-00000.arrow is missing or damaged (sha256)" in ended.err


def test_a_damaged_tokenizer_of_the_run_is_refused(here: Path) -> None:
    path = here / "runs/tiny/tokenizer/tokenizer.model"
    flip(path, 8 * (path.stat().st_size - 40))
    ended = run(script("module:llm.sample", "tiny", "--prompt", "My", "--tokens", "4"), Path.cwd())
    assert ended.status == 4 and "tokenizer.model is damaged" in ended.err and ended.err.count("\n") == 1


# ------------------------------------------------------------------------- the newest checkpoint, whatever is amiss


def truncated(folder: Path) -> str:
    path = folder / checkpoint.WEIGHTS
    os.truncate(path, path.stat().st_size - 100)
    return f"{checkpoint.WEIGHTS} is damaged"


def missing(folder: Path) -> str:
    (folder / checkpoint.MOMENTS).unlink()
    return f"{checkpoint.MOMENTS} is missing"


def without_manifest(folder: Path) -> str:
    (folder / checkpoint.MANIFEST).unlink()
    return f"{checkpoint.MANIFEST} is missing"


def swapped_with_an_older_one(folder: Path) -> str:
    shutil.copy(folder.parent / "step-000008" / checkpoint.WEIGHTS, folder / checkpoint.WEIGHTS)
    return f"{checkpoint.WEIGHTS} is damaged"


def swapped_within(folder: Path) -> str:
    a, b = folder / checkpoint.WEIGHTS, folder / checkpoint.MOMENTS
    a.rename(folder / "x"), b.rename(a), (folder / "x").rename(b)
    return f"{checkpoint.WEIGHTS} is damaged"


def another_s_folder(folder: Path) -> str:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-000004", folder)
    return "holds the checkpoint of step 4: rename it to step-000004"


def empty(folder: Path) -> str:
    (folder / checkpoint.MANIFEST).write_bytes(b"")
    return f"{checkpoint.MANIFEST} is damaged"


@pytest.mark.parametrize(
    "damage",
    [truncated, missing, without_manifest, swapped_with_an_older_one, swapped_within, another_s_folder, empty],
)
def test_a_damaged_newest_checkpoint_is_passed_over(here: Path, damage: Callable[[Path], str]) -> None:
    before = digest(here)
    said = damage(checkpoint.folder_of(here / "runs/tiny", 12))
    ended = run(train(Path("recipe.yaml")), Path.cwd())
    assert ended.status == 0, ended.err
    assert said in ended.err and "step-000012 is passed over" in ended.err and ended.err.count("\n") == 1
    assert "from step 10" in ended.out
    assert digest(here) == before, "made again, to the bit"


def test_all_checkpoints_damaged_is_one_error_and_nothing_is_overwritten(here: Path) -> None:
    for folder in checkpoint.folders(here / "runs/tiny"):
        flip(folder / checkpoint.WEIGHTS, 8 * 9000)
    before = {path: path.read_bytes() for path in (here / "runs/tiny/checkpoints").rglob("*") if path.is_file()}
    ended = run(train(Path("recipe.yaml")), Path.cwd())
    assert ended.status == 4
    assert ended.err.splitlines()[-1].startswith(
        "error: runs/tiny: all 5 checkpoints are damaged or another run's; nothing was changed"
    )
    assert ended.err.count("is passed over") == 5 and ended.err.count("\n") == 6
    assert json.loads((here / "runs/tiny/status.json").read_text())["status"] == 0, "as the run itself ended"
    assert {path: path.read_bytes() for path in before} == before


# ---------------------------------------------------------------------------------------- what was made to hurt


def sealed(folder: Path, **changes: Any) -> None:
    """The manifest of a stranger, who knows how to make one that passes its own digest."""
    manifest = atomic_io.read_checksummed(folder / checkpoint.MANIFEST)
    for path in folder.glob("*.safetensors"):
        manifest["files"][path.name] = {"bytes": path.stat().st_size, "sha256": atomic_io.sha256(path)}
    manifest |= changes
    manifest = {name: value for name, value in manifest.items() if value != "left out"}
    atomic_io.write_checksummed(folder / checkpoint.MANIFEST, manifest)


def weights(folder: Path, header: Any, data: bytes = b"", length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / checkpoint.WEIGHTS
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    sealed(folder)


def tensor(**changes: Any) -> dict[str, Any]:
    return {"model.norm.weight": {"dtype": "F32", "shape": [32], "data_offsets": [0, 128]} | changes}


HEADERS: dict[str, Callable[[Path], None]] = {
    "header of 2^63 bytes": lambda folder: weights(folder, {}, length=1 << 63),
    "header of 2^40 bytes": lambda folder: weights(folder, {}, length=1 << 40),
    "header longer than the file": lambda folder: weights(folder, {}, length=1000),
    "nothing": lambda folder: weights(folder, b""),
    "no JSON": lambda folder: weights(folder, b"\xff" * 64),
    "deep nesting": lambda folder: weights(folder, b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "a list": lambda folder: weights(folder, [1, 2, 3]),
    "a huge shape": lambda folder: weights(folder, tensor(shape=[1 << 62, 1 << 62]), bytes(128)),
    "a shape of 2^50": lambda folder: weights(folder, tensor(shape=[1 << 50]), bytes(128)),
    "a negative shape": lambda folder: weights(folder, tensor(shape=[-32]), bytes(128)),
    "offsets past the end": lambda folder: weights(folder, tensor(data_offsets=[0, 1 << 50]), bytes(128)),
    "offsets that go back": lambda folder: weights(folder, tensor(data_offsets=[128, 0]), bytes(128)),
    "negative offsets": lambda folder: weights(folder, tensor(data_offsets=[-128, 0]), bytes(128)),
    "an unknown type": lambda folder: weights(folder, tensor(dtype="OBJECT"), bytes(128)),
    "another type": lambda folder: weights(folder, tensor(dtype="I64", shape=[16]), bytes(128)),
    "names of files": lambda folder: weights(folder, {"../../x": tensor()["model.norm.weight"]}, bytes(128)),
    "twice the same name": lambda folder: weights(
        folder, json.dumps(tensor()).encode()[:-1] + b", " + json.dumps(tensor()).encode()[1:], bytes(128)
    ),
    "50,000 tensors": lambda folder: weights(
        folder, {f"{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(50_000)}
    ),
}
MANIFESTS: dict[str, Callable[[Path], None]] = {
    "a file outside": lambda folder: sealed(folder, files={"../../../../etc/passwd": {"bytes": 1, "sha256": ""}}),
    "an absolute name": lambda folder: sealed(folder, files=files(folder) | {"/etc/passwd": {"bytes": 1, "sha256": ""}}),
    "a name of two dots": lambda folder: sealed(folder, files=files(folder) | {"..": {"bytes": 1, "sha256": ""}}),
    "a file without its digest": lambda folder: sealed(folder, files=files(folder) | {"a": {"bytes": 1}}),
    "a file that is a list": lambda folder: sealed(folder, files=files(folder) | {"a": []}),
    "a file of a huge size": lambda folder: sealed(folder, files=files(folder) | {"a": {"bytes": 1e300, "sha256": ""}}),
    "no files": lambda folder: sealed(folder, files="left out"),
    "a step that is a text": lambda folder: sealed(folder, step="12"),
    "a step below nothing": lambda folder: sealed(folder, step=-12),
    "a step beyond all": lambda folder: sealed(folder, step=10**30),
    "bits that are a text": lambda folder: sealed(folder, metrics={"bits_per_byte": "none"}),
    "no science": lambda folder: sealed(folder, science="left out"),
    "a scale of three": lambda folder: sealed(folder, scale=[1, 2, 3]),
    "no scale": lambda folder: sealed(folder, scale="left out"),
    "another format": lambda folder: sealed(folder, format=[[[]]]),
    "a tokenizer that is a list": lambda folder: sealed(folder, tokenizer=["a"]),
    "no parent": lambda folder: sealed(folder, parent="left out"),
    "deep nesting": lambda folder: (folder / checkpoint.MANIFEST).write_bytes(b"[" * 500_000) and None,
    "a gigabyte": lambda folder: os.truncate(folder / checkpoint.MANIFEST, 1 << 30),
    "a wide list": lambda folder: (folder / checkpoint.MANIFEST).write_bytes(b"[]," * 20_000_000) and None,
}  # fmt: skip


def files(folder: Path) -> dict[str, Any]:
    return dict(atomic_io.read_checksummed(folder / checkpoint.MANIFEST)["files"])


def in_bounds(act: Callable[[], None], folder: Path) -> int:
    """Exit status of a child that has 400 MB more than it needs and 10 s."""

    def bounded() -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), resource.RLIM_INFINITY))
        act()

    began = time.monotonic()
    ended = run(bounded, folder)
    assert "Traceback" not in ended.err and ended.err.count("\n") <= 1, ended.err
    assert time.monotonic() - began < 10
    return ended.status


@pytest.mark.parametrize(
    "case", [*(f"header: {name}" for name in HEADERS), *(f"manifest: {name}" for name in MANIFESTS)]
)
def test_a_checkpoint_made_to_hurt_is_refused_in_bounded_memory_and_time(here: Path, case: str) -> None:
    kind, _, name = case.partition(": ")
    folder = checkpoint.folder_of(here / "runs/tiny", 12)
    (HEADERS if kind == "header" else MANIFESTS)[name](folder)
    ends = in_bounds(script("module:llm.sample", "tiny/step-12", "--prompt", "My", "--tokens", "2"), Path.cwd())
    assert ends == 4


def test_a_checkpoint_made_to_hurt_is_refused_by_the_trainer(here: Path) -> None:
    """Its own digests are right, so that it is not passed over as damaged: it is refused when it is loaded."""
    weights(checkpoint.folder_of(here / "runs/tiny", 12), tensor(shape=[1 << 50]), bytes(128))
    before = {folder.name for folder in checkpoint.folders(here / "runs/tiny")}
    ended = run(train(Path("recipe.yaml")), Path.cwd())
    assert ended.status == 4 and ended.err.count("\n") == 1 and "model.safetensors cannot be read" in ended.err
    assert {folder.name for folder in checkpoint.folders(here / "runs/tiny")} == before


@pytest.mark.parametrize("data", [b"{", b"[]", b'{"digest": 1}', b"[" * 100_000, b'{"precision": "fp99"}'])
def test_damage_in_what_the_machine_settled_is_refused(here: Path, data: bytes) -> None:
    (here / "runs/tiny/machine.json").write_bytes(data)
    ended = run(train(Path("recipe.yaml")), Path.cwd())
    assert ended.status == 4 and "machine.json is damaged" in ended.err and ended.err.count("\n") == 1


def test_an_edited_recipe_of_a_run_can_be_used_once_its_digest_is_taken_out(here: Path) -> None:
    path = here / "runs/tiny/recipe.yaml"
    text = path.read_text().replace("steps: 12", "steps: 13")
    path.write_text(text)
    with pytest.raises(RefusedError, match=r"recipe\.yaml is damaged or was edited: .* delete that line"):
        load(path)
    path.write_text(text.rpartition("# sha256")[0])
    assert load(path).train.steps == 13


def test_a_tokenizer_of_others_needs_no_manifest(here: Path) -> None:
    shutil.copy(here / "runs/tiny/tokenizer/tokenizer.model", "alone.model")
    assert Tokenizer.load(Path("alone.model")).vocab_size == 320


def test_a_checkpoint_that_goes_while_it_is_read_gives_way_to_a_newer_one(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when a training run keeps fewer of them than a reader needs time."""
    load_tensors, taken = tensor_files.load_tensors, []

    def overtaken(path: Path, into: Any) -> None:
        if len(taken) < 2:
            taken.append(path.parent.name)
            atomic_io.remove(path.parent)
        load_tensors(path, into)

    monkeypatch.setattr(tensor_files, "load_tensors", overtaken)
    assert loaded_run.open_run("tiny").checkpoint.folder.name == "step-000005", "the best that is left"
    assert taken == ["step-000012", "step-000010"]


def test_a_checkpoint_that_goes_before_its_shape_is_read_does_too(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_family, taken = hf_config.read_family, []

    def overtaken(folder: Path) -> str:
        if not taken:
            taken.append(folder.name)
            atomic_io.remove(folder)
        return read_family(folder)

    monkeypatch.setattr(hf_config, "read_family", overtaken)
    assert loaded_run.open_run("tiny/newest").checkpoint.step < checkpoint.step_of(taken[0])


DAMAGES = {
    "metrics.jsonl": (
        ('"step": 5, "val_loss"', '"stdp": 5, "val_loss"'), ('"bits_per_byte"', '"bits_per_bytd"'), ('"prompt"', '"prompu"'),
        ('"step": 2', '"step": "2"'), ('"step": 3, "loss": ', '"step": 3, "loss": "x", "was": '),
        ('"step": 4, "loss": ', f'"step": 4, "loss": 1{"0" * 400}, "was": '), ('"step": 6', '"step: 6'), ('"step": 8, "loss": ', '"step": 8, "loss": [1], "was": '),
    ),
    "fingerprints.jsonl": (
        ('"step": 2', '"step: 2'), ('"step": 4', '"step": "4"'), ('"loss": "0x', '"loss": "0z'), ('"step": 8', '"step: 8'),
        ('"step": 6', '"other": NaN, "step": 6'), ('"chain": "', '"chain": NaN, "was": "'),
    ),
}  # fmt: skip


@pytest.mark.parametrize("file", DAMAGES)
def test_damaged_lines_of_a_record_are_left_out_when_a_run_goes_on(trained: Path, tmp_path: Path, file: str) -> None:
    """The run ends with the same bits, and what is left of its trace is a chain that agrees with that of another."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    recipe, path = tmp_path / "recipe.yaml", tmp_path / "runs/again" / file
    changes = ("run=again", "evaluate.prompts=[The]")
    assert run(train(recipe, *changes, stop_after=8), tmp_path).status == 75
    text = before = path.read_text()
    for old, new in DAMAGES[file]:
        assert old in text
        text = text.replace(old, new, 1)
    path.write_text(text)
    ended = run(train(recipe, *changes), tmp_path)
    assert ended.status == 0 and digest(tmp_path, "again") == digest(tmp_path), ended.err
    left = trace.verify_chain(path.parent)
    changed = [ours != theirs for ours, theirs in zip(text.split("\n"), before.split("\n"), strict=True)]
    lost = 12 - left if file == trace.FILE else sum(changed)  # a trace loses lines that follow damaged ones, too
    assert f"runs/again/{file} was damaged: {lost} of its lines are left out" in ended.err
    assert left == (6 if file == trace.FILE else 12)
    assert "agree to the bit" in trace.compare_runs(tmp_path / "runs/tiny", path.parent)[-1]


def test_a_run_whose_first_start_or_an_evaluation_is_damaged_ends_and_knows_its_best(
    trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    recipe, path = tmp_path / "recipe.yaml", tmp_path / "runs/again/metrics.jsonl"
    assert run(train(recipe, "run=again", "evaluate.every=4", stop_after=8), tmp_path).status == 75
    lines = path.read_text().splitlines()
    at = [number for number, line in enumerate(lines) if "val_loss" in line]
    lines[0] = lines[0].replace('"step', '"stop', 1)
    lines[at[0]] = json.dumps(json.loads(lines[at[0]]) | {"bits_per_byte": 1.0})
    lines[at[1]] = lines[at[1]].replace("epochs_seen", "epochs_sefn")
    path.write_text("\n".join(lines) + "\n")
    ended = run(train(recipe, "run=again", "evaluate.every=4"), tmp_path)
    assert ended.status == 0 and "1.0000 bits per byte there" in ended.out, ended.err
    best = record.read(path.parent).best
    assert best is not None and best["step"] == 4


def test_runs_that_record_their_trace_at_other_steps_are_compared(trained: Path, tmp_path: Path) -> None:
    """One was stopped before its first line, which has to tell of the windows before the stop, too; one changed steps."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    recipe, runs = tmp_path / "recipe.yaml", tmp_path / "runs"
    assert run(train(recipe, "run=rare", "tracking.every=5"), tmp_path).status == 0
    assert run(train(recipe, "run=late", "tracking.every=5", stop_after=3), tmp_path).status == 75
    assert run(train(recipe, "run=late", "tracking.every=5"), tmp_path).status == 0
    assert run(train(recipe, "run=changed", "tracking.every=5", stop_after=8), tmp_path).status == 75
    assert run(train(recipe, "run=changed", "tracking.every=2"), tmp_path).status == 0
    assert trace.read(runs / "late") == trace.read(runs / "rare")
    assert "agree to the bit in all 3" in trace.compare_runs(runs / "changed", runs / "rare")[-1]
    assert "agree to the bit in all 3" in trace.compare_runs(runs / "tiny", runs / "rare")[-1]


@pytest.mark.parametrize("name", ["nowhere", "tiny/step-²", "tiny/step-", "tiny/step-99", "n" * 300])
def test_what_is_no_run_is_told_by_name(here: Path, name: str) -> None:
    with pytest.raises(RecipeError, match=r"there is no run|has no checkpoint"):
        loaded_run.open_run(name)


# -------------------------------------------------------------------------------- checkpoints that others have made


def moved_in(here: Path, *overrides: str) -> Path:
    """The last checkpoint of another run, which learnt more than any, copied into `tiny` in place of its two last."""
    assert run(train(Path("recipe.yaml"), "run=other", *overrides), Path.cwd()).status == 0
    for step in (10, 12):
        shutil.rmtree(checkpoint.folder_of(here / "runs/tiny", step))
    folder = checkpoint.folder_of(here / "runs/tiny", 12)
    shutil.copytree(checkpoint.folder_of(here / "runs/other", 12), folder)
    sealed(folder, metrics={"bits_per_byte": 0.01})
    return folder


def of_an_earlier_version(run: Path) -> None:
    """Runs had no identity once."""
    (run / checkpoint.IDENTITY).unlink()
    for folder in checkpoint.folders(run):
        sealed(folder, run="left out", format=1)


def passed_over(here: Path, folder: Path, before: str) -> None:
    for name in ("tiny/step-12", "tiny/newest", "tiny"):
        ended = run(script("module:llm.sample", name, "--prompt", "My", "--tokens", "2"), Path.cwd())
        assert ended.status == (4 if name == "tiny/step-12" else 0), ended.err
        assert f"{folder} is a checkpoint of another run (other)" in ended.err
    assert loaded_run.open_run("tiny").checkpoint.step < 10
    ended = run(train(Path("recipe.yaml")), Path.cwd())
    assert ended.status == 0 and "from step 8" in ended.out and "step-000012 is passed over" in ended.err
    assert digest(here) == before, "the run's own bits"


def test_a_checkpoint_of_another_run_is_noticed_by_all_who_read_it(here: Path) -> None:
    """Also where nothing but the machine half tells the two apart."""
    before = digest(here)
    passed_over(here, moved_in(here, "machine.micro_batch=4"), before)


def test_a_checkpoint_of_another_seed_is_noticed_in_runs_of_an_earlier_version(here: Path) -> None:
    before = digest(here)
    folder = moved_in(here, "seed=2")
    of_an_earlier_version(here / "runs/tiny")
    passed_over(here, folder, before)
    assert loaded_run.open_run("tiny/newest").checkpoint.manifest["run"] == checkpoint.identity(here / "runs/tiny")


def test_a_run_may_be_moved_and_another_machine_half_is_still_its_own(here: Path) -> None:
    shutil.rmtree(checkpoint.folder_of(here / "runs/tiny", 12))
    (here / "runs/tiny").rename("runs/moved")
    ended = run(train(Path("recipe.yaml"), "run=moved", "machine.micro_batch=4"), Path.cwd())
    assert ended.status == 0 and "from step 10" in ended.out and not ended.err
    (here / "runs/moved" / checkpoint.IDENTITY).unlink()  # as where only the checkpoints were carried along
    made = loaded_run.open_run("moved/step-12").checkpoint.manifest["run"]
    shutil.rmtree(checkpoint.folder_of(here / "runs/moved", 12))
    assert run(train(Path("recipe.yaml"), "run=moved"), Path.cwd()).status == 0
    assert checkpoint.identity(here / "runs/moved") == made


def test_machines_with_disks_of_their_own_share_one_identity(here: Path) -> None:
    folders = [Path.cwd() / f"disk-{rank}" for rank in (0, 1)]
    for folder in folders:
        folder.mkdir()

    def act() -> None:
        os.chdir(folders[int(os.environ["RANK"])])
        train(Path("../recipe.yaml"), f"text.cache={folders[0].parent / 'cache'}", stop_after=2)()

    assert [each.status for each in run_group(act, Path.cwd(), 2, node=1)] == [75, 75]
    ours, theirs = (checkpoint.identity(folder / "runs/tiny") for folder in folders)
    assert ours and ours == theirs
    atomic_io.write_checksummed(folders[1] / "runs/tiny" / checkpoint.IDENTITY, {"run": "another"})
    sealed(checkpoint.folder_of(folders[1] / "runs/tiny", 2), run="another")
    ended = run_group(act, Path.cwd(), 2, node=1)
    assert {each.status for each in ended} == {4} and "another run than that of process 0" in ended[1].err


def test_checkpoints_of_others_do_not_count_among_those_that_are_kept(here: Path) -> None:
    sealed(checkpoint.folder_of(here / "runs/tiny", 10), run="another")
    best = checkpoint.best(here / "runs/tiny")
    assert best is not None and best.step != 10
    checkpoint.retain(here / "runs/tiny", keep=2, step=12)
    assert {each.name for each in checkpoint.folders(here / "runs/tiny")} == {
        "step-000008", "step-000010", "step-000012", best.folder.name}  # fmt: skip


def test_a_folder_that_only_looks_like_a_checkpoint_is_none(here: Path) -> None:
    for name in ("step-²", "step-٣", "step-", "step-1x", "step--1"):
        (here / "runs/tiny/checkpoints" / name).mkdir()
    assert checkpoint.folders(here / "runs/tiny")[0].name == "step-000012"
    assert loaded_run.open_run("tiny/newest").checkpoint.step == 12


def test_a_run_of_an_earlier_version_goes_on_with_the_steps_that_it_skipped(here: Path) -> None:
    """Its train.skip counted steps from 0: kept in its recipe and its checkpoints, and meant so for ever."""
    path, old = here / "runs/old/recipe.yaml", "train.skip=[3-4]"
    assert run(train(Path("recipe.yaml"), "run=old", "train.skip=[4-5]"), Path.cwd()).status == 0
    before = digest(here, "old")
    for folder in checkpoint.folders(here / "runs/old"):
        science = atomic_io.read_checksummed(folder / checkpoint.MANIFEST)["science"]
        sealed(folder, science=science | {"train.skip": ["3-4"]})
    text = path.read_text().rpartition("# sha256")[0].replace("format: 3\n", "").replace("- 4-5", "- 3-4")
    path.write_text(with_checksum(text))
    of_an_earlier_version(here / "runs/old")
    shutil.rmtree(checkpoint.folder_of(here / "runs/old", 12))
    shutil.rmtree(checkpoint.folder_of(here / "runs/old", 10))
    ended = run(train(Path("recipe.yaml"), "run=old", old), Path.cwd())
    assert ended.status == 4 and "train.skip = 4-5, " in ended.err and "once counted steps from 0" in ended.err
    ended = run(train(path), Path.cwd())
    assert ended.status == 0 and "from step 8" in ended.out and digest(here, "old") == before, ended.err
    assert load(path).train.skip == ("4-5",)


def test_a_run_whose_checkpoints_lack_keys_that_came_later_goes_on(here: Path) -> None:
    """By the values that were meant before there were such keys."""
    assert run(train(Path("recipe.yaml"), "run=old", "train.document_mask=false"), Path.cwd()).status == 0
    before, path = digest(here, "old"), here / "runs/old/recipe.yaml"
    shutil.rmtree(checkpoint.folder_of(here / "runs/old", 12))
    for folder in checkpoint.folders(here / "runs/old"):
        science = atomic_io.read_checksummed(folder / checkpoint.MANIFEST)["science"]
        sealed(folder, science={name: value for name, value in science.items() if name not in checkpoint.LATER_KEYS})
    for other in ("train.document_mask=true", "train.sampled_softmax=64"):
        refused = run(train(path, other), Path.cwd())
        assert refused.status == 4 and other.partition("=")[0] in refused.err, refused.err
    ended = run(train(path), Path.cwd())
    assert ended.status == 0 and "from step 10" in ended.out and digest(here, "old") == before, ended.err
