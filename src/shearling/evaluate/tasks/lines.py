"""Results of ``shearling eval``, and what a run of it would do, for a person."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.abilities.shares import Share, mean_share, moved, shares
from shearling.files.sizes import in_bytes


def all_lines(names: Sequence[str], results: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Every model's results, and what is left of the first one's abilities in the others."""
    lines: list[str] = []
    first: dict[str, Any] | None = None
    for name, files in zip(names, results, strict=True):
        lines += result_lines(name if len(names) > 1 else None, files)
        for file in files:
            if file["kind"] == "abilities" and first is not None:
                lines += ability_share_lines(first, file)
            elif file["kind"] == "abilities":
                first = file
    return lines


def told_apart(names: Sequence[str], given: Sequence[str]) -> list[str]:
    """Models' names; of two that are alike as much of the path given as tells them apart.

    One that was given twice is numbered.
    """
    heads = list(names)
    for name in set(names):
        alike = [n for n, other in enumerate(names) if other == name]
        parts = [Path(given[n]).resolve().parts for n in alike]
        shown = [name] * len(alike)
        for count in range(1, max(map(len, parts)) + 1):
            if len(set(shown)) == len(set(parts)):
                break
            shown = ["/".join(one[-count:]) for one in parts]
        for at, (n, head) in enumerate(zip(alike, shown, strict=True)):
            earlier = shown[:at].count(head)
            heads[n] = f"{head} ({earlier + 1})" if shown.count(head) > 1 else head
    return heads


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
        ran = "" if plan["engine"] == "transformers" else f", with {plan['engine']}"
        lines.append(f"  task {task['name'] or task['file']}, shots: {shots}{ran}")
    for each in plan["abilities"]:
        most = plan["limit"] or each["limit"]
        lines.append(f"  abilities, {f'{most} items' if most else 'all items'} of each")
    for each in plan["degeneration"]:
        lines.append(f"  repetition in {each['prompts']} continuations of {each['file']}")
    for model in plan["models"]:
        cached = ", ".join(model["cached"]) or "no task"
        lines.append(f"{model['name']}: about {in_bytes(model['bytes'], 2)}; cached: {cached}")
    return lines


def _evaluation_lines(file: dict[str, Any]) -> list[str]:
    return [
        f"perplexity {file['perplexity']:.3f} on {file['text']} "
        f"({file['windows']} windows of {file['window']} tokens"
        f"{', each behind BOS' if file['bos'] else ''})"
    ]


def _task_lines(file: dict[str, Any]) -> list[str]:
    width = max(map(len, file["tasks"]), default=0)
    version = f" {file['engine_version']}" if file["engine_version"] else ""
    ran = "" if file["engine"] == "transformers" else f", with {file['engine']}{version}"
    lines = [f"tasks of {file['suite']}{ran} (± one standard error):"]
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


def _ability_lines(file: dict[str, Any]) -> list[str]:
    width = max(map(len, file["abilities"]))
    head = f"  {'':{width}}  exact (95 %)      nats a token  tokens (right answer's)"
    lines = [f"abilities, seed {file['seed']}:", head]
    for name, one in file["abilities"].items():
        if one["exact"] is None:
            figures = f"{one['repetition_4']:.1%} of 4-grams repeat; {one['tokens']:.1f} tokens"
        else:
            low, high = one["exact_interval"]
            exact = f"{one['exact']:4.0%} ({low:.0%}-{high:.0%})"
            tokens = f"{one['tokens']:.1f} ({one['expected_tokens']:.1f})"
            figures = f"{exact:16}  {one['nll']:12.3f}  {tokens}"
        lines.append(f"  {name:{width}}  {figures}")
    return lines


def ability_share_lines(first: dict[str, Any], file: dict[str, Any]) -> list[str]:
    """What is left of the abilities of one file's model in another's, the worst first."""
    source, model = (Abilities.from_json(one, Path("abilities.json")) for one in (first, file))
    left = shares(source, model)
    width = max(len(share.ability) for share in left)
    return [
        f"left of the abilities of {source.model.name}, by likelihood (95 %), the worst first:",
        *(_share_line(share, width) for share in left),
        _share_line(mean_share(left), width),
        "answers moved, either way, by {:.4f} ({:.4f}-{:.4f}) nats a token".format(
            *moved(source, model)
        ),
    ]


def _share_line(share: Share, width: int) -> str:
    low, high = share.interval
    mark = "  <- below 95 %" if share.low else ""
    return f"  {share.ability:{width}}  {share.left:6.1%} ({low:.1%}-{high:.1%}){mark}"


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
    "abilities": _ability_lines,
    "degeneration": _degeneration_lines,
    "generations": _generation_lines,
}
