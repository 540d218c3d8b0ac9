"""What is exported says what the run says, and what does not is refused: each planted error is caught by the check."""

import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from llm import export
from llm.base.errors import RecipeError, RefusedError
from llm.interop import folder_export, gguf
from llm.interop.parity import check_folder, overlaps
from llm.run_folder import checkpoint, tensor_files
from llm.run_folder.loaded_run import LoadedRun, open_mean, open_run
from tests.forks import Ended, run, script, start, train, write_recipe, write_text

transformers = pytest.importorskip("transformers", reason="compares with transformers: install the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs `tiny` and `untied`, trained until their logits show every weight."""
    here = tmp_path_factory.mktemp("export")
    text = write_text(here / "text.txt", 120)
    for name, tied in (("tiny", "true"), ("untied", "false")):
        recipe = write_recipe(here, text, **{
            "run": name, "model.tied": tied, "model.context": 64, "train.tokens_per_step": 256, "train.steps": 30,
            "evaluate.every": 10, "tokenizer.vocabulary": 400, "tokenizer.terms": "[New York, founded]"})  # fmt: skip
        assert run(train(recipe), here).status == 0
    return here


def exported(here: Path, *arguments: object, plant: Callable[[], None] = lambda: None) -> Ended:
    """`python -m llm.export` in a child, with an error planted in it."""
    act = script("module:llm.export", *arguments)

    def planted() -> None:
        plant()
        act()

    return run(planted, here)


@pytest.mark.parametrize("name", ["tiny", "untied"])
@pytest.mark.parametrize("arguments", [(), ("--shard", 30_000), ("--dtype", "bf16"), ("--dtype", "bf16", "--shard", 1)])
def test_an_exported_folder_is_the_run(here: Path, tmp_path: Path, name: str, arguments: tuple[object, ...]) -> None:
    ended = exported(here, name, "--to", tmp_path / "out", *arguments)
    assert ended.status == 0, ended.err
    assert not ended.err and "ids: 1,000 tough texts equal" in ended.out and "to the bit in fp32" in ended.out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json"} <= names
    assert not any("optimizer" in each or each.startswith(".") or each == "checkpoint.json" for each in names)
    assert ("model.safetensors.index.json" in names) == ("--shard" in arguments) == ("model.safetensors" not in names)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")  # as it was written
    assert theirs.dtype == (torch.bfloat16 if "bf16" in arguments else torch.float32)


def test_the_mean_of_runs_is_exported_and_scored(here: Path, tmp_path: Path) -> None:
    recipe = {"run": "branch", "seed": 2, "tokenizer.vocabulary": 400, "tokenizer.terms": "[New York, founded]",
              "model.context": 64, "train.tokens_per_step": 256, "train.steps": 5}  # fmt: skip
    assert run(train(write_recipe(here, here / "text.txt", **recipe)), here).status == 0
    ended = exported(here, "tiny", "--mean", "branch", "--to", tmp_path / "out")
    assert ended.status == 0 and "to the bit in fp32" in ended.out, ended.err
    whole = load_file(tmp_path / "out/model.safetensors")
    one, other = (dict(open_run(str(here / "runs" / name)).model.named_parameters()) for name in ("tiny", "branch"))
    assert whole.keys() == one.keys()
    for name, weight in whole.items():
        torch.testing.assert_close(weight, (one[name] + other[name]) / 2, rtol=1e-6, atol=1e-7)
    gguf.write(tmp_path, open_mean(str(here / "runs/tiny"), [str(here / "runs/branch")]), "f32")
    for card in (tmp_path / "out/README.md", tmp_path / "README.md"):
        assert "the mean of tiny/step-000030, branch/step-000005" in card.read_text()
    apart = "branch/step-000005 and tiny/step-000030 have not gone on from one checkpoint"
    scored = run(script("module:llm.evaluate", "tiny", "--mean", "branch"), here)
    assert apart in scored.err
    assert scored.status == 0 and "the mean of tiny/step-000030, branch/step-000005" in scored.out, scored.err
    shutil.copytree(here / "runs/tiny", tmp_path / "twin")
    both = run(script("module:llm.evaluate", "tiny", "--mean", tmp_path / "twin"), here)
    assert "have not gone on" not in both.err
    alone = run(script("module:llm.evaluate", "tiny"), here)
    assert both.out.splitlines()[1:] == alone.out.splitlines()[1:]  # of equals it is the same to the bit


@pytest.mark.parametrize(
    ("arguments", "status", "why"),
    [
        (("tiny", "--mean", "untied"), 4, "another shape or other pieces"),
        (("tiny", "--mean", "nobody"), 2, "there is no run 'nobody'"),
        (("tiny", "--mean", "tiny/newest"), 2, "tiny/step-000030 is in the mean already"),
        (("tiny", "--mean", "tiny", "--tasks", "x"), 2, "leave out --mean"),
    ],
)
def test_runs_that_have_no_mean_are_refused(here: Path, arguments: tuple[str, ...], status: int, why: str) -> None:
    ended = run(script("module:llm.evaluate", *arguments), here)
    assert ended.status == status and why in ended.err and len(ended.err.splitlines()) == 1


def test_their_pipeline_goes_on_with_a_text(here: Path) -> None:
    folder = open_run(str(here / "runs/tiny")).checkpoint.folder
    say = transformers.pipeline("text-generation", model=str(folder))
    assert say("The river", max_new_tokens=8, do_sample=False)[0]["generated_text"].startswith("The river")


def test_what_is_there_is_not_overwritten(here: Path, tmp_path: Path) -> None:
    ended = exported(here, "tiny", "--to", tmp_path)
    assert ended.status == 2 and "is there already" in ended.err and not list(tmp_path.iterdir())
    (tmp_path / "link").symlink_to("nowhere")
    ended = exported(here, "tiny", "--to", tmp_path / "link")
    assert ended.status == 2 and "link is there already" in ended.err, ended.err
    ended = exported(here, "tiny", "--to", tmp_path / "e\udcff")
    assert ended.status == 2 and "is not UTF-8" in ended.err and ended.err.count("\n") == 1, ended.err


def test_a_run_that_is_the_working_folder_has_its_name(here: Path) -> None:
    ended = exported(here / "runs/tiny", ".", "--dtype", "bf16")
    assert ended.status == 0 and "is exported to exports/tiny-bf16" in ended.out, ended.err
    shutil.rmtree(here / "runs/tiny/exports")


# ------------------------------------------------------------------------------------------ planted errors


def swapped_names(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    swap = {"gate_proj": "up_proj", "up_proj": "gate_proj"}
    return {".".join(swap.get(part, part) for part in name.split(".")): each for name, each in tensors.items()}


def lost_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("k_norm", "key_norm"): each for name, each in tensors.items()}


def transposed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: each.T if "o_proj" in name else each for name, each in tensors.items()}


def interleaved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rotary pairs as neighbours, as the other convention has them."""

    def turned(each: Tensor) -> Tensor:
        return each.view(2, 2, -1, *each.shape[1:]).transpose(1, 2).reshape(each.shape)

    return {name: turned(each) if "q_proj" in name or "k_proj" in name else each for name, each in tensors.items()}


def head_is_embedding(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors["model.embed_tokens.weight"] if "lm_head" in name else each for name, each in tensors.items()}


def json_changed(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], dict[str, bytes]]:
    def changed(files: dict[str, bytes]) -> dict[str, bytes]:
        value = json.loads(files[name])
        change(value)
        return files | {name: json.dumps(value).encode()}

    return changed


def no_symbols(whole: Any) -> None:
    whole["added_tokens"] = [each for each in whole["added_tokens"] if each["content"] != "New York"]


def special_symbols(whole: Any) -> None:
    for each in whole["added_tokens"]:
        each["special"] = True


PLANTS: list[tuple[str, str, Callable[[Any], Any]]] = [
    ("tiny", "tensors", swapped_names),
    ("tiny", "tensors", lost_name),
    ("tiny", "tensors", transposed),
    ("tiny", "tensors", interleaved),
    ("untied", "tensors", head_is_embedding),
    ("tiny", "small_files", json_changed("config.json", lambda config: config.update(tie_word_embeddings=False))),
    ("untied", "small_files", json_changed("config.json", lambda config: config.update(tie_word_embeddings=True))),
    ("tiny", "small_files", json_changed("config.json", lambda config: config.update(bos_token_id=2))),
    ("tiny", "small_files", json_changed("config.json", lambda config: config.update(rope_theta=500_000.0))),
    ("tiny", "small_files", json_changed("generation_config.json", lambda config: config.update(eos_token_id=3))),
    ("tiny", "small_files", json_changed("tokenizer.json", lambda whole: whole.update(post_processor=None))),
    ("tiny", "small_files", json_changed("tokenizer.json", no_symbols)),
    ("tiny", "small_files", json_changed("tokenizer.json", special_symbols)),
    ("tiny", "small_files", json_changed("tokenizer.json", lambda whole: whole["model"]["merges"].reverse())),
]
WHAT = ["names", "a lost name", "transposition", "rotary layout", "untied head", "tying", "tying of untied", "BOS", "rotary base",
        "end", "BOS of the tokenizer", "added tokens", "special added tokens", "merges"]  # fmt: skip


@pytest.mark.parametrize("name, place, plant", PLANTS, ids=WHAT)
def test_a_planted_error_is_caught(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: str, plant: Callable[[Any], Any]
) -> None:
    real = getattr(folder_export, place)
    monkeypatch.setattr(folder_export, place, lambda opened, kind: plant(real(opened, kind)))
    opened = open_run(str(here / "runs" / name))
    for kind, shard in (("fp32", export.SHARD), ("bf16", 20_000)):
        folder_export.write_folder(tmp_path / kind, opened, kind, shard)
        with pytest.raises(RefusedError):
            print(list(check_folder(tmp_path / kind, opened.model, opened.tokenizer, kind)))


def test_a_caught_error_is_status_4_in_one_line_and_leaves_no_folder(here: Path, tmp_path: Path) -> None:
    def plant() -> None:
        real = tensor_files.write_tensors
        tensor_files.write_tensors = lambda path, tensors: real(path, transposed(tensors))

    ended = exported(here, "tiny", "--to", tmp_path / "out", plant=plant)
    assert ended.status == 4 and ended.err.count("\n") == 1, ended.err
    assert "the logits differ from the run's" in ended.err and not list(tmp_path.glob("*out*")) + list(
        tmp_path.glob(".*")
    )


# ------------------------------------------------------------------------------------------ the hub


def test_without_a_network_nothing_is_sent_and_no_token_is_told(here: Path, tmp_path: Path) -> None:
    def plant() -> None:
        from huggingface_hub import HfApi

        os.environ["HF_TOKEN"] = "hf_plantedplantedplanted"
        real = HfApi.__init__
        HfApi.__init__ = lambda self: real(self, endpoint="http://127.0.0.1:9")  # type: ignore[method-assign]

    ended = exported(here, "tiny", "--to", tmp_path / "out", "--push", "me/tiny", plant=plant)
    assert ended.status == 2 and ended.err.count("\n") == 1 and "me/tiny was not sent to the hub" in ended.err, (
        ended.err
    )
    assert "hf_planted" not in ended.err + ended.out and (tmp_path / "out" / "config.json").exists()


HUB_NAMES = ("no-owner", "müller/a", "a/b/c", "a/b--c", "a/-b", "a/b.git", "a/b..c", f"a/{'b' * 97}", "a/b\n", "/a")


@pytest.mark.parametrize("name", HUB_NAMES)
def test_a_name_that_the_hub_refuses_is_refused_at_once(name: str) -> None:
    with pytest.raises(RecipeError, match="OWNER/NAME"):
        export.main(["--push", name])


def test_what_the_hub_takes_is_taken() -> None:
    import huggingface_hub
    from huggingface_hub.utils import validate_repo_id

    for name in ("a/b", "me/tiny-1.5_B", f"a/{'b' * 96}", "A.b/c.gitx", "_a/b_"):
        validate_repo_id(name)
        assert re.fullmatch(export.HUB_NAME, name)
    if int(huggingface_hub.__version__.partition(".")[0]) > 0:  # earlier ones let a line's end pass
        for name in HUB_NAMES[2:]:
            with pytest.raises(ValueError):
                validate_repo_id(name)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--shard", 0),
        ("nobody",),
        ("--gguf", "f32", "--dtype", "bf16"),
        ("--gguf", "f16", "--shard", 1000),
        ("--public",),
        ("--to", "~no-such-user/x"),
    ],
)
def test_a_wrong_argument_is_one_line(here: Path, arguments: tuple[object, ...]) -> None:
    ended = exported(here, *arguments)
    assert ended.status == 2 and ended.err.count("\n") == 1, ended.err


# ------------------------------------------------------------------------------------------ the checkpoint itself


def test_the_card_tells_of_the_run_and_of_nothing_else(here: Path) -> None:
    of_run = open_run(str(here / "runs/tiny"))
    card = (of_run.checkpoint.folder / "README.md").read_text()
    for said in ("text.txt", "400 pieces", "step 30 of 30", "7,680 tokens", f"{of_run.checkpoint.bits_per_byte:.4f} bits",
                 "       10  ", "pipeline(", "## Limits", "library_name: transformers"):  # fmt: skip
        assert said in card, said
    assert yaml.safe_load(card.split("---")[1])["tags"] == ["causal-lm", "tiny"] and 'causal-lm, "tiny"' in card
    assert str(here) not in card and "README.md" in of_run.checkpoint.manifest["files"]


def test_a_run_that_was_stopped_leaves_the_same_card(here: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, here / "text.txt", **{"evaluate.every": 3})
    assert run(train(recipe, "run=whole"), tmp_path).status == 0
    assert run(train(recipe, "run=halves", stop_after=7), tmp_path).status == 75
    assert run(train(recipe, "run=halves"), tmp_path).status == 0
    cards = [(tmp_path / f"runs/{name}/checkpoints/step-000012/README.md").read_text() for name in ("whole", "halves")]
    assert cards[0] == cards[1].replace("halves", "whole")


def test_a_damaged_card_is_damage(here: Path, tmp_path: Path) -> None:
    copy = tmp_path / "step-000030"
    shutil.copytree(here / "runs/tiny/checkpoints/step-000030", copy)
    (copy / "README.md").write_text("another")
    with pytest.raises(RefusedError, match=r"README\.md is damaged"):
        checkpoint.open_checkpoint(copy)


def opens(folder: Path) -> None:
    """All of transformers' parts read the folder, and nothing is missing in it."""
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(told.values()), told
    transformers.GenerationConfig.from_pretrained(folder)
    assert transformers.AutoTokenizer.from_pretrained(folder)("a")["input_ids"]
    assert (folder / "README.md").stat().st_size and theirs.config.vocab_size == 320


@pytest.mark.parametrize("kills", [4, pytest.param(25, marks=pytest.mark.slow)])
def test_whenever_training_is_interrupted_its_newest_folder_is_a_whole_model(
    here: Path, tmp_path: Path, kills: int
) -> None:
    recipe = write_recipe(tmp_path, here / "text.txt", **{
        "train.steps": 4000, "checkpoint.every": 1, "checkpoint.keep": 1, "evaluate.every": 4000})  # fmt: skip
    draw, opened = random.Random(1), 0
    for _ in range(kills):
        child = start(train(recipe), tmp_path)
        until = time.monotonic() + 60
        while not list((tmp_path / "runs/tiny/checkpoints").glob("step-*")) and time.monotonic() < until:
            time.sleep(0.01)
        time.sleep(0.3 + draw.random() * 0.5)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        for folder in checkpoint.folders(tmp_path / "runs/tiny"):
            opens(folder)
            opened += 1
    assert opened >= kills


# ------------------------------------------------------------------------------------------ llama.cpp


@pytest.fixture
def opened(here: Path) -> LoadedRun:
    return open_run(str(here / "runs/tiny"))


@pytest.mark.parametrize("name", ["tiny", "untied"])
@pytest.mark.parametrize("kind", export.GGUF)
def test_a_gguf_file_holds_the_run(here: Path, tmp_path: Path, name: str, kind: str) -> None:
    pytest.importorskip("gguf", reason="reads GGUF: install the extra `test`")
    of_run = open_run(str(here / "runs" / name))
    gguf.write(tmp_path, of_run, kind)
    lines = list(gguf.check(tmp_path, of_run, kind))
    assert f"gguf: {24 + (name == 'untied')} tensors" in lines[0] and {path.name for path in tmp_path.iterdir()} == {
        f"{name}-{kind}.gguf", "Modelfile", "README.md"}  # fmt: skip
    assert f"FROM ./{name}-{kind}.gguf" in (tmp_path / "Modelfile").read_text()


def test_terms_that_overlap_are_split_alike_by_transformers_and_refused_for_llama_cpp(
    here: Path, tmp_path: Path
) -> None:
    recipe = write_recipe(tmp_path, here / "text.txt", **{"tokenizer.terms": "[New York, York City, aba]"})
    assert run(train(recipe), tmp_path).status == 0
    assert exported(tmp_path, "tiny").status == 0
    ended = exported(tmp_path, "tiny", "--gguf", "f32")
    assert ended.status == 4 and "'New York City'" in ended.err and not (tmp_path / "exports/tiny-gguf-f32").exists()


def test_overlaps_of_many_terms_are_found_without_comparing_all() -> None:
    assert overlaps([f"term{number:06d}" for number in range(20_000)]) == []
    assert sorted(overlaps(["abc", "cd", "da"])) == ["abcd", "cda", "dabc"]


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_gguf_file_of_tiny_weights_is_the_run_s(tmp_path: Path, opened: LoadedRun, kind: str) -> None:
    """Below f16's normal numbers its steps are no smaller: as of a run in the first steps of a warm-up."""
    pytest.importorskip("gguf", reason="reads GGUF: install the extra `test`")
    with torch.no_grad():
        for block in opened.model.model.layers:
            block.self_attn.o_proj.weight.copy_(torch.randn(block.self_attn.o_proj.weight.shape) * 1e-6)
    gguf.write(tmp_path, opened, kind)
    assert "each the run's within its rounding" in next(gguf.check(tmp_path, opened, kind))


def test_a_gguf_file_with_another_tensor_is_refused(tmp_path: Path, opened: LoadedRun) -> None:
    pytest.importorskip("gguf", reason="reads GGUF: install the extra `test`")
    gguf.write(tmp_path, opened, "f16")
    with torch.no_grad():
        opened.model.model.norm.weight[3] += 0.01
    with pytest.raises(RefusedError, match=r"output_norm\.weight of tiny-f16\.gguf is not the run's"):
        list(gguf.check(tmp_path, opened, "f16"))
