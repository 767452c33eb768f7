"""Writes the page that compares models, and says what it decided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shearling.files.writer import write_text
from shearling.report.decide.candidates import field_of
from shearling.report.decide.choice import Decision, choose
from shearling.report.decide.selection import ComparedModel, select
from shearling.report.pages.compare_page import compare_page
from shearling.report.records.records import Records


def write_comparison(
    records: Records, candidates: Sequence[ComparedModel], output: Path, *, within: float = 0.05
) -> Decision:
    """Write one self-contained HTML file about some models, whole or not at all.

    Args:
        records: what :func:`shearling.report.records.collect.read_directory` read.
        candidates: the models, the baseline first, no two of one fingerprint.
        within: the share of the baseline's quality that the pick may lose.

    Raises:
        ShearlingError: the output cannot be written.
    """
    selection = select(records, candidates)
    choice = choose(field_of(selection.table), within)
    write_text(output, compare_page(selection, choice))
    return choice
