"""Uploading a trained model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from opsd.common.errors import UserError


def check_hub(repository: str) -> None:
    """Raises UserError unless the name is a valid one and the user is logged in."""
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        first = str(error).splitlines()[0]
        raise UserError(f"output.push_to_hub is {repository!r}: {first}") from None
    try:
        HfApi().whoami()
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:  # the hub has answered
        raise UserError(
            f"output.push_to_hub is {repository!r}: not logged in (hf auth login, or HF_TOKEN): "
            f"{str(error).strip().splitlines()[0]}"
        ) from None
    except Exception as error:  # the HTTP client's own errors
        raise UserError(
            f"output.push_to_hub is {repository!r}: the hub cannot be reached "
            f"({str(error).strip().splitlines()[0]})"
        ) from None


def push(repository: str, directory: Path, private: bool) -> str:
    """Upload the files of `directory`; returns their address. Makes the repository if it is new."""
    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    return str(api.upload_folder(repo_id=repository, folder_path=directory))
