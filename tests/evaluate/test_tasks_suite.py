"""Suites and files of questions: what they may say, and what is said of those that will not do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shearling.errors import ShearlingError
from shearling.evaluate.tasks import hub
from shearling.evaluate.tasks.questions import config, read_questions
from shearling.evaluate.tasks.suite import BUILT_IN, load_suite

GOOD = {"question": "Who?", "choices": ["a ram", "a ewe"], "label": 1}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_suites_parse(name: str) -> None:
    label, suite = load_suite(name)
    assert label == name
    tasks = {"abilities": 0, "retention": 11, "shortened": 7, "sheared": 11}
    assert len(suite.tasks) == tasks[name]
    assert len(suite.abilities) == (name == "abilities")


def test_the_papers_metrics_and_shots() -> None:
    tasks = {task.name: task for task in load_suite("shortened")[1].tasks}
    assert {name for name, task in tasks.items() if task.metric == "acc_norm"} == {
        "hellaswag", "arc_challenge", "openbookqa",
    }  # fmt: skip
    texts = load_suite("shortened")[1].texts
    assert [(text.hub, text.window) for text in texts] == [("wikitext2", 128), ("ptb", 128)]
    shots = {task.name: task.shots for task in load_suite("sheared")[1].tasks if task.shots}
    assert shots == {"arc_challenge": 25, "hellaswag": 10, "boolq": 32, "nq_open": 32, "mmlu": 5}


def test_names_in_the_built_in_suites_are_lm_evals() -> None:
    root = Path(pytest.importorskip("lm_eval").__file__).parent / "tasks"
    where = {
        "boolq": "super_glue/boolq", "arc_easy": "arc", "arc_challenge": "arc",
        "lambada_openai": "lambada", "mmlu": "mmlu/default",
        "code2text_python": "code_x_glue", "belebele": "belebele", "mgsm": "mgsm/direct",
    }  # fmt: skip
    for suite in BUILT_IN:
        for task in load_suite(suite)[1].tasks:
            name = str(task.name)
            place = where.get(name, where.get(name.split("_")[0], name))
            files = (root / place).rglob("*.yaml")
            text = "\n".join(file.read_text() for file in files).replace('"', "")
            lines = text.splitlines()
            assert f"task: {task.name}" in lines or f"group: {task.name}" in lines


def test_paths_are_relative_to_the_suite(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "texts: [{file: a.txt, window: 64}]\n"
        "tasks: [piqa, {file: q/b.jsonl, shots: 2}]\n"
        "degeneration: {file: a.txt, prompts: 3}\n"
    )
    name, suite = load_suite(str(tmp_path / "mine.yaml"))
    assert name == "mine"
    assert suite.texts[0].file == suite.degeneration[0].file == tmp_path / "a.txt"
    assert [(t.label, t.file, t.shots) for t in suite.tasks] == [
        ("piqa", None, None),
        ("b", tmp_path / "q" / "b.jsonl", 2),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("- piqa", "not a mapping"),
        ("tasks: [", "not YAML in line"),
        ("task: [piqa]", "has the key task, which is not known; the keys there are texts, tasks"),
        ("tasks: [{name: piqa, shot: 3}]", "shot, which is not known; the keys there are name"),
        ("tasks: [{shots: 3}]", "at tasks.0: give name"),
        ("tasks: [{name: piqa, shots: -1}]", "at tasks.0.shots"),
        ("tasks: [piqa, piqa]", "two tasks are called piqa"),
        ("texts: [{file: a/t.txt}, {file: b/t.txt}]", "two texts are called t"),
        ("texts: [{window: 3}]", "give either file"),
        ("texts: [{hub: c4}]", "'wikitext2' or 'ptb'"),
        ("texts: [{file: a.txt, window: 1}]", "at texts.0.window"),
        ("degeneration: {file: a.txt, new_tokens: 2}", "degeneration.0.new_tokens"),
    ],
)
def test_suites_that_will_not_do(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ShearlingError, match=message) as refused:
        load_suite(str(file))
    assert "\n" not in str(refused.value)


def test_a_suite_that_is_not_there() -> None:
    with pytest.raises(
        ShearlingError, match="neither built in .abilities, retention, shortened, sheared"
    ):
        load_suite("shortend")


def test_questions_are_read_with_blank_lines_and_further_keys(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text("\ufeff" + json.dumps(GOOD | {"id": 3}) + "\n\n" + json.dumps(GOOD) + "\n")
    assert read_questions(file) == [GOOD, GOOD]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "is not an object"),
        (json.dumps({"question": "Who?"}), "lacks choices and label"),
        (json.dumps(GOOD | {"question": " "}), "a question that is no text"),
        (json.dumps(GOOD | {"choices": ["one"]}), "two or more texts"),
        (json.dumps(GOOD | {"choices": ["one", ""]}), "two or more texts"),
        (json.dumps(GOOD | {"choices": "ab"}), "two or more texts"),
        (json.dumps(GOOD | {"label": "1"}), "label '1', which is not a whole number"),
        (json.dumps(GOOD | {"label": True}), "label True, which is not a whole number"),
        (json.dumps(GOOD | {"label": 2}), "label 2, but its 2 choices are numbered 0 to 1"),
        (json.dumps(GOOD | {"label": -1}), "label -1, but"),
    ],
)
def test_questions_that_will_not_do_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ShearlingError, match=message) as refused:
        read_questions(file)
    assert str(refused.value).startswith(f"Line 3 of {file} ")


def test_files_that_hold_no_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    with pytest.raises(ShearlingError, match="There is no task file"):
        read_questions(file)
    file.write_text("\n\n")
    with pytest.raises(ShearlingError, match="has no questions"):
        read_questions(file)
    file.write_bytes("Schäfer".encode("latin-1"))
    with pytest.raises(ShearlingError, match="not UTF-8"):
        read_questions(file)


def test_more_shots_than_other_questions(tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n" * 3)
    assert config("q", file, 2)["num_fewshot"] == 2
    with pytest.raises(ShearlingError, match="3 shots .* only 2 are others"):
        config("q", file, 3)


def test_hub_texts_are_joined_and_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load(path: str, config: str | None, **options: str) -> dict[str, list[str]]:
        asked.append((path, config, options["split"]))
        return {"text": ["one", "two"]}

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert hub.hub_text("wikitext2") == ["one\n\ntwo"]
    assert asked == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(ShearlingError, match=r"ptb could not be fetched .*ConnectionError.*--text"):
        hub.hub_text("ptb")
