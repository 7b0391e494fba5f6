"""What went wrong with a model request, in the words of io.nanoclaw.Agent."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping

import anthropic
import httpx2

from ..provider import TurnFailed

#: The API's type of an error: our code, and the statuses that mean it when the answer names no type.
_KINDS: dict[str, tuple[str, tuple[int, ...]]] = {
    "authentication_error": ("authentication", (401,)),
    "permission_error": ("authentication", (403,)),
    "billing_error": ("quota", (402,)),
    "budget_error": ("quota", ()),  # the gateway's own, of the agent's budget
    "rate_limit_error": ("rate_limit", (429,)),
    "overloaded_error": ("overloaded", (529,)),
    "request_too_large": ("overflow", (413,)),
    "not_found_error": ("invalid_request", (404,)),
    "timeout_error": ("connection", (408, 504)),
    "api_error": ("overloaded", (409, *range(500, 600))),
    "invalid_request_error": ("invalid_request", ()),
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
    match exc:
        case TurnFailed():
            return exc
        case anthropic.APIStatusError():
            return _failure_of_status(exc)
        case anthropic.APITimeoutError() | httpx2.TimeoutException():
            return TurnFailed("connection", f"{_SENTENCES['connection']}.", retryable=True)
        case anthropic.APIConnectionError() | httpx2.TransportError():
            return TurnFailed(
                "connection", "The connection to the model provider broke off.", retryable=True
            )
        case anthropic.APIError():
            return TurnFailed("internal", "The model provider's answer was not understood.", retryable=True)
        case OSError():
            message = f"The agent's files cannot be used: {exc.strerror or type(exc).__name__}."
            return TurnFailed("internal", message, retryable=True)
    raise exc


def _failure_of_status(exc: anthropic.APIStatusError) -> TurnFailed:
    # The type first: an error within a stream comes with the status 200 that the stream began with.
    status = exc.status_code
    meant = [kind for kind, (_, statuses) in _KINDS.items() if status in statuses]
    kind: str = exc.type or [*meant, "invalid_request_error"][0]
    code, _ = _KINDS.get(kind) or _KINDS["api_error" if status >= 500 else "invalid_request_error"]
    detail = " ".join((exc.api_message or "").split())
    if kind == "budget_error":
        return TurnFailed(code, detail)
    detail = detail[:_DETAIL_CHARS]
    if code == "invalid_request":
        if "prompt is too long" in detail:
            code = "overflow"
        elif "credit balance" in detail:
            code = "quota"
    message = f"{_SENTENCES[code]} ({kind.replace('_', ' ')}" + (f", {status})" if status >= 400 else ")")
    if detail and code in ("authentication", "invalid_request", "quota"):
        message += f": {detail}"
    retryable = code in _RETRYABLE
    retry_after_s = _retry_after_s(exc.response.headers) if retryable else None
    return TurnFailed(code, message, retryable=retryable, retry_after_s=retry_after_s)


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Return the wait that the response asks for (RFC 9110, Retry-After: seconds or a date)."""
    value = headers.get("retry-after", "")
    try:
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None
