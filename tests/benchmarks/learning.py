"""What is learnt from a small text, row by row: python tests/benchmarks/learning.py [TABLE ...] [--results FILE] [--threads N]

Each row trains quickstart's recipe with changes through launch/train.py, in a process of its own, one thread unless told
otherwise, and keeps validation bits per byte in FILE, so that a sitting goes on where it was stopped. Without a table it lists
them with what they cost; with --show it prints what FILE holds as Markdown.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import re
import signal
import statistics
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from llm.data.sources import wiki_documents
from llm.prepare import MARKER
from tests.benchmarks.alternatives import plant
from tests.forks import ROOT, ended, script, start
from tests.tiny import with_last_length

PARTS = {"third": 3, "sixth": 6}  # one article in so many of the packaged text, as a text of its own
SPEEDS = {96: 9500, 128: 7800, 192: 5000, 384: 1800}  # tokens a second and thread, by width, to tell the cost by


@dataclass(frozen=True)
class Row:
    """`changes` are overrides of quickstart's recipe; `other` what the code is altered by, as alternatives.py knows it."""

    name: str
    changes: str = ""
    other: str = ""
    seeds: int = 1


AVERAGE = re.compile(r"average over (\d+)% of the run: ([\d.]+)")  # as alternatives.py writes its event
NARROW = "model.dim=128 model.heads=2 train.tokens=500k"
ADAMW = "train.optimizer=adamw train.weight_decay=0.1"
HOBBY = Row("hobbyist's: AdamW at a constant 3e-4, dropout 5 %", f"{ADAMW} train.learning_rate=3e-4 train.decay=0 train.warmup=0 model.dropout=5%")  # fmt: skip
NANOGPT = Row("nanoGPT's: AdamW 1e-3, warm-up 100, cosine", f"{ADAMW} train.learning_rate=1e-3 train.warmup=100 train.decay=90%", "cosine_decay")  # fmt: skip
RATES = [
    Row("defaults"),
    Row("rates / 2", "train.learning_rate=0.01"),
    Row("rates x 2", "train.learning_rate=0.04"),
]
VOCABULARIES = [
    Row("8,192 pieces", "tokenizer.vocabulary=8192"),
    Row("32,768 pieces", "tokenizer.vocabulary=32768"),
    Row("32,768 pieces, in as much time", "tokenizer.vocabulary=32768 train.tokens=425k"),
]
TABLES: dict[str, tuple[str, list[Row]]] = {
    "rates": (NARROW, [
        Row("defaults", seeds=3),
        Row("all of the rest at 0.15 of Muon's rate", other="optimizer.ADAMW_LR_FACTORS.embed_tokens=0.15 optimizer.ADAMW_LR_FACTORS.norm=0.15"),
        Row("embeddings at 0.5 of it", other="optimizer.ADAMW_LR_FACTORS.embed_tokens=0.5"),
        Row("embeddings at 2 of it", other="optimizer.ADAMW_LR_FACTORS.embed_tokens=2"),
        Row("Muon's rate 0.01, embeddings as they were", "train.learning_rate=0.01", "optimizer.ADAMW_LR_FACTORS.embed_tokens=2"),
        Row("Muon's rate 0.04, embeddings as they were", "train.learning_rate=0.04", "optimizer.ADAMW_LR_FACTORS.embed_tokens=0.5"),
        Row("AdamW's second beta 0.95", other="optimizer.BETAS=0.9,0.95"),
        Row("AdamW's second beta 0.98, first 0.8", other="optimizer.BETAS=0.8,0.98"),
        Row("untied", "model.tied=false"),
        Row("untied, head at 0.5", "model.tied=false", "optimizer.ADAMW_LR_FACTORS.lm_head=0.5"),
    ]),
    "twice as long": ("model.dim=128 model.heads=2 train.tokens=1M", [
        Row("defaults"),
        Row("rates / 2", "train.learning_rate=0.01"),
        Row("rates / 2, last 97 % falling", "train.learning_rate=0.01 train.decay=97%"),
        Row("Muon's rate / 2, embeddings as they were", "train.learning_rate=0.01", "optimizer.ADAMW_LR_FACTORS.embed_tokens=2"),
        Row("AdamW's second beta 0.95", other="optimizer.BETAS=0.9,0.95"),
        Row("untied", "model.tied=false"),
    ]),
    "muon": (NARROW, [
        Row("momentum 0.8", other="optimizer.MOMENTUM=0.8"),
        Row("momentum 0.95", other="optimizer.MOMENTUM=0.95"),
        Row("momentum from 0.8 up over 200 steps", other="momentum_warmup"),
        Row("without Nesterov", other="no_nesterov"),
        Row("two polynomials", other="two_polynomials"),
        Row("four polynomials", other="four_polynomials"),
        Row("NorMuon", other="normuon", seeds=2),
        Row("updates of 0.2 sqrt(max)", other="rms_scale"),
        Row("cautious decay", other="cautious"),
        Row("embeddings not decayed", other="embeddings_kept"),
    ]),
    "momentum": ("tokenizer.vocabulary=4096 train.tokens=500k train.shallow=0 train.sampled_softmax=0", [
        *(Row(f"momentum {momentum}", other=f"optimizer.MOMENTUM={momentum}") for momentum in (0.78, 0.82, 0.86, 0.9, 0.93)),
        Row("momentum 0.86, last 70 % falling", "train.decay=70%", "optimizer.MOMENTUM=0.86"),
    ]),
    "schedule": (NARROW, [
        Row("last 60 % falling in a line, warm-up of 10 steps", seeds=3),
        Row("last 40 % falling", "train.decay=40%", seeds=3),
        Row("last 80 % falling", "train.decay=80%", seeds=3),
        Row("last 97 % falling", "train.decay=97%", seeds=3),
        Row("1 - sqrt", other="sqrt_decay", seeds=3),
        Row("cosine", other="cosine_decay", seeds=3),
        Row("cosine over 97 %", "train.decay=97%", "cosine_decay", seeds=3),
        Row("no warm-up", "train.warmup=0", seeds=3),
        Row("warm-up of 50 steps", "train.warmup=50", seeds=3),
        Row("averaged weights", other="averaged", seeds=3),
        Row("averaged weights, last 20 % falling", "train.decay=20%", "averaged", seeds=3),
        Row("averaged weights, rate never falling", "train.decay=0", "averaged", seeds=3),
    ]),
    "batch": (NARROW, [
        Row("512 tokens a step", "train.tokens_per_step=512"),
        Row("2,048 tokens a step", "train.tokens_per_step=2048"),
        Row("2,048 tokens a step, rates x 1.4", "train.tokens_per_step=2048 train.learning_rate=0.028"),
        Row("4,096 tokens a step", "train.tokens_per_step=4096"),
    ]),
    "regularisation": ("text.files=[sixth.txt] model.dim=96 model.heads=3 train.epochs=5 evaluate.every=225", [
        Row("decay over 0.7 epochs (0.32 a step)", "train.weight_decay=0.7epochs", seeds=3),
        Row("decay over 2.2 epochs (0.1)", "train.weight_decay=0.1", seeds=3),
        Row("decay over 0.35 epochs (0.63)", "train.weight_decay=0.35epochs", seeds=3),
        Row("decay over 0.7 epochs, embeddings not", "train.weight_decay=0.7epochs", "embeddings_kept", seeds=3),
        Row("decay over 0.7 epochs, dropout 5 %", "train.weight_decay=0.7epochs model.dropout=5%", seeds=3),
        Row("decay over 0.7 epochs, dropout 10 %", "train.weight_decay=0.7epochs model.dropout=10%", seeds=3),
    ]),
    "decay": (NARROW, [
        Row("0.03", "train.weight_decay=0.03"),
        Row("0.1", "train.weight_decay=0.1"),
        Row("0.2", "train.weight_decay=0.2"),
        Row("0.4", "train.weight_decay=0.4"),
        Row("0.1, embeddings not", "train.weight_decay=0.1", "embeddings_kept"),
    ]),
    "vocabulary": (NARROW, [
        Row("4,096", seeds=3),
        Row("1,024", "tokenizer.vocabulary=1024", seeds=3),
        Row("2,048", "tokenizer.vocabulary=2048", seeds=3),
        Row("8,192", "tokenizer.vocabulary=8192", seeds=3),
        Row("16,384", "tokenizer.vocabulary=16384", seeds=3),
    ]),
    "quickstart": ("train.tokens_per_step=2048", [
        Row("as it stands"),
        Row("1.05 M tokens: as much time as 1,024 a step take for 0.9 M", "train.tokens=1050k"),
        Row("rates x 1.4", "train.learning_rate=0.028"),
        Row("1,024 tokens a step, 0.9 M tokens", "train.tokens_per_step=1024 train.tokens=900k"),
    ]),
    "2M": ("train.tokens=2M", [
        Row("defaults", "evaluate.every=160", seeds=3),
        Row("norms of queries and keys at 1", "evaluate.every=325", "transformer.QK_NORM_INIT=1", seeds=3),
        Row("a feature that all tokens share", "evaluate.every=160", "shared_feature"),
        Row("AdamW's second beta 0.95", "evaluate.every=80", "optimizer.BETAS=0.9,0.95"),
        HOBBY,
        NANOGPT,
    ]),
    "8M": ("train.tokens=8M evaluate.every=800", [
        Row("defaults"),
        Row("embeddings not decayed, dropout 10 %", "model.dropout=10%", "embeddings_kept"),
        Row("embeddings not decayed, decay 0.35 epochs", "train.weight_decay=0.35epochs", "embeddings_kept"),
        Row("embeddings not decayed, decay 1.4 epochs", "train.weight_decay=1.4epochs", "embeddings_kept"),
        Row("embeddings not decayed", other="embeddings_kept"),
        Row("last 80 % falling", "train.decay=80%"),
        Row("2,048 tokens a step", "train.tokens_per_step=2048 evaluate.every=400"),
        Row("rates / 2", "train.learning_rate=0.01"),
    ]),
    "six-epochs": ("text.files=[third.txt] model.dim=128 model.heads=2 train.epochs=6 evaluate.every=450", [
        Row("defaults"),
        Row("dropout 5 %", "model.dropout=5%"),
        Row("dropout 10 %", "model.dropout=10%"),
        Row("decay 0.35 epochs", "train.weight_decay=0.35epochs"),
        Row("decay 0.35 epochs, dropout 10 %", "train.weight_decay=0.35epochs model.dropout=10%"),
        Row("decay 0.7 epochs", "train.weight_decay=0.7epochs"),
        Row("decay 1.4 epochs", "train.weight_decay=1.4epochs"),
        Row("decay 0.2 epochs", "train.weight_decay=0.2epochs"),
        Row("decay 0.5 epochs", "train.weight_decay=0.5epochs"),
        Row("decay 0.35 epochs, embeddings not", "train.weight_decay=0.35epochs", "embeddings_kept"),
        Row("decay 0.35 epochs, two polynomials", "train.weight_decay=0.35epochs", "two_polynomials"),
        Row("decay 0.35 epochs, four polynomials", "train.weight_decay=0.35epochs", "four_polynomials"),
        Row("decay 0.35 epochs, 2,048 tokens a step", "train.weight_decay=0.35epochs train.tokens_per_step=2048 evaluate.every=225"),
        Row("decay 0.35 epochs, last 80 % falling", "train.weight_decay=0.35epochs train.decay=80%"),
        Row("decay 0.35 epochs, rates / 2", "train.weight_decay=0.35epochs train.learning_rate=0.01"),
        Row("decay 0.35 epochs, NorMuon", "train.weight_decay=0.35epochs", "normuon"),
    ]),
    "six-epochs, narrower": ("text.files=[third.txt] model.dim=96 model.heads=3 model.ffn_dim=192 train.epochs=6 evaluate.every=450", [
        Row("decay 0.35 epochs", "train.weight_decay=0.35epochs"),
        Row("decay 1.4 epochs", "train.weight_decay=1.4epochs"),
    ]),
    "twenty-epochs": ("text.files=[third.txt] model.dim=128 model.heads=2 train.epochs=20 evaluate.every=750", [
        Row("model.dropout=auto train.weight_decay=auto", "model.dropout=auto train.weight_decay=auto"),
        Row("AdamW 1e-3, cosine, decay 0.1", f"{ADAMW} train.learning_rate=1e-3 train.decay=98% train.warmup=100 model.dropout=0", "cosine_decay"),
        Row("AdamW 1e-3, cosine, decay 0.1, dropout 10 %", f"{ADAMW} train.learning_rate=1e-3 train.decay=98% train.warmup=100 model.dropout=10%", "cosine_decay"),
    ]),
    **{f"width-{dim}": (f"model.dim={dim} model.heads={heads} train.tokens=500k", RATES) for dim, heads in ((96, 3), (192, 3), (384, 6))},
    # Each row but the last reads as much of the text as the default does in 0.5 M tokens.
    **{f"transfer, {name}": (f"text.files=[{text}] train.epochs={epochs} {more}", [*RATES, *VOCABULARIES]) for name, text, epochs, more in (
        ("French", "wiki-leads-fr", 0.553, ""), ("Spanish", "wiki-leads-es", 0.8075, ""),
        ("Python", f"{sysconfig.get_path('stdlib')}/*.py", 0.4084, "text.documents=files"), ("chat", "chitchat", 0.16, "train.on=all"))},
}  # fmt: skip


def overrides(table: str, row: Row) -> dict[str, str]:
    common = "train.tokens_per_step=1024 evaluate.prompts=[] checkpoint.every=1000000 tracking.every=50 evaluate.every=1000000"
    given = with_last_length(f"{common} {TABLES[table][0]} {row.changes}".split())
    return dict(each.split("=", 1) for each in given)


def cost(table: str, row: Row) -> float:
    """Seconds to expect of one seed."""
    changes = overrides(table, row)
    tokens = float(changes.get("train.tokens", "2M").replace("M", "e6").replace("k", "e3"))
    if "train.epochs" in changes:
        parts = [number for part, number in PARTS.items() if part in changes.get("text.files", "")]
        tokens = float(changes["train.epochs"]) * 1.39e6 / max([1, *parts])
    return tokens / SPEEDS[int(changes.get("model.dim", 192))] + 15


def train(table: str, row: Row, seed: int, threads: int) -> dict[str, object]:
    """Train the row in a child; what came of it."""
    given = overrides(table, row) | {"seed": str(seed), "run": "row", "machine.threads": str(threads)}
    given["text.cache"] = os.environ.get("LEARNING_CACHE", str(ROOT / "data"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        launch = script(
            ROOT / "launch/train.py", ROOT / "recipes/quickstart.yaml", *(f"{k}={v}" for k, v in given.items())
        )

        def act() -> None:
            end_with_parent()
            plant(row.other)
            launch()

        for part, number in PARTS.items():
            documents = list(wiki_documents("en-us"))[::number] if part in given.get("text.files", "") else []
            (folder / f"{part}.txt").write_bytes(f"{MARKER}\n".encode().join(documents))
        child = ended(start(act, folder), folder, seconds=7200)
        if child.status:
            raise RuntimeError(child.err[-2000:])
        lines = [json.loads(line) for line in (folder / "runs/row/metrics.jsonl").read_text().splitlines()]
    curve = [[line["step"], round(line["bits_per_byte"], 4)] for line in lines if "bits_per_byte" in line]
    last = [line for line in lines if "bits_per_byte" in line][-1]
    return {
        "end": last["bits_per_byte"],
        "best": min(bits for _, bits in curve),
        "train_loss": last["train_loss"],
        "val_loss": last["val_loss"],
        "events": [line["event"] for line in lines if "event" in line],
        "curve": curve,
        "tokens_per_second": statistics.median(line["tokens_per_second"] for line in lines if "loss" in line),
    }


def end_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def begin_worker() -> None:
    """A worker ends with the sitting: by SIGTERM, not by the Ctrl-C that its main process sees to."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()


def done(job: tuple[str, Row, int, int]) -> tuple[str, dict[str, object] | str]:
    """The job's key among the results, and what came of it, or why nothing did."""
    table, row, seed, _ = job
    try:
        result: dict[str, object] | str = train(*job)
    except Exception as error:
        result = repr(error)
    return f"{table}/{row.name}/{seed}", result


def show(results: dict[str, dict[str, object]]) -> None:
    """The finished rows as Markdown tables: median of the seeds, and their spread where there are several."""
    for table, (common, rows) in TABLES.items():
        print(f"\n### {table}\n\n`{common}`\n")
        print("| row | seeds | bits per byte at the end | its own best | spread |\n|---|---|---|---|---|")
        for row in rows:
            found = [results[key] for seed in range(1, 10) if (key := f"{table}/{row.name}/{seed}") in results]
            if found:
                line(row.name, *([float(str(each[name])) for each in found] for name in ("end", "best")))
                averages = [AVERAGE.findall(" ".join(map(str, each["events"])))[-2:] for each in found]  # type: ignore[call-overload]
                for seeds in zip(*averages, strict=True):
                    ends = [float(bits) for _, bits in seeds]
                    line(f"{row.name}: the average over {seeds[0][0]} %", ends, ends)


def line(name: str, ends: list[float], bests: list[float]) -> None:
    spread = f"{min(ends):.4f} to {max(ends):.4f}" if len(ends) > 1 else ""
    print(f"| {name} | {len(ends)} | {statistics.median(ends):.4f} | {statistics.median(bests):.4f} | {spread} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE")
    parser.add_argument("--results", type=Path, default=Path("runs/learning.json"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--row", default="", help="only rows whose name holds this")
    parser.add_argument("--most", type=int, default=10**6, help="runs of this sitting")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, each on its own threads")
    parser.add_argument("--show", action="store_true")
    given = parser.parse_args()
    try:
        results = json.loads(given.results.read_text()) if given.results.exists() else {}
    except ValueError:
        parser.error(f"--results {given.results}: no JSON; mend it or name another file")
    if strange := set(given.tables) - set(TABLES):
        parser.error(f"there is no table {strange.pop()}: there are {', '.join(TABLES)}")
    if given.jobs < 1:
        parser.error(f"--jobs {given.jobs}: 1 or more is expected")
    if given.show:
        return show(results)
    jobs = [
        (table, row, seed)
        for table in given.tables or TABLES
        for row in TABLES[table][1]
        for seed in range(1, row.seeds + 1)
        if given.row in row.name and f"{table}/{row.name}/{seed}" not in results
    ]
    for table in given.tables or TABLES:
        costs = [cost(*job[:2]) for job in jobs if job[0] == table]
        print(f"{table}: {len(costs)} runs to do, about {sum(costs) / 60:.0f} min of one thread")
    if not given.tables:
        return
    given.results.parent.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    failed = 0
    with (
        tempfile.TemporaryDirectory() as tempfile.tempdir,  # the runs' folders, which go with the sitting
        multiprocessing.get_context("fork").Pool(given.jobs, begin_worker) as pool,
    ):
        chosen = [(*job, given.threads) for job in jobs[: given.most]]
        for key, result in pool.imap_unordered(done, chosen):
            if isinstance(result, str):
                print(f"{key} failed: {result}", flush=True)
                failed = 1
                continue
            results[key] = result
            beside = given.results.with_suffix(".new")
            beside.write_text(json.dumps(results, indent=1))
            beside.replace(given.results)
            print(f"{key}: {result['end']:.4f} bits per byte, best {result['best']:.4f}", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
