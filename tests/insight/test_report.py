"""The report is made from the record alone, agrees with all that says the same figures, and is safe and whole in a browser."""

import json
import math
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llm.report
from llm.base.errors import RecipeError
from llm.data.chat_template import template_of
from llm.insight import baselines, report
from llm.insight.charts import Series, chart, compact, nice, thinned
from llm.insight.copying import copying, repetition
from llm.run_folder.loaded_run import open_run
from llm.run_folder.record import find, read
from tests.forks import ROOT, Ended, run, script, train, write_recipe, write_text
from tests.run_folder.test_metrics import told_wandb

PROMPTS = ["My self Har", "<script>alert(1)</script>"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs, "tiny" told to W&B offline and "other" at another rate; what the first said is in said.txt."""
    folder = tmp_path_factory.mktemp("report")
    (folder / "home").mkdir()
    text = write_text(folder / "text.txt")
    recipe = write_recipe(folder, text, **{"evaluate.prompts": json.dumps(PROMPTS), "tracking.wandb": "offline"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))
        done = run(train(recipe), folder)
        assert done.status == 0, done.err
        (folder / "said.txt").write_text(done.out)
        done = run(train(recipe, "run=other", "tracking.wandb=off", "train.learning_rate=0.01"), folder)
    assert done.status == 0, done.err
    return folder


def command(folder: Path, *arguments: object) -> Ended:
    return run(script("module:llm.report", *arguments), folder)


def text_of(page: str) -> str:
    """What a person reads on the page, each run of blanks as one; no element of it is a script."""
    parts: list[str] = []

    class Reader(HTMLParser):
        skipping = False

        def handle_starttag(self, tag: str, attrs: Any) -> None:
            assert tag not in ("script", "iframe", "img", "object", "base", "form"), tag
            assert not [
                value for name, value in attrs if name in ("src", "href") and not value.startswith(("#", "data:,"))
            ]
            self.skipping = tag == "style"
            parts.append(" " if tag in ("td", "th", "dt", "dd") else "")

        def handle_data(self, data: str) -> None:
            if not self.skipping:
                parts.append(data)

        def handle_endtag(self, tag: str) -> None:
            self.skipping = False

    Reader().feed(page)
    return " ".join("".join(parts).split())


def page_of(*folders: Path) -> str:
    return llm.report.page(folders).decode()


def test_a_run_that_diverged_leaves_room_for_the_others() -> None:
    good, bad = Series("good", [(0, 3.0), (1, 2.5)]), Series("bad", [(0, 300.0), (1, 90.0)])
    assert chart("x", [Series("damaged", [(-9.0, 1.0), (-3.0, 2.0)], "red")], "seconds") is not None
    both, alone = (chart("x", each, "tokens", most=8.0) for each in ([good, bad], [bad]))
    assert both is not None and alone is not None
    assert {float(text) for _, text in both.y_ticks} <= {2.4, 2.5, 2.6, 2.7, 2.8, 2.9, 3.0}
    assert max(float(text) for _, text in alone.y_ticks) >= 250


def test_each_source_of_a_mixture_and_the_other_text_are_in_the_table(tmp_path: Path) -> None:
    line = {"step": 5, "val_loss": 3.0, "bits_per_byte": 1.5, "also_bits_per_byte": 1.7321}
    sources = {"base": {"bits_per_byte": 1.2345}, "<b>": {"bits_per_byte": float("nan")}, "odd": 3}
    lines = [{"step": 0, "val_loss": 4.0, "bits_per_byte": 2.5}, line | {"sources": sources}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    shown = text_of(page_of(tmp_path))
    assert "bits per byte base evaluate.also" in shown and "1.5000 1.2345 1.7321" in shown and "2.5000 - -" in shown


def test_keys_and_names_are_written_for_people(trained: Path) -> None:
    shown = text_of(page_of(*[trained / "runs" / name for name in ("tiny", "other", "tiny")]))
    assert "tiny, other and tiny" in shown and report._value(["a.txt", "b.txt"]) == "a.txt, b.txt"
    assert report._value(None) == report._value(()) == "-"


def test_the_figures_agree_everywhere(trained: Path) -> None:
    """Console, record, W&B's file, the run's list, evaluate and the report say one best figure and one last loss."""
    done = command(trained, "tiny")
    assert done.status == 0 and done.out == "the report is in runs/tiny/report.html\n", done.err
    shown = text_of((trained / "runs/tiny/report.html").read_text())
    record = [json.loads(line) for line in (trained / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    evaluations = [line for line in record if "val_loss" in line]
    losses = [line for line in record if "loss" in line]
    console = (trained / "said.txt").read_text()
    _, rows = told_wandb(trained)
    told = {row["step"]: row for row in rows if "val_loss" in row}
    for line in evaluations:
        step, bits, nats = line["step"], line["bits_per_byte"], line["val_loss"]
        assert (
            f"step {step:>2}/12  validation: loss {nats:.4f} (training {line['train_loss']:.4f}), {bits:.4f} bits"
            in console
        )
        assert (told[step]["bits_per_byte"], told[step]["val_loss"]) == (bits, nats)
        assert re.search(rf" {step} {64 * step} [\d.]+ {nats:.4f} {line['train_loss']:.4f} [\d.,]+ {bits:.4f}", shown)
    best = min(evaluations, key=lambda line: line["bits_per_byte"])
    assert f"best bits per byte {best['bits_per_byte']:.4f}" in shown
    for line in losses:
        assert f"step {line['step']:>2}/12  loss {line['loss']:.4f}  gradient {line['gradient_norm']:.2f}" in console
    assert [(row["step"], row["loss"], row["seconds"], row["memory"]) for row in rows if "loss" in row] == [
        (line["step"], line["loss"], line["seconds"], line["memory"]) for line in losses
    ]
    assert f"last training loss {losses[-1]['loss']:.4f}" in shown
    measured = run(script("module:llm.evaluate", "tiny", "--yardsticks"), trained).out
    assert f"bits per byte         {best['bits_per_byte']:.4f}" in measured
    yardsticks = dict(re.findall(r"  (gzip|xz|byte 5-gram) +([\d.]+)\n", measured))
    assert len(yardsticks) == 3 and all(f"{name}, bits per byte {bits}" in shown for name, bits in yardsticks.items())
    listed = run(script("module:llm.runs"), trained).out
    assert re.search(rf"tiny +finished +12/12 .*{best['bits_per_byte']:.4f}", listed)
    assert (
        f"parameters {record[0]['parameters'] / 1e6:.2f} M" in shown
        and f"{record[0]['parameters'] / 1e6:.2f} M" in console
    )


def test_the_plan_stands_beside_what_came_of_it(trained: Path) -> None:
    shown = text_of(page_of(trained / "runs/tiny"))
    assert "steps 12 12 100%" in shown and "tokens 768 768 100%" in shown
    assert "Started once." in shown


def test_metrics_jsonl_alone_makes_a_page_and_torch_is_not_imported(trained: Path, tmp_path: Path) -> None:
    alone = tmp_path / "runs/alone"
    alone.mkdir(parents=True)
    shutil.copy(trained / "runs/tiny/metrics.jsonl", alone)
    code = "import sys, llm.report; llm.report.main(['alone']); assert 'torch' not in sys.modules"
    subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, check=True, capture_output=True
    )
    page = (alone / "report.html").read_text()
    shown, whole = text_of(page), text_of(page_of(trained / "runs/tiny"))
    for title in ("over tokens", "over time", "Learning rate", "Gradient norm", "Tokens per second", "Memory, in MB"):
        assert title in shown
    curves = [re.findall(r'<path d="(M[^"]*L[^"]*)"', each) for each in (page, page_of(trained / "runs/tiny"))]
    assert len(curves[0]) == 8 and curves[0][4:] == curves[1][4:], "two charts have yardsticks where there is a text"
    table = re.search(r"perplexity.*Events", whole)
    assert table and table[0] in shown and "no yardsticks" in shown and "repeated:" in shown


def test_without_a_name_the_page_is_of_the_run_that_recorded_last(trained: Path, tmp_path: Path) -> None:
    none = command(tmp_path)
    assert none.status == 2 and "there is no run under runs/ here: train one" in none.err
    for age, name in enumerate(("tiny", "other")):
        shutil.copytree(trained / "runs" / name, tmp_path / "runs" / name)
        for path in (tmp_path / "runs" / name).iterdir():
            os.utime(path, (1e9 - age, 1e9 - age))
    (tmp_path / "runs/other/report.html").touch()  # a page is no record
    assert "runs/tiny/report.html" in command(tmp_path).out
    os.utime(tmp_path / "runs/other/metrics.jsonl")
    assert "runs/other/report.html" in command(tmp_path).out


def test_a_page_is_one_file_that_asks_for_nothing(trained: Path) -> None:
    page = page_of(trained / "runs/tiny", trained / "runs/other")
    assert not re.search(r"https?://|url\((?!#)|@import", page) and "default-src 'none'" in page
    assert len(page) < 400_000


def test_nothing_of_a_record_is_markup(trained: Path, tmp_path: Path) -> None:
    evil = "</pre><script>alert('2')</script><img src=x onerror=alert(3)>"
    folder = tmp_path / "evil"
    folder.mkdir()
    lines = [
        {"step": 0, "planned_steps": 9, "planned_seconds": 5.0, "device": evil, "precision": evil, "tokens_per_step": 64},
        {"step": 1, "loss": 2.0, evil: 3.0}, {"step": 2, "loss": 1.0},
        {"step": 2, "val_loss": 2.0, "bits_per_byte": 1.0},
        {"step": 2, "prompt": evil, "sample": evil}, {"step": 2, "event": evil, "texts": [evil, 5]},
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text(json.dumps({"status": 1, "message": evil}))
    (folder / "recipe.yaml").write_text(f"run: {evil}")
    shown = text_of(page_of(folder))
    assert shown.count("</pre><script>alert('2')</script><img") >= 6
    assert text_of(page_of(trained / "runs/tiny")).count("<script>alert(1)</script>") >= 3


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["{"],
        [{"step": 1, "loss": None, "seconds": "x", "tokens_per_second": [1]}],
        [{"step": 1, "loss": float("nan")}, {"step": 2, "val_loss": float("inf"), "bits_per_byte": 1.0}],
        [{"step": 3, "loss": 0.0, "gradient_norm": 0.0, "learning_rate": 0.0, "seconds": 0, "memory": 0}],
        [{"step": 1, "loss": 1e290, "gradient_norm": 1e-290}, {"step": 2, "loss": -1.0, "gradient_norm": 1e290}],
        [{"step": 5, "loss": 2.0}, {"step": 1, "loss": 3.0}, {"step": 1, "loss": 3.0}],
        [{"step": 1, "val_loss": 0.0, "bits_per_byte": 0.0}, {"step": 1, "prompt": "", "sample": ""}],
        [
            {"step": 0, "planned_steps": 0, "planned_seconds": 0, "bytes_per_token": 0},
            {"step": 1, "loss": 2, "epoch": 0},
        ],
        [{"step": 0, "planned_steps": True, "parameters": -1.5, "tokens_per_step": -3}, {"step": 1, "loss": True}],
        [{"step": 0, "planned_steps": 5, "tokens_per_step": -3}, {"step": 1, "loss": 2, "learning_rate": 0.1}],
        [{"step": 0, "planned_steps": 5, "bytes_per_token": 1e-320}, {"step": 1, "loss": 2}],
        [{"step": 1, "loss": 2, "event": "\udc80"}, {"step": 1, "prompt": "\udcff", "sample": "\ud800"}],
    ],
)
def test_any_record_makes_a_page(tmp_path: Path, lines: list[Any]) -> None:
    """As of a run that has just begun, of an earlier version, or edited by hand; a last line may be torn."""
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    (tmp_path / "metrics.jsonl").write_text(text + '{"step": 7, "lo')
    assert "Recipe" in text_of(page_of(tmp_path))


def test_the_samples_of_a_chat_run_are_shaded_by_the_probabilities_of_its_answers(tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "Yes."}]}] * 200
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = {"text.validation": 0, "evaluate.prompts": "[Go]", "evaluate.every": 12, "tokenizer.vocabulary": 270}
    done = run(train(write_recipe(tmp_path, tmp_path / "chat.jsonl", **keys)), tmp_path)
    assert done.status == 0, done.err
    opened = open_run("tiny", runs=tmp_path / "runs")
    before = template_of(opened.tokenizer).prompt([{"role": "user", "content": "Go"}])
    text = read(opened.folder).samples[-1]["sample"]
    after = opened.tokenizer.encode(text)
    with torch.no_grad():
        true = opened.model.logits(torch.tensor([before + after]))[0].softmax(-1)[
            range(len(before) - 1, len(before) + len(after) - 1), after
        ]
    found = report._scored(opened.folder, 12, (("Go", text),))[12, "Go"]
    assert math.prod(p for _, p in found) == pytest.approx(true.prod().item(), rel=1e-3)
    assert not baselines.of_validation(opened.folder)  # they would be of the questions, too


def test_several_runs_stand_side_by_side_with_the_keys_that_differ(trained: Path) -> None:
    command(trained, "tiny", "--out", "both.html")  # which the next one replaces
    done = command(trained, "tiny", "runs/other", "--out", "both.html")
    assert done.status == 0, done.err
    page = (trained / "both.html").read_text()
    shown = text_of(page)
    assert (
        "train.learning_rate 0.02 0.01" in shown
        and "tracking.wandb offline off" in shown
        and "seed" not in shown.split("Curves")[1][:400]
    )
    differing = report.differing_keys([read(trained / "runs" / name) for name in ("tiny", "other")])
    assert {name for name, _ in differing} == {"train.learning_rate", "tracking.wandb"}
    assert "tiny training" in shown and "other validation" in shown and 'class="line c1' in page


def test_tokens_are_shaded_where_their_checkpoint_is_kept(trained: Path, tmp_path: Path) -> None:
    record = read(trained / "runs/tiny")
    view = report._view(record, 0, print)
    told = {(line["step"], line["prompt"]): line["sample"] for line in record.samples}
    assert len(told) == 6
    for prompt, samples in view.samples:
        for sample in samples:
            assert sample is not None and "".join(text for text, _, _ in sample.tokens) == told[sample.step, prompt]
            assert all(0 <= shade <= 4 and 0 < float(probability) <= 1 for _, shade, probability in sample.tokens)
    run_ = tmp_path / "runs/tiny"
    shutil.copytree(trained / "runs/tiny", run_)
    weights = run_ / "checkpoints/step-000010/model.safetensors"
    weights.write_bytes(b"\0" + weights.read_bytes()[1:])
    shutil.rmtree(run_ / "checkpoints/step-000005")
    view = report._view(read(run_), 0, print)
    shaded = [bool(sample and sample.tokens) for sample in view.samples[0][1]]
    assert shaded == [False, False, True] and any("step-000010" in note for note in view.notes)


class Words:
    """A tokenizer of numbers."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


class Side:
    def __init__(self, ids: np.ndarray) -> None:
        self.ids, self.tokens = ids, len(ids)

    def read(self, start: int, stop: int) -> np.ndarray:
        return self.ids[start:stop]


def test_copies_are_found_as_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a search through all of the text, also where a copy lies across two chunks of it."""
    monkeypatch.setattr("llm.insight.copying.CHUNK", 256)
    random = np.random.default_rng(0)
    ids = random.integers(0, 12, 3000).astype(np.uint16)
    samples = [
        [*ids[250:270].tolist(), 99, *ids[5:14].tolist()],
        random.integers(0, 12, 60).tolist(),
        [99] * 9,
        [3],
        [],
    ]
    all_text = f" {Words().decode(ids.tolist())} "

    def stands(part: list[int]) -> bool:
        return f" {Words().decode(part)} " in all_text

    found = copying([Words().decode(each) for each in samples], Side(ids), Words())  # type: ignore[arg-type]
    for sample, copied in zip(samples, found, strict=True):
        parts = [sample[i:j] for i in range(len(sample)) for j in range(i + 1, len(sample) + 1)]
        assert copied.tokens == max((len(part) for part in parts if stands(part)), default=0)
        assert stands(Words().encode(copied.longest)) or not copied.tokens
        grams = [sample[i : i + 8] for i in range(len(sample) - 7)]
        assert copied.grams == pytest.approx(sum(map(stands, grams)) / max(len(grams), 1))
    assert found[0].tokens >= 20


def test_what_repeats_itself_is_told_from_what_does_not() -> None:
    assert repetition("the " * 40) > 0.9 and repetition("你好" * 40) > 0.9
    assert (
        repetition("Its capital lies on two hills, and is known for bread.") == 0 == repetition("") == repetition("ab")
    )


def test_charts_keep_what_they_draw_within_bounds() -> None:
    assert nice(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and compact(2_500_000) == "2.5 M"
    long = [(float(n), 5.0 / (n + 1)) for n in range(100_000)]
    assert len(thinned(long)) <= 241 and thinned(long)[-1] == long[-1]
    drawn = chart(
        "t",
        [Series("a", long), Series("b", [(5e4, 3.0)], 1, True)],
        "tokens",
        levels={"gzip": 3.0, "xz": 3.01},
        log=True,
    )
    assert (
        drawn is not None
        and len(drawn.labels) == 1
        and "gzip 3.00" in drawn.labels[0][1]
        and "xz 3.01" in drawn.labels[0][1]
    )
    assert all(52 <= x <= 428 for x, _ in drawn.x_ticks) and all(12 <= y <= 238 for y, _ in drawn.y_ticks)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["tiny", "--out", "runs/tiny/recipe.yaml"], ("--out: runs/tiny/recipe.yaml is there and is no report",)),
     (["nowhere"], ("no run 'nowhere'", "tiny")), (["x" * 5000], ("no run",)), (["tiny", "--out", "runs"], ("is a folder",)), (["tiny", "--out", "pipe"], ("--out: pipe is a folder, a pipe or a device: name a file",)),
     (["tiny", "--port", "70000"], ("--port", "65,535")), (["home"], ("no run",))],
)  # fmt: skip
def test_a_wrong_argument_is_one_line(trained: Path, arguments: list[str], words: tuple[str, ...]) -> None:
    if not (trained / "pipe").exists():
        os.mkfifo(trained / "pipe")
    before = (trained / "runs/tiny/recipe.yaml").read_bytes()
    done = command(trained, *arguments)
    assert done.status == 2 and len(done.err.splitlines()) == 1 and all(word in done.err for word in words), done.err
    assert (trained / "runs/tiny/recipe.yaml").read_bytes() == before


# ---------------------------------------------------------------------------------------------- --watch


@contextmanager
def served(*folders: Path) -> Iterator[int]:
    server = llm.report.server(folders, 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(port: int, path: str, host: str = "localhost:1") -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path, headers={"Host": host})
    answer = connection.getresponse()
    text = answer.read().decode()
    connection.close()
    return answer.status, text


def a_copy(trained: Path, folder: Path) -> Path:
    """The run without checkpoints, as if it still went on."""
    shutil.copytree(trained / "runs/tiny", folder, ignore=shutil.ignore_patterns("checkpoints", "wandb"))
    return folder


def test_watch_serves_this_machine_alone_and_follows_the_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_copy(trained, tmp_path / "tiny")
    with served(folder) as port:
        status, page = get(port, "/")
        assert status == 200 and "step 12 of 12" in text_of(re.sub(r"<script nonce.*?</script>", "", page, flags=re.S))
        version = get(port, "/version")[1]
        with (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "loss": 2.5}\n{"step": 14, "lo')
        assert get(port, "/version")[1] != version and "13 of 12" in get(port, "/")[1]
        assert get(port, "/../../etc/passwd")[0] == get(port, "/recipe.yaml")[0] == 404
        assert get(port, "/", host="evil.example")[0] == 403
        with pytest.raises(RecipeError, match="cannot be served"):
            llm.report.server([folder], port)
        with socket.create_connection(("127.0.0.1", port)) as leaving:  # before its request is whole
            leaving.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            leaving.sendall(b"GET / HT")
        assert get(port, "/version")[0] == 200
    assert capsys.readouterr().err == ""
    (bare := tmp_path / "bare").mkdir()
    shutil.copy(folder / "recipe.yaml", bare)
    with served(bare) as port:  # the page asks for the version and reloads where that differs from its own
        assert f'"{get(port, "/version")[1]}"' in get(port, "/")[1]
    assert find(str(folder)) == folder


# ---------------------------------------------------------------------------------------------- a browser


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.skipif(CHROMIUM is None, reason="install chromium")
@pytest.mark.parametrize(
    ("width", "scheme"),
    [
        (1280, "light"),
        (390, "dark"),
        pytest.param(1280, "dark", marks=pytest.mark.slow),
        pytest.param(390, "light", marks=pytest.mark.slow),
    ],
)
def test_a_browser_shows_it_without_an_error(trained: Path, tmp_path: Path, width: int, scheme: Any) -> None:
    """Opened, clicked through, walked through by keyboard, printed, and followed while the run goes on."""
    playwright = pytest.importorskip("playwright.sync_api", reason="install the extra `test`")
    path = tmp_path / "both.html"
    path.write_text(page_of(trained / "runs/tiny", trained / "runs/other"))
    folder = a_copy(trained, tmp_path / "tiny")
    faults: list[str] = []
    with served(folder) as port, playwright.sync_playwright() as start:
        browser = start.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: faults.append(message.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(request.url))
        for address in (path.as_uri(), f"http://127.0.0.1:{port}/"):
            page.goto(address)
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it does not scroll sideways"
            for link in page.locator("nav a").all():
                link.click()
                assert page.evaluate("document.querySelector(location.hash) !== null")
            for summary in page.locator("summary").all():
                opened = summary.evaluate("each => each.parentElement.open")
                summary.click()
                assert summary.evaluate("each => each.parentElement.open") != opened
            page.locator("summary").last.focus()
            page.keyboard.press("Enter")
            page.locator("circle title").first.text_content()
            assert contrasts(page) > 4.5
        assert page.locator("svg[role=img]").count() == 6
        page.locator("summary").last.evaluate("each => { each.parentElement.open = true }")
        with page.expect_navigation(), (folder / "metrics.jsonl").open("a") as file:
            file.write('{"step": 13, "loss": 2.5}\n')
        assert page.get_by_text("13 of 12").count() == 1
        assert page.locator("summary").last.evaluate("each => each.parentElement.open"), "what was opened stays open"
        page.emulate_media(media="print", color_scheme=scheme)
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        browser.close()
    assert not faults, faults


CONTRAST = """() => {
  const light = css => {
    const [r, g, b] = css.match(/[\\d.]+/g).map(each => each / 255).map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const back = each => {
    for (; each; each = each.parentElement) {
      const css = getComputedStyle(each).backgroundColor;
      if (css !== "rgba(0, 0, 0, 0)") return css;
    }
    return "rgb(255, 255, 255)";
  };
  return Math.min(...[...document.querySelectorAll("p, td, th, a, span, dd, dt, summary, h1")].map(each => {
    const [a, b] = [light(getComputedStyle(each).color), light(back(each))];
    return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }));
}"""


def contrasts(page: Any) -> float:
    """The least contrast of any text with what it stands on (WCAG 2 asks for 4.5)."""
    return float(page.evaluate(CONTRAST))
