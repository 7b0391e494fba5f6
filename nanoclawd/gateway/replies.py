"""Errors that the gateway itself gives to an agent, in the shape of the Messages API."""

from __future__ import annotations

import json

#: The API's name of an error, by status. https://docs.anthropic.com/en/api/errors
KINDS = {
    **dict.fromkeys((400, 431, 501, 505), "invalid_request_error"),
    **dict.fromkeys((403, 405), "permission_error"),
    **dict.fromkeys((408, 504), "timeout_error"),
    **dict.fromkeys((500, 502, 503), "api_error"),
    401: "authentication_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class ErrorReply(Exception):
    """This request ends here; the agent is told `status` and `message`."""

    def __init__(self, status: int, reason: str, message: str, *headers: tuple[str, str]) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason  #: a word or two for the journal, e.g. "no-credential"; never content
        self.headers = headers

    def body(self) -> bytes:
        error = {"type": KINDS[self.status], "message": str(self)}
        return json.dumps({"type": "error", "error": error}).encode()


class AgentGone(Exception):
    """The agent hung up, or takes nothing any more."""
