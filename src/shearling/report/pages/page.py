"""Puts the sections together into one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from shearling.files.writer import write_text
from shearling.report.draw.markup import Markup, el
from shearling.report.pages.abilities import abilities_section
from shearling.report.pages.anatomy import anatomy_section
from shearling.report.pages.before_after import comparison_section
from shearling.report.pages.behaviour import degeneration_section, judgements_section
from shearling.report.pages.charts import damage_section, scores_section
from shearling.report.pages.comparison_view import comparisons_section
from shearling.report.pages.family import family_section
from shearling.report.pages.headline import header, page_title
from shearling.report.pages.healing import healing_section
from shearling.report.pages.learning import learning_section
from shearling.report.pages.lineage import lineage_section, use_section
from shearling.report.pages.samples import samples_section
from shearling.report.pages.task_table import tasks_section
from shearling.report.pages.unit_scores import unit_scores_section
from shearling.report.records.collect import collect
from shearling.report.records.results import Results


def write_report(directories: Sequence[Path], output: Path) -> Path:
    """Read the results under the directories and write one HTML file about them.

    The file appears whole or not at all, loads nothing from elsewhere, and is the same, byte for
    byte, for the same results.

    Raises:
        ShearlingError: there is nothing to report on, a result file is damaged, or the output
            cannot be written.
    """
    write_text(output, page(collect(directories)))
    return output


def page(results: Results) -> str:
    """The whole page."""
    sections = (
        [comparisons_section(results)]
        if not results.models
        else [
            family_section(results),
            anatomy_section(results),
            comparison_section(results),
            abilities_section(results),
            tasks_section(results),
            degeneration_section(results),
            judgements_section(results),
            scores_section(results),
            unit_scores_section(results),
            damage_section(results),
            comparisons_section(results),
            learning_section(results),
            healing_section(results),
            samples_section(results),
            lineage_section(results),
            use_section(results),
        ]
    )
    return document(page_title(results), header(results), el("main", sections), footer(results))


def document(title: str, *body: object, style: str = "") -> str:
    """A whole page in the report's style, to which rules of one's own can be added."""
    # our own file, free of markup: it must not be escaped, since style is raw text in HTML
    rules = resources.files("shearling.report.pages").joinpath("style.css").read_text("utf-8")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="generator", content="shearling"),
        el("title", title),
        el("style", Markup(f"\n{rules}{style}")),
    )
    return f"<!doctype html>\n{el('html', head, el('body', *body), lang='en')}\n"


def footer(results: Results) -> Markup:
    """Said from the data alone: a time of writing would make equal reports differ."""
    dated = [
        one.created[:10]
        for one in (
            *results.scores,
            *results.unit_scores,
            *results.damages,
            *results.evaluations,
            *results.runs,
            *results.generations,
            *results.healings,
            *results.learnings,
            *results.comparisons,
            *results.tasks,
            *results.abilities,
            *results.degenerations,
            *results.judgements,
            *results.families,
            *(step for model in results.made for step in model.chain),
        )
        if one.created
    ]
    days = sorted(set(dated))
    when = f", from results of {days[0]}" if days else ""
    until = f" to {days[-1]}" if len(days) > 1 else ""
    return el("footer", f"Made by shearling{when}{until}.")
