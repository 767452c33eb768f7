"""A vLLM server that is none: a thread of this process that computes with transformers.

Requests and answers are those of vLLM's ``/v1/completions`` (``entrypoints/openai/completion`` in
its source), as far as shearling asks: ``prompt_logprobs``, ``token_ids``, ``stop``,
``stop_token_ids``; and what vLLM refuses is refused.
"""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any, ClassVar

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shearling.evaluate.engines.vllm_server import HOST, VllmServer


class StandIn(VllmServer):
    """Takes the place of ``VllmServer``; ``started`` holds all of them, the oldest first."""

    started: ClassVar[list[StandIn]] = []

    def __enter__(self) -> StandIn:
        path = self.command[2]
        self.model = AutoModelForCausalLM.from_pretrained(path).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(path)
        self.requests: list[dict[str, Any]] = []
        self.waiting, self.most_waiting = 0, 0
        self.lock = threading.Lock()
        self.server = _Listening((HOST, self.port), _handler(self))
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.started.append(self)
        self.running = True
        self._wait()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.log.close()
        self.running = False

    def _ended(self) -> int | None:
        return None

    def option(self, name: str) -> str:
        return self.command[self.command.index(name) + 1]

    def refusal(self, body: dict[str, Any]) -> str | None:
        """Why vLLM would not take a request."""
        longest, prompt = int(self.option("--max-model-len")), body["prompt"]
        if body["model"] != self.option("--served-model-name"):
            return f"The model `{body['model']}` does not exist."
        if not prompt:
            return "The decoder prompt cannot be empty"
        if len(prompt) + body["max_tokens"] > longest:
            return f"This model's maximum context length is {longest} tokens."
        if "" in body.get("stop", []):
            return "stop cannot contain an empty string."
        return None

    def choice(self, body: dict[str, Any]) -> dict[str, Any]:
        """One of an answer's ``choices``."""
        prompt = body["prompt"]
        written, reason = self.written_after(prompt, body)
        text = self.text(written, body)
        choice: dict[str, Any] = {"index": 0, "text": text, "finish_reason": reason}
        if body.get("return_token_ids"):
            choice |= {"token_ids": written, "prompt_token_ids": prompt}
        if (count := body.get("prompt_logprobs")) is not None:
            choice["prompt_logprobs"] = self.prompt_logprobs(prompt, count)
        return choice

    def text(self, tokens: list[int], body: dict[str, Any]) -> str:
        skipped = body.get("skip_special_tokens", True)
        return self.tokenizer.decode(tokens, skip_special_tokens=skipped)

    def prompt_logprobs(self, prompt: list[int], count: int) -> list[dict[str, Any] | None]:
        with torch.no_grad():
            logits_TV = self.model(torch.tensor([prompt])).logits[0].float()
        entries: list[dict[str, Any] | None] = [None]
        for token, logprob_V in zip(prompt[1:], logits_TV.log_softmax(-1)[:-1], strict=True):
            shown = {token, *logprob_V.topk(count).indices.tolist()}
            entries.append(
                {
                    str(one): {
                        "logprob": float(logprob_V[one]),
                        "rank": int((logprob_V >= logprob_V[one]).sum()),
                        "decoded_token": self.tokenizer.decode([one]),
                    }
                    for one in shown
                }
            )
        return entries

    def written_after(self, prompt: list[int], body: dict[str, Any]) -> tuple[list[int], str]:
        """A token at a time; the one that ends a text is among those returned."""
        if body["temperature"]:
            return self.drawn_after(prompt, body), "length"
        ends = {*body.get("stop_token_ids", []), self.tokenizer.eos_token_id}
        written: list[int] = []
        while len(written) < body["max_tokens"]:
            with torch.no_grad():
                logits_V = self.model(torch.tensor([prompt + written])).logits[0, -1]
            seen, penalty = list({*prompt, *written}), body.get("repetition_penalty", 1.0)
            seen_V = logits_V[seen]
            logits_V[seen] = torch.where(seen_V > 0, seen_V / penalty, seen_V * penalty)
            written.append(int(logits_V.argmax()))
            text = self.text(written, body)
            if written[-1] in ends or any(stop in text for stop in body.get("stop", [])):
                return written, "stop"
        return written, "length"

    def drawn_after(self, prompt: list[int], body: dict[str, Any]) -> list[int]:
        """By the request's seed, from the whole distribution, whatever ends in it."""
        everything = {"top_p": 1, "top_k": 0, "min_p": 0, "repetition_penalty": 1}
        assert body["temperature"] == 1
        assert body["ignore_eos"]
        assert {key: body[key] for key in everything} == everything
        generator = torch.Generator().manual_seed(body["seed"])
        ids = list(prompt)
        for _ in range(body["max_tokens"]):
            with torch.no_grad():
                chances_V = self.model(torch.tensor([ids])).logits[0, -1].softmax(-1)
            ids.append(int(torch.multinomial(chances_V, 1, generator=generator)))
        return ids[len(prompt) :]


class _Listening(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128


def _handler(stand_in: StandIn) -> type[http.server.BaseHTTPRequestHandler]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            self.answer(200 if self.path == "/health" else 404, {})

        def do_POST(self) -> None:
            assert self.path == "/v1/completions"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            stand_in.requests.append(body)
            if refused := stand_in.refusal(body):
                self.answer(400, {"error": {"message": refused, "code": 400}})
                return
            with stand_in.lock:
                stand_in.waiting += 1
                stand_in.most_waiting = max(stand_in.most_waiting, stand_in.waiting)
            choice = stand_in.choice(body)
            with stand_in.lock:
                stand_in.waiting -= 1
            said = {"id": "cmpl-1", "object": "text_completion", "model": body["model"]}
            self.answer(200, said | {"choices": [choice]})

        def answer(self, status: int, said: dict[str, Any]) -> None:
            content = json.dumps(said).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    return Handler
