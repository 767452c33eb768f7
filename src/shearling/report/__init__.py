"""One self-contained HTML file that shows what was cut, what it gained and what it cost."""

from shearling.report.pages.page import page, write_report
from shearling.report.records.collect import collect
from shearling.report.records.results import Results

__all__ = ["Results", "collect", "page", "write_report"]
