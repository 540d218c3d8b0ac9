"""What is in the environment stays there, and nothing that is written or read could run code."""

import ast
import importlib.util
from pathlib import Path

import pytest

from tests.forks import ROOT, ended, script, start, train, write_recipe, write_text

SECRETS = {"WANDB_API_KEY": "f00d" * 10, "HF_TOKEN": "hf_plantedplantedplanted", "MY_SECRET": "planted-secret-value"}
TENSORBOARD = importlib.util.find_spec("tensorboard") is not None
PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that had secrets in its environment, and all that it printed."""
    folder = tmp_path_factory.mktemp("secrets")
    recipe = write_recipe(
        folder,
        write_text(folder / "text.txt"),
        **{
            "evaluate.prompts": "[My self Har]",
            "train.steps": 6,
            "tracking.wandb": "offline",
            "tracking.tensorboard": TENSORBOARD,
        },
    )
    for act in (train(recipe), script("module:llm.sample", "--prompt", "The", "--tokens", "5")):
        done = ended(start(act, folder, SECRETS), folder)
        assert done.status == 0, done.err
        with (folder / "said.txt").open("a") as said:
            said.write(done.out + done.err)
    return folder


def files(folder: Path) -> list[Path]:
    found = [path for path in folder.rglob("*") if path.is_file()]
    assert len(found) > 20 and any(path.suffix == ".wandb" for path in found), "W&B's files are among them"
    return found


def test_no_secret_of_the_environment_is_in_any_file_or_line(trained: Path) -> None:
    for path in files(trained):
        data = path.read_bytes()
        assert not [name for name, value in SECRETS.items() if value.encode() in data], path


def test_no_file_is_a_pickle(trained: Path) -> None:
    for path in files(trained):
        assert not path.read_bytes().startswith(PICKLES), path
        assert path.suffix not in (".pt", ".pth", ".pkl", ".bin", ".ckpt"), path


def test_no_module_reads_or_writes_pickles_or_runs_what_it_reads() -> None:
    forbidden = {"pickle", "dill", "cloudpickle", "shelve", "marshal", "joblib"}
    for path in [*(ROOT / "llm").glob("*.py"), *(ROOT / "launch").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
                assert not {name.partition(".")[0] for name in names} & forbidden, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "torch.save", "eval", "exec", "yaml.load", "yaml.unsafe_load"), path
                assert not called.endswith("_object"), path  # torch.distributed's objects are pickles
