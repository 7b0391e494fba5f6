"""Errors that the gateway itself gives to an agent, in the shape of the Messages API."""

from __future__ import annotations

import json

#: The API's name of an error, by status. https://docs.anthropic.com/en/api/errors
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "permission_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    431: "invalid_request_error",
    500: "api_error",
    501: "invalid_request_error",
    502: "api_error",
    503: "api_error",
    504: "timeout_error",
    505: "invalid_request_error",
}


class ErrorReply(Exception):
    """This request ends here; the agent is told `status` and `message`."""

    def __init__(
        self, status: int, message: str, *, reason: str, headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason  #: a word or two for the journal, e.g. "no-credential"; never content
        self.headers = headers

    def body(self) -> bytes:
        error = {"type": KINDS[self.status], "message": self.message}
        return json.dumps({"type": "error", "error": error}).encode()


class AgentGone(Exception):
    """The agent hung up, or takes nothing any more."""
