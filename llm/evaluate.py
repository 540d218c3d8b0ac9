"""python -m llm.evaluate [RUN]: how well a run predicts text, tells good sentences from bad, and does in lm-eval."""

import argparse
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.base.errors import RecipeError, RefusedError, TextError, run

if TYPE_CHECKING:
    import numpy as np

    from llm.data.batches import Tokens
    from llm.data.shards import Shards, Split
    from llm.run_folder.loaded_run import LoadedRun

KEYS = (("good", "bad"), ("sentence_good", "sentence_bad"))  # of a pair in .jsonl; the latter are those of BLiMP


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llm.evaluate",
        description="Loss, bits per byte and perplexity of a run, over its validation side or over texts of your own; "
        "or how often it prefers the good one of two sentences; or tasks of lm-evaluation-harness.",
    )
    parser.add_argument(
        "run", nargs="?", help="name of a run, or RUN/step-N, RUN/newest; default: the best checkpoint of the last run"
    )
    parser.add_argument(
        "--text", action="append", metavar="FILE", help="a text, glob or named text instead of the validation side"
    )
    parser.add_argument("--alone", action="store_true", help="each document alone, as lm-eval reads them, not joined")
    parser.add_argument("--yardsticks", action="store_true", help="what gzip, xz and a byte 5-gram make of that text")
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE", help="GOOD, a tab and BAD on a line, or .jsonl with good and bad"
    )
    parser.add_argument("--tasks", metavar="NAME,...", help="tasks of lm-eval, on the checkpoint's folder as it lies")
    parser.add_argument("--task-folder", type=Path, metavar="FOLDER", help="where tasks of your own lie, as .yaml")
    parser.add_argument("--rows", type=int, default=8, help="windows at once (default 8)")
    given = parser.parse_args()
    if given.rows < 1:
        raise RecipeError(f"--rows = {given.rows}: at least 1 is expected")
    return given


def main() -> None:
    given = arguments()
    from llm.run_folder.loaded_run import open_run

    opened = open_run(given.run)
    print(f"run                   {opened.name}")
    if given.pairs:
        print(judge_pairs(opened, given.pairs, given.rows))
    if given.tasks:
        for line in harness(opened, given.tasks.split(","), given.task_folder, given.rows):
            print(line)
    if given.text or not (given.pairs or given.tasks):
        measure(opened, _own_text(opened, given.text) if given.text else _validation(opened), given)


@dataclass(frozen=True)
class Read:
    """A text as this run reads it: its tokens joined, where its documents begin, and its own bytes."""

    name: str
    tokens: "Split | Tokens"
    starts: list[int]
    size: int  # bytes
    documents: list[bytes]


def measure(opened: "LoadedRun", text: Read, given: argparse.Namespace) -> None:
    """Print what the text costs; with --alone no document is told what stood before it, and no BOS is predicted."""
    # As lm-eval counts them: what stands between runs of Unicode's whitespace, nothing at an end included.
    size, words = text.size, sum(len(re.split(r"\s+", document.decode())) for document in text.documents)
    if given.alone:
        documents = [text.tokens.read(*pair) for pair in pairwise([*text.starts, text.tokens.tokens])]
        nats = sum(_nats_alone(opened, document, given.rows) for document in documents)
        targets = sum(map(len, documents)) - len(documents)
    else:
        nats, targets = _nats(opened, text.tokens, given.rows), text.tokens.tokens - 1
    if not targets:
        raise TextError(f"{text.name}: nothing to predict: name a longer text")
    bits = nats / size / math.log(2)
    print(
        f"text                  {text.name}: {len(text.documents):,} documents{', each alone' if given.alone else ''}, "
        f"{size:,} bytes, {targets:,} targets\n"
        f"loss                  {nats / targets:.4f} nats a token\n"
        f"bits per byte         {bits:.4f}\n"
        f"perplexity a token    {_exp(nats / targets):,.2f}\n"
        f"perplexity a word     {_exp(nats / words):,.2f}"
    )
    if given.yardsticks:
        from llm.insight.baselines import MOST, yardsticks

        train = _shards(opened).train
        table = [opened.tokenizer.bytes_of(id) for id in range(opened.tokenizer.vocabulary)]
        learnt = b"".join(table[id] for id in train.read(max(0, train.tokens - MOST), train.tokens).tolist())
        print("yardsticks            bits per byte, after reading the training side")
        for name, value in {**yardsticks(learnt, b"".join(text.documents)), "this run": bits}.items():
            print(f"  {name:<19} {value:.4f}")


def _nats(opened: "LoadedRun", tokens: "Split | Tokens", rows: int) -> float:
    import torch

    from llm.data.batches import eval_batches

    nats, device = 0.0, opened.model.lm_head.weight.device
    with torch.no_grad():
        for batch in eval_batches(tokens, opened.recipe.model.context, rows):
            batch = batch.to(device)
            nats += opened.model(batch.tokens, batch.targets).item()
    return nats


def _nats_alone(opened: "LoadedRun", document: "np.ndarray", rows: int) -> float:
    """The same of one document; as in lm-eval, its last window reaches back so that it too reads a whole context."""
    import torch

    from llm.base.constants import IGNORED
    from llm.data.batches import Tokens

    context = opened.recipe.model.context
    rest = (len(document) - 1) % context
    nats = _nats(opened, Tokens(document[: len(document) - rest]), rows)
    if rest:
        last = torch.from_numpy(document[-context - 1 :].astype("int64"))[None].to(opened.model.lm_head.weight.device)
        targets = last[:, 1:].clone()
        targets[:, :-rest] = IGNORED
        with torch.no_grad():
            nats += opened.model(last[:, :-1], targets).item()
    return nats


def _own_text(opened: "LoadedRun", files: list[str]) -> Read:
    """Texts split into documents as the run's own were."""
    import numpy as np

    from llm.data.batches import Tokens
    from llm.data.documents import Corpus
    from llm.distributed.process import warn

    corpus = Corpus(replace(opened.recipe.text, files=tuple(files)))
    for line in corpus.repeated:
        warn(f"text: {line}")
    documents = list(corpus.documents())
    parts = [_ids(opened, document.decode()) for document in documents]
    starts = np.cumsum([0, *map(len, parts[:-1])]).tolist()
    tokens = Tokens(np.concatenate([np.empty(0, np.uint32), *parts]))
    return Read(", ".join(files), tokens, starts, sum(map(len, documents)), documents)


def _validation(opened: "LoadedRun") -> Read:
    """The validation side that the run was evaluated on."""
    side = _shards(opened).validation.verified()
    if not side.tokens:
        raise TextError(
            f"run {opened.folder.name} has no validation side (text.validation = 0): name a text with --text"
        )
    starts = side.document_starts().tolist()
    ids = (side.read(*pair).tolist() for pair in pairwise([*starts, side.tokens]))
    documents = [opened.tokenizer.decode(each).encode() for each in ids]
    return Read("validation side", side, starts, side.text_bytes, documents)


def _shards(opened: "LoadedRun") -> "Shards":
    from llm.data.shards import of_run

    return of_run(opened.folder)


def _ids(opened: "LoadedRun", text: str) -> "np.ndarray":
    """BOS and the ids of a text."""
    import numpy as np

    return np.array([opened.tokenizer.bos, *opened.tokenizer.encode(text)], np.uint32)


# ------------------------------------------------------------------------------------------------- sentence pairs


def judge_pairs(opened: "LoadedRun", path: Path, rows: int) -> str:
    """In how many pairs of the file the good sentence is the likelier one, as a line; equal ones do not count."""
    pairs = read_pairs(path)
    likely = likelihoods(opened, [sentence for pair in pairs for sentence in pair], rows)
    right = sum(good > bad for good, bad in zip(likely[::2], likely[1::2], strict=True))
    of = f"{right:,} of {len(pairs):,}, {right / len(pairs):.2%}"
    return f"pairs                 {path.name}: the good one is likelier in {of}"


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Good and bad sentence of each line. TextError names the line that is none."""
    from llm.data.documents import holds_rows

    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(
            f"--pairs = {path} cannot be read as text: {getattr(error, 'strerror', None) or error}"
        ) from None
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = (
                json.loads(line) if holds_rows(path) else dict(zip(KEYS[0], line.rstrip("\r").split("\t"), strict=True))
            )
            pair = next((value[good], value[bad]) for good, bad in KEYS if good in value)
            if not all(isinstance(sentence, str) for sentence in pair):  # a null is no sentence "None"
                raise TypeError
            pairs.append(pair)
        except (ValueError, TypeError, KeyError, StopIteration, RecursionError):
            raise TextError(
                f"{path}, line {number}: GOOD, a tab and BAD are expected, or .jsonl with good and bad"
            ) from None
    if not pairs:
        raise TextError(f"{path} holds no pairs: write GOOD, a tab and BAD on a line")
    return pairs


def likelihoods(opened: "LoadedRun", sentences: list[str], rows: int) -> list[float]:
    """Log-probability (nats) of each sentence as a whole document."""
    import torch

    model, context, found = opened.model, opened.recipe.model.context, []
    encoded = [torch.from_numpy(_ids(opened, sentence).astype("int64")) for sentence in sentences]
    if (longest := max(map(len, encoded))) > context + 1:
        raise TextError(f"a sentence of {longest - 1} tokens is longer than the context of {context}: shorten it")
    for low in range(0, len(encoded), rows):
        part = encoded[low : low + rows]
        batch = torch.nn.utils.rnn.pad_sequence(part, batch_first=True, padding_value=-1).to(
            model.lm_head.weight.device
        )
        with torch.no_grad():
            logits = model.logits(batch[:, :-1].clamp(min=0)).float().log_softmax(-1)
        each = logits.gather(2, batch[:, 1:, None].clamp(min=0))[..., 0]
        found += each.double().masked_fill(batch[:, 1:] < 0, 0).sum(1).tolist()
    return found


# ------------------------------------------------------------------------------------------------- lm-eval


def harness(opened: "LoadedRun", tasks: list[str], folder: Path | None, rows: int) -> Iterator[str]:
    """Lines with the results of lm-eval's tasks, run on the checkpoint's folder as it lies, in fp32."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks needs lm-eval ({error}): pip install -e '.[eval]'") from None

    class Folder(HFLM):
        def loglikelihood_rolling(self, *requests: Any, **how: Any) -> Any:
            self.add_bos_token = False  # their windows begin with it already
            try:
                return super().loglikelihood_rolling(*requests, **how)
            finally:
                self.add_bos_token = True

    if not opened.tokenizer.is_portable:
        raise RefusedError(
            f"{opened.name} has no tokenizer.json, which lm-eval needs: its vocabulary is of another kind"
        )
    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise RecipeError(f"--tasks: lm-eval knows no {unknown[0]}; tasks of your own lie in --task-folder")
    device = str(opened.model.lm_head.weight.device)
    model = Folder(
        str(opened.checkpoint.folder), device=device, dtype="float32", batch_size=rows, add_bos_token=True,
        max_length=opened.recipe.model.context)  # fmt: skip
    results = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert results is not None
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "stderr" not in name and name != "sample_len":
                yield f"{task:<21} {name.removesuffix(',none')} {value:.6g}"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf


if __name__ == "__main__":
    run(main)
