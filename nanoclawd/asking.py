"""A request that waits for a person's answer: all that the gateway can see of it, and what an answer allows.

The hash of all that is what an answer is about: gateway and router compute it each for itself.
"""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from nanoclawd.policy import HTTP_PORT, Ask, Rule, Way, authority
from nanoclawd.wire import Json

BODY_BYTES = 16 << 10  #: of a request that is asked for
REQUEST_CHARACTERS = 96 << 10  #: of one as JSON; a few of them fit into a message


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One request of a session. Of a tunnel nothing can be seen but host and port."""

    agent: str
    session: str
    way: Way
    method: str
    host: str
    port: int
    path: str = ""  #: decoded, as rules have it
    target: str = ""  #: path and query as they came
    headers: tuple[tuple[str, str], ...] = ()  #: all that would be sent on
    body: str = ""  #: base64

    @property
    def canonical(self) -> str:
        """The one spelling as JSON: ASCII, sorted by key, without blanks."""
        return json.dumps({"kind": "request", **asdict(self)}, sort_keys=True, separators=(",", ":"))

    @property
    def sha256(self) -> str:
        return hash_of(self.canonical)

    @property
    def ask(self) -> Ask:
        """The same as policies decide about it."""
        return Ask(
            way=self.way,
            method=self.method,
            host=self.host,
            port=self.port,
            path=self.path,
            target=self.target,
        )

    @property
    def body_bytes(self) -> bytes:
        return base64.b64decode(self.body)

    @property
    def url(self) -> str:
        """The whole URL; of a tunnel all of it that there is."""
        if self.way is Way.TUNNEL:
            return authority(self.host, self.port)
        return f"http://{authority(self.host, self.port).removesuffix(f':{HTTP_PORT}')}{self.target}"

    def rule(self, *, deny: bool = False, until: float = 0.0) -> Rule:
        """Return the rule that allows this and as little else as a rule can, or denies all of its host.

        What is allowed: host, port and, if they are seen, method and path, with what is below that path.
        """
        if deny or self.way is Way.TUNNEL:
            return Rule(host=self.host, port=self.port, deny=deny, until=until)
        path = "" if self.path == "/" else self.path
        return Rule(host=self.host, port=self.port, methods=(self.method,), path=path, until=until)


def hash_of(canonical: str) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()


def to_json(request: Request) -> Json:
    """Return the request as the interfaces have it."""
    headers = [{"name": name, "value": value} for name, value in request.headers]
    return {**asdict(request), "headers": headers}


def from_json(request: Json) -> Request:
    """The reverse. Raises ValueError if it is larger than one may be, or its body is not base64."""
    headers = tuple((header["name"], header["value"]) for header in request["headers"])
    found = Request(**{**request, "way": Way(request["way"]), "headers": headers})
    base64.b64decode(found.body, validate=True)
    if len(found.canonical) > REQUEST_CHARACTERS:
        raise ValueError("the request is too large")
    return found


def parse(canonical: str) -> Request:
    """Return the request of a row. Raises ValueError, TypeError or KeyError if somebody wrote it anew."""
    values: dict[str, Any] = json.loads(canonical)
    del values["kind"]
    headers = tuple((str(name), str(value)) for name, value in values["headers"])
    return Request(**{**values, "way": Way(values["way"]), "headers": headers})
