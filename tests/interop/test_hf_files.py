"""A checkpoint is a Hugging Face model as it lies: their ids, their logits and their greedy text are ours, to the bit."""

import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.config.schema import Model
from llm.data.tokenizer import SPACE, Tokenizer
from llm.distributed.coordinator import Coordinator
from llm.distributed.sharding import Sharding, local_shard
from llm.inference.generation import Sampling, generate
from llm.interop.hf_files import model_files, tokenizer_files
from llm.interop.parity import SCRIPTS, tough_texts
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer
from llm.run_folder import checkpoint
from llm.run_folder.loaded_run import open_run
from tests import tiny
from tests.data.test_tokenizer import DOCUMENTS, HOSTILE, LOSSLESS, trained
from tests.forks import run, train, write_recipe, write_text
from tests.model.test_transformer import RECIPES

transformers = pytest.importorskip("transformers", reason="compares with transformers: install the extra `test`")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # theirs
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

draw = random.Random(12)
SHAPES = {
    f"{name}, {'tied' if tied else 'untied'}": replace(each.model, tied=tied)
    for name, each in RECIPES.items()
    for tied in (True, False)
}
TERMS = ("New York", "Har", "a,b", 'q"', " of the ", "<b>")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    scripts = " ".join(SCRIPTS).encode()
    return Tokenizer.train([*DOCUMENTS, scripts * 3], vocab_size=480, terms=TERMS)


def saved(folder: Path, model: Transformer, tokenizer: Tokenizer) -> Path:
    """The model's checkpoint, as the trainer would leave it."""
    sharding = Sharding("none", torch.device("cpu"), torch.float32)
    moments = Optimizer(model, RECIPES["quickstart"].train, torch.float32, sharding).moments
    weights = {name: local_shard(p) for name, p in model.named_parameters()}
    beside = {**model_files(model.shape, tokenizer, model.family), **tokenizer_files(tokenizer)}
    manifest = {"step": 1, "metrics": {}}
    draft = checkpoint.Draft(
        folder,
        weights=weights,
        moments=moments,
        manifest=manifest,
        extra_files=beside,
        unlisted_files={},
        coordinator=Coordinator(),
        sharding=sharding,
    )
    draft.together(draft.allocate, draft.fill, draft.finish)
    return folder


def opened(folder: Path) -> Any:
    """What transformers makes of the folder; nothing may be missing, left over or of another size."""
    theirs, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert type(theirs).__name__ == "Qwen3ForCausalLM"
    assert not any(told.get(each) for each in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), (
        told
    )
    return theirs.eval()


def ours_and_theirs_agree(ours: Transformer, tokenizer: Tokenizer, folder: Path) -> None:
    """Logits to the bit at every position of the context, and 200 greedy tokens."""
    theirs = opened(folder)
    tokens = tiny.ids(1, ours.shape.context, vocabulary=tokenizer.vocab_size)
    with torch.no_grad():
        assert torch.equal(ours.logits(tokens), theirs(tokens).logits)
    ids = [tokenizer.bos, *tokenizer.encode("the sea")]
    banned = (*tokenizer.banned, tokenizer.bos)  # as neither may end the text before its time
    mine = [row[0] for row in generate(ours, [ids], 200, Sampling(temperature=0), banned=banned)]
    text = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.int64), do_sample=False,
        min_new_tokens=200, max_new_tokens=200, temperature=None, top_k=None, min_p=None,
        pad_token_id=tokenizer.bos)[0].tolist()  # fmt: skip
    assert text == [*ids, *mine] and len(mine) == 200


def slow_but(*names: str) -> list[Any]:
    """The shapes, all but these marked slow."""
    slow = {name: [] if any(each in name for each in names) else [pytest.mark.slow] for name in SHAPES}
    return [pytest.param(shape, marks=slow[name], id=name) for name, shape in SHAPES.items()]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_shape_of_our_recipes_that_was_trained_opens_as_it_lies(tmp_path: Path, shape: Model) -> None:
    keys = {f"model.{key}": str(value).lower() for key, value in asdict(shape).items() if key != "from_"}
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"), **keys, **{
        "train.steps": 4, "train.warmup": 0, "train.tokens_per_step": shape.context, "machine.micro_batch": 1,
        "text.documents": "lines", "evaluate.every": 99})  # fmt: skip
    ended = run(train(recipe), tmp_path)
    assert ended.status == 0, ended.err
    of_run = open_run(str(tmp_path / "runs" / "tiny"))
    ours_and_theirs_agree(of_run.model, of_run.tokenizer, of_run.checkpoint.folder)


@pytest.mark.parametrize("shape", slow_but("quickstart"))
def test_transformers_opens_a_checkpoint_and_says_the_same(tmp_path: Path, tokenizer: Tokenizer, shape: Model) -> None:
    model = tiny.stirred(Transformer(shape, tokenizer.vocab_size), seed=5)
    ours_and_theirs_agree(model, tokenizer, saved(tmp_path / "step-000001", model, tokenizer))


@pytest.mark.parametrize("tied", [True, False])
def test_a_run_that_was_trained_opens_as_it_lies(tmp_path: Path, tied: bool) -> None:
    text = write_text(tmp_path / "text.txt")
    recipe = write_recipe(
        tmp_path, text, **{"model.tied": str(tied).lower(), "model.context": 256, "train.tokens_per_step": 512}
    )
    assert run(train(recipe), tmp_path).status == 0
    of_run = open_run(str(tmp_path / "runs" / "tiny" / "step-000012"))
    ours_and_theirs_agree(of_run.model, of_run.tokenizer, of_run.checkpoint.folder)


def test_5000_tough_texts_have_their_ids_and_come_back(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Those with a literal U+2581 too, by which sentencepiece means a space."""
    theirs = transformers.AutoTokenizer.from_pretrained(
        saved(tmp_path / "s", tiny.transformer(vocabulary=480), tokenizer)
    )
    pieces = [tokenizer.bytes_of(id).decode(errors="ignore") for id in range(480)]
    beside = [*TERMS, *pieces, " ", SPACE, "\n", "<0xE2>"]
    signs = [f"{a}{SPACE}{b}" for a in beside for b in draw.sample(beside, 3)]
    signs += [text.replace(" ", SPACE) for text in TERMS] + [text.replace("", SPACE) for text in (*TERMS, "a  b\n")]
    texts = [*(text for text in HOSTILE if len(text) < 10_000), *signs, *tough_texts(tokenizer, 5_600)]
    assert len(set(texts)) > 6_000 and {"", "<s>", "<0x0A>", "New York"} <= set(texts)
    assert sum(SPACE in text for text in texts) > 1_500
    assert theirs.bos_token_id == theirs.eos_token_id == tokenizer.bos and len(theirs) == tokenizer.vocab_size
    for text, ids, found in zip(
        texts, tokenizer.encode_batch(texts, threads=2), theirs(texts)["input_ids"], strict=True
    ):
        assert found == [tokenizer.bos, *ids.tolist()], repr(text[:200])
        assert theirs.decode(found[1:]) == text == theirs.decode(found, skip_special_tokens=True), repr(text[:200])
    assert theirs("x")["input_ids"] == theirs.encode("x") == [tokenizer.bos, *tokenizer.encode("x")]
    assert all(found in theirs.convert_ids_to_tokens(range(480)) for found in ("New York", "Har", " of the "))


def test_an_end_of_others_vocabularies_is_no_word_of_a_text(tmp_path: Path) -> None:
    """Of one that sentencepiece made with </s> beside <s>, as it does unless told otherwise."""
    others = Tokenizer(trained(vocab_size=600, **LOSSLESS), "others")
    assert others.is_exact_bpe and [others.piece(id) for id in others.controls] == ["<s>", "</s>"]
    theirs = transformers.AutoTokenizer.from_pretrained(saved(tmp_path / "s", tiny.transformer(vocabulary=600), others))
    for text in ("</s>", "a </s>b", "<s></s>\n", f"</{SPACE}s></s>", *tough_texts(others, 500)):
        ids = theirs(text)["input_ids"]
        assert ids == [others.bos, *others.encode(text)] and theirs.decode(ids, skip_special_tokens=True) == text, text


def test_their_sampling_starts_from_ours(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """The pieces that we never say are never said there, and a text ends where the next document would begin."""
    model = tiny.stirred(Transformer(tiny.shape(context=128), 480))
    theirs = opened(saved(tmp_path / "s", model, tokenizer))
    assert theirs.generation_config.eos_token_id == tokenizer.bos and tokenizer.banned
    assert list(theirs.generation_config.suppress_tokens) == list(tokenizer.banned)


def test_a_vocabulary_of_another_kind_leaves_the_tokenizer_files_out_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "unigram.model").write_bytes(trained(vocab_size=300, byte_fallback=True, character_coverage=1.0))
    recipe = write_recipe(
        tmp_path, write_text(tmp_path / "text.txt"), **{"tokenizer.path": "unigram.model", "train.steps": 4}
    )
    ended = run(train(recipe), tmp_path)
    assert ended.status == 0, ended.err
    lines = [line for line in ended.out.splitlines() if "tokenizer.json" in line]
    assert len(lines) == 1 and "not byte-fallback BPE" in lines[0] and "tokenizer/tokenizer.model" in lines[0]
    of_run = open_run(str(tmp_path / "runs" / "tiny"))
    assert not list(of_run.checkpoint.folder.glob("tokenizer*"))
    theirs = opened(of_run.checkpoint.folder)  # the model opens all the same
    tokens = tiny.ids(1, 16, vocabulary=of_run.tokenizer.vocab_size)
    with torch.no_grad():
        assert torch.equal(theirs(tokens).logits, of_run.model.logits(tokens))
