"""Tasks asked of vLLM: the figures that transformers gives, and a server that is always ended."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import LlamaConfig, LlamaForCausalLM

import fake_engines
from shearling.errors import ShearlingError
from shearling.evaluate.engines import serving, vllm_server
from shearling.evaluate.engines.serving import ServingOptions
from shearling.evaluate.tasks import harness, served
from shearling.evaluate.tasks.engine import TaskEngine, task_engine
from shearling.evaluate.tasks.run import TaskRunner
from shearling.evaluate.tasks.served import ServedScorer
from shearling.evaluate.tasks.suite import Task
from shearling.model.loading import load_model
from shearling.model.subject import open_subject
from tiny_tokenizer import VOCAB, byte_tokenizer
from vllm_stand_in import StandIn

POSITIONS = 160
PROGRAM = Path("vllm")
ENGINE = TaskEngine("vllm", "0.32.0", PROGRAM)
WORDS = ["wool", "a ram", "hay and oats", "z", "the shears", "grass"]


def write_model(path: Path, *, adds_bos: bool = False, **generation: Any) -> Path:
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4,
        intermediate_size=50, num_hidden_layers=2, vocab_size=VOCAB,
        max_position_embeddings=POSITIONS, initializer_range=0.3, bos_token_id=256,
        eos_token_id=257,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    for name, value in generation.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(path)
    byte_tokenizer(adds_bos=adds_bos).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served")
    write_model(path / "model")
    write_model(path / "bos", adds_bos=True)
    rows = [
        {
            "question": f"What {WORDS[i % 6]} is number {i * 7}?",
            "choices": [WORDS[(i + k) % 6] for k in range(2 + i % 3)],
            "label": i % 2,
        }
        for i in range(10)
    ]
    (path / "flock.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture(autouse=True)
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[StandIn]]:
    """Servers that were started; none may be left."""
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    monkeypatch.setattr(vllm_server, "_ASK_SECONDS", 0.02)
    monkeypatch.setattr(serving, "VllmServer", StandIn)
    StandIn.started.clear()
    yield StandIn.started
    assert not any(server.running for server in StandIn.started)


@pytest.fixture
def scorer(place: Path) -> Iterator[ServedScorer]:
    scorer = serve(place / "model")
    yield scorer
    scorer.close()


def serve(path: Path, at_a_time: int = 4) -> ServedScorer:
    with harness.quiet():
        return ServedScorer(open_subject(path), ServingOptions(PROGRAM, at_a_time=at_a_time))


def reference(path: Path) -> HFLM:
    """lm-eval's own wrapper, one request at a time."""
    with harness.quiet():
        return HFLM(
            pretrained=load_model(path), tokenizer=open_subject(path).tokenizer(), batch_size=1
        )


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]  # ty: ignore


PAIRS = [
    ("Question: hay?\nAnswer:", " yes"), ("Question: hay?\nAnswer:", " yet"),
    ("Question: hay?\nAnswer: ", "no, never"), ("Who", " a ram"), ("Who", " a ram"),
    ("A much longer question of a shepherd's\nAnswer:", " z"), ("", "BOS before this"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["model", "bos"])
def test_log_likelihoods_are_those_of_transformers(place: Path, name: str) -> None:
    """Prompts that share answers, contexts and all but a last token; with and without a BOS."""
    ours, theirs = serve(place / name), reference(place / name)
    next_ones = (
        (f"ram {i}", theirs.tok_decode([_next_token(theirs, f"ram {i}")])) for i in count()
    )
    likeliest = next(pair for pair in next_ones if pair[1].isascii() and pair[1].isprintable())
    pairs = [*PAIRS, likeliest]
    expected = theirs.loglikelihood(asked("loglikelihood", *pairs), disable_tqdm=True)
    scored = ours.loglikelihood(asked("loglikelihood", *pairs))
    ours.close()
    assert [greedy for _, greedy in scored] == [greedy for _, greedy in expected]
    assert {greedy for _, greedy in scored} == {True, False}
    for (one, _), (other, _) in zip(scored, expected, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    rolling = asked("loglikelihood_rolling", ("word " * 50,), ("a ram",))
    assert ours.truncated == 0
    with harness.quiet():
        theirs = reference(place / name).loglikelihood_rolling(rolling[1:], disable_tqdm=True)
    ours = serve(place / name)
    assert ours.loglikelihood_rolling(rolling[1:]) == pytest.approx(theirs, abs=1e-5)
    ours.close()


def _rams() -> Iterator[str]:
    return (f"ram {i}" for i in count())


def _next_token(lm: HFLM, text: str) -> int:
    with torch.no_grad():
        return int(lm.model(torch.tensor([lm.tok_encode(text)])).logits[0, -1].argmax())


def test_prompts_that_are_too_long_lose_their_beginning(place: Path, scorer: ServedScorer) -> None:
    """A server wants room for one token more: 159 of 160 are left, the answer's among them."""
    long = "x" * 200
    pairs = asked("loglikelihood", (long, " yes"), (long, " no"), ("short", " yes"))
    scored = scorer.loglikelihood(pairs)
    assert scorer.truncated == 2
    kept = "x" * (POSITIONS - 1 - len(" yes"))
    expected = reference(place / "model").loglikelihood(
        asked("loglikelihood", (kept, " yes")), disable_tqdm=True
    )
    assert scored[0][0] == pytest.approx(expected[0][0], abs=1e-5)
    with pytest.raises(ShearlingError, match="An answer of 201 tokens is longer than the model's"):
        scorer.loglikelihood(asked("loglikelihood", ("a", " " + long)))


STOPS = [  # without BOS, the first writes the special token <s>, and the second ends by itself
    ("a ram 13", {"until": ["<s>"], "max_gen_toks": 24, "do_sample": False}),
    ("grass 35", {"until": [], "max_gen_toks": 24, "do_sample": False}),
    ("wool 0", {"until": ["\n"], "max_gen_toks": 9}),
    ("the shears 16", {"until": ["<s>", "zz"], "max_gen_toks": 9, "temperature": 0.0}),
]


@pytest.mark.parametrize("name", ["model", "bos"])
def test_texts_are_those_of_transformers(place: Path, stand_in: list[StandIn], name: str) -> None:
    """To the letter; ended by a special token, by itself, by a word in it, and by their length."""
    theirs = reference(place / name)
    free = theirs.generate_until(asked("generate_until", STOPS[2]), disable_tqdm=True)
    end = next(letter for letter in free[0][3:] if letter.isascii())
    stops = [*STOPS, (STOPS[2][0], {"until": [end], "max_gen_toks": 9})]
    expected = theirs.generate_until(asked("generate_until", *stops), disable_tqdm=True)
    ours = serve(place / name)
    written = ours.generate_until(asked("generate_until", *stops))
    ours.close()
    assert written == expected
    lengths = [len(theirs.tok_encode(text)) for text in expected]
    assert min(lengths) < max(lengths)
    assert ours.answers == len(stops)
    assert ours.answer_tokens == sum(lengths)
    (server,) = stand_in
    assert all(body["prompt"][0] == 256 for body in server.requests) is (name == "bos")


def test_what_a_directory_says_of_generation_counts(tmp_path: Path) -> None:
    """A penalty and further tokens that end a text, as transformers reads them of the directory."""
    path = write_model(tmp_path / "model", repetition_penalty=1.5)
    plain = write_model(tmp_path / "plain")
    texts = asked(
        "generate_until", *((text, {"max_gen_toks": 14}) for text in ("a ram 37", "grass 5"))
    )
    expected = reference(path).generate_until(texts, disable_tqdm=True)
    assert expected != reference(plain).generate_until(texts, disable_tqdm=True)
    lm = reference(path)
    ids = torch.tensor([lm.tok_encode(texts[0].args[0])])
    ended = int(lm.model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=257)[0, -1])
    write_model(path, repetition_penalty=1.5, eos_token_id=[257, ended])
    shorter = reference(path).generate_until(texts, disable_tqdm=True)
    assert shorter != expected
    ours = serve(path)
    assert ours.generate_until(texts) == shorter
    ours.close()


def test_beams_and_samples_are_asked_for_and_all_else_refused(
    scorer: ServedScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    bodies: list[dict[str, Any]] = []

    def answered(requests: Any) -> list[list[int]]:
        bodies.extend(body for body, _ in requests)
        return [[65] for _ in requests]

    monkeypatch.setattr(scorer, "_asked_of_server", answered)

    def body(**generation: Any) -> dict[str, Any]:
        scorer.generate_until(asked("generate_until", ("A ram", {"max_gen_toks": 3} | generation)))
        return bodies[-1]

    beams = body(num_beams=10)
    assert (beams["use_beam_search"], beams["n"], beams["temperature"]) == (True, 10, 0)
    sampled = body(do_sample=True, temperature=0.7, top_p=0.9)
    assert (sampled["temperature"], sampled["top_p"], sampled["seed"]) == (0.7, 0.9, 0)
    greedy = body(do_sample=False, temperature=0.7)
    assert greedy["temperature"] == 0
    assert "n" not in greedy
    with pytest.raises(ShearlingError, match=r"with no_repeat_ngram_size, which vllm is not asked"):
        body(no_repeat_ngram_size=3)


def test_many_are_asked_at_a_time_and_none_more(place: Path, stand_in: list[StandIn]) -> None:
    scorer = serve(place / "model", at_a_time=3)
    (server,) = stand_in
    three, answered = threading.Barrier(3, timeout=60), server.choice

    def choice(body: dict[str, Any]) -> dict[str, Any]:
        three.wait()  # each waits until three are there
        return answered(body)

    server.choice = choice
    scorer.loglikelihood(asked("loglikelihood", *PAIRS * 3))
    scorer.close()
    assert server.most_waiting == 3
    assert server.option("--max-num-seqs") == "3"


def test_a_server_is_as_long_as_its_requests(
    place: Path, stand_in: list[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "CONTEXT", 32)
    scorer = serve(place / "model")
    scorer.loglikelihood(asked("loglikelihood", ("x" * 20, " yes")))
    assert [server.option("--max-model-len") for server in stand_in] == ["32"]
    long = asked("generate_until", ("x" * 20, {"max_gen_toks": 30}), ("y", {"max_gen_toks": 30}))
    scorer.generate_until(long)
    assert [server.option("--max-model-len") for server in stand_in] == ["32", "64"]
    assert [server.running for server in stand_in] == [False, True]
    scorer.loglikelihood(asked("loglikelihood", ("x" * 150, " yes"), ("x", " yes")))
    assert [server.option("--max-model-len") for server in stand_in] == ["32", "64", "160"]
    scorer.close()


def test_an_answer_in_another_form_is_named(scorer: ServedScorer, stand_in: list[StandIn]) -> None:
    (server,) = stand_in
    server.choice = lambda body: {"index": 0, "text": "hay"}
    for kind, arguments, missing in (
        ("loglikelihood", ("Who", " a ram"), "prompt_logprobs"),
        ("generate_until", ("Who", {"max_gen_toks": 2}), "token_ids"),
    ):
        with pytest.raises(
            ShearlingError,
            match=rf"^vllm could not serve model: its answer has no {missing} .*0\.11",
        ):
            getattr(scorer, kind)(asked(kind, arguments))
    server.refusal = lambda body: "Not today."
    with pytest.raises(ShearlingError, match=r"could not serve model: it answered 400 \(Not today"):
        scorer.loglikelihood(asked("loglikelihood", ("Who", " a ram")))


def measured(place: Path, **options: Any) -> dict[str, Any]:
    subject = open_subject(place / "model")
    runner = TaskRunner("mine", [Task(file=place / "flock.jsonl")], limit=6, **options)
    return runner.run(
        subject, lambda: (load_model(subject.path), subject.tokenizer()),
        recalled=runner.recalled(subject),
    )  # fmt: skip


def test_a_task_of_a_suite(place: Path, stand_in: list[StandIn]) -> None:
    """Equal figures; both engines' results say whose they are, and are kept apart."""
    ours, theirs = measured(place, engine=ENGINE), measured(place)
    assert ours["tasks"]["flock"]["metrics"] == theirs["tasks"]["flock"]["metrics"]
    same = ("samples", "shots", "primary", "prompt_sha256", "data_sha256")
    for key in same:
        assert ours["tasks"]["flock"][key] == theirs["tasks"]["flock"][key]
    assert (ours["engine"], ours["engine_version"]) == ("vllm", "0.32.0")
    assert (theirs["engine"], theirs["engine_version"]) == ("transformers", None)
    (server,) = stand_in
    options = dict(zip(server.command[3::2], server.command[4::2], strict=True))
    assert options == {
        "--served-model-name": "model", "--host": "127.0.0.1", "--port": str(server.port),
        "--dtype": "float32", "--max-model-len": str(POSITIONS), "--max-num-seqs": "64",
        "--seed": "0", "--generation-config": "vllm",
    }  # fmt: skip
    assert "trust" not in " ".join(server.command)
    assert server.environment["HF_HUB_OFFLINE"] == "1"
    assert server.environment["VLLM_CPU_KVCACHE_SPACE"] == "1"
    measured(place, engine=ENGINE)  # from the cache
    assert len(stand_in) == 1
    other = TaskEngine("vllm", "0.33.0", Path("vllm"))
    measured(place, engine=other)
    assert len(stand_in) == 2


def test_a_gpu_is_shared_and_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert "CUDA_VISIBLE_DEVICES" not in vllm_server.quiet_environment("cuda")
    assert vllm_server.quiet_environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert vllm_server.quiet_environment("cuda:1")["CUDA_VISIBLE_DEVICES"] == "5"
    options = ServingOptions(PROGRAM, "cuda", "bfloat16").arguments(4096)
    assert options[options.index("--gpu-memory-utilization") + 1] == "0.850"
    assert options[options.index("--dtype") + 1] == "bfloat16"


def test_a_server_ends_with_whatever_stops_the_tasks(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program of its own: one that dies says why, and Ctrl-C leaves none behind."""
    monkeypatch.setattr(serving, "VllmServer", vllm_server.VllmServer)
    program = fake_engines.vllm(tmp_path / "vllm")
    engine = task_engine("vllm", program)
    assert engine.label == "vllm 0.32.0"
    pids = []

    def stopped(scorer: ServedScorer, *_: Any, **__: Any) -> None:
        assert scorer._server is not None
        pids.append(scorer._server.process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(harness, "run_task", stopped)
    with pytest.raises(KeyboardInterrupt):
        measured(place, engine=engine)
    assert len(pids) == 1
    assert not psutil.pid_exists(pids[0])
    dying = tmp_path / "dying"
    write_model(dying)
    with pytest.raises(
        ShearlingError,
        match=r"^vllm could not serve dying \(exit code 1\): ValueError: Free memory is less",
    ):
        ServedScorer(open_subject(dying), ServingOptions(program))


def test_engines_that_ask_no_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShearlingError, match=r"--engine llama\.cpp was given, but tasks are asked"):
        task_engine("llama.cpp")
    monkeypatch.setenv("PATH", os.fspath(tmp_path))
    with pytest.raises(ShearlingError, match=r"vllm was looked for on the PATH .* with --vllm\."):
        task_engine("vllm")
    assert not task_engine("transformers").served
