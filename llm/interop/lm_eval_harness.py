"""Tasks of lm-evaluation-harness, run on a checkpoint's folder itself. The only module that imports lm_eval."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm.base.errors import RecipeError, RefusedError
from llm.run_folder.loaded_run import LoadedRun


def run_tasks(run: LoadedRun, tasks: list[str], folder: Path | None, rows: int) -> Iterator[str]:
    """Lines with the results of `tasks` in fp32; `folder` holds tasks of the user's own."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise RecipeError(f"--tasks needs lm-eval ({error}): pip install -e '.[eval]'") from None
    if not run.tokenizer.is_portable:
        raise RefusedError(f"{run.name} has no tokenizer.json, which lm-eval needs: its vocabulary is of another kind")
    manager = TaskManager(include_path=str(folder) if folder else None)
    if unknown := [name for name in tasks if name not in manager.all_tasks]:
        raise RecipeError(f"--tasks: lm-eval knows no {unknown[0]}; name the folder of your own tasks by --task-folder")
    model = _model(HFLM, run, rows)
    results = simple_evaluate(model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False)
    assert results is not None
    for task, metrics in results["results"].items():
        for name, value in metrics.items():
            if isinstance(value, int | float) and "stderr" not in name and name != "sample_len":
                yield f"{task:<21} {name.removesuffix(',none')} {value:.6g}"


def _model(base: Any, run: LoadedRun, rows: int) -> Any:
    class Folder(base):
        def loglikelihood_rolling(self, *requests: Any, **options: Any) -> Any:
            self.add_bos_token = False  # lm-eval's rolling windows begin with BOS already
            try:
                return super().loglikelihood_rolling(*requests, **options)
            finally:
                self.add_bos_token = True

    return Folder(
        str(run.checkpoint.folder), device=str(run.model.lm_head.weight.device), dtype="float32", batch_size=rows,
        add_bos_token=True, max_length=run.recipe.model.context)  # fmt: skip
