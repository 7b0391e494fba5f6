"""The scripted Messages API as a program of its own, as tests in the nested machine use it."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    (tmp_path / "script.json").write_text(json.dumps([{"text": "one two"}]))
    command = [sys.executable, "-m", "tests.support.messages_api", "--require-key", "k", "--repeat"]
    command += ["--script", str(tmp_path / "script.json"), "--record", str(tmp_path / "record")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


def post(port: int, **headers: str) -> tuple[int, Any]:
    message = {"role": "user", "content": "hello"}
    body = json.dumps({"model": "m", "max_tokens": 1, "messages": [message]}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/messages", body, headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as exc:
        with exc:
            return exc.code, json.load(exc)


def test_request_with_the_key_is_answered(port: int, tmp_path: Path) -> None:
    as_header = post(port, **{"x-api-key": "k"})
    as_token = post(port, Authorization="Bearer k")

    assert as_header[0] == as_token[0] == 200
    assert as_header[1]["content"] == [{"type": "text", "text": "one two"}]
    first, _ = (json.loads(line) for line in (tmp_path / "record").read_text().splitlines())
    assert first["headers"]["x-api-key"] == "k"


def test_request_without_the_key_is_refused(port: int) -> None:
    status, body = post(port)

    assert (status, body["error"]["type"]) == (401, "authentication_error")
