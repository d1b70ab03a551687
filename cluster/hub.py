"""The Hub's answers to the driver: a revision's commit. Files are read through worker.sources."""

from __future__ import annotations

from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..proto.v1.errors import CheckpointNotFoundError, GatedCheckpointError, SourceError, one_line
from ..worker.records import HubToken
from ..worker.sources.answers import redact


def resolve_commit(repo_id: str, revision: str, *, endpoint: str | None, token: HubToken) -> str:
    """The commit that `revision` means now. Raises CheckpointNotFoundError, GatedCheckpointError and SourceError."""
    api = HfApi(endpoint=endpoint, token=token)
    where = api.endpoint
    try:
        info = api.model_info(repo_id, revision=revision, timeout=20)
    except GatedRepoError:
        raise GatedCheckpointError(
            f"{repo_id} is gated: ask for access on its page, and set HF_TOKEN to a token that has it"
        ) from None
    except RevisionNotFoundError:
        raise CheckpointNotFoundError(f"{repo_id} has no revision {revision!r} at {where}") from None
    except RepositoryNotFoundError:
        raise CheckpointNotFoundError(
            f"there is no folder and no repository {repo_id} at {where}; if it is private, set HF_TOKEN"
        ) from None
    except HFValidationError as error:
        raise CheckpointNotFoundError(f"{repo_id!r} is neither a folder nor a repository: {one_line(error)}") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, RuntimeError) as error:
        raise SourceError(f"{where} can't be asked about {repo_id}: {redact(one_line(error))}") from None
    except Exception as error:
        # The HTTP library's own errors, whichever library huggingface_hub uses.
        raise SourceError(f"{where} can't be reached: {redact(one_line(error))}") from None
    if not info.sha:
        raise SourceError(f"{where} gave no commit for {repo_id} at {revision!r}")
    return info.sha
