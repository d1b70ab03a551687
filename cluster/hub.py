"""The Hub's answers to the driver: a revision's commit. Files are read through worker.sources."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

from huggingface_hub import HfApi, constants
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
from ..worker.sources.answers import is_transient, origin, redact, retry_after_s
from ..worker.sources.hub import TRANSIENT, why_no_hub
from ..worker.sources.hub_cache import cache_folder, cached_commit
from ..worker.sources.patience import Failure, Patience, Sleep, cause_of

logger = logging.getLogger(__name__)

_ATTEMPTS = 4  # fewer than for a file: somebody waits for the first word
_ATTEMPTS_WITH_CACHE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedCommit:
    """`is_cached`: the Hub couldn't be asked; this is what its cache on this machine last saw."""

    commit: str
    is_cached: bool = False


def resolve_commit(
    repo_id: str,
    revision: str,
    *,
    endpoint: str | None,
    token: HubToken,
    cache_dir: str = "",
    local_files_only: bool = False,
    sleep: Sleep | None = None,
) -> ResolvedCommit:
    """The commit that `revision` means now; or as last cached: with the Hub out of reach, or not to be asked
    (`local_files_only`, HF_HUB_OFFLINE).

    Raises CheckpointNotFoundError, GatedCheckpointError and SourceError.
    """
    cached = cached_commit(repo_id, revision, cache_dir)
    if local_files_only or constants.HF_HUB_OFFLINE:
        if not cached:
            why, remedy = why_no_hub(local_files_only)
            raise SourceError(
                f"{why}, and {repo_id} at {revision!r} is not in the Hub's cache ({cache_folder(cache_dir)}): "
                f"{remedy}, or pass a local folder"
            )
        return ResolvedCommit(commit=cached, is_cached=True)
    attempts = _ATTEMPTS_WITH_CACHE if cached else _ATTEMPTS
    try:
        return ResolvedCommit(commit=_ask(repo_id, revision, endpoint, token, attempts, sleep))
    except _OutOfReachError as error:
        if not cached:
            raise SourceError(str(error)) from None
        logger.warning("%s; commit %s of the Hub's cache is used", error, cached)
        return ResolvedCommit(commit=cached, is_cached=True)


class _OutOfReachError(Exception):
    """The Hub gave no answer, where a cached one will do."""


def _ask(repo_id: str, revision: str, endpoint: str | None, token: HubToken, attempts: int, sleep: Sleep | None) -> str:
    api = HfApi(endpoint=endpoint, token=token)
    where, host = redact(api.endpoint), (origin(api.endpoint) or ("", "", 0))[1]
    patience = Patience(f"the commit of {repo_id} at {revision!r} from {where}", attempts, sleep=sleep)
    while True:
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
            raise CheckpointNotFoundError(
                f"{repo_id!r} is neither a folder nor a repository: {one_line(error)}"
            ) from None
        except OfflineModeIsEnabled as error:
            raise _OutOfReachError(f"{where} can't be asked about {repo_id}: {one_line(error)}") from None
        except HfHubHTTPError as error:
            status, headers = error.response.status_code, error.response.headers
            if not is_transient(status):
                raise SourceError(f"{where} can't be asked about {repo_id}: {redact(one_line(error))}") from None
            failure = Failure(cause=f"HTTP {status}", wait_s=retry_after_s(headers, time.time()))
        except TRANSIENT as error:
            failure = Failure(cause=cause_of(error, host))
        except Exception as error:
            raise SourceError(f"{where} does not answer as a Hub does: {redact(one_line(error))}") from None
        else:
            if not info.sha:
                raise SourceError(f"{where} gave no commit for {repo_id} at {revision!r}")
            return info.sha
        try:
            patience.failed(failure)
        except SourceError as error:
            raise _OutOfReachError(str(error)) from None
