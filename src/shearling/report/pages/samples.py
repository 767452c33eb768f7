"""What the models say to the same prompts, beside each other."""

from __future__ import annotations

from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import absent, section
from shearling.report.numbers import exact, plural
from shearling.report.records.fields import describe
from shearling.report.records.results import Results

PROMPTS_SHOWN = 12  # more would bury the rest of the page
CHARACTERS_SHOWN = 3000


def samples_section(results: Results) -> Markup:
    """One block a prompt, in it one column a model."""
    title = "Samples"
    table: dict[tuple[str, str], dict[str, str]] = {}
    for one in results.generations:
        for sample in one.samples:
            key = (sample.prompt, _sampling(one.sampling, one.max_new_tokens))
            table.setdefault(key, {})[one.model.fingerprint] = sample.text
    if not table:
        return absent(title, 'No samples yet: `shearling eval MODEL --prompt "…"` writes some.')
    settings = {sampling for _, sampling in table}
    blocks = [
        _prompt(results, prompt, said, sampling if len(settings) > 1 else "")
        for (prompt, sampling), said in list(table.items())[:PROMPTS_SHOWN]
    ]
    lines = [f"Sampling: {next(iter(settings))}."] if len(settings) == 1 and any(settings) else []
    if len(table) > PROMPTS_SHOWN:
        lines.append(f"The first {PROMPTS_SHOWN} of {plural(len(table), 'prompt')} are shown.")
    note = el("p", " ".join(lines), class_="small muted") if lines else None
    return section(title, note, blocks)


def _prompt(results: Results, prompt: str, said: dict[str, str], sampling: str) -> Markup:
    columns = [
        el("div", el("h4", model.name), _said(said[model.fingerprint]), class_="said")
        for model in results.models
        if model.fingerprint in said
    ]
    note = el("p", f"Sampling: {sampling}.", class_="small muted") if sampling else None
    return el(
        "article",
        el("h3", _cut(prompt) if prompt else "(no prompt)"),
        note,
        el("div", columns, class_="columns"),
        class_="samples",
    )


def _said(text: str) -> Markup:
    if not text.strip():
        return el("p", el("span", "(said nothing)", class_="muted"))
    # a continuation begins with a space; below a line break, spaces are an indentation
    shown = text.strip("\n") if text.startswith("\n") else text.strip()
    return el("p", _cut(shown.rstrip()))


def _cut(text: str) -> str:
    if len(text) <= CHARACTERS_SHOWN:
        return text
    return f"{text[:CHARACTERS_SHOWN]}… ({exact(len(text) - CHARACTERS_SHOWN)} characters more)"


def _sampling(sampling: object, longest: int | None) -> str:
    parts = [describe(sampling)] if sampling is not None else []
    if longest is not None:
        parts.append(f"at most {exact(longest)} new tokens")
    return ", ".join(parts)
