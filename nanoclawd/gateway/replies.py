"""Errors that the gateway itself gives to an agent, in the shape of the Messages API."""

from __future__ import annotations

import json

from nanoclawd.policy import Denied

#: The API's name of an error, by status. https://docs.anthropic.com/en/api/errors
KINDS = {
    **dict.fromkeys((400, 414, 431, 501, 505), "invalid_request_error"),
    **dict.fromkeys((403, 405), "permission_error"),
    **dict.fromkeys((408, 504), "timeout_error"),
    **dict.fromkeys((500, 502, 503), "api_error"),
    401: "authentication_error",
    402: "budget_error",  # not the API's "billing_error": its account has nothing to do with it
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
}


class AgentGone(Exception):
    """The agent hung up, or takes nothing any more."""


def render_error(error: Denied) -> bytes:
    """Return the body that tells an agent why."""
    shown = {"type": KINDS[error.status], "message": str(error)}
    return json.dumps({"type": "error", "error": shown}).encode()
