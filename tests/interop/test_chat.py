"""A run that answers says the same elsewhere: transformers, GGUF and Ollama's Modelfile carry one template."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from llm.base.errors import RefusedError
from llm.data.chat_template import GO, JINJA, PLAIN_JINJA, JinjaTemplate, OwnTemplate
from llm.data.hf_tokenizer import HFTokenizer
from llm.data.tokenizer import CONTROLS, Tokenizer
from llm.inference.sampling import Sampling
from llm.interop.parity import _same_conversations, conversations
from llm.run_folder.loaded_run import open_run
from tests.data.test_conversations import BRACKETS, CHATML, THINKING, foreign, opened
from tests.forks import SENTENCES, digest, run, script, train
from tests.test_chat import chat_recipe, done, here, talk

__all__ = ["here", "talk"]  # fixtures
transformers = pytest.importorskip("transformers", reason="compares with transformers: install the extra `test`")


def go(template: str, messages: list[dict[str, str]]) -> str:
    """Renders the part of Go's template language that ours is written in: one range over the messages."""
    body = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}([^{]*)", template)
    assert body is not None
    said = [body[1].replace("{{ .Role }}", m["role"]).replace("{{ .Content }}", m["content"]) for m in messages]
    return "".join(said) + body[2]


def test_every_road_is_one_template(tmp_path: Path) -> None:
    own = Tokenizer.train([" ".join(SENTENCES).encode()], vocab_size=330)
    rendered = [JinjaTemplate(with_template(own, source, tmp_path)) for source in (JINJA, PLAIN_JINJA)]
    for messages in conversations(own, 60):
        texts = {each.render(messages, answer=True)[0] for each in rendered}
        assert texts == {f"<s>{go(GO, messages)}"}
    assert "generation" not in PLAIN_JINJA.replace("add_generation_prompt", "")


def with_template(tokenizer: Tokenizer, source: str, folder: Path) -> HFTokenizer:
    """Our vocabulary as a stranger's folder, with this template."""
    opened(tokenizer, folder)
    files = {name: (folder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    files["chat_template.jinja"] = source.encode()
    return HFTokenizer(files, bos=tokenizer.bos, ends=[tokenizer.bos], vocab_size=tokenizer.vocab_size, name="x")


def test_an_exported_folder_holds_the_template_and_ends_answers(talk: Path) -> None:
    ended = run(script("module:llm.export", "talk", "--to", "out"), talk)
    assert ended.status == 0, ended.err
    assert "chat template: 100 tough conversations equal, ids and answers" in ended.out
    end = OwnTemplate(open_run("talk", runs=talk / "runs").tokenizer).end
    generation = json.loads((talk / "out/generation_config.json").read_text())
    assert end in generation["eos_token_id"] and end not in generation["suppress_tokens"]
    assert len(generation["suppress_tokens"]) == 1 + len(CONTROLS) - 1
    assert asdict(Sampling()).items() <= generation.items()
    assert (talk / "out/chat_template.jinja").read_text() == JINJA
    base = json.loads((talk / "runs/tiny/checkpoints/step-000003/generation_config.json").read_text())
    assert end in base["suppress_tokens"] and end != base["eos_token_id"]


def test_gguf_and_modelfile_carry_template_and_stop(talk: Path) -> None:
    gguf = pytest.importorskip("gguf")
    ended = run(script("module:llm.export", "talk", "--gguf", "f32", "--to", "gguf"), talk)
    assert ended.status == 0, ended.err
    skipped = "llama.cpp check skipped" in ended.out
    assert skipped or "llama.cpp: 100 tough conversations equal" in ended.out
    tokenizer = open_run("talk", runs=talk / "runs").tokenizer
    fields = gguf.GGUFReader(talk / "gguf/talk-f32.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == PLAIN_JINJA
    end = OwnTemplate(tokenizer).end
    assert fields["tokenizer.ggml.eos_token_id"].contents() == fields["tokenizer.ggml.eot_token_id"].contents() == end
    names = [fields["tokenizer.ggml.tokens"].contents(at) for at in tokenizer.controls[1:]]
    assert names == list(CONTROLS)
    modelfile = (talk / "gguf/Modelfile").read_text()
    assert "\nPARAMETER repeat_penalty 1.1\nPARAMETER repeat_last_n -1\n" in modelfile
    assert f'TEMPLATE """{GO}"""\nPARAMETER stop "<|end|>"\n' in modelfile
    plain = run(script("module:llm.export", "tiny", "--gguf", "f32", "--to", "plain"), talk)
    assert plain.status == 0 and "TEMPLATE {{ .Prompt }}\n" in (talk / "plain/Modelfile").read_text()
    assert "tokenizer.chat_template" not in gguf.GGUFReader(talk / "plain/tiny-f32.gguf").fields


def stranger(folder: Path) -> Path:
    """A tiny folder of Qwen3's shape with a byte-level tokenizer and a template of its own."""
    tokenizer = foreign(CHATML)
    config = transformers.Qwen3Config(
        vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64, bos_token_id=0,
        eos_token_id=list(tokenizer.ends), tie_word_embeddings=True)  # fmt: skip
    torch.manual_seed(1)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    for name, data in tokenizer.files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_strangers_model_is_taught_by_its_own_template(here: Path, tmp_path: Path) -> None:
    """Trained, stopped and resumed, exported and compared; a conversation goes on in it."""
    folder = stranger(tmp_path / "stranger")
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    recipe = chat_recipe(here, tmp_path, **{"model.from": folder, "text.cache": tmp_path / "cache"})
    done(run(train(recipe), tmp_path / "whole"))
    assert run(train(recipe, stop_after=3), tmp_path / "parts").status == 75
    done(run(train(recipe), tmp_path / "parts"))
    assert digest(tmp_path / "parts", "talk") == digest(tmp_path / "whole", "talk")
    ended = run(script("module:llm.export", "talk", "--to", "out"), tmp_path / "whole")
    assert ended.status == 0, ended.err
    assert "100 tough conversations equal, ids and answers" in ended.out
    assert (tmp_path / "whole/out/chat_template.jinja").read_text() == CHATML


@pytest.mark.parametrize(("source", "count"), [(CHATML, 100), (THINKING, 100), (BRACKETS, 50)])
def test_what_a_strangers_template_takes_is_compared(tmp_path: Path, source: str, count: int) -> None:
    """A template that refuses system messages is compared on the conversations without one."""
    tokenizer = foreign(source)
    assert f": {count} tough conversations equal" in _same_conversations(opened(tokenizer, tmp_path), tokenizer)
    nothing = foreign("{{ raise_exception('no') }}")
    with pytest.raises(RefusedError, match="fails on each"):
        _same_conversations(opened(nothing, tmp_path), nothing)


def test_a_folder_without_a_template_is_refused_in_one_line(here: Path, tmp_path: Path) -> None:
    folder = stranger(tmp_path / "stranger")
    (folder / "chat_template.jinja").unlink()
    ended = run(train(chat_recipe(here, tmp_path, **{"model.from": folder})), tmp_path)
    assert ended.status == 2 and len(ended.err.splitlines()) == 1, ended.err
    assert "has no chat template" in ended.err
