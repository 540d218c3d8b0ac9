"""The model is Qwen3 to the letter, starts as the identity, sees only the past, learns, and adds up over batches."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from llm.base.constants import IGNORED
from llm.config.reading import load
from llm.config.resolving import with_steps
from llm.config.schema import Model, Train
from llm.insight.planning import sized
from llm.model import cost
from llm.model.transformer import BIAS_INIT, NORM_EPS, QK_NORM_INIT, ROPE_THETA, Block, Transformer
from llm.optim.optimizer import Optimizer
from tests import tiny
from tests.forks import run, train, write_recipe, write_text

FOLDER = Path(__file__).parents[2] / "recipes"
EPOCH = 1_386_780  # tokens of the text wiki-leads, by which `auto` is settled
RECIPES = {name: sized(with_steps(load(FOLDER / f"{name}.yaml"), EPOCH)) for name in ("classic", "quickstart", "small")}
SHAPES = {name: (each.model, each.tokenizer.vocabulary) for name, each in RECIPES.items()} | {
    "tied": (tiny.shape(), 32),
    "untied": (tiny.shape(tied=False, kv_heads=2), 33),
    "narrow heads": (tiny.shape(heads=8, kv_heads=2, head_dim=2), 32),
    "heads of 54": (tiny.shape(heads=3, kv_heads=1, head_dim=54, layers=1), 32),
    "as many heads as wide": (tiny.shape(heads=16, kv_heads=16, head_dim=4), 32),
}
each_shape = pytest.mark.parametrize(("shape", "vocabulary"), SHAPES.values(), ids=SHAPES)
each_recipe = pytest.mark.parametrize("name", RECIPES)


def off(found: Tensor, true: Tensor) -> float:
    """Size of the error, relative to the size of the truth."""
    return ((found - true).norm() / true.norm()).item()


@pytest.mark.parametrize(
    ("name", "parameters"), [("classic", 15_400_308), ("quickstart", 4_917_440), ("small", 33_697_536)]
)
def test_the_recipes_have_the_size_that_they_had(name: str, parameters: int) -> None:
    assert cost.parameters(*SHAPES[name]) == parameters


SIZED = [path for path in sorted(FOLDER.glob("*.yaml")) if not load(path).model.from_]  # else of the folder's size


@pytest.mark.parametrize("path", SIZED, ids=lambda path: path.stem)
def test_a_recipe_says_how_many_parameters_it_has(path: Path) -> None:
    said = re.search(r"^model: +# ([\d.]+) M parameters$", path.read_text("utf-8"), re.MULTILINE)
    assert said is not None
    each, decimals = sized(load(path)), len(said[1].partition(".")[2])
    assert said[1] == f"{cost.parameters(each.model, each.tokenizer.vocabulary) / 1e6:.{decimals}f}"


@each_shape
def test_parameters_are_counted_by_formula(shape: Model, vocabulary: int) -> None:
    assert cost.parameters(shape, vocabulary) == sum(p.numel() for p in Transformer(shape, vocabulary).parameters())


def qwen3(shape: Model, vocabulary: int) -> Any:
    """transformers' own model of that shape, its weights as it draws them."""
    transformers = pytest.importorskip("transformers", reason="compares with transformers: install the extra `test`")
    return transformers.AutoModelForCausalLM.from_config(
        transformers.Qwen3Config(
            vocab_size=vocabulary,
            hidden_size=shape.dim,
            intermediate_size=shape.ffn_dim,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.context,
            rope_theta=ROPE_THETA,
            rms_norm_eps=NORM_EPS,
            tie_word_embeddings=shape.tied,
        )
    ).eval()


@each_shape
@torch.no_grad()
def test_it_is_qwen3_in_names_shapes_and_every_bit_of_its_logits(shape: Model, vocabulary: int) -> None:
    ours, theirs = Transformer(shape, vocabulary), qwen3(shape, vocabulary)
    assert {name: p.shape for name, p in ours.named_parameters()} == {
        name: p.shape for name, p in theirs.named_parameters()
    }
    theirs.load_state_dict(tiny.stirred(ours).state_dict())
    tokens = tiny.ids(2, min(shape.context, 48), vocabulary=vocabulary)
    assert torch.equal(ours.logits(tokens), theirs(tokens).logits)


@each_recipe
@torch.no_grad()
def test_an_untrained_model_knows_nothing(name: str) -> None:
    shape, vocabulary = SHAPES[name]
    tokens = tiny.ids(2, 257, vocabulary=vocabulary)
    loss = Transformer(shape, vocabulary, seed=1)(tokens[:, :-1], tokens[:, 1:]) / 512
    assert loss.item() == pytest.approx(math.log(vocabulary), rel=0.02)


@torch.no_grad()
def test_blocks_start_as_the_identity() -> None:
    model = Transformer(tiny.shape(), 32)
    embedded = model.model.embed_tokens(tiny.ids(2, 16))
    assert torch.equal(model.model(tiny.ids(2, 16), None, None), model.model.norm(embedded))


def test_only_the_norms_of_queries_and_keys_start_above_one() -> None:
    norms = {name: p for name, p in Transformer(tiny.shape(), 32).named_parameters() if p.ndim == 1}
    assert len(norms) == 2 * 4 + 1
    for name, p in norms.items():
        assert torch.equal(p, torch.full_like(p, QK_NORM_INIT if "self_attn" in name else 1.0))


@torch.no_grad()
def test_the_last_feature_of_tied_embeddings_is_a_bias_that_the_logits_do_not_see() -> None:
    model, tokens = Transformer(tiny.shape(), 32), tiny.ids(2, 16)
    embedding = model.model.embed_tokens.weight
    for rate, share in ((0.005, 0.25), (0.04, 1.0), (0.02, 1.0)):
        model.start_with_bias(rate)
        assert torch.equal(embedding[:, -1], torch.full((32,), BIAS_INIT * share * 4))
    before = model.logits(tokens)
    embedding[:, -1] *= -1  # of the same length, so that the norm divides by the same number
    assert torch.equal(model.logits(tokens), before)
    embedding[0, -2] *= -1
    assert not torch.equal(model.logits(tokens), before)


@torch.no_grad()
def test_pieces_start_as_the_sum_of_their_own_embedding_and_that_of_their_prefix() -> None:
    model = Transformer(tiny.shape(), 4, 1)
    embedding = model.model.embed_tokens.weight
    drawn = embedding.clone()
    model.start_with_prefixes(torch.tensor([-1, 0, 1, -1]))
    assert torch.equal(embedding, torch.stack([drawn[0], drawn[1] + drawn[0], drawn[2] + drawn[1], drawn[3]]))


def test_untied_embeddings_start_without_a_bias() -> None:
    model = Transformer(tiny.shape(tied=False), 32, 1)
    model.start_with_bias(0.02)
    for p, before in zip(model.parameters(), Transformer(tiny.shape(tied=False), 32, 1).parameters(), strict=True):
        assert torch.equal(p, before)


@pytest.mark.parametrize(("optimizer", "value"), [("muon", BIAS_INIT * 16), ("adamw", 0.0)])
def test_a_run_starts_with_a_bias_beside_muon_alone(optimizer: str, value: float, tmp_path: Path) -> None:
    keys = {
        "train.optimizer": optimizer,
        "train.learning_rate": 0.02,
        "train.steps": 1,
        "train.warmup": 0,
        "model.dim": 256,
    }
    recipe = write_recipe(tmp_path, write_text(tmp_path / "text.txt"), **keys)
    assert run(train(recipe), tmp_path).status == 0
    weights = load_file(tmp_path / "runs" / "tiny" / "checkpoints" / "step-000001" / "model.safetensors")
    assert weights["model.embed_tokens.weight"][:, -1].mean().item() == pytest.approx(value, abs=0.1)
    assert weights["model.norm.weight"][-1].item() == pytest.approx(0.0 if value else 1.0, abs=0.05)


def test_weights_follow_from_the_seed_alone() -> None:
    def weights(seed: int) -> Tensor:
        return torch.cat([p.detach().flatten() for p in Transformer(tiny.shape(), 32, seed).parameters()])

    torch.manual_seed(1)
    first = weights(5)
    torch.manual_seed(2)
    assert torch.equal(weights(5), first)
    assert not torch.equal(weights(6), first)


@pytest.mark.parametrize("heads", [{"heads": 2, "kv_heads": 1}, {"heads": 2, "kv_heads": 2}])
@torch.no_grad()
def test_a_changed_token_leaves_what_came_before_alone_to_the_bit(heads: dict[str, int]) -> None:
    model, tokens = tiny.transformer(**heads), tiny.ids(1, 16)
    before = model.logits(tokens)
    for place in range(16):
        changed = tokens.clone()
        changed[0, place] = (changed[0, place] + 1) % tiny.VOCABULARY
        after = model.logits(changed)
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.isclose(after[0, place:], before[0, place:]).all(-1).any()  # and all that follows sees it


@torch.no_grad()
def test_rows_of_a_batch_do_not_see_each_other() -> None:
    model, tokens = tiny.transformer(), tiny.ids(4, 16)
    assert torch.allclose(model.logits(tokens)[2:3], model.logits(tokens[2:3]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_loss_is_that_of_the_logits() -> None:
    model, tokens = tiny.transformer(dropout=0.5), tiny.ids(4, 17)
    by_hand = torch.nn.functional.cross_entropy(
        model.logits(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
    )
    assert model(tokens[:, :-1], tokens[:, 1:]).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_bf16_costs_little() -> None:
    model, tokens = tiny.transformer(), tiny.ids(4, 17)
    exact = model(tokens[:, :-1], tokens[:, 1:])
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.002)  # bf16 rounds by 0.4 %; 64 targets even it out
    loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


@pytest.mark.parametrize(
    "train",
    [Train(optimizer="muon", learning_rate=0.02), Train(optimizer="adamw", learning_rate=0.01)],
    ids=["muon", "adamw"],
)
def test_one_batch_is_memorised(train: Train) -> None:
    model = Transformer(tiny.shape(dim=32, ffn_dim=64), tiny.VOCABULARY, seed=1)
    optimizer = Optimizer(model, train)
    tokens = tiny.ids(4, 17)
    for step in range(150):  # twice what either needs
        model.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:]) / 64
        loss.backward()
        if loss < 0.05:
            return
        optimizer.step(step, 1.0, torch.ones(()), torch.tensor(True))
    pytest.fail(f"loss {loss.item():.3f} after 150 steps")


def gradients(model: Transformer, micro_batch: int, tokens: Tensor, targets: Tensor) -> list[Tensor]:
    """Of the mean over all targets that count, with the windows in micro-batches."""
    counted = (targets != IGNORED).sum()
    model.zero_grad()
    for windows in torch.arange(len(tokens)).split(micro_batch):
        (model(tokens[windows], targets[windows], windows + 1000) / counted).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def test_sixteen_windows_at_once_are_four_times_four() -> None:
    """Dropout on, and rows of which one counts all of its targets, another only one, and a whole micro-batch few."""
    model, tokens, targets = tiny.transformer(dropout=0.1), tiny.ids(16, 16), tiny.ids(16, 16, seed=1)
    for row in range(16):
        targets[row, 16 - row :] = IGNORED
    whole = gradients(model, 16, tokens, targets)
    for micro_batch in (4, 1):
        parts = gradients(model, micro_batch, tokens, targets)
        assert len(parts) == len(whole)
        assert max(off(part, true) for part, true in zip(parts, whole, strict=True)) < 1e-6


def test_a_callers_biases_start_at_zero_and_scalars_at_one() -> None:
    def changed(block: Block) -> Block:
        block.bias, block.scale = torch.nn.Parameter(torch.full((3,), 9.0)), torch.nn.Parameter(torch.tensor(9.0))
        return block

    ours = Transformer(tiny.shape(), tiny.VOCABULARY, 1, changed)
    found = {name: p.unique().tolist() for name, p in ours.named_parameters() if name.endswith(("bias", "scale"))}
    assert found and all(value == ([0] if name.endswith("bias") else [1]) for name, value in found.items())
