"""Texts for perplexity that the hub holds, joined as the papers that report them join them."""

from __future__ import annotations

from typing import Any

from shearling.errors import ShearlingError
from shearling.evaluate.tasks.suite import HubText

# Path for `datasets.load_dataset`, its configuration or file, split and field. PTB's repository
# holds a loading script, which is never run here: its converted files are read.
_SOURCES: dict[str, tuple[str, str | None, str | None, str, str]] = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", None, "test", "text"),
    "ptb": (
        "parquet",
        None,
        "hf://datasets/ptb-text-only/ptb_text_only@~parquet/penn_treebank/validation/0000.parquet",
        "train",  # what a single file's split is called
        "sentence",
    ),
}
SEPARATOR = "\n\n"


def hub_text(name: HubText) -> list[str]:
    """WikiText-2 (test) or Penn Treebank (validation) as one document, lines a blank one apart.

    Raises:
        ShearlingError: no `datasets`, or the hub could not be reached.
    """
    path, config, file, split, field = _SOURCES[name]
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ShearlingError(
            f"The text {name} is read with the package datasets, which is not installed; run "
            "pip install 'shearling[tasks]', or give a file of yours with --text."
        ) from error
    files: dict[str, Any] = {} if file is None else {"data_files": file}
    try:
        rows = load_dataset(path, config, split=split, **files)
    except Exception as error:  # whatever the network, the cache or the hub raise
        raise ShearlingError(
            f"The text {name} could not be fetched from the hub ({type(error).__name__}); check "
            "the network, or give a file of yours with --text."
        ) from error
    return [SEPARATOR.join(rows[field])]
