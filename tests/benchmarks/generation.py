"""Generation against transformers on equal weights: python tests/benchmarks/generation.py [RECIPE ...] [--threads N] [--device cuda]

Each recipe's shape, weights drawn at random, is saved as a checkpoint, which transformers opens as it lies. Both then say the
same tokens greedily, in one precision, in turn, so that a machine whose speed wanders slows both alike; min/median/max of tokens/s
are printed. Theirs: `generate` under inference_mode, its default cache, no end token and no logits processor. Weights are laid out
before the clock starts, as `llm.sample` does once. `--int8` rounds ours to 8 bits, whose tokens may differ. `--run` takes a run's own
weights and the first words of its validation texts instead. The last column counts our steps of the model for each token of a text:
fewer than one where guessed tokens came true.
"""

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from llm.config.reading import load
from llm.inference.fast_decode import FastDecoder, prepare_weights
from llm.inference.generation import Sampling, generate
from llm.inference.scoring import validation_text
from llm.insight.planning import sized
from llm.model.transformer import Transformer
from llm.run_folder.loaded_run import open_run
from tests import tiny
from tests.interop.test_hf_files import saved

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 16, 100, 5


def theirs_of(folder: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=NEW_TOKENS)
    return model


def compare(recipe: str, rows: int, device: str, dtype: torch.dtype, rounds: int, run: str | None, int8: bool) -> None:
    settled = load(Path(recipe), ["model.dropout=0"])
    shape, vocabulary = settled.model, sized(settled).tokenizer.vocab_size
    ours = tiny.stirred(Transformer(shape, vocabulary), seed=5).eval()
    prompts = tiny.ids(rows, PROMPT_TOKENS, vocabulary=vocabulary)
    if run:
        opened = open_run(run, torch.device("cpu"))
        ours, text = opened.model, validation_text(opened)
        prompts = torch.stack(
            [torch.from_numpy(text.tokens.read(at, at + PROMPT_TOKENS).astype("int64")) for at in text.starts[:rows]]
        )
    like: Any = SimpleNamespace(bos=1, ends=(1,), vocab_size=vocabulary, banned=(), is_exact_bpe=False)  # no text
    with tempfile.TemporaryDirectory() as folder:
        theirs = theirs_of(saved(Path(folder) / "step-000001", ours, like)).to(device, dtype)
    ours, prompts = ours.to(device, dtype), prompts.to(device)
    prepare_weights(ours, int8=int8)
    mask = torch.ones_like(prompts)

    @torch.inference_mode()
    def they_say() -> list[list[int]]:
        return theirs.generate(prompts, attention_mask=mask)[:, PROMPT_TOKENS:].tolist()

    def we_say() -> list[list[int]]:
        columns = generate(ours, prompts.tolist(), NEW_TOKENS, Sampling(temperature=0, repetition_penalty=1))
        return [[token for token in row if token is not None] for row in zip(*columns, strict=True)]

    expected = they_say()  # which also warms both
    with mock.patch.object(FastDecoder, "step", autospec=True, side_effect=FastDecoder.step) as steps:
        said = we_say()
    taken = sum(1 for call in steps.call_args_list if call.args[3][0])  # which begin after the first token: no reading
    # In fp32 on a CPU to the token; elsewhere the order of sums may turn two that are as good as equal.
    same = [a == b for one, other in zip(said, expected, strict=True) for a, b in zip(one, other, strict=True)]
    assert all(same) or device != "cpu" or int8
    sides: dict[str, Callable[[], object]] = {"transformers": they_say, "ours": we_say}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, say in sides.items():
            began = time.perf_counter()
            say()
            rates[name].append(rows * NEW_TOKENS / (time.perf_counter() - began))
    gain = statistics.median(a / b for a, b in zip(rates["ours"], rates["transformers"], strict=True))
    cells = [f"{f(values):9,.0f}" for values in rates.values() for f in (min, statistics.median, max)]
    print(
        f"{Path(recipe).stem:12}{rows:6}{''.join(cells)}{gain:8.2f}   {sum(same) / len(same):.0%} of the tokens equal, "
        f"{taken / NEW_TOKENS:.2f} steps a token",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "recipes", nargs="*", default=[f"recipes/{name}.yaml" for name in ("quickstart", "classic", "small")]
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--run", help="a run of the recipe that is named")
    parser.add_argument("--int8", action="store_true")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(given.threads)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(
        f"{versions}, {given.device}, {given.threads} threads, {given.precision}{', ours int8' if given.int8 else ''}, {PROMPT_TOKENS} + {NEW_TOKENS} tokens, "
        f"{given.rounds} rounds, tokens/s"
    )
    print(f"{'':18}{'transformers':>27}{'ours':>27}{'gain':>8}")
    print(f"{'recipe':12}{'rows':>6}" + f"{'min':>9}{'median':>9}{'max':>9}" * 2)
    for recipe in given.recipes:
        for rows in given.rows:
            dtype = torch.bfloat16 if given.precision == "bf16" else torch.float32
            compare(recipe, rows, given.device, dtype, given.rounds, given.run, given.int8)


if __name__ == "__main__":
    main()
