"""Push an exported directory to the hub with huggingface_hub; the token comes from the environment or the login."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id

from halos.errors import UserError, user_errors
from halos.redaction import redact


def check_name(repo: str) -> None:
    """Raises UserError if `repo` is not of the form ORG/NAME, before anything is written."""
    with user_errors(f"--push-to-hub {repo}"):
        validate_repo_id(repo)
    if repo.count("/") != 1:
        raise UserError(f"--push-to-hub {repo}: write ORG/NAME")


def push(directory: Path, repo: str, *, private: bool, revision: str | None) -> str:
    """Create the repository (and its branch `revision`) if it does not exist, and upload. Return the URL of the commit."""
    try:
        with user_errors(f"{directory} is written, but {repo} could not be pushed to", "push it later with `hf upload`"):
            return _push(HfApi(), directory, repo, private=private, revision=revision)
    except UserError as error:  # a client's message may quote the request with its token
        raise UserError(redact(str(error))) from error.__cause__


def _push(api: HfApi, directory: Path, repo: str, *, private: bool, revision: str | None) -> str:
    api.create_repo(repo, private=private, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)
    done = api.upload_folder(repo_id=repo, folder_path=directory, revision=revision, commit_message=f"Upload {directory.name}")
    return str(done)
