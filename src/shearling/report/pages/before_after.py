"""The before/after table of a report."""

from __future__ import annotations

from shearling.report.decide.compare import groups
from shearling.report.draw.markup import Markup, el
from shearling.report.draw.sections import absent, section, with_commands
from shearling.report.draw.table import figures_table
from shearling.report.records.results import Results


def comparison_section(results: Results) -> Markup:
    """Every measure of every model, with its change against the source."""
    title = "Before and after" if results.made else "Measurements"
    rows = groups(results)
    if not (results.made or results.evaluations or results.runs):
        return absent(title, "None yet: `shearling eval MODEL` and `shearling bench MODEL`.")
    missing = [
        (not results.evaluations, "No perplexity yet: `shearling eval MODEL` measures it."),
        (
            not results.runs,
            "No speed and memory yet: `shearling bench MODEL` measures them.",
        ),
    ]
    lines = [
        el("p", with_commands(sentence), class_="small muted")
        for is_missing, sentence in missing
        if is_missing
    ]
    return section(title, figures_table(results, rows, title), lines)
