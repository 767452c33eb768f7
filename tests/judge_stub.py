"""An OpenAI-compatible endpoint on loopback whose judge is a function of the test's."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What a judge is shown -> what it writes, or a status with an error to send instead.
Judgement = Callable[[str, str, str], "str | int"]


class Stub:
    """Counts what it is asked; ``judge`` may be changed while it runs."""

    def __init__(self, judge: Judgement) -> None:
        self.judge = judge
        self.models = ["stub-judge"]
        self.refuses_temperature = False
        self.requests: list[dict[str, Any]] = []
        self.retries: list[int] = []  # the library's own count, as it sends it
        self._lock = threading.Lock()
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def do_GET(self) -> None:
                data = [{"id": name, "object": "model"} for name in stub.models]
                self.answer(200, {"object": "list", "data": data})

            def do_POST(self) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with stub._lock:
                    stub.requests.append(asked)
                    stub.retries.append(int(self.headers["x-stainless-retry-count"]))
                if stub.refuses_temperature and "temperature" in asked:
                    self.answer(400, {"error": {"message": "Unsupported value: 'temperature'"}})
                    return
                said = stub.judge(*shown(asked))
                if isinstance(said, int):  # an endpoint that gives the key away
                    message = f"failed for {self.headers['authorization']}"
                    self.answer(said, {"error": {"message": message}})
                    return
                said = said.replace("$KEY", self.headers["authorization"])
                message = {"role": "assistant", "content": said}
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                self.answer(
                    200,
                    {"id": "x", "object": "chat.completion", "created": 0, "choices": [choice]},
                )

            def answer(self, status: int, value: dict[str, Any]) -> None:
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.send_header("retry-after-ms", "10")  # else each test waits for seconds
                self.end_headers()
                self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def shown(asked: dict[str, Any]) -> tuple[str, str, str]:
    """Prompt, first and second answer of a request."""
    text = asked["messages"][-1]["content"]
    found = re.fullmatch(
        r"\[Instruction\]\n(.*)\n\n\[Answer A\]\n(.*)\n\n\[Answer B\]\n(.*)\n\n\[End of.*",
        text, re.DOTALL,
    )  # fmt: skip
    assert found is not None
    return found[1], found[2], found[3]


def longer(_: str, first: str, second: str) -> str:
    """A judge without position bias: the longer answer is better, equally long ones tie."""
    if len(first) == len(second):
        return "They are alike.\nVerdict: tie"
    return f"It says more.\nVerdict: {'A' if len(first) > len(second) else 'B'}"
