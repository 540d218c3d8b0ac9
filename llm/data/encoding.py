"""Encode blocks of documents, in this process or in child processes.

sentencepiece releases the interpreter's lock, looking up remembered words does not: there only processes use all
cores. They are plain children that read blocks from stdin and end when it closes, so none outlives its parent, however
the parent dies, and Ctrl-C reaches only the parent.
"""

import itertools
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np

from llm.base.errors import GroupError
from llm.data.chat_template import template_of
from llm.data.conversations import messages_of
from llm.data.tokenizer import Tokenizer


class LocalEncoder:
    """Encodes in the calling thread."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype

    def encode(self, text: bytes, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ids of the documents that `text` holds end to end, each after a BOS, and where each begins: (documents,)."""
        bounds = [0, *np.cumsum(lengths).tolist()]
        encoded = self._tokenizer.encode_batch([text[a:b].decode() for a, b in itertools.pairwise(bounds)], threads=1)
        starts = np.cumsum([0, *(len(ids) + 1 for ids in encoded)])
        tokens = np.full(starts[-1], self._tokenizer.bos, self._dtype)
        of_text = np.ones(len(tokens), bool)
        of_text[starts[:-1]] = False
        tokens[of_text] = np.concatenate(encoded)
        return tokens, starts[:-1]

    def close(self) -> None:
        pass


class ConversationEncoder:
    """Encodes conversations in the calling thread."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._template, self._dtype = template_of(tokenizer), dtype

    def encode(self, text: bytes, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of the conversations that `text` holds end to end, where each begins, and the part of each id."""
        bounds = [0, *np.cumsum(lengths).tolist()]
        found = self._template.encode([messages_of(text[a:b]) for a, b in itertools.pairwise(bounds)])
        starts = np.cumsum([0, *(len(ids) for ids, _ in found)])[:-1]
        tokens = np.concatenate([ids for ids, _ in found]).astype(self._dtype)
        return tokens, starts, np.concatenate([parts for _, parts in found])

    def close(self) -> None:
        pass


class ProcessEncoder:
    """Encodes in a child process, which remembers words of its own."""

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        code = "import sys; sys.path.insert(0, sys.argv[1]); from llm.data.encoding import serve; serve(sys.argv[2])"
        command = [sys.executable, "-c", code, str(Path(__file__).parents[2]), dtype.name]
        self._dtype = dtype
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True)
        assert self._child.stdin and self._child.stdout
        self._to, self._from = self._child.stdin, self._child.stdout
        self._model: bytes | None = tokenizer.model  # sent with the first block, once the child is up

    def encode(self, text: bytes, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """As `LocalEncoder.encode`. GroupError if the process was killed."""
        try:
            if self._model is not None:
                _send(self._to, self._model)
                self._model = None
            _send(self._to, text, lengths.astype(np.int64).tobytes())
            return np.frombuffer(_receive(self._from), self._dtype), np.frombuffer(_receive(self._from), np.int64)
        except (BrokenPipeError, EOFError) as error:
            mend = "run the same command again, with more memory if it ran out"
            raise GroupError(f"a process that encodes text ended with status {self._child.wait()}: {mend}") from error

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self._to.close()
        self._from.close()
        self._child.wait()


def serve(dtype: str) -> None:
    """The child's loop: read blocks, write ids, until the parent is gone."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    with suppress(EOFError, BrokenPipeError):
        encoder = LocalEncoder(Tokenizer(_receive(source), "the vocabulary"), np.dtype(dtype))
        while True:
            tokens, starts = encoder.encode(_receive(source), np.frombuffer(_receive(source), np.int64))
            _send(sink, tokens.tobytes(), starts.astype(np.int64).tobytes())
    os._exit(0)  # quietly, although half an answer may be left unread


def _send(pipe: IO[bytes], *parts: bytes) -> None:
    for part in parts:
        pipe.write(len(part).to_bytes(8, "little"))
        pipe.write(part)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> bytes:
    """The next part. EOFError if the other side is gone."""
    head = pipe.read(8)
    part = pipe.read(int.from_bytes(head, "little"))
    if len(head) < 8 or len(part) < int.from_bytes(head, "little"):
        raise EOFError
    return part
