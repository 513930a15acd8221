"""Upload a trained model to the Hugging Face hub."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from opsd.common.errors import UserError


def check_hub(repository: str, private: bool, create: bool) -> None:
    """Raises UserError unless the name is valid and the user is logged in.

    create: also make the repository if it is new, and raise unless the user may write to it.
    """

    def refused(why: str, error: Exception) -> UserError:
        first = str(error).strip().splitlines()[0]
        return UserError(f"output.push_to_hub is {repository!r}: {why} ({first})")

    api = HfApi()
    try:
        validate_repo_id(repository)
        api.whoami()
    except HFValidationError as error:
        raise refused("not a repository's name", error) from None
    except (LocalTokenNotFoundError, HfHubHTTPError) as error:  # the hub has answered
        raise refused("not logged in: hf auth login, or HF_TOKEN", error) from None
    except Exception as error:  # the HTTP client's own errors
        raise refused("the hub cannot be reached", error) from None
    if not create:
        return
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        api.auth_check(made.repo_id, write=True)
    except Exception as error:  # of the hub or of the HTTP client
        raise refused("it cannot be written to", error) from None


def push(repository: str, directory: Path, private: bool) -> str:
    """Uploads the files of `directory`; returns their URL. Makes the repository if it is new."""
    api = HfApi()
    made = api.create_repo(repository, private=private, exist_ok=True)  # its id has the owner too
    return str(api.upload_folder(repo_id=made.repo_id, folder_path=directory))
