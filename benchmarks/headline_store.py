"""The token store of headline.py: seven domains in RedPajama's shares, as far as there is text.

    python benchmarks/headline_store.py MODEL STORE [--data DIR]

DIR (or ``SHEARLING_BENCH_DATA``) holds redpajama/DOMAIN.jsonl and, where there is more,
more/DOMAIN.jsonl.zst. Of redpajama/ the first nine tenths of every domain's documents are taken;
the last tenth is kept for evaluation. What a domain lacks after that comes from more/. The texts
are then packed by

    shearling pack DOMAIN=FILE ... --tokenizer MODEL --output STORE --length 512 \\
        --held-out 0.06 --seed 1

The seed decides which documents are held out; with 0 those of book fill 28 sequences, too few. This
gives 10.2 million tokens to train on and half a million held out, of 2 bytes each.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_text import compressed, seen
from shearling.model.loading import load_tokenizer
from shearling.model.resolve import resolve

LENGTH, HELD_OUT, SEED = 512, 0.06, 1
# Tokens of each domain, in thousands. RedPajama has 67 % cc, 15 % c4, 4.5 % github, wiki and book,
# 2.5 % arxiv, 2 % stackexchange; there is no more c4, and the two smallest have what 40 held-out
# sequences need.
TOKENS = {
    "cc": 5960, "c4": 850, "github": 950, "wiki": 950, "book": 950, "arxiv": 620,
    "stackexchange": 570,
}  # fmt: skip


def main() -> None:
    """Choose the documents, write them out, and pack them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="whose tokenizer is used: a directory or a .gguf file")
    parser.add_argument("store", type=Path, help="a new directory")
    parser.add_argument("--data", type=Path, default=os.environ.get("SHEARLING_BENCH_DATA"))
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data DIR, or set SHEARLING_BENCH_DATA")
    source = resolve(options.model)
    tokenizer = load_tokenizer(source)
    with tempfile.TemporaryDirectory() as folder:
        files = []
        for domain, thousands in TOKENS.items():
            file, count = Path(folder) / f"{domain}.jsonl", 0
            with file.open("w", encoding="utf-8") as stream:
                for text in _texts(options.data, domain):
                    stream.write(json.dumps({"text": text}) + "\n")
                    count += len(tokenizer(text, verbose=False)["input_ids"]) + 1  # and EOS
                    if count >= 1000 * thousands:
                        break
            print(f"{domain}: {count:,} tokens", file=sys.stderr)
            files.append(f"{domain}={file}")
        subprocess.run(
            [
                sys.executable, "-m", "shearling.cli", "pack", *files, "--tokenizer", str(source),
                "--output", str(options.store), "--length", str(LENGTH), "--held-out",
                str(HELD_OUT), "--seed", str(SEED),
            ],
            check=True,
        )  # fmt: skip


def _texts(data: Path, domain: str) -> Iterator[str]:
    """Documents that may be trained on: the sample's first nine tenths, then what more there is."""
    yield from seen(data, domain)
    more = data / f"more/{domain}.jsonl.zst"
    if more.exists():
        yield from compressed(more)


if __name__ == "__main__":
    main()
