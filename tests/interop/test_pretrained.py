"""Somebody else's folder goes on here: the same logits before the first step, and after the last one for them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llm.base.errors import RecipeError, RefusedError
from llm.config.reading import load
from llm.data import hf_tokenizer
from llm.data.hf_tokenizer import borrow
from llm.data.tokenizer import Tokenizer
from llm.distributed.sharding import local_shard
from llm.inference import generation
from llm.interop import pretrained
from llm.interop.parity import tough_texts
from llm.model import hf_config
from llm.model.transformer import Transformer
from llm.run_folder.loaded_run import open_run
from tests import tiny
from tests.data.test_tokenizer import HOSTILE, trained
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


def tokenizer_of(source: Path) -> Tokenizer:
    return borrow(source, hf_config.read_config(source))


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


def ours_of(folder: Path, source: Path) -> Transformer:
    recipe = pretrained.shaped(load(recipe_of(folder, source)))
    vocabulary = hf_config.read_config(source)["vocab_size"]
    ours = Transformer(recipe.model, vocabulary, family=hf_config.read_family(source))
    pretrained.load(source, {name: local_shard(p) for name, p in ours.named_parameters()})
    return ours


CASES = [
    (family, dtype, shard, tied)
    for family in ("qwen3", "llama")
    for dtype, shard in ((torch.float32, "1GB"), (torch.bfloat16, "20KB"))
    for tied in (True, False)
]


@pytest.mark.parametrize(
    "family, dtype, shard, tied",
    [each if each[0] == "qwen3" else pytest.param(*each, marks=pytest.mark.slow) for each in CASES[:-1]] + CASES[-1:],
)
def test_logits_are_theirs_before_the_first_step_and_after_the_last(
    tmp_path: Path, family: str, dtype: torch.dtype, shard: str, tied: bool
) -> None:
    source = made(tmp_path / "source", family, dtype, shard=shard, tie_word_embeddings=tied)
    assert (source / pretrained.INDEX).exists() == (shard == "20KB")
    ours, path = ours_of(tmp_path, source), recipe_of(tmp_path, source)
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
    assert "starting from `source`" in card and str(tmp_path) not in card


def test_side_files_with_windows_line_ends_are_kept_and_others_than_utf8_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    (source / "chat_template.jinja").write_bytes(b"{{ messages }}\r\n{# caf\xc3\xa9 #}\r\n")
    recipe = recipe_of(tmp_path, source)
    assert run(train(recipe, stop_after=3), tmp_path).status == 75
    assert run(train(recipe), tmp_path).status == 0
    (source / "added_tokens.json").write_bytes(b'{"caf\xe9": 3}')
    done = run(train(recipe, "run=other"), tmp_path)
    assert done.status == 4 and done.err.count("\n") == 1 and "added_tokens.json is not UTF-8 at byte 5" in done.err


def test_their_ids_and_bytes_are_kept(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    ours, theirs = tokenizer_of(source), transformers.AutoTokenizer.from_pretrained(source)
    texts = tough_texts(ours, 1_000)
    assert [ids.tolist() for ids in ours.encode_batch(texts, 1)] == theirs(texts, add_special_tokens=False)["input_ids"]
    assert ours.lossless and ours.bos == 1 and ours.vocab_size == VOCABULARY and 330 in ours.banned
    assert all(ours.decode(ours.encode(text)) == text for text in texts if "<|endoftext|>" not in text)
    ours.save(tmp_path / "kept")
    assert hf_tokenizer.load(tmp_path / "kept").fingerprint == ours.fingerprint
    assert (tmp_path / "kept/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (tmp_path / "kept/tokenizer.json").write_bytes(
        (source / "tokenizer.json").read_bytes().replace(b'"a"', b'"\\u0061"', 1)
    )
    with pytest.raises(RefusedError, match=r"tokenizer\.json is missing or damaged"):
        hf_tokenizer.load(tmp_path / "kept")


def test_what_was_exported_here_is_somebody_elses_there(tmp_path: Path) -> None:
    """A vocabulary of our own comes back through tokenizers with the same ids, and the run goes on with another text."""
    text = write_text(tmp_path / "text.txt")
    assert run(train(write_recipe(tmp_path, text, **{"run": "first", "model.context": 32})), tmp_path).status == 0
    assert run(script("module:llm.export", "first", "--to", "source"), tmp_path).status == 0
    first = open_run(str(tmp_path / "runs/first"))
    again = tokenizer_of(tmp_path / "source")
    assert first.tokenizer.lossless and again.lossless
    texts = [*tough_texts(again, 400), *HOSTILE]
    assert sum("\u2581" in text for text in texts) > 20
    assert all(
        again.encode(text) == first.tokenizer.encode(text) and again.decode(again.encode(text)) == text
        for text in texts
    )
    ended = run(train(recipe_of(tmp_path, tmp_path / "source")), tmp_path)
    assert ended.status == 0, ended.err
    assert run(script("module:llm.export", "tiny", "--to", "out"), tmp_path).status == 0
    assert run(script("module:llm.export", "tiny", "--gguf", "f32"), tmp_path).status == 2  # llama.cpp has its own list


def test_without_a_beginning_of_its_own_a_document_begins_with_their_end(tmp_path: Path) -> None:
    assert tokenizer_of(made(tmp_path / "source", "qwen3")).bos == 0


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 500_000.0}
OTHERS: dict[str, Any] = {  # what else a field could say, where that does not follow from its default
    "rope_parameters": LINEAR, "layer_types": ["sliding_attention", "full_attention"], "eos_token_id": [0, 3],
    "hidden_act": "gelu", "dtype": "bfloat16", "torch_dtype": "float16", "model_type": "mistral", "architectures": ["Other"],
    "problem_type": "regression", "id2label": {"0": "one"}, "label2id": {"one": 0}, "transformers_version": "4.40.0"}  # fmt: skip
NO_FIELDS: list[dict[str, Any]] = [  # what their code looks for beside the fields, and fields that only count together
    {"rope_scaling": LINEAR},
    {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
    {"rope_scaling": {"rope_type": "default"}},  # which takes the place of rope_parameters, its base included
    {"rope_scaling": {"rope_theta": 1e4}},
    {"rope_scaling": {"rope_type": "default", "rope_theta": 1e4}, "rope_parameters": None, "rope_theta": 1e4},
    {"rope_theta": 1e4},
    {"rope_theta": 1e4, "rope_parameters": None},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5, "partial_rotary_factor": 0.5}},
    {"rope_parameters": {"full_attention": LINEAR}},
    {"partial_rotary_factor": 0.5},
    {"is_causal": False},
    {"per_layer_config": {"1": {"rms_norm_eps": 0.5}}},
    {"sliding_window": 8},
    {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 0, "layer_types": None},
    {"attention_chunk_size": 8, "layer_types": ["chunked_attention"] * 2},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"transformers_weights": "other.safetensors"},
]


def another(name: str, value: Any) -> Any:
    if name in OTHERS:
        return OTHERS[name]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2 or 1
    return f"{value}x" if isinstance(value, str) else 1 if value is None else value


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_every_field_of_their_configuration_is_obeyed_or_refused_by_name(tmp_path: Path, family: str) -> None:
    """Each changed in turn on a folder whose weights stay: the same logits as theirs to the bit, or one line."""
    source = made(tmp_path / "source", family)
    stated = json.loads((source / "config.json").read_text())
    of_class = {"qwen3": transformers.Qwen3Config, "llama": transformers.LlamaConfig}[family]().to_dict()
    # How text is chosen is no matter of logits, and old versions refuse some of it; nor does their model run without
    # return_dict.
    beside = {"return_dict", *transformers.GenerationConfig().to_dict()} - stated.keys()
    fields = {name: value for name, value in (of_class | stated).items() if name not in beside}
    changes = [{name: another(name, value)} for name, value in fields.items()] + NO_FIELDS
    tokens, obeyed, refused = tiny.ids(2, 32, vocabulary=VOCABULARY), [], []
    for change in changes:
        (source / "config.json").write_text(json.dumps(stated | change))
        try:
            ours = ours_of(tmp_path, source)
        except (RefusedError, RecipeError) as error:
            assert len(str(error).splitlines()) == 1
            refused.append(set(change))
            continue
        with torch.no_grad():
            assert torch.equal(ours.logits(tokens), theirs_of(source)(tokens).logits), change
        obeyed.append(set(change))
    assert {"rms_norm_eps"} in obeyed and {"rope_theta", "rope_parameters"} in obeyed and {"use_cache"} in obeyed
    assert {"tie_word_embeddings"} in refused and {"rope_scaling"} in refused and {"attention_bias"} in refused


@pytest.mark.parametrize("shard", ["1GB", "20KB"])
def test_a_tied_folder_may_keep_the_head_that_it_is_tied_to_and_no_other(tmp_path: Path, shard: str) -> None:
    source = made(tmp_path / "source", tie_word_embeddings=False, shard=shard)
    config = (source / "config.json").read_text()
    changed("config.json", tie_word_embeddings=True)(source)
    with pytest.raises(RefusedError, match=r"another lm_head\.weight .* tie_word_embeddings = true"):
        ours_of(tmp_path, source)
    (source / "config.json").write_text(config)
    theirs = theirs_of(source)
    theirs.lm_head.weight.data.copy_(theirs.model.embed_tokens.weight.data)
    theirs.save_pretrained(source, max_shard_size=shard)
    changed("config.json", tie_word_embeddings=True)(source)
    tokens = tiny.ids(2, 32, vocabulary=VOCABULARY)
    with torch.no_grad():
        assert torch.equal(ours_of(tmp_path, source).logits(tokens), theirs(tokens).logits)


UNCLEAR: dict[str, tuple[str, str]] = {  # a file of the folder, and what is in it
    "an adapter": ("adapter_config.json", "{}"),
    "two models": (pretrained.INDEX, '{"weight_map": {"a": "other.safetensors"}}'),
    "an index that is none": (pretrained.INDEX, '{"weight_map": {"a": null}}'),
    "an index that is a list": (pretrained.INDEX, "[]"),
    "a family in a list": ("config.json", '{"model_type": ["llama"]}'),
    "a list for settings of generation": ("generation_config.json", "[1]"),
}


@pytest.mark.parametrize("what", UNCLEAR)
def test_a_folder_that_could_be_read_in_two_ways_or_none_is_refused(tmp_path: Path, what: str) -> None:
    source, (name, text) = made(tmp_path / "source"), UNCLEAR[what]
    (source / name).write_text(text)
    shutil.copy(source / "model.safetensors", source / "other.safetensors")
    with pytest.raises(RefusedError):
        ours_of(tmp_path, source)
        tokenizer_of(source)


def test_a_tensor_that_two_files_hold_is_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "source", shard="20KB")
    files = sorted(source.glob("*.safetensors"))
    tensors = load_file(files[0])
    save_file(load_file(files[1]) | {name: torch.zeros_like(each) for name, each in tensors.items()}, files[1])
    with pytest.raises(RefusedError, match="which another file holds too"):
        ours_of(tmp_path, source)


# ------------------------------------------------------------------------------------------ where a text begins and ends


def test_a_null_in_their_settings_is_no_piece_of_that_name(tmp_path: Path) -> None:
    """As Qwen3's bos_token is, in whose vocabulary "None" is a piece like others."""
    source = made(tmp_path / "source", "qwen3")
    whole = json.loads((source / "tokenizer.json").read_text())
    whole["model"]["vocab"] |= {"None": 320, "True": 321, "7": 322}
    (source / "tokenizer.json").write_text(json.dumps(whole))
    for value in (None, True, 7, {"content": None}, ["None"]):
        changed("tokenizer_config.json", bos_token=value)(source)
        found = tokenizer_of(source)
        assert (found.bos, found.ends) == (0, (0,))
    changed("config.json", bos_token_id=1)(source)  # with a null in the tokenizer's settings, as Qwen3 has it
    assert tokenizer_of(source).bos == 1
    changed("config.json", bos_token_id=50)(source)  # an ordinary piece: left over from the defaults of a family
    assert tokenizer_of(source).bos == 0


@pytest.mark.parametrize("value", ["0", True, [0, "1"], VOCABULARY, -1, {"id": 1}])
def test_an_end_that_is_no_id_is_refused_by_name(tmp_path: Path, value: object) -> None:
    source = made(tmp_path / "source")
    for name in ("config.json", "generation_config.json"):
        before = (source / name).read_text()
        changed(name, eos_token_id=value)(source)
        with pytest.raises(RefusedError, match=r"eos_token_id = .* is no id"):
            tokenizer_of(source)
        (source / name).write_text(before)


def saying(id: int, act: Callable[[], None]) -> Callable[[], None]:
    """The same with a model that only ever says this one token."""

    def planted() -> None:
        generation.choose = lambda logits, *_: torch.full((len(logits),), id)
        act()

    return planted


def test_a_text_ends_at_any_of_their_ends_here_and_after_an_export(tmp_path: Path) -> None:
    """Those of config.json, generation_config.json and the tokenizer: 0 and 40, 41, 0; and where a text begins, 1."""
    source = made(tmp_path / "source")
    changed("config.json", eos_token_id=[0, 40])(source)
    changed("generation_config.json", eos_token_id=41)(source)
    path = recipe_of(tmp_path, source, **{"evaluate.prompts": '["The river"]', "evaluate.every": 3})
    assert run(saying(41, train(path)), tmp_path).status == 0
    record = [json.loads(line) for line in (tmp_path / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    assert {each["sample"] for each in record if "sample" in each} == {""}
    opened = open_run(str(tmp_path / "runs/tiny"))
    theirs = transformers.GenerationConfig.from_pretrained(opened.checkpoint.folder)
    assert opened.tokenizer.ends == (0, 1, 40, 41) and theirs.eos_token_id == [0, 1, 40, 41]
    for id, tokens in ((0, 0), (1, 0), (40, 0), (41, 0), (42, 9)):
        ended = run(saying(id, script("module:llm.sample", "tiny", "--prompt", "The river", "--tokens", 9)), tmp_path)
        assert ended.status == 0 and f"{tokens} tokens in" in ended.err, ended.err
    assert run(script("module:llm.export", "tiny", "--to", "out"), tmp_path).status == 0


@pytest.mark.parametrize("stated", [True, False])
def test_with_a_sentencepiece_vocabulary_alone_a_text_ends_at_its_own_end(tmp_path: Path, stated: bool) -> None:
    """As in older Llama folders: <unk>, <s> and </s> are 0, 1 and 2."""
    source = made(tmp_path / "source", eos_token_id=2 if stated else None)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    (source / "tokenizer.model").write_bytes(trained(vocab_size=VOCABULARY, model_type="bpe", byte_fallback=True))
    assert run(train(recipe_of(tmp_path, source)), tmp_path).status == 0
    opened = open_run(str(tmp_path / "runs/tiny"))
    assert (opened.tokenizer.bos, opened.tokenizer.ends, opened.tokenizer.banned) == (1, (1, 2), (0,))
    theirs = transformers.GenerationConfig.from_pretrained(opened.checkpoint.folder)
    assert theirs.eos_token_id == [1, 2] and theirs.suppress_tokens == [0]
    ended = run(saying(2, script("module:llm.sample", "tiny", "--prompt", "The river", "--tokens", 9)), tmp_path)
    assert ended.status == 0 and "0 tokens in" in ended.err, ended.err
    changed("config.json", bos_token_id=5)(source)
    with pytest.raises(RefusedError, match=r"begins a text with piece 1, the model with 5: put its tokenizer\.json"):
        tokenizer_of(source)


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
    with pytest.raises(RecipeError, match="brings its own tokenizer"):
        load(path, ["tokenizer.terms=[a]"])


def retold(source: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the model in a folder's tokenizer.json."""
    whole = json.loads((source / "tokenizer.json").read_text())
    change(whole["model"])
    (source / "tokenizer.json").write_text(json.dumps(whole))


def test_ids_beyond_a_gap_and_merges_dropped_at_random_are_refused(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    retold(source, lambda model: model.update(dropout=0.1))
    with pytest.raises(RefusedError, match="set its dropout to null"):
        tokenizer_of(source)
    retold(
        source,
        lambda model: (
            model["vocab"].update(zz=VOCABULARY),
            model["merges"].append(["z", "z"]),
            model.update(dropout=None),
        ),
    )
    with pytest.raises(RefusedError, match=f"has ids outside the model's {VOCABULARY} pieces"):
        tokenizer_of(source)


@pytest.mark.parametrize("key", ["extra_special_tokens", "model_specific_special_tokens"])
def test_a_template_knows_a_models_own_tokens(tmp_path: Path, key: str) -> None:
    source = made(tmp_path / "source")
    changed("tokenizer_config.json", **{"pad_token": {}, key: {"image_token": "<|begin|>"}})(source)
    names = tokenizer_of(source).special_names
    assert names["image_token"] == "<|begin|>" and "pad_token" not in names


def as_llama_2(source: Path) -> None:
    """Give a folder Llama 2's way to split: its normaliser puts a space before a text; its class puts it elsewhere."""

    def renamed(model: dict[str, Any]) -> None:
        model["vocab"] = {name.replace("\u0120", "\u2581"): id for name, id in model["vocab"].items()}
        model["merges"] = [[half.replace("\u0120", "\u2581") for half in pair] for pair in model["merges"]]

    retold(source, renamed)
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    whole = json.loads((source / "tokenizer.json").read_text()) | {
        "pre_tokenizer": None,
        "decoder": {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, space]},
    }
    (source / "tokenizer.json").write_text(json.dumps(whole))
    changed("tokenizer_config.json", tokenizer_class="LlamaTokenizer")(source)


def test_a_tokenizer_as_llama_2s_splits_texts_alike_in_checkpoints_and_exports(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    as_llama_2(source)
    assert run(train(recipe_of(tmp_path, source)), tmp_path).status == 0
    opened = open_run(str(tmp_path / "runs/tiny"))
    theirs = transformers.AutoTokenizer.from_pretrained(opened.checkpoint.folder)
    for text in (" ", "  a b", " The river"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == opened.tokenizer.encode(text)
    assert (theirs.padding_side, list(theirs(" "))) == ("left", ["input_ids", "attention_mask"])  # as generate takes it
    ended = run(script("module:llm.export", "tiny", "--to", "out"), tmp_path)
    assert ended.status == 0, ended.err


SEPARATOR = {
    "content": "<|sep|>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
    "special": True,
}


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("tokenizer_config.json", {"added_tokens_decoder": {"320": SEPARATOR}}),
        ("tokenizer_config.json", {"additional_special_tokens": ["<|sep|>"]}),
        ("tokenizer_config.json", {"extra_special_tokens": {"sep": "<|sep|>"}}),
        ("tokenizer_config.json", {"pad_token": "<|sep|>"}),
        ("special_tokens_map.json", {"sep_token": SEPARATOR}),
        ("special_tokens_map.json", {"additional_special_tokens": ["<|sep|>"]}),
        ("added_tokens.json", {"<|sep|>": 320}),
    ],
)  # fmt: skip
def test_a_token_that_only_a_side_file_adds_is_refused(tmp_path: Path, name: str, keys: dict[str, Any]) -> None:
    source = made(tmp_path / "source")
    if not (source / name).exists():
        (source / name).write_text("{}")
    changed(name, **keys)(source)
    with pytest.raises(RefusedError, match=r"lacks the added token '<\|sep\|>'"):
        tokenizer_of(source)
    if int(transformers.__version__.partition(".")[0]) < 5:
        return  # which itself passes over the tokens of some of these files
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(source)  # as the message advises
    assert 320 in tokenizer_of(source).encode("a<|sep|>b")
