"""How well a run predicts text: its loss over a whole text, and the log-probability of single sentences."""

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from llm.base.constants import IGNORED
from llm.base.errors import TextError
from llm.data.batches import Batch, Tokens, eval_batches, packed_batches
from llm.data.documents import Corpus
from llm.data.encoding import ConversationEncoder
from llm.data.packing import Conversations, WindowTable, table_of
from llm.data.shards import AnyShards, Split, of_run
from llm.data.text_files import JSON_LINES, suffix_of
from llm.distributed.process import warn
from llm.inference.fast_decode import PREPARED
from llm.run_folder.loaded_run import LoadedRun

PAIR_KEYS = (("good", "bad"), ("sentence_good", "sentence_bad"))  # of a pair in .jsonl; the second are BLiMP's


@dataclass(frozen=True)
class EncodedText:
    """A text in the tokens of a run: all documents joined, the start of each, and their own bytes.

    The tokens of conversations are a WindowTable of them instead.
    """

    name: str
    tokens: Split | Tokens | WindowTable
    starts: list[int]
    size: int  # bytes
    documents: list[bytes]

    @property
    def is_chat(self) -> bool:
        return isinstance(self.tokens, WindowTable)


@dataclass(frozen=True)
class Score:
    """The sum of the losses over a text, and the counts that it is divided by."""

    nats: float
    targets: int
    size: int  # bytes
    words: int

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.targets

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.size / math.log(2)

    @property
    def token_perplexity(self) -> float:
        return _exp(self.loss)

    @property
    def word_perplexity(self) -> float:
        return _exp(self.nats / self.words)


def score(run: LoadedRun, text: EncodedText, rows: int, *, alone: bool = False) -> Score:
    """The loss of `text`, `rows` windows at once; with `alone`, no document sees the one before it.

    BOS is a target only where documents are joined. Of conversations, the answers are scored, each conversation alone.
    TextError where there is nothing to predict.
    """
    if isinstance(text.tokens, WindowTable):
        if not text.tokens.targets:
            raise TextError(f"{text.name} holds no answers: name conversations that do")
        return score_answers(run, text.tokens, rows)
    if alone:
        documents = [text.tokens.read(*bounds) for bounds in pairwise([*text.starts, text.tokens.tokens])]
        nats = sum(_nats_alone(run, document, rows) for document in documents)
        targets = sum(map(len, documents)) - len(documents)
    else:
        nats, targets = _nats(run, text.tokens, rows), text.tokens.tokens - 1
    if not targets:
        raise TextError(f"{text.name}: nothing to predict: name a longer text")
    # As lm-eval counts words: all that stands between runs of Unicode whitespace, empty strings at the ends included.
    words = sum(len(re.split(r"\s+", document.decode())) for document in text.documents)
    return Score(nats, targets, text.size, words)


def score_held_out(run: LoadedRun, rows: int) -> Iterator[tuple[str, str, Score]]:
    """Of all that the run held out, its text or answers or those of each of text.sources: source, title and loss.

    A source that holds nothing out is passed over; TextError if none is left.
    """
    found = False
    for name, shards in of_run(run.folder).sources.items():
        about, side = f"{name}: " if name else "", shards.validation.verified()
        if shards.is_chat and (table := table_of(run.recipe, side)).targets:
            found = True
            yield name, f"{about}held-out answers", score_answers(run, table, rows)
        elif not shards.is_chat and side.tokens > 1:
            found, text = True, validation_text(run, shards)
            yield name, f"{about}{text.name}: {len(text.documents):,} documents", score(run, text, rows)
    if not found:
        raise TextError(f"run {run.folder.name} holds nothing out to score: name a text with --text")


def score_answers(run: LoadedRun, table: WindowTable, rows: int) -> Score:
    """The loss on the answers (of all, under train.on = all) of a table of conversations."""
    pieces = [run.tokenizer.bytes_of(id) for id in table.target_ids().tolist()]
    words = b"".join(piece or b" " for piece in pieces).split()
    return Score(_total(run, packed_batches(table, rows)), table.targets, sum(map(len, pieces)), len(words))


def encode_files(run: LoadedRun, files: list[str]) -> EncodedText:
    """Texts, split into documents as the run's own text was; or conversations."""
    corpus = Corpus(replace(run.recipe.text, files=tuple(files)))
    for line in corpus.repeated:
        warn(f"text: {line}")
    documents = list(corpus.documents())
    if not documents:
        raise TextError(f"{', '.join(files)}: nothing to predict: name a longer text")
    size = sum(map(len, documents))
    if corpus.is_chat:
        encoder = ConversationEncoder(run.tokenizer, np.dtype(np.uint32))
        ids, begins, parts = encoder.encode(b"".join(documents), np.array([len(each) for each in documents]))
        table = table_of(run.recipe, Conversations(ids, begins, parts))
        return EncodedText(", ".join(files), table, begins.tolist(), size, documents)
    encoded = [_encode(run, document.decode()) for document in documents]
    starts = np.cumsum([0, *map(len, encoded[:-1])]).tolist()
    tokens = Tokens(np.concatenate([np.empty(0, np.uint32), *encoded]))
    return EncodedText(", ".join(files), tokens, starts, size, documents)


def validation_text(run: LoadedRun, shards: AnyShards | None = None) -> EncodedText:
    """The validation side that the run was evaluated on."""
    side = (shards or of_run(run.folder)).validation.verified()
    if not side.tokens:
        raise TextError(f"run {run.folder.name} has no validation side (text.validation = 0): name a text with --text")
    starts = side.document_starts().tolist()
    ids = (side.read(*bounds).tolist() for bounds in pairwise([*starts, side.tokens]))
    documents = [run.tokenizer.decode(each).encode() for each in ids]
    return EncodedText("validation side", side, starts, side.text_bytes, documents)


def count_preferred(run: LoadedRun, pairs: list[tuple[str, str]], rows: int) -> tuple[int, int]:
    """In how many pairs the good sentence is strictly likelier than the bad one, and how many pairs there are."""
    found = likelihoods(run, [sentence for pair in pairs for sentence in pair], rows)
    return sum(good > bad for good, bad in zip(found[::2], found[1::2], strict=True)), len(pairs)


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The good and the bad sentence of each line. TextError names a line without a pair."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or error
        raise TextError(f"--pairs = {path} cannot be read as text: {cause}") from None
    pairs = [_pair(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not pairs:
        raise TextError(f"{path} holds no pairs: write GOOD, a tab and BAD on a line")
    return pairs


def _pair(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        if suffix_of(path) in JSON_LINES:
            value = json.loads(line)
        else:
            value = dict(zip(PAIR_KEYS[0], line.rstrip("\r").split("\t"), strict=True))
        pair = next((value[good], value[bad]) for good, bad in PAIR_KEYS if good in value)
        if not all(isinstance(sentence, str) and sentence for sentence in pair):  # null is not the sentence "None"
            raise TypeError
        for sentence in pair:
            sentence.encode()  # else it holds half of a surrogate pair
        return pair
    except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
        raise TextError(f"{path}, line {number}: expected GOOD, a tab and BAD, or .jsonl with good and bad") from None


@torch.no_grad()
def likelihoods(run: LoadedRun, sentences: list[str], rows: int) -> list[float]:
    """Log-probability (nats) of each sentence as a whole document."""
    context, device, found = run.recipe.model.context, run.model.lm_head.weight.device, []
    encoded = [torch.from_numpy(_encode(run, sentence).astype("int64")) for sentence in sentences]
    for sentence, ids in zip(sentences, encoded, strict=True):
        if len(ids) > context + 1:
            fault = f"a sentence of {len(ids) - 1} tokens is longer than the context of {context}"
            raise TextError(f"{fault}: shorten {sentence[:40]!r}...")
    for low in range(0, len(encoded), rows):
        padded = torch.nn.utils.rnn.pad_sequence(encoded[low : low + rows], batch_first=True, padding_value=-1)
        inputs, targets = padded[:, :-1].to(device), padded[:, 1:].to(device)
        logits = run.model.logits(inputs.clamp(min=0)).float().log_softmax(-1)
        chosen = logits.gather(2, targets[..., None].clamp(min=0))[..., 0]
        found += chosen.double().masked_fill(targets < 0, 0).sum(1).tolist()
    return found


def _nats(run: LoadedRun, tokens: Split | Tokens, rows: int) -> float:
    begin = run.tokenizer.bos if run.recipe.train.document_mask else None
    return _total(run, eval_batches(tokens, run.recipe.model.context, rows, begin=begin))


@torch.no_grad()
def _total(run: LoadedRun, batches: Iterable[Batch]) -> float:
    """Summed loss (nats) of the batches."""
    nats, device = 0.0, run.model.lm_head.weight.device
    for batch in batches:
        batch = batch.to(device)
        nats += _loss(run, batch.tokens, batch.targets, batch.segments)
    return nats


@torch.no_grad()
def _nats_alone(run: LoadedRun, document: np.ndarray, rows: int) -> float:
    """The loss of one document. Its last window reaches back to fill the context, as in lm-eval."""
    rest = (len(document) - 1) % run.recipe.model.context
    nats = _nats(run, Tokens(document[: len(document) - rest]), rows)
    if rest:
        last = torch.from_numpy(document[-run.recipe.model.context - 1 :].astype("int64"))[None]
        last = last.to(run.model.lm_head.weight.device)
        targets = last[:, 1:].clone()
        targets[:, :-rest] = IGNORED
        nats += _loss(run, last[:, :-1], targets, None)
    return nats


def _loss(run: LoadedRun, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> float:
    """The sum of the losses of windows (B, T), in nats; with the arithmetic of decoding where that is in int8."""
    decoder = PREPARED.get(run.model)
    if decoder is None or not decoder.int8:
        given = {} if segments is None else {"segments": segments}  # which a caller's own model may not take
        return float(run.model(tokens, targets, **given).item())
    nats = 0.0
    for row in range(len(tokens)):
        ends = [] if segments is None else (segments[row].diff().nonzero()[:, 0] + 1).tolist()
        for low, high in pairwise([0, *ends, tokens.shape[1]]):
            logits = decoder.read(tokens[row, low:high].tolist())
            aims = targets[row, low:high]
            nats += F.cross_entropy(logits, aims, ignore_index=IGNORED, reduction="sum").item()
    return nats


def _encode(run: LoadedRun, text: str) -> np.ndarray:
    """BOS and the ids of a text."""
    return np.array([run.tokenizer.bos, *run.tokenizer.encode(text)], np.uint32)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
