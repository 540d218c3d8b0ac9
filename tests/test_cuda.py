"""What only a GPU can show: the same bits after a stop, fp16's scale, memory that runs short, graphs that say the same.

    python -m pytest tests/test_cuda.py -n 6      # with pytest-xdist; without -n one after the other

Every act runs in a forked child, as CUDA cannot be forked once it is in use.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm.run_folder import checkpoint
from llm.training.proof import LOW_PRECISION_TOLERANCE
from tests import tiny
from tests.forks import digest, ended, start, train, write_recipe, write_text
from tests.test_worlds import dealt_to_itself, losses

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
STEPS, STOP = 6, 3


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("text") / "text.txt", documents=400)


def recipe_of(folder: Path, text: Path, **changes: Any) -> Path:
    """Large enough that the kernels of real runs do the work: heads of 64 that share keys, two micro-batches."""
    return write_recipe(folder, text, **{
        "model.dim": 128, "model.heads": 2, "model.kv_heads": 1, "model.context": 256, "train.tokens_per_step": 8 * 256, "machine.micro_batch": 4,
        "train.steps": STEPS, "evaluate.every": 5, "checkpoint.every": 99, "machine.precision": "bf16", **changes})  # fmt: skip


def done(act: Callable[[], None], folder: Path, status: int = 0, seconds: float = 300) -> str:
    folder.mkdir(exist_ok=True)
    found = ended(start(act, folder), folder, seconds=seconds)
    assert found.status == status, found.err[-3000:] + found.out[-1000:]
    return found.out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"train.optimizer": "adamw"},
        {"machine.precision": "fp16"},
        {"machine.precision": "fp32"},
        {"machine.recompute": "true"},
        {"machine.exact": "true"},
        {"machine.compile": "true", "model.layers": 10},
        {"machine.compile": "true", "machine.recompute": "true"},
        {"machine.shard": "full"},
        {"machine.shard": "full", "machine.precision": "fp16", "train.optimizer": "adamw"},
    ],
    ids=lambda changes: " ".join(f"{name.partition('.')[2]}={value}" for name, value in changes.items()) or "plain",
)
def test_a_stopped_run_ends_in_the_same_bits(tmp_path: Path, text: Path, changes: dict[str, Any]) -> None:
    recipe = recipe_of(tmp_path, text, **changes)
    way = dealt_to_itself if "machine.shard" in changes else lambda act: act
    said = done(way(train(recipe)), tmp_path / "whole")
    assert "cuda" in said and "cannot be done" not in said, said
    done(way(train(recipe, stop_after=STOP)), tmp_path / "parts", status=75)
    done(way(train(recipe)), tmp_path / "parts")
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    curve = losses(tmp_path / "whole")
    assert len(curve) == STEPS and curve[-1] < curve[0]


def test_layouts_and_ways_of_computing_are_one_curve(tmp_path: Path, text: Path) -> None:
    """Recomputing changes no bit; compiling, other micro-batches and a group of one only round otherwise."""
    ways: dict[str, tuple[list[str], bool]] = {
        "plain": ([], False),
        "recompute": (["machine.recompute=true"], False),
        "compile": (["machine.compile=true"], False),
        "micro-batch": (["machine.micro_batch=2"], False),
        "full": (["machine.shard=full"], True),
        "fp32": (["machine.precision=fp32"], False),
    }
    for name, (overrides, alone) in ways.items():
        act = train(recipe_of(tmp_path, text), *overrides)
        done(dealt_to_itself(act) if alone else act, tmp_path / name)
    plain = losses(tmp_path / "plain")
    assert digest(tmp_path / "recompute") == digest(tmp_path / "plain")
    for name in ways:
        assert losses(tmp_path / name) == pytest.approx(
            plain, rel=3e-2 if name == "fp32" else LOW_PRECISION_TOLERANCE
        ), name


def test_fp16_overflows_are_answered_by_its_scale_which_is_part_of_the_state(tmp_path: Path, text: Path) -> None:
    """From a scale at which the first steps must overflow: halved, no event, and the same bits after a stop there."""

    def high(act: Callable[[], None]) -> Callable[[], None]:
        def starting_high() -> None:
            import llm.training.trainer

            llm.training.trainer.FP16_SCALE = 2.0**40
            act()

        return starting_high

    recipe = recipe_of(tmp_path, text, **{"machine.precision": "fp16", "train.steps": 30})
    done(high(train(recipe)), tmp_path / "whole")
    for stop in (4, 26):
        done(high(train(recipe, stop_after=stop)), tmp_path / "parts", status=75)
    done(high(train(recipe)), tmp_path / "parts")
    assert digest(tmp_path / "parts") == digest(tmp_path / "whole")
    newest = checkpoint.newest(tmp_path / "whole/runs/tiny", print)
    assert newest is not None
    scale, good_steps = newest.manifest["scale"]
    assert scale < 2.0**40 and good_steps > 0
    record = (tmp_path / "whole/runs/tiny/metrics.jsonl").read_text()
    assert "not finite" not in record
    curve = losses(tmp_path / "whole")
    assert curve[-1] < curve[0] - 0.2


def test_what_is_not_finite_reaches_neither_weights_nor_moments(tmp_path: Path, text: Path) -> None:
    def act() -> None:
        from llm.training.trainer import Trainer

        update = Trainer.update

        def planted(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
            held = [p.detach().clone() for p in self.state.model.parameters()]
            held += [m.local.clone() for m in self.state.optimizer.moments.values()]
            if step == 2:
                p = self.state.model.lm_head.weight
                hook = p.register_hook(lambda gradient: gradient * float("nan"))
            result = update(self, step)
            now = [*self.state.model.parameters(), *(m.local for m in self.state.optimizer.moments.values())]
            same = [torch.equal(a, b) for a, b in zip(held, now, strict=True)]
            assert all(same) if step == 2 else not all(same)
            if step == 2:
                hook.remove()
            return result

        Trainer.update = planted  # type: ignore[method-assign]
        train(recipe, "train.on_nonfinite=skip")()

    for optimizer in ("muon", "adamw"):
        recipe = recipe_of(tmp_path, text, **{"train.optimizer": optimizer})
        done(act, tmp_path / optimizer)
        assert "not finite" in (tmp_path / optimizer / "runs/tiny/metrics.jsonl").read_text()


def capped(act: Callable[[], None], headroom: int, at: int) -> Callable[[], None]:
    """The act, with so many bytes of the card beyond what it holds just before update `at`, or the rehearsal (-1)."""

    def limit() -> None:
        torch.cuda.empty_cache()
        share = (torch.cuda.memory_reserved() + headroom) / torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(share)

    def short() -> None:
        from llm.training.micro_batch import MicroBatches
        from llm.training.trainer import Trainer

        update, rehearse = Trainer.update, MicroBatches.rehearse

        def short_update(self: Trainer, step: int) -> tuple[Tensor, Tensor]:
            if step == at:
                limit()
            return update(self, step)

        def short_rehearsal(self: MicroBatches) -> float:
            if at < 0:
                limit()
            return rehearse(self)

        Trainer.update, MicroBatches.rehearse = short_update, short_rehearsal  # type: ignore[method-assign]
        act()

    return short


def test_memory_that_runs_short_halves_the_micro_batch_on_the_same_curve(tmp_path: Path, text: Path) -> None:
    wide = {"model.ffn_dim": 8192, "train.tokens_per_step": 32 * 256, "machine.micro_batch": "auto"}
    recipe = recipe_of(tmp_path, text, **wide)
    done(train(recipe), tmp_path / "whole")
    said = done(capped(train(recipe), 400 << 20, at=2), tmp_path / "short")
    assert "no memory for micro-batches of 32 windows at step 3" in said, said
    before = done(capped(train(recipe), 500 << 20, at=-1), tmp_path / "before")
    assert "no memory" not in before, before
    sizes = [
        json.loads((tmp_path / name / "runs/tiny/machine.json").read_text()) for name in ("whole", "short", "before")
    ]
    assert sizes[0]["micro_batch"] == 32 and sizes[1]["micro_batch"] < 32 and sizes[2]["micro_batch"] < 32
    whole, short = losses(tmp_path / "whole"), losses(tmp_path / "short")
    assert short[:2] == whole[:2]
    assert short == pytest.approx(whole, rel=1e-2)


def test_a_replayed_graph_says_what_reading_all_again_would(tmp_path: Path) -> None:
    """Greedy tokens in fp32, rows of any lengths, the context filled twice."""

    def act() -> None:
        from llm.distributed.environment import use_deterministic_kernels
        from llm.inference.generation import Sampling, generate
        from llm.model.transformer import Transformer

        for strict in (False, True):
            if strict:
                use_deterministic_kernels()
            for keys in ({}, {"kv_heads": 2}, {"tied": False}):
                shape = tiny.shape(dim=64, context=64, **keys)
                model = tiny.stirred(Transformer(shape, 128), seed=3).cuda()
                prompts = [[3, 1, 4], [5], [9, 2, 6, 5, 3, 5, 8] * 3]
                columns = list(generate(model, prompts, 150, Sampling(temperature=0, repetition_penalty=1)))
                for row, prompt in enumerate(prompts):
                    text, new = list(prompt), [column[row] for column in columns]
                    for index, said in enumerate(new):
                        with torch.no_grad():
                            logits = model.logits(torch.tensor([text]).cuda())[0, -1]
                        likeliest = logits.argmax().item()
                        # Another order of sums may turn two that are as good as equal.
                        assert said == likeliest or logits[likeliest] - logits[said] < 1e-3, (keys, row, index)
                        text.append(said)
                        text = text[-32:] if len(text) > 64 else text
            assert torch.are_deterministic_algorithms_enabled() == strict

    done(act, tmp_path)


def test_dropout_is_the_same_function_on_the_card_and_compiled(tmp_path: Path) -> None:
    def act() -> None:
        from llm.model.dropout import dropout, hashed_mask

        positions, site = torch.arange(2**33, 2**33 + 16), torch.tensor(5)
        there = hashed_mask(positions, 7, site, 31, 33, 0.1)
        assert torch.equal(hashed_mask(positions.cuda(), 7, site.cuda(), 31, 33, 0.1).cpu(), there)
        hidden = torch.randn(16, 31, 33, device="cuda")
        eager = dropout(hidden.clone(), positions.cuda(), seed=7, site=site.cuda(), rate=0.1)
        compiled = torch.compile(dropout, fullgraph=True)(hidden, positions.cuda(), seed=7, site=site.cuda(), rate=0.1)
        assert torch.equal(eager == 0, ~there.cuda()) and torch.equal(eager, compiled)

    done(act, tmp_path)


def test_a_compiled_loss_is_the_loss(tmp_path: Path) -> None:
    def act() -> None:
        from llm.base.constants import IGNORED
        from llm.model.loss import compile_loss, cross_entropy_sum

        hidden = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(4096, 64, device="cuda", requires_grad=True)
        targets = torch.randint(4096, (5000,), device="cuda")
        targets[::7] = IGNORED
        found = []
        for compiled in (False, True):
            compile_loss(compiled)
            leaf = hidden.clone().requires_grad_()
            loss = cross_entropy_sum(leaf, weight, targets)
            found.append([loss, *torch.autograd.grad(loss, [leaf, weight])])
        for eager, fused in zip(*found, strict=True):
            assert ((eager - fused).double().norm() / eager.double().norm()).item() < 1e-3

    done(act, tmp_path)


def test_a_run_is_sampled_on_the_card(tmp_path: Path, text: Path) -> None:
    from tests.forks import script

    done(train(recipe_of(tmp_path, text)), tmp_path / "run")
    said = done(
        script("module:llm.sample", "tiny", "--prompt", "My self Har", "--tokens", "300", "--seed", "1"),
        tmp_path / "run",
    )
    assert said.startswith("My self Har") and len(said) > 100
    assert os.environ.get("CUDA_VISIBLE_DEVICES") != ""
