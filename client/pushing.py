"""A checkpoint folder onto the Hugging Face Hub, by huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..proto.v1.errors import AuthenticationError, SaveError, one_line
from .hub_token import cleaned

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo


def push_folder(
    folder: str,
    files: list[str],
    repo_id: str,
    *,
    older: list[str],
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Commits `files` of `folder` to the repository `repo_id`, which is made where there is none.

    older: patterns of the names of files that these replace; those that the repository has are removed. token: as
    huggingface_hub takes it; by default that of this environment. Raises AuthenticationError where the Hub refuses it,
    InvalidRequestError where no header can carry it, and SaveError for all else that fails.
    """
    # Lazily: only who pushes needs it.
    from huggingface_hub import HfApi

    if isinstance(token, str):
        token = cleaned(token)
    api = HfApi(token=token)
    with _told(repo_id, token):
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr"):
            api.create_branch(full_id, branch=revision, exist_ok=True)
        return api.upload_folder(
            repo_id=full_id,
            folder_path=folder,
            allow_patterns=files,
            # Weights of another save, which a reader would take in the place of these or beside them.
            delete_patterns=older,
            revision=revision,
            commit_message=commit_message or "Upload model",
            commit_description=commit_description,
            create_pr=create_pr,
        )


@contextmanager
def _told(repo_id: str, token: str | bool | None) -> Iterator[None]:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except LocalTokenNotFoundError:
        raise AuthenticationError(
            "the Hub wants a token, and there is none here: pass token=, set HF_TOKEN or run `hf auth login`"
        ) from None
    except (HfHubHTTPError, HFValidationError, OSError, ValueError, RuntimeError) as error:
        text = one_line(error, 300)
        if isinstance(token, str) and token:
            text = text.replace(token, "…")
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status in (401, 403):
            raise AuthenticationError(f"the Hub refuses to let this token write to {repo_id}: {text}") from None
        raise SaveError(f"{repo_id} can't be pushed to the Hub: {text}") from None
