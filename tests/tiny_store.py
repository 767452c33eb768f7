"""A packed store of three tiny domains."""

from __future__ import annotations

import json
import random
from pathlib import Path

from shearling.data.pack import PackPlan, pack
from shearling.data.store import Store
from tiny_tokenizer import byte_tokenizer

LENGTH = 24


def write_store(root: Path) -> Store:
    """Domains of 3:2:1 documents of a few words each, in sequences of 24 tokens."""
    draw = random.Random(0)
    words = ["sheep", "gate", "wool", "went", "through", "the"]
    for name, documents in (("fell", 90), ("meadow", 60), ("pen", 30)):
        lines = [
            json.dumps({"text": " ".join(draw.choices([*words, name], k=draw.randint(4, 30)))})
            for _ in range(documents)
        ]
        (root / f"{name}.jsonl").write_text("\n".join(lines))
    files = [str(root / f"{name}.jsonl") for name in ("fell", "meadow", "pen")]
    plan = PackPlan.of(files, byte_tokenizer(), "flock", length=LENGTH, held_out=0.2)
    pack(plan, root / "store", workers=1)
    return Store.open(root / "store")
