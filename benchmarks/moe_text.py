"""Text for make_moe.py: windows to fit to, of all domains, and what no fit has seen.

Legend: N windows, L tokens in each.
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from shearling.data.documents import documents
from shearling.data.store import Store

DOMAINS = ("arxiv", "book", "c4", "cc", "github", "stackexchange", "wiki")
SHARES = {"c4": 2}  # of windows to fit to; every other domain has 1
MIX = {
    "c4": 0.25, "wiki": 0.2, "cc": 0.15, "book": 0.15, "stackexchange": 0.1, "github": 0.1,
    "arxiv": 0.05,
}  # fmt: skip


def seen(data: Path, domain: str) -> list[str]:
    """The first nine tenths of a domain's documents."""
    texts = documents(data / f"redpajama/{domain}.jsonl")
    return texts[: len(texts) * 9 // 10]


def held_back(data: Path, domain: str) -> list[str]:
    """The last tenth, which nothing is fitted to."""
    texts = documents(data / f"redpajama/{domain}.jsonl")
    return texts[len(texts) * 9 // 10 :]


def rows(texts: list[str], tokenizer: PreTrainedTokenizerBase, most: int, length: int) -> Tensor:
    """At most so many windows (N, L): documents end to end, EOS between, long ones cut."""
    ids: list[int] = []
    for text in texts:
        if len(ids) >= most * length:
            break
        ids += tokenizer(text[:20_000], verbose=False)["input_ids"][: 8 * length]
        ids.append(tokenizer.eos_token_id)
    count = min(most, len(ids) // length)
    return torch.tensor(ids[: count * length]).view(count, length)


def calibration_rows(
    data: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> Tensor:
    """Windows (N, L) of all domains, documents drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    share = -(-tokens // (length * (len(DOMAINS) + sum(SHARES.values()) - len(SHARES))))
    parts = []
    for domain in DOMAINS:
        texts = seen(data, domain)
        order = torch.randperm(len(texts), generator=generator).tolist()
        count = share * SHARES.get(domain, 1)
        parts.append(rows([texts[i] for i in order], tokenizer, count, length))
    ids_NL = torch.cat(parts)
    return ids_NL[torch.randperm(len(ids_NL), generator=generator)][: tokens // length]


def compressed(file: Path) -> list[str]:
    """The texts of a .jsonl.zst."""
    with pyarrow.CompressedInputStream(pyarrow.OSFile(str(file)), "zstd") as stream:
        lines = stream.read().decode("utf-8").split("\n")
    return [json.loads(line)["text"] for line in lines if line]


def mixed_rows(
    data: Path, tokenizer: PreTrainedTokenizerBase, tokens: int, length: int, seed: int
) -> Tensor:
    """Windows (N, L) to train on, in the shares of ``MIX``, in an order drawn at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    parts = []
    for domain, share in MIX.items():
        texts, more = seen(data, domain), data / f"more/{domain}.jsonl.zst"
        if more.exists():
            texts = texts + compressed(more)
        order = torch.randperm(len(texts), generator=generator).tolist()
        count = -(-int(share * tokens) // length)
        parts.append(rows([texts[i] for i in order], tokenizer, count, length))
    ids_NL = torch.cat(parts)
    return ids_NL[torch.randperm(len(ids_NL), generator=generator)][: tokens // length]


def stored_rows(store: Store, tokens: int, seed: int) -> Tensor:
    """Sequences (N, L) of a store's training parts, in an order drawn at random."""
    generator = torch.Generator().manual_seed(seed + 1)
    parts = [store.sequences(domain) for domain in store.domains]
    ids_NL = torch.cat([part[range(len(part))][0] for part in parts])
    order = torch.randperm(len(ids_NL), generator=generator)
    return ids_NL[order[: tokens // store.length]]


__all__ = [
    "DOMAINS",
    "calibration_rows",
    "compressed",
    "held_back",
    "mixed_rows",
    "rows",
    "seen",
    "stored_rows",
]
