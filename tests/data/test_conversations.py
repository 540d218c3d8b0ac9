"""Conversations: bad rows are one line each, ids and masks are transformers', each answer is learnt exactly once."""

import json
import random
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm.base.atomic_io import write_bytes
from llm.base.constants import IGNORED
from llm.base.errors import LLMError, RefusedError, TextError
from llm.config.reading import load
from llm.config.schema import Text
from llm.data.batches import packed_batches
from llm.data.chat_template import ANSWER, CONTEXT, TURN, JinjaTemplate, OwnTemplate, template_of
from llm.data.conversations import Message, checked, from_turns
from llm.data.documents import Corpus
from llm.data.hf_tokenizer import HFTokenizer
from llm.data.packing import PackedShuffle, WindowTable, _cut
from llm.data.pipeline import Prepared, prepare_text
from llm.data.tokenizer import CONTROLS, Tokenizer
from llm.interop.hf_files import tokenizer_files
from llm.interop.parity import tough_texts
from llm.model.transformer import Transformer
from tests.forks import SENTENCES, write_recipe
from tests.tiny import shape, stirred

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{{ '\n' }}{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNTAGGED = CHATML.replace("{% generation %}", "").replace("{% endgeneration %}", "")
WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}" + CHATML
)


@pytest.fixture(scope="module")
def own() -> Tokenizer:
    return Tokenizer.train([" ".join(SENTENCES).encode()], vocab_size=330)


def foreign(template: str) -> HFTokenizer:
    """A byte-level tokenizer as others have them, with a template of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    library.train_from_iterator(SENTENCES, trainer)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "bos_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False, "model_max_length": 10**9}  # fmt: skip
    files = {
        "tokenizer.json": library.to_str().encode(),
        "tokenizer_config.json": json.dumps(settings).encode(),
        "chat_template.jinja": template.encode(),
    }
    end = library.token_to_id("<|im_end|>")
    return HFTokenizer(files, bos=0, ends=[end], vocab_size=library.get_vocab_size(), name="foreign")


def tough_dialogues(tokenizer: Tokenizer, count: int, marks: bool = False) -> list[list[Message]]:
    """Empty and missing system messages, newlines at edges, many scripts, up to 50 turns; `marks`: markers in text."""
    draw = random.Random(5)
    names = (*CONTROLS, "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|endoftext|>")
    texts = ["", "\n", "\n\nhi\n", " ", "  two  ", "🎉👩‍👩‍👧", "שלום עולם", "مرحبا\n", *tough_texts(tokenizer, 300)]
    texts = [text for text in texts if len(text) < 400]
    if marks:
        texts = [f"{text}{draw.choice(names)}{text[:3]}" for text in texts]
    else:
        texts = [text for text in texts if not any(name in text for name in names)]

    def one(number: int) -> list[Message]:
        turns = 50 if number % 50 == 0 else draw.randint(1, 6)
        said = [{"role": ("user", "assistant")[at % 2], "content": draw.choice(texts)} for at in range(turns)]
        system = [{"role": "system", "content": draw.choice(texts) if number % 4 else ""}] if number % 2 else []
        return [*system, *said]

    return [one(number) for number in range(count)]


def opened(tokenizer: Tokenizer, folder: Path) -> Any:
    """transformers' tokenizer of the folder that a model trained on conversations has."""
    transformers = pytest.importorskip("transformers")
    for name, data in tokenizer_files(tokenizer, chat=True).items():
        write_bytes(folder / name, data)
    return transformers.AutoTokenizer.from_pretrained(folder)


def theirs(library: Any, messages: list[Message]) -> tuple[list[int], list[int]]:
    found = library.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    return found["input_ids"], found["assistant_masks"]


def test_a_template_is_read_where_nothing_else_has_opened_jinja2(monkeypatch: pytest.MonkeyPatch) -> None:
    import jinja2.ext

    monkeypatch.delitem(sys.modules, "jinja2.ext")
    monkeypatch.delattr(jinja2, "ext")
    ids = template_of(foreign(CHATML)).prompt([{"role": "user", "content": "hi"}])
    assert len(ids) > 4


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["own", "chatml", "default"])
def test_ids_and_mask_are_transformers_own(own: Tokenizer, tmp_path: Path, kind: str, count: int) -> None:
    tokenizer = own if kind == "own" else foreign(CHATML if kind == "chatml" else WITH_DEFAULT)
    library, template, learnt = opened(tokenizer, tmp_path), template_of(tokenizer), 0
    dialogues = tough_dialogues(tokenizer, count)
    for messages, (ids, parts) in zip(dialogues, template.encode(dialogues), strict=True):
        assert (ids.tolist(), (parts == ANSWER).astype(int).tolist()) == theirs(library, messages)
        prompt = library.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert template.prompt(messages) == prompt
        learnt += int((parts == ANSWER).sum())
    assert learnt > 10 * count


def test_no_text_is_a_marker_here_and_stock_roads_cannot_know(own: Tokenizer, tmp_path: Path) -> None:
    library, template, differ = opened(own, tmp_path), OwnTemplate(own), 0
    dialogues = tough_dialogues(own, 100, marks=True)
    for messages, (ids, _) in zip(dialogues, template.encode(dialogues), strict=True):
        controls = [id for id in ids.tolist() if id in own.controls]
        assert len(controls) == 1 + 2 * len(messages)
        assert [own.piece(id) for id in controls[1::2]] == [f"<|{message['role']}|>" for message in messages]
        assert "".join(own.decode(ids.tolist())) == "".join(message["content"] for message in messages)
        spelled = any(name in message["content"] for message in messages for name in (*CONTROLS, "<s>", "<unk>"))
        assert (ids.tolist() != theirs(library, messages)[0]) == spelled
        differ += spelled
    assert differ > 80


def test_answers_of_a_template_without_the_tag_end_with_the_end_of_the_turn() -> None:
    tagged, untagged = JinjaTemplate(foreign(CHATML)), JinjaTemplate(foreign(UNTAGGED))
    dialogues = [each for each in tough_dialogues(foreign(CHATML), 60) if all(m["content"].strip() for m in each)]
    assert len(dialogues) > 20
    for ours, wanted in zip(untagged.encode(dialogues), tagged.encode(dialogues), strict=True):
        assert ours[0].tolist() == wanted[0].tolist() and ours[1].tolist() == wanted[1].tolist()


# What an answer's place is decided by, in templates that do not mark it: space that is left out, words that only the last
# answer begins with, an end that the tokenizer does not name, space before the end, no system message.
THINKING = UNTAGGED.replace(
    "message['content']",
    "(('<think>\n\n</think>\n\n' + message['content'].lstrip('\n')) "
    "if loop.last and message.role == 'assistant' else message['content'])",
)
BRACKETS = (
    "{% for message in messages %}{% if message.role == 'user' %}{{ '[Q] ' + message['content'].strip() + ' [A]' }}"
    "{% elif message.role == 'system' %}{{ raise_exception('no system here') }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' <|im_end|>' }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
@pytest.mark.parametrize("source", [UNTAGGED, CHATML, THINKING, BRACKETS])
def test_what_follows_the_prompt_is_what_is_learnt(source: str, end: str) -> None:
    """The last answer is all that is rendered behind its prompt, up to the template's own end of the turn."""
    stranger = foreign(source)
    id = stranger._library.token_to_id(end)
    tokenizer = HFTokenizer(stranger.files, bos=0, ends=[id], vocab_size=stranger.vocab_size, name="foreign")
    template, ending = template_of(tokenizer), stranger._library.token_to_id("<|im_end|>")
    assert ending in template.ends and ending not in template.banned
    for said in ("It rises.", "\n It rises.\n", "\n\nIt rises", " 7", "\tIt\n\n"):
        messages = [{"role": ("user", "assistant")[at % 2], "content": said} for at in range(4)]
        ((ids, parts),) = template.encode([messages])
        prompt = template.prompt(messages[:3])
        assert ids[: len(prompt)].tolist() == prompt
        rest, learnt = ids[len(prompt) :].tolist(), parts[len(prompt) :] == ANSWER
        stop = rest.index(ending)
        assert learnt[: stop + 1].all() and not learnt[stop + 1 :].any(), (said, tokenizer.decode(rest))
        assert (ids[parts == ANSWER] == ending).sum() == 2 and (parts == TURN).sum() == 2


def test_a_template_that_fails_on_a_conversation_says_on_which() -> None:
    with pytest.raises(RefusedError, match=r"begins with 'Be kind': no system here"):
        template_of(foreign(BRACKETS)).encode([[{"role": "system", "content": "Be kind"}]])


def test_a_template_that_alters_what_is_said_and_marks_no_answers_is_refused() -> None:
    template = JinjaTemplate(foreign(UNTAGGED.replace("message['content']", "message['content'] | upper")))
    with pytest.raises(RefusedError, match="generation"):
        template.encode([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]])


def test_a_template_cannot_leave_its_sandbox() -> None:
    template = JinjaTemplate(foreign("{{ messages.__class__.__mro__ }}"))
    with pytest.raises(LLMError):
        template.encode([[{"role": "user", "content": "a"}]])


BAD = {
    '{"messages": []}': "no list of messages",
    '{"messages": "hello"}': "no list of messages",
    '{"messages": [{"role": "assistant", "content": "a"}]}': "message 1, is of assistant, where user is expected",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': "message 2, is of user",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]}': "message 2, is of system",
    '{"messages": [{"role": "system", "content": "a"}]}': "only a system message",
    '{"messages": [{"role": "user"}]}': "message 1, has no content",
    '{"messages": [{"role": "user", "content": null}]}': "message 1, has no content",
    '{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]}': "content of type list",
    '{"messages": [{"role": "user", "content": 3}]}': "content of type int",
    '{"messages": [{"role": "user", "content": " \\n"}]}': "message 1, is empty",
    '{"messages": [{"role": "tool", "content": "a"}]}': 'role = "tool"',
    '{"messages": [{"role": ["user"], "content": "a"}]}': "one of system, user, assistant is expected",
    '{"messages": [{"content": "a"}]}': "role = null",
    '{"messages": ["a"]}': "message 1, is str",
    '{"messages": [{"role": "user", "content": "a\\u0000"}]}': "NUL",
    '{"messages": [{"role": "user", "content": "\\ud800"}]}': "surrogate",
    '{"conversations": [{"from": "bot", "value": "a"}]}': 'from = "bot"',
    '{"conversations": [{"from": "human", "text": "a"}]}': "message 1, has no value",
    '{"text": "a"}': "is no conversation",
    "[1]": "is no conversation",
    "{": "is not JSON",
    json.dumps({"messages": [{"role": "user", "content": "a" * (5 << 20)}]}): "5.2 MB, more than 1 MiB",
}
GOOD = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


@pytest.mark.parametrize("row", BAD, ids=[says[:30] for says in BAD.values()])
def test_a_bad_row_is_one_line_with_its_place(tmp_path: Path, row: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{GOOD}\n{row}\n{GOOD}")
    with pytest.raises(TextError) as caught:
        list(Corpus(Text(files=(str(tmp_path / "a.jsonl"),))).documents())
    said = str(caught.value)
    assert f"{tmp_path / 'a.jsonl'} line 3" in said and BAD[row] in said
    assert len(said) < 400 and "\n" not in said and caught.value.status == 2


def test_both_forms_are_one_document_and_texts_stay_texts(tmp_path: Path) -> None:
    other = '{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "id": 7}\n'
    (tmp_path / "a.jsonl").write_text(GOOD + other)
    (tmp_path / "b.jsonl").write_text('{"text": "a text", "messages": []}\n')
    chat, text = (Text(files=(str(tmp_path / name),)) for name in ("a.jsonl", "b.jsonl"))
    documents = list(Corpus(chat).documents())
    assert documents[0] == documents[1] and Corpus(chat).is_chat
    assert list(Corpus(text).documents()) == [b"a text"] and not Corpus(text).is_chat
    with pytest.raises(TextError, match=r"holds conversations and .* a text"):
        list(Corpus(Text(files=(*chat.files, *text.files))).documents())


def test_consecutive_messages_of_one_sender_are_one_turn() -> None:
    turns = [("b", "hi"), ("b", "there"), ("a", " "), ("b", "!"), ("a", "yes"), ("b", "no")]
    assert [each["content"] for each in from_turns(turns)] == ["hi\nthere\n!", "yes", "no"]
    assert from_turns([("b", "hi"), ("b", "hello?")]) == []


def test_chitchat_is_turns_of_two_people() -> None:
    """Of 4,018 conversations with two turns, one has nothing but blanks in its second."""
    try:
        corpus = Corpus(Text(files=("chitchat",)))
    except TextError:
        pytest.skip("the extra chat is not installed")
    notes: Counter[str] = Counter()
    found = [json.loads(each) for each in corpus.documents(notes)]
    assert len(found) == 4017 and notes == {"conversations of one turn left out": 3151}
    assert all(checked("", {"messages": each}) == each for each in found)


def said(folder: Path, seed: int = 1) -> Path:
    """Conversations of one to fifteen exchanges, some with a system message, one with a very long answer."""
    draw, words = random.Random(seed), " ".join(SENTENCES).split()
    with (folder / "chat.jsonl").open("w") as file:
        for number in range(60):
            exchanges = draw.randint(1, 15)
            messages = [{"role": "system", "content": " ".join(draw.choices(words, k=2))}] if number % 3 == 0 else []
            for _ in range(exchanges):
                most = 60 if number % 20 == 7 else 6
                messages += [
                    {"role": role, "content": " ".join(draw.choices(words, k=draw.randint(1, most)))}
                    for role in ("user", "assistant")
                ]
            file.write(json.dumps({"messages": messages}) + "\n")
    return folder / "chat.jsonl"


def prepared(folder: Path, tokenizer: Tokenizer | None = None, **changes: object) -> Prepared:
    recipe = load(write_recipe(folder, said(folder), **{"text.validation": 0.3, **changes}))
    return prepare_text(recipe, lambda line: None, tokenizer=tokenizer)


@pytest.mark.parametrize("kind", ["own", "foreign"])
@pytest.mark.parametrize("context", [16, 48, 200])
def test_each_answer_is_learnt_exactly_once(tmp_path: Path, kind: str, context: int) -> None:
    made = prepared(tmp_path, None if kind == "own" else foreign(CHATML))
    side, tokenizer = made.shards.train, made.tokenizer
    table = WindowTable(side, context, everything=False)
    count: Counter[int] = Counter()
    for window in table.windows:
        assert 0 < sum(piece.size for piece in window) <= context
        for piece in window:
            learnt = np.flatnonzero(table._learnt(piece)) + 1 - (piece.prefix[1] - piece.prefix[0]) + piece.begin
            assert len(learnt)
            count.update(learnt.tolist())
    answers = np.flatnonzero(side.parts(0, side.tokens) == ANSWER).tolist()
    assert count == Counter(answers) and table.targets == len(answers)
    assert table.cut > 0 or context == 200
    ids = [tokenizer.decode(side.read(at, at + 1).tolist()) for at in answers]
    assert sum(map(len, ids)) > 100


@pytest.mark.parametrize("kind", ["own", "foreign", "default"])
def test_a_long_conversation_is_cut_to_conversations(tmp_path: Path, kind: str) -> None:
    """Each window of whole exchanges is what the template says of the system message and these exchanges alone."""
    tokenizer = {"own": None, "foreign": foreign(CHATML), "default": foreign(WITH_DEFAULT)}[kind]
    made, template = prepared(tmp_path, tokenizer), None
    template = template_of(made.tokenizer)
    side = made.shards.train
    table = WindowTable(side, 120, everything=False)
    parts_of, seen = side.parts, 0
    everyone = [json.loads(line)["messages"] for line in (tmp_path / "chat.jsonl").read_text().splitlines()]
    alone = set()
    for messages in everyone:
        system = [each for each in messages if each["role"] == "system"]
        turns = messages[len(system) :]
        subs = [[*system, *turns[a:b]] for a in range(0, len(turns), 2) for b in range(a + 2, len(turns) + 1, 2)]
        alone |= {tuple(ids.tolist()) for ids, _ in template.encode(subs)}
    for window in table.windows:
        for piece in window:
            whole = parts_of(piece.begin, piece.begin + 1)[0] == TURN or piece.prefix[0] == piece.prefix[1]
            ids = tuple(table._ids(piece).tolist())
            ended = piece.end == side.tokens or parts_of(piece.end, piece.end + 1)[0] in (TURN, CONTEXT)
            if piece.prefix[1] > piece.prefix[0] and whole and ended and piece.size < 90:
                trailing = tuple(made.tokenizer.encode("\n")) if kind != "own" else ()
                assert ids in alone or (*ids, *trailing) in alone, made.tokenizer.decode(ids)
                seen += 1
    assert seen > 10


def test_a_long_system_message_stands_before_each_exchange_that_it_leaves_room_for() -> None:
    """Longer than half a window, it is still repeated; where an exchange needs the room, the exchange is whole."""
    system, exchange, long = [CONTEXT] * 40, [TURN, CONTEXT, ANSWER, ANSWER], [TURN, *[CONTEXT] * 30, ANSWER]
    parts = np.array([*system, *exchange * 9, *long, *exchange * 2], np.uint8)
    pieces = _cut(0, len(parts), parts, 63)
    assert all(piece.size <= 63 for piece in pieces)
    without = [piece for piece in pieces if piece.begin > 0 and piece.prefix == (0, 0)]
    assert [parts[piece.begin : piece.end].tolist()[: len(long)] for piece in without] == [long]
    assert all(piece.prefix == (0, 40) for piece in pieces if piece.begin > 0 and piece not in without)
    learnt = [at for piece in pieces for at in range(max(piece.begin, piece.counted), piece.end) if parts[at] == ANSWER]
    assert learnt == np.flatnonzero(parts == ANSWER).tolist()


def test_a_packed_window_is_its_conversations_alone(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    table = WindowTable(made.shards.validation, 120, everything=False)
    model = stirred(Transformer(shape(context=120), made.tokenizer.vocab_size)).eval()
    with torch.no_grad():
        packed = sum(
            model(batch.tokens, batch.targets, segments=batch.segments).item() for batch in packed_batches(table, 3)
        )
        alone, targets = 0.0, 0
        for window in table.windows:
            for piece in window:
                ids = torch.from_numpy(table._ids(piece))[None]
                wanted = ids[:, 1:].clone()
                wanted[0, ~torch.from_numpy(table._learnt(piece))] = IGNORED
                alone += model(ids[:, :-1], wanted).item()
                targets += int((wanted != IGNORED).sum())
    assert max(map(len, table.windows)) > 1
    assert targets == table.targets and packed == pytest.approx(alone, rel=1e-5)


def test_ranks_evaluate_each_window_once(tmp_path: Path) -> None:
    table = WindowTable(prepared(tmp_path).shards.validation, 64, everything=False)
    for world in (1, 2, 3):
        ranks = [list(packed_batches(table, 4, rank, world)) for rank in range(world)]
        assert len({len(batches) for batches in ranks}) == 1
        assert sum(int((batch.targets != IGNORED).sum()) for each in ranks for batch in each) == table.targets


def test_every_epoch_reads_each_window_once_in_another_order(tmp_path: Path) -> None:
    order = PackedShuffle(3, WindowTable(prepared(tmp_path).shards.train, 64, everything=False))
    epochs = [order.indices(np.arange(order.windows) + order.windows * epoch).tolist() for epoch in range(3)]
    assert all(sorted(each) == list(range(order.windows)) for each in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_all_learns_every_token_but_the_first(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    table = WindowTable(made.shards.train, 100, everything=True)
    assert table.targets == made.shards.train.tokens - made.shards.train.documents


def test_a_text_has_no_answers_to_learn(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n\n".join(SENTENCES * 30))
    recipe = load(write_recipe(tmp_path, tmp_path / "a.txt", **{"train.on": "assistant"}))
    with pytest.raises(LLMError, match=r"train.on = assistant, but .* holds no conversations"):
        prepare_text(recipe, lambda line: None)
