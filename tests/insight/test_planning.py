"""A plan says before a run what the run then takes: parameters exactly, memory by what is alive, and no torch."""

import gc
import gzip
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import llm
from llm.base.errors import RecipeError, StoppedError, TextError
from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.config.schema import Recipe
from llm.data.pipeline import prepare_text
from llm.distributed.sharding import Sharding, local_shard
from llm.insight import cards, ladder, planning
from llm.model import cost
from llm.model.transformer import Transformer
from llm.optim.optimizer import Optimizer, gradient_norm
from tests.data.test_documents import needs_wiki
from tests.forks import ROOT, run, script, train, write_recipe, write_text
from tests.test_memory import peaks

CPU = cards.Device("a CPU", 16e9, 0.0, 1e11, 1e11, cuda=False)
RECIPES = {  # width, depth, vocabulary, context, micro-batch and recomputation, and what else changes memory
    "quickstart": "machine.micro_batch=8",
    "wide": "model.dim=384 model.heads=6 machine.micro_batch=2 train.tokens_per_step=1024",
    "deep": "model.layers=12 tokenizer.vocabulary=1024 machine.micro_batch=2 train.tokens_per_step=1024",
    "many pieces": "tokenizer.vocabulary=32768 machine.micro_batch=1 train.tokens_per_step=512",
    "long context": "model.context=1024 machine.micro_batch=2",
    "many micro-batches, few keys": "model.kv_heads=1 machine.micro_batch=1",
    "recomputed": "machine.recompute=true model.layers=8 model.ffn_dim=1024 tokenizer.vocabulary=1024 machine.micro_batch=4",
    "short windows, AdamW": "train.optimizer=adamw model.dim=256 model.heads=4 model.context=32 machine.micro_batch=1 train.tokens_per_step=64",
    "short windows, Muon": "model.dim=384 model.heads=6 model.context=32 machine.micro_batch=1 train.tokens_per_step=32",
    # Small, as a CPU may take a hundred times as long in bf16.
    "bf16, dropout, untied": "machine.precision=bf16 model.dropout=10% model.tied=false model.dim=96 model.layers=2 model.context=128 tokenizer.vocabulary=1024 machine.micro_batch=2 train.tokens_per_step=512",
    "bf16, recomputed": "machine.precision=bf16 machine.recompute=true model.dim=96 model.layers=3 model.context=128 tokenizer.vocabulary=1024 machine.micro_batch=2 train.tokens_per_step=512",
}


def quickstart(changes: str = "") -> Recipe:
    read = load(ROOT / "recipes/quickstart.yaml", ["machine.precision=fp32", *changes.split()])
    return planning.sized(with_steps(read, 1_400_000))


def alive(recipe: Recipe, micro_batch: int) -> int:
    """Most bytes of tensors that are alive at once in a step, by what torch's allocator gives and takes back."""
    vocab_size, shape, half = recipe.tokenizer.vocabulary, recipe.model, recipe.machine.precision == "bf16"
    gc.collect()
    model = Transformer(shape, vocab_size)
    model.model.recompute = recipe.machine.recompute
    optimizer = Optimizer(model, recipe.train, torch.bfloat16 if half else torch.float32)
    if recipe.train.optimizer == "muon" and shape.tied:
        optimizer.share_with_prefixes(torch.arange(-1, vocab_size - 1))
    held = sum(p.nbytes for p in model.parameters()) + sum(each.local.nbytes for each in optimizer.moments.values())
    tokens = torch.randint(vocab_size, (micro_batch, shape.context + 1))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        for _ in range(min(2, recipe.windows_per_step // micro_batch)):  # the third takes what the second took
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                loss = model(tokens[:, :-1], tokens[:, 1:], torch.arange(micro_batch))
            loss.backward()
        gradient_norm([local_shard(p.grad) for p in model.parameters() if p.grad is not None], Sharding())
        optimizer.step(0, 0.1, torch.ones(()), torch.tensor(True))

    step()
    model.zero_grad(set_to_none=True)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    events = seen.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for _, size in sorted((each.start_ns(), each.nbytes()) for each in events if each.name() == "[memory]"):
        now += size
        most = max(most, now)
    return held + most


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.filterwarnings("ignore")  # the profiler's own
def test_memory_is_what_is_alive_at_the_peak_of_a_step(name: str) -> None:
    recipe = quickstart(RECIPES[name])
    plan = planning.plan(recipe, CPU)
    found = alive(recipe, plan.micro_batch)
    print(
        f"{name}: planned {plan.memory.peak / 1e6:.1f} MB, alive {found / 1e6:.1f} MB, {plan.memory.peak / found:.3f}"
    )
    assert plan.memory.peak == pytest.approx(found, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"model.dim": 192, "model.heads": 3, "model.layers": 4, "model.context": 256, "machine.micro_batch": 64},
        {"model.dim": 384, "model.heads": 6, "model.layers": 8, "model.context": 128, "machine.micro_batch": 32},
        {"model.dim": 720, "model.heads": 12, "model.layers": 16, "machine.micro_batch": 1},
        {"model.dim": 512, "model.heads": 8, "model.layers": 8, "model.context": 256, "machine.micro_batch": 32, "machine.recompute": True},
    ],
)  # fmt: skip
def test_a_process_takes_what_its_plan_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = write_text(tmp_path / "text.txt", 400)
    context, windows = changes.get("model.context", 16), changes["machine.micro_batch"]
    path = write_recipe(tmp_path, text, **{
        "model.dropout": 0, "train.optimizer": "adamw", "train.steps": 2, "train.warmup": 0, "train.decay": 0,
        "train.tokens_per_step": 2 * windows * context, "evaluate.every": 99, "checkpoint.every": 99, **changes})  # fmt: skip
    (found,) = peaks(tmp_path / "run", path, 1, "none")
    planned = planning.plan(load(path), CPU).memory.peak
    print(f"{changes}: planned {planned / 1e6:.0f} MB, resident {found / 1e6:.0f} MB, {planned / found:.3f}")
    assert found > 1e9
    assert planned == pytest.approx(found, rel=0.2)


@pytest.mark.parametrize(
    ("name", "changes", "windows", "gib"),
    [
        ("small", "train.optimizer=adamw", 32, 8.5),
        ("small", "", 32, 8.4),
        ("medium", "train.optimizer=adamw train.tokens_per_step=65536", 16, 11.8),
        ("medium", "train.tokens_per_step=65536", 8, 6.62),
        ("medium", "train.tokens_per_step=65536 machine.recompute=true", 8, 2.52),
        ("large", "train.optimizer=adamw train.tokens_per_step=65536", 32, 10.3),
    ],
)
def test_the_formula_gives_what_an_h100_took(name: str, changes: str, windows: int, gib: float) -> None:
    """The peaks of tests/benchmarks/README.md, in bf16."""
    recipe = load(ROOT / f"recipes/{name}.yaml", changes.split())
    found = planning.step_memory(with_steps(recipe, 10**9), cards.card("h100"), windows).peak / 2**30
    assert found == pytest.approx(gib, rel=0.10)


@pytest.mark.parametrize(
    ("name", "changes", "speed"),
    [
        ("small", "", 463_493),
        ("small", "machine.compile=false", 297_905),
        ("medium", "train.tokens_per_step=65536", 165_597),
        ("medium", "train.tokens_per_step=65536 machine.compile=false", 81_253),
        ("medium", "train.tokens_per_step=65536 machine.compile=false machine.recompute=true", 46_688),
        ("large", "train.tokens_per_step=65536", 116_881),
    ],
)
def test_the_table_gives_the_speed_of_an_h100_within_a_factor_of_two(name: str, changes: str, speed: float) -> None:
    """The tokens per second of tests/benchmarks/README.md, in bf16."""
    found = planning.tabulated_speed(load(ROOT / f"recipes/{name}.yaml", changes.split()), cards.card("h100"))
    assert speed / 2 < found < 2 * speed


@pytest.mark.parametrize(
    ("dim", "layers", "tokens", "speed"), [(32, 2, 64, 4_800), (32, 6, 64, 1_700), (64, 4, 256, 4_650), (96, 4, 512, 7_500), (192, 4, 1024, 3_550)]
)  # fmt: skip
def test_the_speed_of_small_models_on_a_cpu_is_found_within_a_factor_of_two(
    dim: int, layers: int, tokens: int, speed: float
) -> None:
    """Measured on two AVX2 cores whose product of matrices does 1e11 operations a second, 2026-11-30."""
    changes = f"model.dim={dim} model.layers={layers} train.tokens_per_step={tokens} tokenizer.vocabulary=1024"
    heads = f"model.heads={dim // 64 or 1} model.context={tokens // 4} train.sampled_softmax=0"
    recipe = load(ROOT / "recipes/quickstart.yaml", [*changes.split(), *heads.split()])
    found = planning.tabulated_speed(recipe, CPU)
    assert speed / 2 < found < 2 * speed


@pytest.mark.parametrize("name", ["quickstart", "classic", "small", "medium", "large"])
def test_parameters_by_part_are_those_of_the_model(name: str) -> None:
    recipe = planning.sized(with_steps(load(ROOT / f"recipes/{name}.yaml"), 1_400_000))
    with torch.device("meta"):
        model = Transformer.__new__(Transformer)
        model.initialise = lambda seed: None  # type: ignore[method-assign]  # no generator on this device
        model.__init__(recipe.model, recipe.tokenizer.vocabulary)  # type: ignore[misc]
    parts = {"embed_tokens": "embeddings", "lm_head": "embeddings", "_proj": "MLP", "norm": "norms"}
    found = dict.fromkeys(("embeddings", "attention", "MLP", "norms"), 0)
    for each, p in model.named_parameters():
        attention = ".self_attn." in each and "norm" not in each
        found["attention" if attention else next(part for key, part in parts.items() if key in each)] += p.numel()
    assert planning.parts(recipe) == found


def plan(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """`python -m llm.plan`, which fails if it imports torch."""
    code = "import sys; from llm.base.errors import run; from llm import plan\ntry: run(plan.main)\nfinally: assert 'torch' not in sys.modules"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=ENVIRONMENT)


ENVIRONMENT = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}


def test_a_plan_is_made_without_torch(tmp_path: Path) -> None:
    text = write_text(tmp_path / "text.txt")
    done = plan(write_recipe(tmp_path, text), "--gpu", "RTX 3080 Ti", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (
        "parameters",
        "micro-batch: 2 of the 4",
        "M tokens to train on",
        "an estimate",
        "checkpoints",
        "tokens/s",
    ):
        assert words in done.stdout


def test_tokens_of_a_prepared_text_are_counted_and_no_estimate(tmp_path: Path) -> None:
    path = write_recipe(tmp_path, write_text(tmp_path / "text.txt"), **{"train.steps": None, "train.epochs": 2})
    recipe = load(path)
    assert planning.plan(recipe, CPU).text_is_estimated
    shards = prepare_text(recipe, lambda line: None).shards
    made = planning.plan(recipe, CPU)
    assert (made.text_tokens, made.validation_tokens) == (shards.train.tokens, shards.validation.tokens)
    assert not made.text_is_estimated and made.epochs == pytest.approx(2, rel=0.02)
    write_text(tmp_path / "text.txt", 61)
    assert planning.plan(recipe, CPU).text_is_estimated


def test_a_text_that_is_not_there_leaves_the_rest_of_the_plan(tmp_path: Path) -> None:
    made = planning.plan(load(ROOT / "recipes/small.yaml", ["text.files=none.txt"]), cards.card("3080ti"))
    assert (made.text_tokens, made.tokens, made.seconds) == (0, 0, 0) and made.fits
    said = "\n".join(planning.lines(made))
    assert "is not known here" in said and "as the length of the run is not; about" in said and "--gpu" not in said


def test_the_micro_batch_is_the_largest_that_fits() -> None:
    recipe, sizes = load(ROOT / "recipes/small.yaml", ["text.files=none.txt"]), []
    for gib in (1, 4, 8, 12):
        made = planning.plan(recipe, replace(cards.card("3060"), memory=gib * 2**30))
        sizes.append((made.micro_batch, made.fits))
        assert not made.fits or made.memory.peak <= planning.room(made.device)
    assert sizes[0] == (1, False) and [fits for _, fits in sizes[1:]] == [True] * 3
    assert sizes[1][0] < sizes[2][0] < sizes[3][0] == 32


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "name a recipe, or --text FILE"),
        (("none.yaml",), "none.yaml does not exist"),
        (("recipe.yaml", "model.dim=31"), "model.dim = 31"),
        (("recipe.yaml", "--gpu", "voodoo2"), "--gpu voodoo2: not in the table"),
        (("recipe.yaml", "--memory", "much"), "--memory much: expected a size such as 12GB"),
        (("recipe.yaml", "--memory", "9" * 400 + "GB"), "expected a size such as 12GB"),
        (("recipe.yaml", "model.from=exports/x"), "model.from"),
        (("recipe.yaml", "--hours", "3"), "--hours and --ladder go with --text"),
        (("--text", "text.txt"), "--text needs --hours"),
        (("--text", "text.txt", "--hours", "8 parsecs"), "--hours = '8 parsecs': expected a time such as 8h"),
        (("recipe.yaml", "--gpu", "3080ti", "--probe"), "--probe measures this machine"),
        (("--text", "my text.txt", "--hours", "90min"), "`python -m llm.prepare --wiki 'my text.txt'`"),
        (("--text=-x.txt", "--hours", "1"), "`python -m llm.prepare --wiki ./-x.txt`"),
        (("--text", "none.txt", "--hours", "1", "--gpu", "4090"), "none.txt is not there"),
        (("--text", "text.txt", "--hours", "-1"), "--hours = -1: must be at least"),
        (("--text", "text.txt", "--hours", "1", "--memory", "12GB"), "speed of a card of 12GB"),
        (("--text", "text.txt", "--hours", "1", "--gpu", "4090"), "text.files=text.txt"),  # 10 kB
        (("--text", "wiki-leads", "--hours", "1", "--gpu", "4090", "--memory", "1MB"), "fits the memory of"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    write_recipe(tmp_path, write_text(tmp_path / "text.txt"))
    done = plan(*words, folder=tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and said in done.stderr, done.stderr


def test_a_probe_measures_real_steps_and_leaves_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_recipe(tmp_path, write_text(tmp_path / "text.txt"), **{"train.steps": 3, "train.warmup": 0})
    ended = run(script("module:llm.plan", "recipe.yaml", "--probe"), tmp_path)
    assert ended.status == 0, ended.err
    assert "(measured)" in ended.out and not (tmp_path / "runs").exists() and not ended.err, ended.err


def test_a_probe_or_ladder_that_is_stopped_says_that_nothing_is_kept(tmp_path: Path) -> None:
    def stopped(recipe: object, **given: object) -> None:
        raise StoppedError("all is saved")

    for act in (planning.probe, ladder.measured):
        with pytest.raises(StoppedError, match="nothing is kept"):
            act(load(write_recipe(tmp_path, write_text(tmp_path / "text.txt"))), stopped)


@needs_wiki
def test_three_recipes_are_written_that_can_be_trained_and_none_is_overwritten(tmp_path: Path) -> None:
    done = plan("--text", "wiki-leads", "--hours", "8", "--gpu", "3080ti", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    names = [f"wiki-leads-{name}.yaml" for name in ("safe", "best", "largest")]
    recipes = [load(tmp_path / name) for name in names]
    sizes = [sum(planning.parts(each).values()) for each in recipes]
    assert sizes[0] < sizes[1] <= sizes[2] and [each.run for each in recipes] == [Path(name).stem for name in names]
    assert all("# expected: " in (tmp_path / name).read_text() for name in names)

    before = [(tmp_path / name).read_text() for name in names[1:]]
    (tmp_path / names[0]).unlink()
    done = plan("--text", "wiki-leads", "--hours", "1", "--gpu", "3080ti", folder=tmp_path)
    assert done.returncode == 2 and "there already" in done.stderr
    assert not (tmp_path / names[0]).exists() and [(tmp_path / name).read_text() for name in names[1:]] == before


@needs_wiki
def test_time_that_the_text_leaves_is_for_a_branch_of_the_best_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert [each.name for each in ladder.propose("wiki-leads", CPU, 0.5)] == ["safe", "best", "largest"]
    _, best, _, branch = ladder.propose("wiki-leads", CPU, 24)
    assert branch.name == "branch" and 0.45 < branch.plan.seconds / best.plan.seconds < 0.55
    assert branch.expectation.bits_per_byte < best.expectation.bits_per_byte

    said = ladder.write_proposals("wiki-leads", CPU, 24)
    assert said[-1].endswith("python -m llm.evaluate wiki-leads-best --mean wiki-leads-branch")
    first, second = (load(Path(f"wiki-leads-{name}.yaml")) for name in ("best", "branch"))
    half = 2 * first.checkpoint.every
    assert second.from_ == f"wiki-leads-best/step-{half:06d}" and 0.45 < half / best.plan.recipe.train.steps < 0.55
    assert first.checkpoint.keep * first.checkpoint.every >= best.plan.recipe.train.steps
    assert first == replace(second, run=first.run, seed=first.seed, from_=first.from_)
    assert first.seed != second.seed and first.train.sampled_softmax == 4096 < first.tokenizer.vocabulary
    Path("wiki-leads-best.yaml").unlink()
    with pytest.raises(RecipeError, match=r"there already: wiki-leads-safe\.yaml"):
        ladder.write_proposals("wiki-leads", CPU, 0.5)


MEASURED = [  # width, vocabulary, tokens, bits per byte: recipes/experiments.md, the packaged English text
    (192, 4096, 0.5e6, 1.7917), (192, 4096, 2e6, 1.4581), (192, 16384, 1.115e6, 1.5236), (192, 16384, 6.8e6, 1.3094),
    (96, 16384, 0.5e6, 1.7350), (384, 16384, 0.5e6, 1.6905), (288, 4096, 0.5e6, 1.7727),
    (48, 4096, 64e3, 2.4859), (80, 4096, 256e3, 2.0463),
]  # fmt: skip


@needs_wiki
@pytest.mark.parametrize(("width", "vocabulary", "tokens", "bits"), MEASURED)
def test_measured_runs_lie_in_the_interval_of_the_law(width: int, vocabulary: int, tokens: float, bits: float) -> None:
    recipe = quickstart(f"model.dim={width} model.heads={max(1, width // 64)} tokenizer.vocabulary={vocabulary}")
    parameters = sum(planning.parts(recipe).values())
    text_tokens = 1_386_780 * planning.bytes_per_token(4096) / planning.bytes_per_token(vocabulary)
    expected = ladder.law_of("wiki-leads").expect(parameters, vocabulary, tokens, text_tokens)
    print(f"{width} {vocabulary} {tokens:,.0f}: {bits} measured, {expected}")
    assert expected.low <= bits <= expected.high


def test_a_ladder_foretells_a_power_law() -> None:
    rungs = [
        ladder.Rung(ladder.rung("wiki-leads", width, tokens, "x"), tokens, 9 * tokens**-0.12)
        for width, tokens in ladder.RUNGS
    ]
    climbed = ladder.fitted(rungs, 1_386_780)
    tokens = ladder.REACH * ladder.RUNGS[-1][1]
    expected = climbed.expect(tokens)
    assert expected.bits_per_byte == pytest.approx(9 * tokens**-0.12)
    size = sum(planning.parts(rungs[-1].recipe).values())
    assert climbed.law.expect(size, 4096, tokens, 1_386_780).bits_per_byte == pytest.approx(expected.bits_per_byte)
    json.dumps(expected.low)


def test_a_ladder_is_trained_through_the_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "RUNGS", ((16, 2048), (16, 4096), (16, 6144)))
    monkeypatch.setattr(ladder, "RUNG_PIECES", 320)
    monkeypatch.chdir(tmp_path)
    write_text(tmp_path / "text.txt", 200)
    climbed = ladder.climb("text.txt", llm.train)
    assert [each.tokens for each in climbed.rungs] == [2048, 4096, 6144] and climbed.slope < 0
    assert not (tmp_path / "runs").exists()


def test_sizes_come_from_where_the_recipe_takes_them(tmp_path: Path) -> None:
    """Of model.from, a run or a folder, and of tokenizer.path: the parameters of the model that will be trained."""
    text = write_text(tmp_path / "text.txt")
    path = write_recipe(tmp_path, text)
    done = run(train(path), tmp_path)
    assert done.status == 0, done.err
    trained = tmp_path / "runs/tiny"
    taken = [each.name for each in (trained / "checkpoints").iterdir()]
    said = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])["parameters"]
    places = (trained / "best", trained, trained / "checkpoints" / taken[0])
    for change in [
        *(f"model.from={place}" for place in places),
        f"tokenizer.path={trained / 'tokenizer/tokenizer.model'}",
    ]:
        done = plan(
            path, "--memory", "12GB", "tokenizer.vocabulary=8192", change, folder=tmp_path
        )  # overrides after an option
        assert done.returncode == 0 and f": {said:,} parameters" in done.stdout, done.stderr
    done = plan(path, f"train.teachers=[{trained}/best, {trained}/best]", folder=tmp_path)
    assert f"teachers {cost.size(8 * said)}" in done.stdout, done.stderr  # two, of four bytes a number
    for change in ("model.from=runs/none/best", "train.teachers=runs/none/best", "tokenizer.path=none.model"):
        done = plan(path, change, folder=tmp_path)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "is not there" in done.stderr, done.stderr


def test_a_run_that_goes_on_is_planned_from_its_checkpoint() -> None:
    whole, rest = (planning.plan(quickstart(f"train.steps=400 {more}"), CPU) for more in ("", "from=other/step-300"))
    assert (whole.steps, rest.steps, rest.tokens) == (400, 100, whole.tokens / 4) and rest.seconds < whole.seconds / 3
    assert "length: 100 steps" in "\n".join(planning.lines(rest))


@pytest.mark.parametrize("paces", [(100, 3), (4, 10), (4, 5), (50, 50)])
def test_checkpoints_are_counted_as_a_run_saves_them(paces: tuple[int, int]) -> None:
    pace, looks = paces
    recipe = quickstart(f"train.steps=30 checkpoint.every={pace} evaluate.every={looks} evaluate.prompts=[]")
    steps = range(1, 31)
    assert planning.saves(recipe, evaluated=False) == sum(step % pace == 0 or step == 30 for step in steps)
    saved = sum(step % pace == 0 or step % looks == 0 or step == 30 for step in steps)
    assert planning.saves(recipe, evaluated=True) == saved
    assert not planning.saves(replace(recipe, train=replace(recipe.train, steps=0)), evaluated=True)  # not known yet
    rest = replace(recipe, from_="other/step-12")
    assert planning.saves(rest, evaluated=True) == saved - sum(
        step % pace == 0 or step % looks == 0 for step in steps[:12]
    )


def test_rows_are_judged_by_as_much_text_as_a_file(tmp_path: Path) -> None:
    """The same text, a file of lines and as many rows: one short row alone says nothing of how it compresses."""
    lines = [f"The {number}th river of the north flows past {number * 7} towns to the sea." for number in range(4000)]
    (tmp_path / "lines.txt").write_text("\n".join(lines))
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    whole, rows = (ladder.law_of(str(tmp_path / name)).factor for name in ("lines.txt", "rows.jsonl"))
    assert rows == pytest.approx(whole, rel=0.15)


def test_names_and_sizes(tmp_path: Path) -> None:
    assert cards.card("NVIDIA GeForce RTX 4060 Ti") is cards.CARDS["4060ti"]
    assert cards.bytes_of("12GB") == cards.bytes_of("12 GiB") == 12 * 2**30
    with pytest.raises(RecipeError):
        cards.bytes_of("0GB")
    with pytest.raises(TextError):
        ladder.law_of("none.txt")
    (tmp_path / "nothing.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(TextError, match="nothing in it"):
        ladder.law_of(str(tmp_path / "nothing.txt.gz"))
    write_text(tmp_path / "a.txt")
    (tmp_path / "b.txt").touch()
    assert ladder.law_of(f"{tmp_path}/*.txt") == ladder.law_of(str(tmp_path / "a.txt"))


def test_a_step_of_billions_of_windows_is_planned_at_once() -> None:
    made = planning.plan(
        quickstart("train.tokens_per_step=4000000000 model.context=2 train.steps=9 train.warmup=0"),
        cards.card("3080ti"),
    )
    assert 2_000_000_000 % made.micro_batch == 0


@pytest.mark.parametrize("name", ["step-by-step.txt", "a\x85b.txt", "a\x7fb.txt", 'é "b".txt'])
def test_a_proposed_recipe_of_a_text_of_any_name_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with Path(name).open("w") as file:
        file.writelines(f"The {number}th river flows past {number * 7} towns to the sea.\n" for number in range(40_000))
    ladder.write_proposals(name, CPU, 1)
    found = [load(path, []) for path in tmp_path.glob("*.yaml")]
    assert found and all(recipe.text.files == (name,) for recipe in found)
