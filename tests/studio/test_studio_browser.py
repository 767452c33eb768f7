"""The command as a user starts it, and its page in a real browser."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from browser import Browser, browser, find

from shearling.evaluate.generation import Sampling, generate
from shearling.model.loading import load_model, load_tokenizer

# The command as the console script runs it, whether or not the command line lists it yet; but that
# both models' processes are forked from one that has imported torch and transformers, which takes
# seconds. tests/files/test_child.py starts one as users do.
PROGRAM = """
import multiprocessing
import typer
from shearling.commands.studio import studio
from shearling.files import child
if __name__ == "__main__":
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shearling.studio.worker"])
    child._context = lambda: context
    app = typer.Typer()
    app.command()(studio)
    app()
"""


class Studio:
    def __init__(self, *arguments: str, folder: Path) -> None:
        script = folder / "studio.py"
        script.write_text(PROGRAM)
        self.process = subprocess.Popen(
            [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        found = re.search(r"http://\S+", self.line)
        assert found is not None, self.line
        self.url = found[0]

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def ask(self, **fields: Any) -> list[dict[str, Any]]:
        request = urllib.request.Request(
            self.url + "api/run", json.dumps(fields).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=30) as answer:
            return [json.loads(line) for line in answer]


@pytest.fixture(scope="module")
def studio(dense, pruned, tmp_path_factory) -> Iterator[Studio]:
    folder = tmp_path_factory.mktemp("program")
    started = Studio(str(dense), str(pruned), "--port", "0", "--threads", "1", folder=folder)
    yield started
    # Ctrl-C: all of it ends, quietly.
    children = psutil.Process(started.process.pid).children(recursive=True)
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(20) == 0
    _, alive = psutil.wait_procs(children, timeout=10)
    assert alive == []


@pytest.fixture(scope="module")
def tab(studio, tmp_path_factory) -> Iterator[Browser]:
    if find() is None:
        pytest.skip("no Chromium was found")
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def continued(path: Path, prompt: str, *, chat: bool = False, **options: Any) -> str:
    sampling = Sampling(**options)
    [sample] = generate(load_model(path), load_tokenizer(path), [prompt], sampling, chat=chat)
    return sample["text"]


def answers(tab: Browser) -> list[str]:
    return tab.run("[...document.querySelectorAll('.answer')].map((p) => p.textContent)")


def open_page(tab: Browser, url: str) -> None:
    tab.complaints.clear()
    tab.requests.clear()
    tab.open(url)
    tab.wait("document.querySelectorAll('article').length === 2")


def test_the_port_that_was_free_is_printed_and_answers(studio):
    assert not studio.url.endswith(":0/")
    models = studio.get("api/models")["models"]
    assert [model["name"] for model in models] == ["dense", "pruned"]
    assert [model["chat"] for model in models] == [True, False]
    request = urllib.request.Request(studio.url, headers={"Host": "rebound.example"})
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(request)


def test_a_link_asks_both_models(studio, tab, dense, pruned):
    open_page(tab, studio.url + "?prompt=Wool%20is&max_new_tokens=20&chat=0&go=1")
    tab.wait("document.getElementById('status').textContent === 'Done.'")
    expected = [
        "Wool is" + continued(path, "Wool is", max_new_tokens=20) for path in (dense, pruned)
    ]
    assert answers(tab) == expected
    figures = tab.run("[...document.querySelectorAll('dd')].map((d) => d.firstChild.data)")
    assert len(figures) == 8
    assert "–" not in figures
    assert tab.complaints == []
    assert {url.split("?")[0] for url in tab.requests} == {
        studio.url + path for path in ("", "api/models", "api/run")
    }


def test_typing_and_asking_by_key(studio, tab, dense):
    open_page(tab, studio.url)
    assert tab.run("document.activeElement.id") == "prompt"
    tab.send("Input.insertText", text="Hi <b>you</b>")
    tab.run("document.querySelector('[name=max_new_tokens]').value = 5; 0")
    key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 2}
    tab.send("Input.dispatchKeyEvent", type="keyDown", **key)
    tab.wait("document.getElementById('status').textContent === 'Done.'")
    # In the chat template the prompt is not shown again, and markup is text like any other.
    assert answers(tab)[0] == continued(dense, "Hi <b>you</b>", max_new_tokens=5, chat=True)
    assert answers(tab)[1].startswith("Hi <b>you</b>")
    assert tab.run("document.querySelector('article b:not(.size b)')") is None
    query = tab.run("Object.fromEntries(new URLSearchParams(location.search))")
    assert (query["prompt"], query["max_new_tokens"], query["chat"]) == ("Hi <b>you</b>", "5", "1")
    assert tab.complaints == []


def test_mistakes_are_shown_in_a_sentence(studio, tab):
    open_page(tab, studio.url + "?chat=0")
    tab.run("document.getElementById('ask').click()")
    assert tab.run("document.getElementById('error').textContent") == "Write a prompt first."
    tab.run("fields.prompt.value = 'x'; fields.top_p.value = 7; ask()")
    alert = tab.wait("!error.hidden && !running && error.textContent")
    assert alert.startswith("top_p is 7.0")
    tab.run("fields.top_p.value = 1; fields.max_new_tokens.value = 70; ask()")
    tab.wait("!running && document.querySelectorAll('.failed').length === 2")
    assert tab.run("error.hidden")
    assert "longer than the model's 64 positions" in tab.text()


def test_a_phone_shows_it_without_scrolling_sideways(studio, tab):
    for dark in (False, True):
        tab.size(390, 844, dark=dark)
        assert tab.run("document.documentElement.scrollWidth") == 390
        assert tab.run("getComputedStyle(document.body).backgroundColor") == (
            "rgb(25, 24, 22)" if dark else "rgb(251, 250, 246)"
        )
    names = tab.run("[...document.querySelectorAll('input, textarea')].map((f) => f.labels.length)")
    assert set(names) == {1}


def test_models_survive_an_interrupt_and_their_end_is_told(studio):
    """Ctrl-C reaches every process of a terminal, but is the server's alone to handle."""
    children = psutil.Process(studio.process.pid).children()
    (server,) = (child for child in children if "forkserver" in " ".join(child.cmdline()))
    workers = server.children()
    assert len(workers) == 2
    for process in workers:
        process.send_signal(signal.SIGINT)
    events = studio.ask(prompt="x", max_new_tokens=9, together=True)
    assert [e["type"] for e in events].count("done") == 2
    for process in workers:
        process.kill()
    for _ in range(2):
        failed = [e["message"] for e in studio.ask(prompt="x") if e["type"] == "failed"]
        assert len(failed) == 2
        assert all("ended with exit code -9" in message for message in failed)
