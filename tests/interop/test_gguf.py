"""A GGUF file in llama.cpp is the run: equal ids, equal greedy text, logits within the stated bounds; or it is refused.

Run with `python -m pytest -m llama_cpp`, after `pip install llama-cpp-python` (which builds for some minutes).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from llm.base.errors import RefusedError
from llm.config.schema import Model
from llm.data.tokenizer import SPACE, Tokenizer
from llm.inference.generation import Sampling, generate
from llm.interop import gguf, parity
from llm.interop.hf_files import model_files
from llm.interop.parity import check_llama_cpp, tough_texts
from llm.model.transformer import Transformer
from llm.run_folder.checkpoint import Checkpoint
from llm.run_folder.loaded_run import LoadedRun
from tests import tiny
from tests.data.test_tokenizer import DOCUMENTS
from tests.model.test_transformer import RECIPES

pytestmark = pytest.mark.llama_cpp
llama_cpp = pytest.importorskip("llama_cpp", reason="builds from source: pip install llama-cpp-python")
pytest.importorskip("gguf", reason="install the extra `export`")

SHAPES = {
    f"{name}, {'tied' if tied else 'untied'}": replace(each.model, tied=tied)
    for name, each in RECIPES.items()
    for tied in (True, False)
}
KINDS = ("f32", "f16", "bf16", "q8_0")
# Share of the five likeliest that both name. Weights drawn at random lie close: q8_0, whose error is a 250th of the
# largest number of 32, lets about one in twenty change places with the sixth.
TOP_5 = {"f32": 0.999, "f16": 0.99, "bf16": 0.95, "q8_0": 0.9}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """Its size is no multiple of anything; terms hold spaces, and one is the start of a name of llama.cpp's own."""
    return Tokenizer.train(DOCUMENTS, vocab_size=491, terms=("New York", " of the ", "Har", "<s"))


def made(folder: Path, shape: Model, tokenizer: Tokenizer) -> LoadedRun:
    """As if a run had left it, every weight drawn."""
    model = tiny.stirred(Transformer(shape, tokenizer.vocab_size), seed=5).eval()
    with torch.no_grad():
        (model.lm_head.weight if not shape.tied else model.model.norm.weight).mul_(
            3
        )  # so that it is sure of its choices
    for name, data in {**model_files(shape, tokenizer, model.family), "README.md": b"card"}.items():
        (folder / name).write_bytes(data)
    return LoadedRun(folder / "made", RECIPES["quickstart"], tokenizer, model, Checkpoint(folder, {}))


def said_by(path: Path, ids: list[int], tokens: int) -> list[int]:
    theirs = llama_cpp.Llama(str(path), n_ctx=256, type_k=0, type_v=0, verbose=False)
    try:
        return list(islice(theirs.generate(ids, temp=0, top_k=1, repeat_penalty=1.0), tokens))
    finally:
        theirs.close()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_llama_cpp_says_what_the_run_says(tmp_path: Path, tokenizer: Tokenizer, shape: Model, kind: str) -> None:
    opened = made(tmp_path, shape, tokenizer)
    gguf.write(tmp_path, opened, kind)
    lines = list(gguf.check(tmp_path, opened, kind))
    assert len(lines) == 3 and "ids of 1,000 tough texts equal" in lines[1]
    path = gguf.file_of(tmp_path, opened, kind)
    ids = [tokenizer.bos, *tokenizer.encode("the sea")]
    if kind == "f32":
        ours = [row[0] for row in generate(opened.model, [ids], 64, Sampling(temperature=0, repetition_penalty=1))]
        assert said_by(path, ids, 64) == ours and len(ours) == 64
    agreement = top_5(path, opened.model)
    print(f"{kind}: {lines[-1]}; of the five likeliest {agreement:.1%} are the same")
    assert agreement >= TOP_5[kind]


@torch.no_grad()
def top_5(path: Path, model: Transformer) -> float:
    tokens = tiny.ids(1, 128, seed=3, vocabulary=model.lm_head.weight.shape[0])
    theirs = llama_cpp.Llama(str(path), n_ctx=256, logits_all=True, type_k=0, type_v=0, verbose=False)
    theirs.eval(tokens[0].tolist())
    found = torch.tensor(theirs.scores[: tokens.shape[1]])
    theirs.close()
    pairs = zip(model.logits(tokens)[0].topk(5).indices.tolist(), found.topk(5).indices.tolist(), strict=True)
    return sum(len(set(ours) & set(other)) for ours, other in pairs) / (5 * tokens.shape[1])


def test_5000_tough_texts_have_their_ids(tmp_path: Path, tokenizer: Tokenizer) -> None:
    opened = made(tmp_path, tiny.shape(context=256), tokenizer)
    gguf.write(tmp_path, opened, "f32")
    theirs = llama_cpp.Llama(str(gguf.file_of(tmp_path, opened, "f32")), vocab_only=True, verbose=False)
    texts = [
        " begins with a space",
        "  two",
        "ends in newlines\n\n\n",
        "\n",
        " of the of the of the ",
        *(text.replace(SPACE, "x") for text in tough_texts(tokenizer, 6_000, seed=9)),
    ]
    assert len(set(texts)) > 5_000
    for text, ids in zip(texts, tokenizer.encode_batch(texts, threads=2), strict=True):
        assert theirs.tokenize(text.encode(), add_bos=True, special=False) == [tokenizer.bos, *ids.tolist()], text[:200]
    theirs.close()


# ------------------------------------------------------------------------------------------ planted errors


def test_1000_tough_conversations_have_their_ids(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rendered from the file's own template; a template that differs in one space is refused."""
    opened = made(tmp_path, tiny.shape(context=256), tokenizer)
    opened = replace(opened, checkpoint=Checkpoint(tmp_path, {"chat": True}))
    monkeypatch.setattr(parity, "conversations", partial(parity.conversations, count=1_000))
    gguf.write(tmp_path, opened, "f32")
    assert any("tough conversations equal" in line for line in gguf.check(tmp_path, opened, "f32"))
    monkeypatch.setattr(gguf, "PLAIN_JINJA", gguf.PLAIN_JINJA.replace("'|>'", "'|> '"))
    gguf.write(tmp_path, opened, "f32")
    with pytest.raises(RefusedError, match="of the conversation"):
        list(gguf.check(tmp_path, opened, "f32"))


def settings_changed(**changes: Any) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = gguf.settings
        patch.setattr(gguf, "settings", lambda opened: real(opened) | changes)

    return plant


def types_changed(before: int, after: int) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = gguf.vocabulary

        def vocabulary(tokenizer: Tokenizer) -> tuple[list[bytes], list[float], list[int]]:
            names, scores, types = real(tokenizer)
            return names, scores, [after if each == before else each for each in types]

        patch.setattr(gguf, "vocabulary", vocabulary)

    return plant


def names_changed(swap: dict[str, str]) -> Callable[[pytest.MonkeyPatch], None]:
    def plant(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(gguf, "NAMES", gguf.NAMES | swap)

    return plant


def weights_changed(
    names: tuple[str, ...], turn: Callable[[torch.Tensor], torch.Tensor]
) -> Callable[[LoadedRun], LoadedRun]:
    """The file is of a model in which these matrices are turned; the run's are not."""

    def plant(opened: LoadedRun) -> LoadedRun:
        other = Transformer(opened.model.shape, opened.tokenizer.vocab_size).eval()
        weights = opened.model.state_dict()
        turned = {name: turn(each) if name.split(".")[-2] in names else each for name, each in weights.items()}
        other.load_state_dict(turned)
        return replace(opened, model=other)

    return plant


def interleave(each: torch.Tensor) -> torch.Tensor:
    return each.view(-1, 2, 8, each.shape[1]).transpose(1, 2).reshape(each.shape)


SETTINGS = {
    "names": names_changed({"mlp.gate_proj": "ffn_up", "mlp.up_proj": "ffn_gate"}),
    "BOS": settings_changed(add_bos_token=False),
    "another BOS": settings_changed(bos_token_id=2),
    "a space before": settings_changed(add_space_prefix=True),
    "rotary base": settings_changed(rope_freq_base=500_000.0),
    "added tokens": types_changed(gguf.USER_DEFINED, gguf.NORMAL),
    "special added tokens": types_changed(gguf.USER_DEFINED, gguf.CONTROL),
}
WEIGHTS = {
    "transposition": weights_changed(("o_proj",), lambda each: each.T.contiguous()),
    "rotary layout": weights_changed(("q_proj", "k_proj"), interleave),
    "tying": weights_changed(("lm_head",), lambda each: each.roll(1, 0)),
}


@pytest.mark.parametrize("what", [*SETTINGS, *WEIGHTS])
def test_a_planted_error_is_caught(
    tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    shape = tiny.shape(dim=32, heads=2, kv_heads=2, head_dim=16, context=256, tied=what != "tying")
    opened = written = made(tmp_path, shape, tokenizer)
    if what in SETTINGS:
        SETTINGS[what](monkeypatch)
    else:
        written = WEIGHTS[what](opened)
    gguf.write(tmp_path, written, "f32")
    with pytest.raises(RefusedError):
        print(list(check_llama_cpp(gguf.file_of(tmp_path, opened, "f32"), opened.model, tokenizer, "f32", False)))


def test_what_cannot_be_joined_cannot_be_a_control_piece(tokenizer: Tokenizer) -> None:
    names, scores, types = gguf.vocabulary(tokenizer)
    assert len(names) == len(scores) == len(types) == 491 and len(set(names)) == 491
    assert types.count(gguf.BYTE) == 256 and types.count(gguf.USER_DEFINED) == 5
    assert types[tokenizer.bos] == gguf.CONTROL and {b"New York", b" of the "} <= set(names)
