"""Push an exported directory to the hub, through huggingface_hub's own calls; the token is the environment's or the login's."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from halos.config.secrets import redact
from halos.errors import UserError


def check_name(repo: str) -> None:
    """Raises UserError for what is no ORG/NAME, before anything is written."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UserError(f"--push-to-hub {repo}: {error}") from error
    if repo.count("/") != 1:
        raise UserError(f"--push-to-hub {repo}: write ORG/NAME")


def push(directory: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Make the repository (and its branch `revision`) where there is none, and upload; the commit's address."""
    api = HfApi()
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo, folder_path=directory, revision=revision, commit_message=f"Upload {directory.name}"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        reason = redact(str(error)).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{directory} is written, but {repo} could not be pushed to: {reason[0]}") from error
    return str(commit)
