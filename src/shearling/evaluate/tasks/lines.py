"""Results of ``shearling eval``, and what a run of it would do, for a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def result_lines(name: str | None, files: Sequence[dict[str, Any]]) -> list[str]:
    """The results of one model, of whatever kind; ``name`` where there are several models."""
    lines = [f"{name}:"] if name else []
    for file in files:
        lines += _SHOWN[file["kind"]](file)
    return lines


def plan_lines(plan: dict[str, Any]) -> list[str]:
    """What ``--dry-run`` says."""
    lines = [f"suite {plan['suite']}:"]
    for text in plan["texts"]:
        lines.append(f"  perplexity on {text['hub'] or text['file']}, windows of {text['window']}")
    for task in plan["tasks"]:
        shots = "its own" if task["shots"] is None else task["shots"]
        lines.append(f"  task {task['name'] or task['file']}, shots: {shots}")
    for each in plan["degeneration"]:
        lines.append(f"  repetition in {each['prompts']} continuations of {each['file']}")
    for model in plan["models"]:
        cached = ", ".join(model["cached"]) or "no task"
        lines.append(f"{model['name']}: about {model['bytes'] / 1e9:.2f} GB; cached: {cached}")
    return lines


def _evaluation_lines(file: dict[str, Any]) -> list[str]:
    return [
        f"perplexity {file['perplexity']:.3f} on {file['text']} "
        f"({file['windows']} windows of {file['window']} tokens"
        f"{', each behind BOS' if file['bos'] else ''})"
    ]


def _task_lines(file: dict[str, Any]) -> list[str]:
    width = max(map(len, file["tasks"]), default=0)
    lines = [f"tasks of {file['suite']} (± one standard error):"]
    for name, task in file["tasks"].items():
        metric = task["primary"] or ""
        value = task["metrics"].get(metric)
        base, comma, filtered = metric.partition(",")
        error = task["metrics"].get(f"{base}_stderr{comma}{filtered}")
        shown = "-" if value is None else f"{value:.4f}"
        shown += f" ± {error:.4f}" if error is not None else ""
        lines.append(
            f"  {name:{width}}  {shown:17}  {metric}, {task['samples']:,} questions"
            + (f", {task['shots']} shots" if task["shots"] else "")
        )
    if file["average"] is not None:
        lines.append(f"  {'average':{width}}  {file['average']:.4f}")
    return lines


def _degeneration_lines(file: dict[str, Any]) -> list[str]:
    def share(figure: float | None) -> str:
        return "-" if figure is None else f"{figure:.1%}"

    ours, text = file, file["reference"]
    return [
        f"repetition in {file['prompts']} continuations of {file['text']} (the text's own):",
        *(
            f"  {label:20} {share(ours[key]):>6} ({share(text[key])})"
            for key, label in (("repetition_4", "repeated 4-grams"), ("loops", "end in a loop"))
        ),
        *(
            f"  {f'distinct {n}-grams':20} {share(ours['distinct'][n]):>6} "
            f"({share(text['distinct'][n])})"
            for n in ours["distinct"]
        ),
    ]


def _generation_lines(file: dict[str, Any]) -> list[str]:
    return [f"\n> {sample['prompt']}\n{sample['text']}" for sample in file["samples"]]


_SHOWN: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "evaluation": _evaluation_lines,
    "tasks": _task_lines,
    "degeneration": _degeneration_lines,
    "generations": _generation_lines,
}
