from __future__ import annotations

import threading
from multiprocessing import Pipe

import psutil
import pytest
import torch

from shearling.evaluate.generation import Sampling, generate
from shearling.model import templates
from shearling.model.loading import load_model, load_tokenizer
from shearling.studio.worker import Done, Failed, Job, Piece, Ready, _serve, weight_bytes
from tiny_models import tiny_model
from tiny_tokenizer import write_llama

SAMPLED = Sampling(max_new_tokens=20, temperature=0.8, top_p=0.9, seed=3)


@pytest.fixture(scope="session")
def ready(worker) -> Ready:
    return worker.ready()


def expected(path, prompt, *, chat=False):
    options = {"max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    [sample] = generate(
        load_model(path), load_tokenizer(path), [prompt], Sampling(**options), chat=chat
    )
    return sample["text"]


def test_says_what_it_holds(ready, dense):
    model = load_model(dense)
    parameters = sum(p.numel() for p in model.parameters())
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    assert ready.weight_bytes == 4 * parameters + buffers
    assert (ready.chat, ready.positions) == (True, 64)
    assert 5e7 < ready.resident_bytes < psutil.virtual_memory().total


@pytest.mark.parametrize("chat", [False, True])
def test_streams_what_generate_writes(worker, ready, dense, chat):
    *texts, done = list(worker.answer(Job(1, "Wool is", chat, SAMPLED)))
    assert isinstance(done, Done)
    assert all(isinstance(text, Piece) for text in texts)
    assert done.text == expected(dense, "Wool is", chat=chat) != ""
    assert done.text.startswith("".join(text.text for text in texts))
    assert len(texts) > 5
    assert [t.tokens for t in texts] == sorted({t.tokens for t in texts})
    assert done.prompt_tokens == len("<user>Wool is<assistant>" if chat else "Wool is")
    assert (done.tokens, done.ended) == (20, "length")
    # 19 tokens after the first, in the time between the first and the last
    assert done.first_seconds is not None
    assert texts[0].tokens > 1 or texts[0].seconds == done.first_seconds
    last = done.first_seconds + 19 / done.tokens_per_s
    assert last > texts[-1].seconds - 1e-9  # a sum of quotients


def test_a_stop_ends_the_answer_and_not_the_next(worker, ready):
    long = Sampling(max_new_tokens=50, temperature=1.0)
    events = worker.answer(Job(7, "a", False, long))
    next(events)
    worker.stop(7)
    *_, done = events
    assert isinstance(done, Done)
    assert (done.ended, done.tokens < 50) == ("stopped", True)
    worker.stop(7)  # late: it is over
    worker.stop(9)
    *_, done = worker.answer(Job(8, "a", False, long))
    assert (done.ended, done.tokens) == ("length", 50)


def test_what_cannot_be_answered_is_said_and_forgotten(worker, ready):
    [failed] = worker.answer(Job(2, "a" * 60, False, SAMPLED))
    assert isinstance(failed, Failed)
    assert failed.message.startswith("A prompt of 60 tokens and 20 new ones are longer")
    *_, done = worker.answer(Job(3, "a", False, SAMPLED))
    assert isinstance(done, Done)


def test_weights_that_are_tied_or_quantised_are_counted_as_they_lie_in_memory():
    tied = tiny_model("llama-tied")
    buffers = sum(b.numel() * b.element_size() for b in tied.buffers())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert weight_bytes(tied) == 4 * tied.num_parameters() + buffers
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    assert 64 * 32 < weight_bytes(model) <= 64 * 32 + 32 * (4 + 8)


def serving(path):
    """What a worker's process does, in a thread; our end of the pipe."""
    ours, theirs = Pipe()
    thread = threading.Thread(target=_serve, args=(theirs, path, "float32", "cpu", 1), daemon=True)
    thread.start()
    return thread, ours


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_ends_with_its_parent(pruned, busy):
    thread, ours = serving(pruned)
    assert isinstance(ours.recv(), Ready)
    if busy:
        ours.send(Job(1, "a", False, Sampling(max_new_tokens=60, temperature=1.0)))
        assert isinstance(ours.recv(), Piece)
    ours.close()  # a parent that was killed leaves no more
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('Roles must alternate.') }}", "(Roles must alternate);"),
        (
            "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
            "longer",
        ),
        ("{% for a in", "unexpected 'end of"),
    ],
)
def test_a_template_that_fails_is_said_and_the_next_question_answered(
    tmp_path, monkeypatch, template, said
):
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    thread, ours = serving(write_llama(tmp_path / "model", layers=1, template=template))
    assert isinstance(ours.recv(), Ready)
    ours.send(Job(1, "a", True, SAMPLED))
    failed = ours.recv()
    assert isinstance(failed, Failed)
    assert said in failed.message
    assert "\n" not in failed.message
    ours.send(Job(2, "a", False, Sampling(max_new_tokens=1)))
    assert isinstance(ours.recv(), Piece | Done)
    ours.close()
    thread.join(20)
    assert not thread.is_alive()


def test_a_model_that_cannot_be_loaded(tmp_path):
    thread, ours = serving(tmp_path)
    failed = ours.recv()
    assert isinstance(failed, Failed)
    assert "is not a model directory" in failed.message
    thread.join(20)
    assert not thread.is_alive()
