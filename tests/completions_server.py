"""A server of OpenAI's completions interface in a thread of this process, as kind or unkind as a test wants it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers /v1/completions by `reply(number of the request, body)` -> (status, JSON or text, headers) or None."""

    def __init__(self) -> None:
        self.reply: Callable = lambda number, body: (200, completion(body), {})
        self.seen: list[tuple[str, dict, dict]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                owner.seen.append((self.path, body, dict(self.headers)))
                reply = owner.reply(len(owner.seen), body)
                if reply is None:  # hang up in the middle of an answer
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{")
                    self.close_connection = True
                    return
                status, content, headers = reply
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_) -> None:
                """Nothing on stderr."""

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()


def completion(body: dict, text: str = " 1234567", **usage: int) -> dict:
    usage = {"prompt_tokens": len(body["prompt"]), "completion_tokens": 4} | usage
    return {"choices": [{"text": text, "finish_reason": "stop"}], "usage": usage}
