"""Sends an exported folder to the Hugging Face hub."""

from pathlib import Path

from llm.base.errors import RecipeError
from llm.data.sources import network_errors


def push(folder: Path, repository: str, *, private: bool) -> str:
    """Upload the folder; its address on the hub. RecipeError, without the token, where that fails."""
    from huggingface_hub import HfApi
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(repository, private=private, exist_ok=True)
        return str(api.upload_folder(folder_path=folder, repo_id=repository))
    except network_errors() as error:
        # Only the kind of the error: its text may contain the request, and with it the token.
        fault = f"{repository} was not sent to the hub ({type(error).__name__})"
        mend = "connect to the network and run `hf auth login`"
        raise RecipeError(f"{fault}: {mend}; {folder} is whole") from None
