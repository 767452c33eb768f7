from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("starlette.testclient", reason="starlette's test client lacks httpx")

from starlette.testclient import TestClient

from shearling.errors import ShearlingError
from shearling.evaluate.generation import Sampling
from shearling.studio.app import MOST_BYTES, application
from shearling.studio.conversation import Busy, Conversation, StudioModel
from shearling.studio.guard import Guard
from shearling.studio.page import build
from shearling.studio.serve import address, check_memory, distinct, listen, warning
from shearling.studio.worker import Done, Failed, Job, Piece, Ready


class Player:
    """A worker that says what it is told to; ``held`` keeps it in the midst of an answer."""

    def __init__(self, *, chat: bool = True, fails: bool = False) -> None:
        self.jobs: list[Job] = []
        self.stopped: list[int] = []
        self.go = threading.Event()
        self.go.set()
        self.chat, self.fails = chat, fails

    def answer(self, job: Job) -> Iterator[Any]:
        self.jobs.append(job)
        if self.fails:
            return iter([Failed("It cannot.")])
        return self._events(job)

    def _events(self, job: Job) -> Iterator[Any]:
        yield Piece("so ", 1, 0.5)
        self.go.wait(10)
        ended = "stopped" if job.number in self.stopped else "end"
        yield Done("so be it", 3, 2, 0.5, 4.0, 10**9, ended)

    def stop(self, number: int) -> None:
        self.stopped.append(number)
        self.go.set()

    def kill(self) -> None:
        self.go.set()

    def model(self, name: str) -> StudioModel:
        return StudioModel(name, 1000, Ready(4000, 10**8, self.chat, 64), self)


def client_of(*players: Player, host: str = "127.0.0.1", together: bool = False) -> TestClient:
    conversation = Conversation([p.model(f"m{i}") for i, p in enumerate(players)], patience=0.05)
    app = application(conversation, host=host, together=together)
    return TestClient(app, base_url="http://127.0.0.1:8465")


def ask(client: TestClient, **fields: Any) -> list[dict[str, Any]]:
    response = client.post("/api/run", json={"prompt": "what"} | fields)
    assert response.status_code == 200, response.text
    return [json.loads(line) for line in response.text.splitlines()]


def test_models_answer_in_turns():
    one, two = Player(), Player(chat=False)
    with client_of(one, two) as client:
        events = ask(client, chat=True, max_new_tokens=9, temperature=0.5, top_p=0.9, seed=4)
    assert [(e["type"], e.get("model")) for e in events] == [
        ("run", None), ("start", 0), ("text", 0), ("done", 0),
        ("start", 1), ("text", 1), ("done", 1), ("over", None),
    ]  # fmt: skip
    sampling = Sampling(max_new_tokens=9, temperature=0.5, top_p=0.9, seed=4)
    number = events[0]["run"]
    assert one.jobs == [Job(number, "what", True, sampling, share=1)]
    assert two.jobs == [Job(number, "what", False, sampling, share=1)]  # it has no template
    assert events[3]["text"] == "so be it"
    assert events[3]["tokens_per_s"] == 4.0


def test_models_answer_at_once():
    one, two = Player(), Player()
    one.go.clear()

    class After(Player):
        def _events(self, job):
            yield from super()._events(job)
            one.go.set()  # the first goes on only once the second has answered

    two = After()
    with client_of(one, two, together=True) as client:
        assert client.get("/api/models").json()["together"] is True
        events = ask(client, together=True)
    done = [e["model"] for e in events if e["type"] == "done"]
    assert done == [1, 0]
    assert one.jobs[0].share == two.jobs[0].share == 2


def test_one_that_fails_does_not_keep_the_next_from_answering():
    with client_of(Player(fails=True), Player()) as client:
        events = ask(client)
    assert {"model": 0, "type": "failed", "message": "It cannot."} in events
    assert events[-2]["type"] == "done"


def test_a_stop_ends_this_answer_and_skips_the_next():
    async def talk() -> list[dict[str, Any]]:
        one, two = Player(), Player()
        one.go.clear()
        conversation = Conversation([one.model("a"), two.model("b")])
        events = []
        asked = await conversation.ask("x", Sampling(), chat=False, together=False)
        async for event in asked:
            events.append(event)
            if event["type"] == "text":
                assert not conversation.stop(99)
                assert conversation.stop(events[0]["run"])
                assert not conversation.stop(events[0]["run"])
        assert two.jobs == []
        return events

    events = asyncio.run(talk())
    assert [e["type"] for e in events] == ["run", "start", "text", "done", "over"]
    assert events[3]["ended"] == "stopped"


def test_who_goes_away_stops_the_answer_and_frees_the_models():
    async def talk() -> None:
        one, two = Player(), Player()
        one.go.clear()
        conversation = Conversation([one.model("a"), two.model("b")], patience=5)
        asked = await conversation.ask("x", Sampling(), chat=False, together=False)
        async for event in asked:
            if event["type"] == "text":
                break
        await asked.aclose()
        events = await conversation.ask("y", Sampling(), chat=False, together=False)
        assert [e["type"] async for e in events][-1] == "over"
        assert one.stopped == [1]
        assert [job.prompt for job in one.jobs + two.jobs] == ["x", "y", "y"]

    asyncio.run(talk())


def test_a_second_prompt_is_refused_politely():
    async def talk() -> None:
        one = Player()
        one.go.clear()
        conversation = Conversation([one.model("a")], patience=0.01)
        await conversation.ask("x", Sampling(), chat=False, together=False)
        with pytest.raises(Busy):
            await conversation.ask("y", Sampling(), chat=False, together=False)
        one.go.set()

    asyncio.run(talk())


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": "x", "top_p": 2}, r"top_p is 2\.0"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "x", "seed": -1}, "seed is -1"),
        ({"prompt": "x", "seed": "one"}, "seed: 'one' was given, but a whole number was expected"),
        ({"prompt": "x", "sed": 1}, "sed: Extra inputs are not permitted"),
        ({"temperature": 1}, "prompt: Field required"),
        ({"prompt": "x" * MOST_BYTES}, "shorten the prompt"),
    ],
)
def test_refuses_in_a_sentence(body, message):
    player = Player()
    with client_of(player) as client:
        response = client.post("/api/run", json=body)
    assert response.status_code == 400
    assert re.search(message, response.json()["error"])
    assert player.jobs == []


def test_what_is_not_json_and_what_is_not_there():
    with client_of(Player()) as client:
        response = client.post(
            "/api/run", content="{", headers={"content-type": "application/json"}
        )
        assert response.status_code == 400
        assert "Invalid JSON" in response.json()["error"]
        assert client.get("/api/run").status_code == 405
        assert client.get("/../etc/passwd").status_code == 404


@pytest.mark.parametrize(
    ("bound", "host", "known"),
    [
        ("127.0.0.1", "127.0.0.1:8465", True),
        ("127.0.0.1", "localhost:1", True),
        ("127.0.0.1", "LOCALHOST", True),
        ("127.0.0.1", "[::1]:8465", True),
        ("localhost", "127.0.0.1", True),
        ("127.0.0.1", "rebound.example:8465", False),
        ("127.0.0.1", "localhost.example", False),
        ("127.0.0.1", "192.168.1.5:8465", False),
        ("127.0.0.1", "", False),
        ("127.0.0.1", "[::1", False),
        ("0.0.0.0", "192.168.1.5:8465", True),
        ("0.0.0.0", f"{socket.gethostname()}:8465", True),
        ("0.0.0.0", "rebound.example", False),
        ("box.example", "box.example:8465", True),
    ],
)
def test_only_hosts_of_its_own_are_served(bound, host, known):
    reason = Guard(None, bound, {}).refusal("GET", {"host": host})
    assert (reason is None) == known


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9999"},  # another program's page on this machine
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
        {"content-type": "text/plain"},  # what a form could send without asking first
        {"host": "evil.example"},
    ],
)
def test_pages_of_other_sites_get_nothing_done(headers):
    player = Player()
    with client_of(player) as client:
        sent = {"content-type": "application/json"} | headers
        response = client.post("/api/run", content='{"prompt": "x"}', headers=sent)
    assert response.status_code == 403
    assert player.jobs == []
    assert "access-control-allow-origin" not in response.headers


def test_its_own_page_gets_answers():
    with client_of(Player()) as client:
        own = {"origin": "http://127.0.0.1:8465", "sec-fetch-site": "same-origin"}
        assert client.post("/api/run", json={"prompt": "x"}, headers=own).status_code == 200


def test_the_page_is_whole_and_under_its_policy():
    page, _ = build()
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page)
    assert "//" not in re.sub(r"//.*$|/\*.*?\*/", "", page.split("<script>")[0], flags=re.M)
    with client_of(Player()) as client:
        response = client.get("/")
        assert response.text == page
        policy = response.headers["content-security-policy"]
        refused = client.get("/", headers={"host": "evil.example"})
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert refused.headers["content-security-policy"] == policy


def test_addresses():
    with listen("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert port > 0
        with pytest.raises(ShearlingError, match=rf"Port {port} of 127\.0\.0\.1 is taken;.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(ShearlingError, match=r"--host no\.such\.invalid is no address"):
        listen("no.such.invalid", 0)
    assert address("127.0.0.1", 80) == "http://127.0.0.1:80/"
    assert address("::1", 80) == "http://[::1]:80/"
    assert address("0.0.0.0", 80) == "http://localhost:80/"
    assert warning("localhost") is None
    assert "no password" in str(warning("0.0.0.0"))


def test_models_that_do_not_fit_are_refused_with_the_estimate(dense, pruned):
    check_memory([dense, pruned], "float32", available=900_000_000)
    with pytest.raises(
        ShearlingError, match=r"2 models in float32 need about 0\.8 GB, but 0\.7 GB"
    ):
        check_memory([dense, pruned], "float32", available=700_000_000)


def test_names_are_told_apart():
    assert distinct(["a", "b", "a"]) == ["a (1)", "b", "a (2)"]
