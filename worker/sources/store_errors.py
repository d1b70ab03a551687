"""What a store's client library means by its exception. Pure; imports none of them, since any may be missing.

Libraries translate each other's errors, and lose what matters on the way: s3fs makes an OSError of a botocore error,
fsspec's HTTP a FileNotFoundError of any status. So the whole chain is looked at, by status, code and class name.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import TypeGuard

from ...proto.v1.errors import one_line
from . import answers
from .disk import TRANSIENT as TRANSIENT_ERRNOS
from .patience import cause_of, chain


class Meaning(enum.Enum):
    MISSING = "missing"
    DENIED = "denied"  # credentials that may not, or none
    CHANGED = "changed"  # the range or the version isn't there any more
    TRANSIENT = "transient"
    LASTING = "lasting"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    meaning: Meaning
    cause: str  # for people; without secrets


class AnswerError(Exception):
    """An HTTP answer that isn't the one asked for. Its text is ours."""

    def __init__(self, text: str, *, status: int = 0, meaning: Meaning | None = None) -> None:
        super().__init__(text)
        self.status, self.meaning = status, meaning


_HINT = "; check the endpoint, the region and the credentials in this node's environment"
_CODES = {
    **dict.fromkeys(("NoSuchKey", "NoSuchBucket", "NoSuchVersion", "NotFound"), Meaning.MISSING),
    **dict.fromkeys(
        ("AccessDenied", "AllAccessDisabled", "AccountProblem", "ExpiredToken", "InvalidAccessKeyId", "InvalidToken"),
        Meaning.DENIED,
    ),
    **dict.fromkeys(
        ("InvalidSecurity", "RequestTimeTooSkewed", "SignatureDoesNotMatch", "TokenRefreshRequired"), Meaning.DENIED
    ),
    **dict.fromkeys(("PreconditionFailed", "InvalidRange"), Meaning.CHANGED),
    **dict.fromkeys(
        ("SlowDown", "RequestTimeout", "InternalError", "ServiceUnavailable", "OperationAborted", "TooManyRequests"),
        Meaning.TRANSIENT,
    ),
    **dict.fromkeys(("Throttling", "ThrottlingException", "RequestLimitExceeded"), Meaning.TRANSIENT),
}
_STATUSES = {
    **dict.fromkeys((401, 403), Meaning.DENIED),
    **dict.fromkeys((404, 410), Meaning.MISSING),
    **dict.fromkeys((412, 416), Meaning.CHANGED),
}
# In this order: a certificate that isn't trusted comes as a failed connection.
_CLASSES = (
    (Meaning.LASTING, {"SSLCertVerificationError", "CertificateError", "ProfileNotFound"}),
    (
        Meaning.DENIED,
        {
            *("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError"),
            *("UnauthorizedSSOTokenError", "SSOTokenLoadError", "DefaultCredentialsError", "RefreshError"),
            *("ClientAuthenticationError", "PermissionError"),
        },
    ),
    (
        Meaning.TRANSIENT,
        {
            *("TimeoutError", "FSTimeoutError", "Timeout", "ConnectionError", "gaierror", "TransportError"),
            *("ClientConnectionError", "ClientPayloadError", "HTTPClientError", "ResponseStreamingError"),
            *("IncompleteRead", "IncompleteReadError", "ResponseParserError", "ChunkedEncodingError"),
            *("ServiceRequestError", "ServiceResponseError"),
        },
    ),
    (Meaning.MISSING, {"FileNotFoundError", "NotADirectoryError", "IsADirectoryError"}),
)


def judge(error: BaseException) -> Verdict:
    errors = list(chain(error))
    for each in errors:
        if isinstance(each, AnswerError) and each.meaning is not None:
            return Verdict(meaning=each.meaning, cause=str(each))
    code = next(filter(None, map(_code, errors)), "")
    status = next(filter(None, map(_status, errors)), 0)
    if code or status:
        cause = " ".join([*([f"HTTP {status}"] if status else []), *([code] if code and not code.isdigit() else [])])
        meaning = _CODES.get(code) or _STATUSES.get(status)
        if meaning is None:
            meaning = Meaning.TRANSIENT if answers.is_transient(status) else Meaning.LASTING
        return Verdict(meaning=meaning, cause=cause + _HINT if meaning is Meaning.LASTING else cause)
    for meaning, names in _CLASSES:
        for each in errors:
            if any(base.__name__ in names for base in type(each).__mro__):
                return Verdict(meaning=meaning, cause=_text(each, meaning))
    for each in errors:
        if isinstance(each, OSError) and each.errno in TRANSIENT_ERRNOS:
            return Verdict(meaning=Meaning.TRANSIENT, cause=cause_of(each))
        if isinstance(each, OSError) and str(each).startswith("Forbidden"):  # gcsfs' 403
            return Verdict(meaning=Meaning.DENIED, cause="HTTP 403")
    return Verdict(meaning=Meaning.LASTING, cause=cause_of(error) + _HINT)


def _text(error: BaseException, meaning: Meaning) -> str:
    """Of what concerns credentials, only the class: its text may quote them."""
    if meaning is Meaning.DENIED:
        return type(error).__name__
    if meaning is Meaning.MISSING:
        return "no such file"
    if one_line(error) == type(error).__name__:
        return type(error).__name__  # it has no text
    return cause_of(error) + _HINT if meaning is Meaning.LASTING else cause_of(error)


def _code(error: BaseException) -> str:
    """The store's own word, as botocore has it."""
    response = getattr(error, "response", None)
    found = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    return found if isinstance(found, str) and found.isalnum() else ""


def _status(error: BaseException) -> int:
    """The answer's status, by whichever name the library has it."""
    if any(base.__name__ == "HttpProcessingError" for base in type(error).__mro__):
        return 0  # aiohttp's word for an answer that broke off: its "400" is no server's
    response = getattr(error, "response", None)
    if isinstance(response, dict):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        return found if _is_status(found) else 0
    for owner, name in ((error, "status"), (error, "status_code"), (response, "status_code"), (error, "code")):
        found = getattr(owner, name, None)
        if _is_status(found):
            return found
    return 0


def _is_status(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and 100 <= value < 600
