"""``shearling pack``: what the command line says, checked, and handed to :mod:`shearling.data`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shearling.commands.options import (
    Bos,
    Json,
    MergeAdapter,
    Seed,
    print_result,
    size_in_bytes,
)
from shearling.commands.takes import takes_options

if TYPE_CHECKING:
    from shearling.data.pack import PackPlan


@dataclass(frozen=True, kw_only=True)
class PackOptions:
    """What the command line says."""

    files: Annotated[
        list[str],
        typer.Argument(
            help="Domains, each a file, a directory or a quoted glob, as NAME=PATH or as a path "
            "alone: .jsonl (also .gz and .zst), .txt or .parquet."
        ),
    ]
    tokenizer: Annotated[
        str, typer.Option(help="The model whose tokenizer is used: a directory or a hub id.")
    ]
    merge_adapter: MergeAdapter = False
    output: Annotated[Path, typer.Option(help="A new directory, or an unfinished one to go on.")]
    length: Annotated[int, typer.Option(min=2, help="Tokens in each sequence.")] = 2048
    held_out: Annotated[
        float, typer.Option(min=0, max=0.999, help="Share of the documents not to train on.")
    ] = 0.02
    bos: Bos = None
    seed: Seed = 0
    max_line: Annotated[
        str, typer.Option(help="Longest line, which is held in memory; of .gz and .zst unpacked.")
    ] = "100MB"
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; by default one for each processor if it is worth it."),
    ] = None
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be packed, and write nothing.")
    ] = False
    as_json: Json = False


@takes_options
def pack(options: PackOptions) -> None:
    """Turn text and instruction data into a store of tokens to heal a model with.

    Every domain gets a train and a held-out part that share no document; a .txt is one document,
    and where whole ones do not do, the end of the longest is held out. A record is {"text": …},
    {"messages": …} or a prompt with its answer ("instruction" and "output", "question" and
    "answer"); of the last two only answers are learned.
    """
    from shearling.data.pack import PackPlan
    from shearling.data.pack import pack as build
    from shearling.files.terminal import progress_bars
    from shearling.model.loading import load_tokenizer
    from shearling.model.resolve import resolve

    directory = resolve(options.tokenizer, merge_adapter=options.merge_adapter)
    name = directory.resolve().name if Path(options.tokenizer).exists() else options.tokenizer
    plan = PackPlan.of(
        options.files,
        load_tokenizer(directory),
        name,
        length=options.length,
        held_out=options.held_out,
        seed=options.seed,
        bos=options.bos,
        max_line=size_in_bytes(options.max_line, "--max-line"),
    )
    if options.dry_run:
        _print_plan(plan, options.as_json)
        return
    with progress_bars() as progress:
        manifest = build(plan, options.output, workers=options.workers, progress=progress)
    print_result(manifest, options.as_json, [*_lines(manifest), f"wrote {options.output}"])


def _print_plan(plan: PackPlan, as_json: bool) -> None:
    domains: dict[str, dict[str, Any]] = {}
    text = []
    for domain, sources in plan.domains.items():
        names = [source.name for source in sources]
        size = sum(source.file.stat().st_size for source in sources)
        domains[domain] = {"files": names, "bytes": size}
        files = "1 file" if len(names) == 1 else f"{len(names):,} files"
        text.append(f"would pack {files} of {size / 1e6:,.1f} MB as {domain}")
    described = {"length": plan.length, "held_out": plan.held_out, "seed": plan.seed}
    described["bos"] = plan.bos
    print_result(described | {"domains": domains}, as_json, text)


def _lines(manifest: dict[str, Any]) -> list[str]:
    """A row for each domain: sequences of both parts, tokens, and what was left out."""
    width = max(map(len, [*manifest["domains"], "domain"]))
    rows = [f"{'domain':<{width}} {'train':>10} {'held out':>10} {'documents':>12} {'tokens':>16}"]
    for domain, described in manifest["domains"].items():
        parts = (described["train"], described["held_out"])
        documents, tokens = (sum(part[key] for part in parts) for key in ("documents", "tokens"))
        sizes = " ".join(f"{part['sequences']:>10,}" for part in parts)
        rows.append(f"{domain:<{width}} {sizes} {documents:>12,} {tokens:>16,}")
        if end := described.get("held_out_end"):
            rows[-1] += f"; held out: the last {end:,} tokens of its longest document"
        learned = sum(part["learned_tokens"] for part in parts)
        if learned < tokens:
            rows[-1] += f", {learned:,} of them in answers"
        if described["left_out"]:
            rows[-1] += f"; {described['left_out']:,} blank records left out"
    dropped = sum(
        described[part]["dropped_remainder"] + described[part]["dropped_without_answer"]
        for described in manifest["domains"].values()
        for part in ("train", "held_out")
    )
    return [*rows, f"{dropped:,} tokens that fill no sequence, or hold no answer, were dropped"]
