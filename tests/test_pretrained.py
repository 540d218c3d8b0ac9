"""Somebody else's folder goes on here: the same logits before the first step, and after the last one for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from llm import borrowed, pretrained
from llm.errors import RecipeError, RefusedError
from llm.model import Transformer
from llm.recipe import load
from llm.runs import open_run
from llm.selfcheck import tough_texts
from llm.sharding import held
from tests import tiny
from tests.forks import SENTENCES, Ended, run, run_group, script, train, write_recipe, write_text

transformers = pytest.importorskip("transformers", reason="compares with transformers: install the extra `test`")
tokenizers = pytest.importorskip("tokenizers", reason="install the extra `export`")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
VOCABULARY = 331  # of the model: more than the tokenizer has pieces
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 48, "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "head_dim": 8}  # fmt: skip


def write_tokenizer(folder: Path, *, bos: bool) -> None:
    """A byte-level BPE, as Qwen3 and Llama 3 have, trained on our sentences; with a BOS of its own or only an end."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|endoftext|>", "<|begin|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    model.train_from_iterator(SENTENCES * 3, trainer)
    ends = {"eos_token": "<|endoftext|>"} | ({"bos_token": "<|begin|>"} if bos else {})
    transformers.PreTrainedTokenizerFast(tokenizer_object=model, **ends).save_pretrained(folder)


def made(
    folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32, *, shard: str = "1GB", **keys: Any
) -> Path:
    """A folder as transformers writes it, of random weights that are all different."""
    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    }[family]
    rope = {"rope_theta": 500_000.0, "rope_parameters": {"rope_type": "default", "rope_theta": 500_000.0}}
    ends = {"bos_token_id": 1 if family == "llama" else None, "eos_token_id": 0}
    theirs = model(config(**(SIZES | rope | ends | keys)))
    tiny.stirred(theirs, seed=3)
    theirs.to(dtype).save_pretrained(folder, max_shard_size=shard)
    write_tokenizer(folder, bos=family == "llama")
    return folder


def recipe_of(folder: Path, source: Path, **changes: object) -> Path:
    text = write_text(folder / "text.txt")
    keys = {"model.from": source, "model.context": 32, "train.tokens_per_step": 64, "train.steps": 6, "train.warmup": 0}
    path = write_recipe(folder, text, **keys, **changes)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(line for line in lines if line.split(":")[0].strip() not in ("dim", "layers", "heads")))
    return path


def theirs_of(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


CASES = [
    (family, dtype, shard, tied)
    for family in ("qwen3", "llama")
    for dtype, shard in ((torch.float32, "1GB"), (torch.bfloat16, "20KB"))
    for tied in (True, False)
]


@pytest.mark.parametrize("family, dtype, shard, tied", CASES)
def test_logits_are_theirs_before_the_first_step_and_after_the_last(
    tmp_path: Path, family: str, dtype: torch.dtype, shard: str, tied: bool
) -> None:
    source = made(tmp_path / "source", family, dtype, shard=shard, tie_word_embeddings=tied)
    assert (source / pretrained.INDEX).exists() == (shard == "20KB")
    path = recipe_of(tmp_path, source)
    recipe = pretrained.shaped(load(path))
    ours = Transformer(recipe.model, VOCABULARY, family=pretrained.family(source))
    pretrained.load(source, {name: held(p) for name, p in ours.named_parameters()})
    tokens = tiny.ids(2, 32, vocabulary=VOCABULARY)
    with torch.no_grad():
        before = theirs_of(source)(tokens).logits
        assert torch.equal(ours.logits(tokens), before)

    ended = run(train(path), tmp_path)
    assert ended.status == 0, ended.err
    opened = open_run(str(tmp_path / "runs/tiny"))
    with torch.no_grad():
        after = opened.model.logits(tokens)
        assert not torch.equal(after, before)
        assert torch.equal(theirs_of(opened.checkpoint.folder)(tokens).logits, after)
    exported = run(script("module:llm.export", "tiny", "--to", "out"), tmp_path)
    assert exported.status == 0 and "ids: 1,000 tough texts equal" in exported.out, exported.err
    again = theirs_of(tmp_path / "out")
    assert type(again).__name__ == {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}[family]
    assert again.config.max_position_embeddings == 96 and again.config.rms_norm_eps == 1e-5
    assert run(script("module:llm.sample", "tiny", "--prompt", "The river", "--tokens", 5), tmp_path).status == 0


def test_a_run_on_others_weights_resumes_to_the_bit_and_on_two_processes(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, made(tmp_path / "source"), **{"machine.micro_batch": 1, "machine.exact": "true"})
    assert run(train(path, "run=whole"), tmp_path).status == 0
    assert run(train(path, "run=halves", stop_after=3), tmp_path).status == 75
    assert run(train(path, "run=halves"), tmp_path).status == 0
    assert {each.status for each in run_group(train(path, "run=two", "machine.shard=full"), tmp_path, 2)} == {0}
    assert len({open_run(str(tmp_path / "runs" / name)).checkpoint.digest for name in ("whole", "halves", "two")}) == 1
    card = (open_run(str(tmp_path / "runs/whole")).checkpoint.folder / "README.md").read_text()
    assert "on from `source`" in card and str(tmp_path) not in card


def test_their_ids_and_bytes_are_kept(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    ours, theirs = pretrained.tokenizer_of(source), transformers.AutoTokenizer.from_pretrained(source)
    texts = tough_texts(ours, 1_000)
    assert [ids.tolist() for ids in ours.encode_batch(texts, 1)] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.lossless and ours.bos == 1 and ours.vocabulary == VOCABULARY and 330 in ours.banned
    assert all(ours.decode(ours.encode(text)) == text for text in texts if "<|endoftext|>" not in text)
    ours.save(tmp_path / "kept")
    assert borrowed.load(tmp_path / "kept").fingerprint == ours.fingerprint
    assert (tmp_path / "kept/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (tmp_path / "kept/tokenizer.json").write_bytes(
        (source / "tokenizer.json").read_bytes().replace(b'"a"', b'"\\u0061"', 1)
    )
    with pytest.raises(RefusedError, match=r"tokenizer\.json is missing or damaged"):
        borrowed.load(tmp_path / "kept")


def test_what_was_exported_here_is_somebody_elses_there(tmp_path: Path) -> None:
    """A vocabulary of our own comes back through tokenizers with the same ids, and the run goes on with another text."""
    text = write_text(tmp_path / "text.txt")
    assert run(train(write_recipe(tmp_path, text, **{"run": "first", "model.context": 32})), tmp_path).status == 0
    assert run(script("module:llm.export", "first", "--to", "source"), tmp_path).status == 0
    first = open_run(str(tmp_path / "runs/first"))
    again = pretrained.tokenizer_of(tmp_path / "source")
    texts = tough_texts(again, 400)
    assert all(
        again.encode(text) == first.tokenizer.encode(text) and again.decode(again.encode(text)) == text
        for text in texts
    )
    ended = run(train(recipe_of(tmp_path, tmp_path / "source")), tmp_path)
    assert ended.status == 0, ended.err
    assert run(script("module:llm.export", "tiny", "--to", "out"), tmp_path).status == 0
    assert run(script("module:llm.export", "tiny", "--gguf", "f32"), tmp_path).status == 2  # llama.cpp has its own list


def test_without_a_beginning_of_its_own_a_document_begins_with_their_end(tmp_path: Path) -> None:
    assert pretrained.tokenizer_of(made(tmp_path / "source", "qwen3")).bos == 0


def changed(name: str, **keys: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(value | keys))

    return change


REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "remote code": (changed("config.json", auto_map={"AutoModel": "theirs.Model"}), "auto_map"),
    "remote code of the tokenizer": (changed("tokenizer_config.json", auto_map={"AutoTokenizer": ["a.B", None]}), "auto_map"),
    "another family": (changed("config.json", model_type="gpt2"), "model_type = 'gpt2'"),
    "scaled positions": (changed("config.json", rope_parameters={"rope_type": "yarn", "factor": 4.0}), "rope_scaling"),
    "scaled positions of old": (changed("config.json", rope_parameters=None, rope_scaling={"type": "linear", "factor": 2.0}), "rope_scaling"),
    "biases": (changed("config.json", attention_bias=True), "attention_bias"),
    "biases of the MLP": (changed("config.json", mlp_bias=True), "mlp_bias"),
    "sliding windows": (changed("config.json", use_sliding_window=True, sliding_window=8), "sliding"),
    "sliding layers": (changed("config.json", layer_types=["sliding_attention"] * 2), "sliding"),
    "quantised": (changed("config.json", quantization_config={"bits": 4}), "quantization_config"),
    "a size that is none": (changed("config.json", hidden_size="32"), "hidden_size"),
    "a rope that is none": (changed("config.json", rope_parameters=[1]), "rope_parameters"),
    "a base that is no number": (changed("config.json", rope_parameters={"rope_theta": "x"}), "rope_theta"),
    "two bases": (changed("config.json", rope_theta=1e4, rope_parameters={"rope_theta": 1e5}), "leave one out"),
    "no heads": (changed("config.json", num_attention_heads=0, head_dim=None), "head"),
    "weights for less": (changed("config.json", hidden_size=4096, num_hidden_layers=999), "lacks weights"),
    "settings that are none": (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "no settings"),
    "a huge size": (changed("config.json", vocab_size=1 << 40), "vocab_size"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors only"),
    "a way out": (lambda folder: (folder / pretrained.INDEX).write_text('{"weight_map": {"a": "../a.safetensors"}}'), "outside"),
    "not JSON": (lambda folder: (folder / "config.json").write_text("{"), "not JSON"),
    "another size": (changed("config.json", intermediate_size=64), "mlp"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.model"),
    "a broken tokenizer": (lambda folder: (folder / "tokenizer.json").write_text('{"model": {}}'), "damaged or of a kind"),
}  # fmt: skip


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_model_here_does_not_do_is_refused_by_name(tmp_path: Path, what: str) -> None:
    change, said = REFUSED[what]
    source = made(tmp_path / "source")
    change(source)
    ended: Ended = run(train(recipe_of(tmp_path, source)), tmp_path)
    assert ended.status in (2, 4) and ended.err.count("\n") == 1 and said in ended.err, ended.err
    assert not list(tmp_path.glob("runs/tiny/checkpoints/step-*"))


def test_prepare_knows_their_shape(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, source := made(tmp_path / "source"))
    numbers = sum(p.numel() for p in theirs_of(source).parameters())
    ended = run(script("module:llm.prepare", path), tmp_path)
    assert ended.status == 0 and f"{numbers / 1e6:.2f} M parameters" in ended.out, ended.out + ended.err


def test_a_recipe_that_says_another_shape_is_refused(tmp_path: Path) -> None:
    path = recipe_of(tmp_path, made(tmp_path / "source"))
    for override, said in (
        ("model.dim=64", "model.dim = 64"),
        ("model.context=128", "96 tokens"),
        ("model.from=nowhere", "not there"),
    ):
        with pytest.raises(RecipeError, match=said):
            pretrained.shaped(load(path, [override, "train.tokens_per_step=256"]))
    with pytest.raises(RecipeError, match="tokenizer along"):
        load(path, ["tokenizer.terms=[a]"])
