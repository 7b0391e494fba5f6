"""What went wrong with a model request, in the words of io.nanoclaw.Agent."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping

import anthropic
import httpx2

from ..provider import TurnFailed

_CODES = {
    "authentication_error": "authentication",
    "permission_error": "authentication",
    "billing_error": "quota",
    "rate_limit_error": "rate_limit",
    "overloaded_error": "overloaded",
    "request_too_large": "overflow",
    "invalid_request_error": "invalid_request",
    "not_found_error": "invalid_request",
    "timeout_error": "connection",
    "api_error": "overloaded",
}
_STATUS_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "api_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
_RETRYABLE = ("rate_limit", "overloaded", "connection")
_SENTENCES = {
    "authentication": "The model provider refuses the credential",
    "quota": "The account at the model provider has no credit left",
    "rate_limit": "The model provider's rate limit is reached",
    "overloaded": "The model provider cannot answer at the moment",
    "overflow": "The conversation is longer than this model can take",
    "invalid_request": "The model provider refuses the request",
    "connection": "The model provider did not answer in time",
}
_DETAIL_CHARS = 200


def failure_of(exc: Exception) -> TurnFailed:
    """Return what to report for that exception; raise it again if it is a bug."""
    if isinstance(exc, TurnFailed):
        return exc
    if isinstance(exc, anthropic.APIStatusError):
        return _failure_of_status(exc)
    if isinstance(exc, anthropic.APITimeoutError | httpx2.TimeoutException):
        return TurnFailed("connection", f"{_SENTENCES['connection']}.", retryable=True)
    if isinstance(exc, anthropic.APIConnectionError | httpx2.TransportError):
        return TurnFailed("connection", "The connection to the model provider broke off.", retryable=True)
    if isinstance(exc, anthropic.APIError):
        return TurnFailed("internal", "The model provider's answer was not understood.", retryable=True)
    if isinstance(exc, OSError):
        reason = exc.strerror or type(exc).__name__
        return TurnFailed("internal", f"The agent's files cannot be used: {reason}.", retryable=True)
    raise exc


def _failure_of_status(exc: anthropic.APIStatusError) -> TurnFailed:
    # The type first: an error within a stream comes with the status 200 that the stream began with.
    status = exc.status_code
    kind = exc.type or _STATUS_TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    code = _CODES.get(kind, "overloaded" if status >= 500 else "invalid_request")
    detail = " ".join((exc.api_message or "").split())[:_DETAIL_CHARS]
    if code == "invalid_request":
        if "prompt is too long" in detail:
            code = "overflow"
        elif "credit balance" in detail:
            code = "quota"
    message = f"{_SENTENCES[code]} ({kind.replace('_', ' ')}" + (f", {status})" if status >= 400 else ")")
    if detail and code in ("authentication", "invalid_request", "quota"):
        message += f": {detail}"
    return TurnFailed(
        code,
        message,
        retryable=code in _RETRYABLE,
        retry_after_s=_retry_after_s(exc.response.headers) if code in _RETRYABLE else None,
    )


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the wait that the response asks for (RFC 9110, Retry-After: seconds or a date)."""
    value = headers.get("retry-after", "")
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
