"""The token store of headline.py: seven domains in RedPajama's shares, as far as there is text.

    python benchmarks/headline_store.py MODEL STORE [--data DIR] [--texts TEXTS]

DIR (or ``SHEARLING_BENCH_DATA``) holds redpajama/DOMAIN.jsonl and, where there is more,
more/DOMAIN.jsonl.zst. Of redpajama/ the first nine tenths of every domain's documents are taken;
the last tenth is kept for evaluation. What a domain lacks after that comes from more/. The texts
are then packed by

    shearling pack DOMAIN=FILE ... --tokenizer MODEL --output STORE --length 512 \\
        --held-out 0.06 --seed 1

The seed decides which documents are held out; with 0 those of book fill 28 sequences, too few. This
gives 10.2 million tokens to train on and half a million held out, of 2 bytes each.

TEXTS gets the other text of headline.py, of the same documents: ``cal.jsonl``, pieces of a few
hundred tokens of every domain in the shares of ``moe_text.MIX``; ``held.jsonl``, the last tenth of
c4's documents; and ``wikitext2-test.txt``.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moe_text import MIX, compressed, held_back, seen
from shearling.model.loading import load_tokenizer
from shearling.model.resolve import resolve

LENGTH, HELD_OUT, SEED = 512, 0.06, 1
PIECES, CHARACTERS = 2_000, 2_400  # of calibration text
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
    parser.add_argument("--texts", type=Path, help="where calibration and evaluation text goes")
    options = parser.parse_args()
    if options.data is None:
        parser.error("give --data DIR, or set SHEARLING_BENCH_DATA")
    if options.texts is not None:
        _write_texts(Path(options.data), options.texts)
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


def _write_texts(data: Path, folder: Path) -> None:
    """Calibration text in shares, and what takes no part in anything before the end."""
    rng = random.Random(SEED)
    pieces = []
    for domain, share in MIX.items():
        own = [
            text[start : start + CHARACTERS]
            for text in _texts(data, domain)
            for start in range(0, len(text) - CHARACTERS // 2, CHARACTERS)
        ]
        pieces += rng.sample(own, min(len(own), round(share * PIECES)))
    folder.mkdir(parents=True, exist_ok=True)
    for name, texts in (("cal", pieces), ("held", held_back(data, "c4"))):
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copy(data / "wikitext2-test.txt", folder)


def _texts(data: Path, domain: str) -> Iterator[str]:
    """Documents that may be trained on: the sample's first nine tenths, then what more there is."""
    yield from seen(data, domain)
    more = data / f"more/{domain}.jsonl.zst"
    if more.exists():
        yield from compressed(more)


if __name__ == "__main__":
    main()
