"""A web server on loopback for agents' tools: files, and what a request looked like.

    web_server DIRECTORY PORT TLS_PORT

Serves DIRECTORY on PORT of 127.0.0.1 and 127.0.0.2 and, with DIRECTORY/../key.pem, on TLS_PORT. /echo
answers with what was asked.
"""

from __future__ import annotations

import json
import ssl
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

ADDRESS = "127.0.0.2"  # not 127.0.0.1, which is every agent's own and not asked for at a proxy


class Handler(SimpleHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path.startswith("/echo"):
            self._answer(json.dumps({"path": self.path, "headers": dict(self.headers)}).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        size = 0
        if self.headers["Transfer-Encoding"] == "chunked":
            while length := int(self.rfile.readline() or b"0", 16):
                size += len(self.rfile.read(length + 2)) - 2
        else:
            size = len(self.rfile.read(int(self.headers["Content-Length"])))
        self._answer(json.dumps({"path": self.path, "bytes": size}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
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
