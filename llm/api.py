"""The public API: load a recipe, train it in this process, open a run, let it generate and score it."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm.base import atomic_io
from llm.base.errors import RecipeError
from llm.config.packaged import load_recipe, recipes
from llm.config.schema import Recipe

if TYPE_CHECKING:
    from llm.run_folder.loaded_run import LoadedRun

__all__ = ["Run", "load_recipe", "open_run", "recipes", "train"]


def train(
    recipe: Recipe,
    *,
    runs: str | Path = "runs",
    model: Callable[..., Any] | None = None,
    optimizer: Callable[..., Any] | None = None,
    documents: Callable[[], Iterable[str | bytes]] | None = None,
    on_log: Callable[[dict[str, Any]], None] | None = None,
) -> "Run":
    """Train or resume the recipe's run in this process, and return it. The process is left as it was found.

    StoppedError after Ctrl-C or a signal: everything is saved, and the same call resumes. tests/examples/ has a worked
    example of each part that a caller may give:

    - `model(shape, vocab_size, seed, shard_module, family)` returns an nn.Module with `forward(tokens, targets,
      windows)` (summed loss in nats; under train.document_mask and for conversations also `segments`), `logits(tokens,
      cache, last)`, `blocks`, `model.recompute`, `lm_head.weight` and `shape`, as Transformer has them. Each block goes
      through `shard_module` as soon as it is made. Weights depend on `seed` alone. `open_run` must be given the same
      callable, with `shard_module` left out.
    - `optimizer(model, train, orthogonalise_in, sharding)` returns an object with `moments`, a dict from names to
      LocalShards that holds all of its state, and `step(step, lr_factor, scale, finite)`: update `step` with gradients
      times `scale`; if `finite` (a bool on the device) is false, weights and moments keep every bit.
    - `documents()` yields each document as str, or as bytes in UTF-8; text.files is then not read. It is called several
      times, on every rank, and must give the same documents in the same order each time.
    - `on_log(line)` gets each line of metrics.jsonl as a dict, on rank 0. If it raises an Exception, it is not called
      again and training goes on; `signal.raise_signal(signal.SIGINT)` in it stops the run as Ctrl-C does.

    Each checkpoint names the parts that were given. A run that began with a caller's model or optimizer resumes only
    with one, and any other run only without. Checkpoints of a caller's model are not Hugging Face folders and cannot be
    exported. The memory, traffic and utilisation that a run reports are those of our own model and optimizer.
    """
    from llm.distributed.process import say
    from llm.interop.pretrained import ready
    from llm.training.context import Parts, qualified_name
    from llm.training.session import train as train_run

    given = {"model": model, "optimizer": optimizer, "documents": documents, "on_log": on_log}
    if odd := next((name for name, part in given.items() if part is not None and not callable(part)), None):
        raise RecipeError(f"{odd}= is {type(given[odd]).__name__}, not a function: see tests/examples/ for one")
    if documents is not None:  # so that the run's recipe names them
        recipe = replace(recipe, text=replace(recipe.text, files=(qualified_name(documents),), sources=()))
    parts = Parts(model, optimizer, documents, on_log)
    train_run(recipe, partial(ready, say=say, documents=documents), runs=Path(runs), parts=parts)
    return open_run(recipe.run, runs=runs, model=model)


def open_run(name: str | None = None, *, runs: str | Path = "runs", model: Callable[..., Any] | None = None) -> "Run":
    """A trained run, at its best checkpoint: NAME, NAME/step-N, NAME/newest, or the run trained last.

    `model` is needed again where the run was trained with one.
    """
    from llm.distributed.modes import usual_modes
    from llm.run_folder.loaded_run import open_run as open_folder

    with usual_modes():
        return Run(open_folder(name, runs=Path(runs), model=model))


class Run:
    """A trained run: `recipe`, `tokenizer`, `model`, `metrics`, and what can be done with them."""

    def __init__(self, loaded: "LoadedRun") -> None:
        self.folder, self.step = loaded.folder, loaded.checkpoint.step
        self.loaded = replace(loaded, folder=loaded.folder.absolute())  # the caller may go to another folder
        self.recipe, self.tokenizer, self.model = loaded.recipe, loaded.tokenizer, loaded.model

    def __repr__(self) -> str:
        return f"<Run {self.loaded.name} in {self.folder}>"

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl: steps, evaluations, samples and events, in their order."""
        return list(atomic_io.read_lines(self.loaded.folder / "metrics.jsonl"))

    def generate(self, prompt: str, tokens: int = 200, *, seed: int = 0, **sampling: float) -> str:
        """The model's continuation of `prompt`. `sampling`: temperature, top_k, top_p, min_p, repetition_penalty.

        RecipeError for a number out of its bounds, and for half of a surrogate pair in the prompt.
        """
        from llm.base.command import checked
        from llm.distributed.modes import usual_modes
        from llm.inference.generation import continuations
        from llm.inference.sampling import Sampling

        tokens = checked("tokens", str(tokens), int, 0, float("inf"))
        seed = checked("seed", str(seed), int, 0, (1 << 63) - 1)
        choice = Sampling(**sampling)  # type: ignore[arg-type]
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RecipeError(f"the prompt {prompt[:40]!r} holds half of a surrogate pair: leave it out") from error
        ids = [[self.tokenizer.bos, *self.tokenizer.encode(prompt)]]
        with usual_modes():
            return continuations(self.model, self.tokenizer, ids, tokens, choice, seed)[0]

    def evaluate(self, *texts: str | Path, rows: int = 8) -> dict[str, float]:
        """Loss, bits per byte and perplexities of the run's held-out text or answers, or of `texts`: files or names.

        With text.sources those of each source, as "NAME/loss" and so on. RecipeError unless `rows` (windows that are
        read at once) is 1 or more.
        """
        from llm.base.command import checked
        from llm.distributed.modes import usual_modes
        from llm.inference import scoring

        rows = checked("rows", str(rows), int, 1, float("inf"))

        names = ("loss", "bits_per_byte", "token_perplexity", "word_perplexity", "targets")
        with usual_modes():
            if texts:
                text = scoring.encode_files(self.loaded, list(map(str, texts)))
                scores = {"": scoring.score(self.loaded, text, rows)}
            else:
                scores = {source: score for source, _, score in scoring.score_held_out(self.loaded, rows)}
        return {
            f"{source}/{name}" if source else name: getattr(score, name)
            for source, score in scores.items()
            for name in names
        }
