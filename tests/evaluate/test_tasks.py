"""Tasks through lm-eval: the same figures as its own command line gives, and what is refused."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from transformers import LlamaConfig, LlamaForCausalLM

from shearling.errors import ShearlingError
from shearling.evaluate.tasks import cache, harness, names, run
from shearling.evaluate.tasks.harness import Scorer
from shearling.evaluate.tasks.run import TaskRunner
from shearling.evaluate.tasks.suite import Task
from shearling.model.loading import load_model
from shearling.model.subject import open_subject
from tiny_tokenizer import VOCAB, byte_tokenizer

METRICS = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 160 positions, and questions of one and of several tokens an answer."""
    path = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=36, num_attention_heads=9, num_key_value_heads=3, head_dim=4,
        intermediate_size=50, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=160,
        initializer_range=0.3, bos_token_id=256, eos_token_id=257,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path / "model")
    byte_tokenizer().save_pretrained(path / "model")
    words = ["wool", "a ram", "hay and oats", "z", "the shears", "grass"]
    rows = [
        {
            "question": f"What {words[i % 6]} is number {i * 7}?",
            "choices": [words[(i + k) % 6] for k in range(2 + i % 3)],
            "label": i % 2,
            "source": "made up",
        }
        for i in range(40)
    ]
    (path / "flock.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHEARLING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))


def measured(place: Path, *tasks: Task, known: dict | None = None, **options: Any) -> Any:
    subject = open_subject(place / "model")
    return TaskRunner("mine", tasks, **options).run(
        subject, lambda: (load_model(subject.path), subject.tokenizer()), recalled=known or {}
    )


@functools.cache
def command_line(place: Path, shots: int) -> dict[str, Any]:
    """What `lm_eval run` says of the same questions, by a task written as its docs teach."""
    from lm_eval.__main__ import cli_evaluate

    out = place / f"{shots} shots"

    written = {
        "task": "flock_reference",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(place / "flock.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{label}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    if shots:  # never the question itself among its shots
        written["fewshot_split"] = "test"
    out.mkdir()
    task = out / "flock_reference.yaml"
    task.write_text(yaml.safe_dump(written))
    arguments = [
        "lm_eval", "run", "--model", "hf", "--tasks", str(task), "--device", "cpu",
        "--model_args", f"pretrained={place / 'model'},dtype=float32", "--batch_size", "1",
        "--output_path", str(out), *(("--num_fewshot", str(shots)) if shots else ()),
    ]  # fmt: skip
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(sys, "argv", arguments)
        # Its thousands of other tasks take half a minute to read, and the versions it asks
        # compilers and pip for as long; neither is part of a figure.
        patch.setattr("lm_eval.tasks._index.TaskIndex.build", lambda *_, **__: {})
        patch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        cli_evaluate()
    [file] = out.rglob("results_*.json")
    found = json.loads(file.read_text())["results"]["flock_reference"]
    return {name: found[f"{name},none"] for name in METRICS}


def flock(place: Path, **options: Any) -> Task:
    return Task(file=place / "flock.jsonl", **options)


@pytest.mark.parametrize(("shots", "onednn"), [(0, "0"), (0, "1"), (1, "1")])
def test_equal_to_lm_evals_command_line_to_the_last_digit(
    place: Path, monkeypatch: pytest.MonkeyPatch, shots: int, onednn: str
) -> None:
    from shearling.engine import products

    monkeypatch.setenv("SHEARLING_ONEDNN", onednn)
    products.preferred.cache_clear()
    try:
        ours = measured(place, flock(place, shots=shots))
    finally:
        monkeypatch.undo()
        products.preferred.cache_clear()
    theirs = command_line(place, shots)
    task = ours["tasks"]["flock"]
    assert task["metrics"] == theirs
    assert 0 < theirs["acc"] < 1
    assert theirs["acc"] != theirs["acc_norm"]
    assert (task["samples"], task["shots"], task["primary"]) == (40, shots, "acc_norm")
    assert ours["average"] == theirs["acc_norm"]
    assert (ours["kind"], ours["suite"], ours["model"]["name"]) == ("tasks", "mine", "model")


def test_scores_are_lm_evals_own_whatever_the_batch(place: Path) -> None:
    """Every log-likelihood, of prompts that share answers, contexts and all but a last token."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    pairs = [
        ("Question: hay?\nAnswer:", " yes"), ("Question: hay?\nAnswer:", " yet"),
        ("Question: hay?\nAnswer:", " no, never"), ("Who", " a ram"), ("Who", " a ram"),
        ("A much longer question of a shepherd's\nAnswer:", " z"), ("", "BOS before this"),
    ]  # fmt: skip
    asked = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    model, tokenizer = load_model(place / "model"), byte_tokenizer()
    with harness.quiet():
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(
            asked, disable_tqdm=True
        )
        for batch in (None, 1, 3, 50):
            ours = Scorer(model, tokenizer, batch=batch).loglikelihood(asked)
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
            for (one, _), (other, _) in zip(ours, theirs, strict=True):
                assert one == pytest.approx(other, abs=1e-4)


def test_only_the_logits_that_answers_need_are_computed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.api.instance import Instance

    model = load_model(place / "model")
    scorer = Scorer(model, byte_tokenizer(), batch=1)
    shapes, forward = [], model.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        shapes.append(found.logits.shape[1])
        return found

    monkeypatch.setattr(model, "forward", watched)
    scorer.loglikelihood([Instance("loglikelihood", {}, ("A long question", " abc"), 0)])
    assert shapes == [4]  # a token a byte


def test_generation_and_rolling_tasks_run_as_lm_evals_do(place: Path) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    asked = [
        Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 6}), i)
        for i, text in enumerate(["A ram", "Grass is what a sheep"])
    ]
    rolling = [Instance("loglikelihood_rolling", {}, ("word " * 50,), 0)]
    model, tokenizer = load_model(place / "model"), byte_tokenizer()
    with harness.quiet():
        theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2)
        ours = Scorer(model, tokenizer)
        written = theirs.generate_until(asked, disable_tqdm=True)
        assert ours.generate_until(asked) == written
        assert ours.answers == 2
        assert ours.answer_tokens == sum(len(answer.encode()) for answer in written) > 0
        expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
        assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, rel=1e-5)


def test_batches_go_by_length_and_lose_no_request(place: Path) -> None:
    scorer = Scorer(load_model(place / "model"), byte_tokenizer())
    from lm_eval.models.utils import Collator

    requests = [(("", ""), [1] * n, [2]) for n in (1, 5, 900, 30, 2500, 7, 7, 120, 3, 1000)]
    order = Collator(requests, sort_fn=lambda r: -len(r[1]))
    chunks = list(order.get_batched(n=0, batch_fn=scorer._batch_scheduler))
    assert sorted(len(r[1]) for chunk in chunks for r in chunk) == sorted(
        len(r[1]) for r in requests
    )
    assert len(chunks) < len(requests)
    assert [len(r[1]) for r in chunks[0]] == [2500]


def test_a_stopped_run_goes_on_task_by_task(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = place / "other.jsonl"
    other.write_text((place / "flock.jsonl").read_text().replace("number", "count"))
    tasks = TaskRunner("mine", [flock(place), Task(file=other)], limit=5)
    subject = open_subject(place / "model")

    def load() -> tuple[Any, Any]:
        return load_model(subject.path), subject.tokenizer()

    run_task, calls = harness.run_task, []

    def killed(scorer: Any, task: Any, **options: Any) -> Any:
        calls.append(harness.name_of(task))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run_task(scorer, task, **options)

    with monkeypatch.context() as patch:
        patch.setattr(harness, "run_task", killed)
        with pytest.raises(KeyboardInterrupt):
            tasks.run(subject, load, recalled={})
    again = TaskRunner("mine", [flock(place), Task(file=other)], limit=5)
    known = again.recalled(subject)
    assert list(known) == ["flock"]
    found = again.run(subject, load, recalled=known)
    assert list(found["tasks"]) == ["flock", "other"]
    everything = again.recalled(subject)
    silent = TaskRunner("mine", [flock(place), Task(file=other)], limit=5)
    # All is known: no model is loaded, and no task built.
    repeated = silent.run(subject, lambda: pytest.fail("loaded"), recalled=everything)
    assert repeated["tasks"] == found["tasks"]
    assert {task["samples"] for task in found["tasks"].values()} == {5}


@pytest.mark.parametrize("change", ["limit", "shots", "dtype", "seed", "data", "tokenizer"])
def test_the_cache_knows_what_counts(place: Path, tmp_path: Path, change: str) -> None:
    subject = open_subject(place / "model")
    file = tmp_path / "flock.jsonl"
    file.write_text((place / "flock.jsonl").read_text())
    task = Task(file=file)
    options: dict[str, Any] = {"limit": 3}
    first = TaskRunner("mine", [task], **options).key(subject, task)
    cache.keep(first, {"result": 1})
    again = TaskRunner("other name", [task], batch=7, **options)
    assert again.recalled(subject) == {"flock": {"result": 1}}
    if change == "shots":
        task = Task(file=file, shots=2)
    elif change == "data":
        file.write_text(file.read_text().replace("wool", "silk"))
    elif change == "tokenizer":
        import shutil

        other = shutil.copytree(place / "model", tmp_path / "model")
        (other / "tokenizer_config.json").write_text("{}")
        assert open_subject(other).fingerprint == subject.fingerprint
        subject = open_subject(other)
    else:
        options |= {change: {"limit": 4, "dtype": "bfloat16", "seed": 1}[change]}
    assert TaskRunner("mine", [task], **options).recalled(subject) == {}


def test_a_damaged_cache_is_none(place: Path) -> None:
    subject, task = open_subject(place / "model"), flock(place)
    tasks = TaskRunner("mine", [task])
    cache.keep(tasks.key(subject, task), {"flock": {}})
    files = Path(os.environ["SHEARLING_CACHE"]).rglob("*.json")
    [file] = [file for file in files if "fingerprints" not in file.parts]
    file.write_text(file.read_text()[:20])
    assert tasks.recalled(subject) == {}


def test_prompts_that_lose_their_beginning_are_counted(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    row = {"question": "x" * 200, "choices": ["yes", "no"], "label": 0}
    file.write_text(json.dumps(row) + "\n" + json.dumps(row | {"question": "short"}))
    assert measured(place, Task(file=file))["tasks"]["long"]["truncated"] == 2
    file.write_text(json.dumps(row | {"choices": ["y" * 200, "no"]}))
    with pytest.raises(ShearlingError, match="An answer of 201 tokens is longer than the model's"):
        measured(place, Task(file=file))


class Manager:
    """lm-eval's, without the half minute that reading its thousands of tasks takes."""

    all_tasks = ("arc_easy", "arc_challenge", "piqa")

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def load(self, _: Any) -> Any:
        raise self.error or AssertionError


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("arc_esy", None, "has no task 'arc_esy'; the nearest are arc_easy"),
        ("piqa", ConnectionError("no route"), r"data of the task piqa could not be fetched.*net"),
        ("piqa", ModuleNotFoundError("No module named 'x'"), r"cannot be set up.*'x'"),
    ],
)
def test_tasks_that_cannot_be_had(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: Exception, message: str
) -> None:
    monkeypatch.setattr(run, "_manager", lambda default: Manager(error))
    with pytest.raises(ShearlingError, match=message):
        measured(place, Task(name=name))


def test_a_metric_that_a_task_lacks(place: Path) -> None:
    with pytest.raises(ShearlingError, match="no metric f1; it has acc, acc_norm"):
        measured(place, flock(place, metric="f1"))
    assert measured(place, flock(place, metric="acc"), limit=3)["tasks"]["flock"]["primary"] == (
        "acc"
    )


def test_a_metric_behind_one_of_several_filters() -> None:
    """GSM8K's two: each is a metric of its own, and the bare name takes the first."""
    listed = [{"metric": "exact_match"}]
    filters = [{"name": "strict-match"}, {"name": "flexible-extract"}]
    built = SimpleNamespace(config=SimpleNamespace(metric_list=listed, filter_list=filters))
    metrics = {f"exact_match,{each['name']}": 0.25 * i for i, each in enumerate(filters)}
    for asked, primary in (
        ("exact_match,flexible-extract", "exact_match,flexible-extract"),
        ("exact_match", "exact_match,strict-match"),
    ):
        task = Task(name="gsm8k", metric=asked)
        run._check_metric(built, task)
        assert run._with_primary({"metrics": metrics}, task)["primary"] == primary
    with pytest.raises(ShearlingError, match=r"no metric exact_match,loose; it has exact_match,st"):
        run._check_metric(built, Task(name="gsm8k", metric="exact_match,loose"))


def test_without_lm_eval(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "find_spec", lambda _: None)
    with pytest.raises(ShearlingError, match=r"pip install 'shearling\[tasks\]'"):
        TaskRunner("mine", [flock(place)])
    TaskRunner("mine", [])  # nothing needs it


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hellaswga", r"has no task 'hellaswga'; the nearest are hellaswag, \w+, \w+; give one"),
        ("nopetask", r"has no task 'nopetask'; give one"),
    ],
)
def test_a_task_that_stands_nowhere_is_refused_before_all_are_read(
    place: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.setattr(run, "_manager", lambda default: pytest.fail("the index was read"))
    with pytest.raises(ShearlingError, match=message):
        measured(place, Task(name=name))


def test_names_of_lm_eval_are_known_by_its_files() -> None:
    """Of groups and tags, of included files, and those with quotes."""
    names.check_known(["mmlu", "sciq", "acp_bench", "afrimgsm_cot_tasks_prompt_1", "scrolls"])
