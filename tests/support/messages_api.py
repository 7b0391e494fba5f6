"""A loopback server that speaks Anthropic's Messages API with scripted answers.

    python -m tests.support.messages_api --port 0 --script FILE [--require-key KEY] [--record FILE]

prints the port that it listens on, and serves until it is ended. It needs the standard library only. A
script is a JSON list of answers, given one a request; when they are used up, every further request is an
error of the test (status 400), unless --repeat keeps the last one. The fields of an answer, all optional:

    text          the reply, streamed in words
    thinking      a thinking block before it
    tool_use      a list of {"name": …, "input": {…}} that follow it; the stop reason is then "tool_use"
    compaction    a compaction block with this summary before everything else
    stop_reason   another one than "end_turn" or "tool_use"
    usage         {"input_tokens": …, "output_tokens": …}
    pause_s       the wait before each event of the stream
    status        an HTTP error instead of an answer, with
    error           {"type": …, "message": …} (else they fit the status) and
    headers       headers of the response, e.g. {"retry-after": "7"}
    drop_after    cut the connection after this many events
    error_after   after this many events send the event "error" with the fields of `error`
    hold_after    after this many events wait until the client goes away (or release() is called)

The requests are checked as the API checks them where a client that keeps transcripts goes wrong: each
tool_use has its tool_result in the next message, nothing is empty, the first message is the user's.
"""

from __future__ import annotations

import argparse
import http.server
import json
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar

Answer = dict[str, Any]

_ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    529: "overloaded_error",
}


class MessagesApi:
    """The server. Listens on a loopback port (0: any), or on a Unix socket if `unix` is given."""

    def __init__(
        self,
        answers: list[Answer],
        *,
        port: int = 0,
        unix: Path | None = None,
        require_key: str | None = None,
        record: Path | None = None,
        repeat: bool = False,
    ) -> None:
        self.requests: list[dict[str, Any]] = []  #: {"at", "path", "headers" (lower case), "body"} of each
        self._answers = list(answers)
        self._require_key = require_key
        self._record = record
        self._repeat = repeat
        self._ids = 0
        self._changed = threading.Condition()
        self._released = threading.Event()
        handler = type("Handler", (_Handler,), {"api": self})
        self._server: socketserver.BaseServer
        if unix is not None:
            self._server = _UnixServer(str(unix), handler)
            self.port = 0
        else:
            server = _TcpServer(("127.0.0.1", port), handler)
            self._server, self.port = server, int(server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=[0.05], daemon=True)

    def start(self) -> MessagesApi:
        self._thread.start()
        return self

    def close(self) -> None:
        self.release()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> MessagesApi:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, *answers: Answer) -> None:
        with self._changed:
            self._answers += answers

    def release(self) -> None:
        """Let held streams go on to their end."""
        self._released.set()

    def wait_requests(self, count: int, timeout_s: float = 30.0) -> list[dict[str, Any]]:
        """Wait until there were so many requests; return all."""
        with self._changed:
            if not self._changed.wait_for(lambda: len(self.requests) >= count, timeout_s):
                raise TimeoutError(f"{len(self.requests)} requests instead of {count}")
            return list(self.requests)

    # for the handler

    def next_answer(self, request: dict[str, Any]) -> Answer:
        with self._changed:
            self.requests.append(request)
            self._changed.notify_all()
            if self._record is not None:
                with self._record.open("a") as file:
                    file.write(json.dumps(request) + "\n")
            if self._require_key is not None and self._require_key not in _keys(request["headers"]):
                return {"status": 401, "error": {"message": "invalid x-api-key"}}
            problem = find_problem(request["body"])
            if problem:
                return {"status": 400, "error": {"message": problem}}
            if not self._answers:
                return {"status": 400, "error": {"message": "messages_api: the script is used up"}}
            return self._answers[0] if self._repeat and len(self._answers) == 1 else self._answers.pop(0)

    def next_id(self, prefix: str) -> str:
        with self._changed:
            self._ids += 1
            return f"{prefix}_{self._ids:04d}"

    def wait_release(self, client: socket.socket) -> bool:
        """Wait for release() or the end of the client; return whether the stream goes on."""
        client.settimeout(0.05)
        while not self._released.is_set():
            try:
                if not client.recv(1):
                    return False
            except TimeoutError:
                continue
            except OSError:
                return False
        client.settimeout(None)
        return True


def find_problem(body: dict[str, Any]) -> str | None:
    """Return what the API would refuse, None if it would not."""
    for field in ("model", "max_tokens", "messages"):
        if not body.get(field):
            return f"{field}: Field required"
    messages = body["messages"]
    blocks = [_blocks(message) for message in messages]
    if messages[0]["role"] != "user" and blocks[0][0].get("type") != "compaction":
        return "messages: first message must use the user role"
    for index, message in enumerate(messages):
        if not blocks[index]:
            return f"messages.{index}: content must not be empty"
        if any(block["type"] == "text" and not block["text"].strip() for block in blocks[index]):
            return f"messages.{index}: text content blocks must contain non-whitespace text"
        asked = {block["id"] for block in blocks[index] if block["type"] == "tool_use"}
        answered = {
            block["tool_use_id"]
            for block in (blocks[index + 1] if index + 1 < len(messages) else [])
            if block["type"] == "tool_result"
        }
        if message["role"] == "assistant" and asked != answered:
            return f"messages.{index}: tool_use ids and tool_result blocks of the next message differ"
    return None


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _keys(headers: dict[str, str]) -> tuple[str, str]:
    """Return what the request says its key is: raw clients send x-api-key, the SDK a bearer token."""
    return headers.get("x-api-key", ""), headers.get("authorization", "").removeprefix("Bearer ")


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    api: ClassVar[MessagesApi]

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        raw = self.rfile.read(int(self.headers.get("content-length", 0)))
        if not self.path.partition("?")[0].endswith("/v1/messages"):
            self._error(404, {"error": {"message": f"no such path: {self.path}"}})
            return
        request = {
            "at": time.time(),
            "path": self.path,
            "headers": {name.lower(): value for name, value in self.headers.items()},
            "body": json.loads(raw),
        }
        answer = self.api.next_answer(request)
        if "status" in answer:
            self._error(answer["status"], answer)
            return
        message = self._message(answer, request["body"]["model"])
        if request["body"].get("stream"):
            self._stream(answer, message)
        else:
            self._json(200, message, answer.get("headers", {}))

    def _message(self, answer: Answer, model: str) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if "compaction" in answer:
            content.append({"type": "compaction", "content": answer["compaction"]})
        if "thinking" in answer:
            content.append({"type": "thinking", "thinking": answer["thinking"], "signature": "c2ln"})
        if answer.get("text"):
            content.append({"type": "text", "text": answer["text"]})
        for tool in answer.get("tool_use", []):
            content.append({"type": "tool_use", "id": self.api.next_id("toolu"), **tool})
        reason = answer.get("stop_reason", "tool_use" if answer.get("tool_use") else "end_turn")
        return {
            "id": self.api.next_id("msg"),
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": content,
            "stop_reason": reason,
            "stop_sequence": None,
            "usage": {"input_tokens": 10, "output_tokens": 5, **answer.get("usage", {})},
        }

    def _stream(self, answer: Answer, message: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("content-type", "text/event-stream; charset=utf-8")
        self.send_header("transfer-encoding", "chunked")
        self.send_header("request-id", self.api.next_id("req"))
        for name, value in answer.get("headers", {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            for sent, event in enumerate(_events(message)):
                time.sleep(answer.get("pause_s", 0))
                if sent == answer.get("drop_after"):
                    self._cut()
                    return
                if sent == answer.get("error_after"):
                    self._event({"type": "error", "error": _error(529, answer)})
                    break
                if sent == answer.get("hold_after") and not self.api.wait_release(self.connection):
                    self._cut()
                    return
                self._event(event)
            self.wfile.write(b"0\r\n\r\n")
        except OSError:
            self.close_connection = True  # the client went away

    def _event(self, event: dict[str, Any]) -> None:
        data = f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
        self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
        self.wfile.flush()

    def _cut(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _error(self, status: int, answer: Answer) -> None:
        self._json(status, {"type": "error", "error": _error(status, answer)}, answer.get("headers", {}))

    def _json(self, status: int, body: object, headers: dict[str, str]) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.send_header("request-id", self.api.next_id("req"))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _error(status: int, answer: Answer) -> dict[str, str]:
    kind = _ERROR_TYPES.get(status, "api_error")
    return {"type": kind, "message": kind.replace("_", " "), **answer.get("error", {})}


def _events(message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the events of a stream that makes that message."""
    yield {
        "type": "message_start",
        "message": {
            **message,
            "content": [],
            "stop_reason": None,
            "usage": {**message["usage"], "output_tokens": 1},
        },
    }
    for index, block in enumerate(message["content"]):
        empty, deltas = _deltas(block)
        yield {"type": "content_block_start", "index": index, "content_block": empty}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    usage = {"output_tokens": message["usage"]["output_tokens"]}
    yield {"type": "message_delta", "delta": delta, "usage": usage}
    yield {"type": "message_stop"}


def _deltas(block: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if block["type"] == "text":
        words = block["text"].split(" ")
        pieces = [word + " " for word in words[:-1]] + [words[-1]]
        return {**block, "text": ""}, [{"type": "text_delta", "text": piece} for piece in pieces]
    if block["type"] == "thinking":
        return {**block, "thinking": "", "signature": ""}, [
            {"type": "thinking_delta", "thinking": block["thinking"]},
            {"type": "signature_delta", "signature": block["signature"]},
        ]
    if block["type"] == "compaction":
        return {**block, "content": None}, [{"type": "compaction_delta", "content": block["content"]}]
    text = json.dumps(block["input"])
    half = len(text) // 2
    return {**block, "input": {}}, [
        {"type": "input_json_delta", "partial_json": piece} for piece in (text[:half], text[half:])
    ]


class _Quiet(socketserver.BaseServer):
    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients that are killed just go
            super().handle_error(request, client_address)  # type: ignore[arg-type]  # typeshed: sockets alone


class _TcpServer(_Quiet, socketserver.ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128


class _UnixServer(_Quiet, socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser(description="A Messages API with scripted answers, on loopback.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--unix", type=Path, help="listen on this Unix socket instead")
    parser.add_argument("--script", type=Path, required=True)
    parser.add_argument("--require-key", help="answer 401 to requests without this key")
    parser.add_argument("--record", type=Path, help="append each request to this file, as a line of JSON")
    parser.add_argument("--repeat", action="store_true", help="give the last answer again and again")
    options = parser.parse_args()
    api = MessagesApi(
        json.loads(options.script.read_text()),
        port=options.port,
        unix=options.unix,
        require_key=options.require_key,
        record=options.record,
        repeat=options.repeat,
    )
    print(api.port, flush=True)
    api.start()
    threading.Event().wait()


if __name__ == "__main__":
    main()
