"""A web server on loopback for agents' tools: files, git, and what a request looked like.

    web_server DIRECTORY PORT TLS_PORT

Serves DIRECTORY on PORT of 127.0.0.1 and 127.0.0.2 and, with DIRECTORY/../key.pem, on TLS_PORT. /echo
answers with what was asked. /git is git's own server for the repositories in DIRECTORY/../git, which anybody
may read and write; /private is the same for who has LOGIN.
"""

from __future__ import annotations

import base64
import gzip
import json
import os
import ssl
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

ADDRESS = "127.0.0.2"  # not 127.0.0.1, which is every agent's own and not asked for at a proxy
LOGIN = "ada:ghp-canary-41c7d0a2"


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/echo"):
            self._answer(json.dumps({"path": self.path, "headers": dict(self.headers)}).encode())
        elif self.path.startswith(("/git/", "/private/")):
            self._answer_git(b"")
        else:
            super().do_GET()

    def do_POST(self) -> None:
        body = self._body()
        if self.path.startswith(("/git/", "/private/")):
            self._answer_git(body)
        else:
            self._answer(json.dumps({"path": self.path, "bytes": len(body)}).encode())

    def _body(self) -> bytes:
        if self.headers["Transfer-Encoding"] != "chunked":
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while length := int(self.rfile.readline() or b"0", 16):
            body += self.rfile.read(length + 2)[:-2]
        self.rfile.readline()
        return body

    def _answer_git(self, body: bytes) -> None:
        """Have git-http-backend(1) answer, as any web server does by CGI."""
        path, _, query = self.path.partition("?")
        _, area, rest = path.split("/", 2)
        login = "Basic " + base64.b64encode(LOGIN.encode()).decode()
        if area == "private" and self.headers["Authorization"] != login:
            return self._answer(b"", 401, ("WWW-Authenticate", 'Basic realm="git"'))
        if self.headers["Content-Encoding"] == "gzip":
            body = gzip.decompress(body)
        variables = {
            "PATH": os.environ["PATH"],
            "GIT_PROJECT_ROOT": f"{self.directory}/../git",
            "GIT_HTTP_EXPORT_ALL": "1",
            "GIT_PROTOCOL": self.headers["Git-Protocol"] or "",
            "PATH_INFO": f"/{rest}",
            "QUERY_STRING": query,
            "REQUEST_METHOD": self.command,
            "CONTENT_TYPE": self.headers["Content-Type"] or "",
            "CONTENT_LENGTH": str(len(body)),
            "REMOTE_USER": "ada",
        }
        done = subprocess.run(
            ["git", "http-backend"], input=body, env=variables, capture_output=True, check=True
        )
        head, _, answer = done.stdout.partition(b"\r\n\r\n")
        headers = [
            (name, value)
            for name, _, value in (line.partition(": ") for line in head.decode().split("\r\n"))
        ]
        status = int(dict(headers).get("Status", "200").split()[0])
        self._answer(answer, status, *(each for each in headers if each[0] != "Status"))

    def _answer(self, body: bytes, status: int = 200, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    directory, port, tls_port = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    handler = partial(Handler, directory=directory)
    secure = ThreadingHTTPServer((ADDRESS, tls_port), handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{directory}/../key.pem")
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    named = ThreadingHTTPServer(("127.0.0.1", port), handler)  # as localhost
    for server in (secure, named):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    ThreadingHTTPServer((ADDRESS, port), handler).serve_forever()


if __name__ == "__main__":
    main()
