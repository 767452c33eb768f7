"""What make_moe.py reports of a mixture: perplexities, and how its routers send tokens.

Legend: N windows, L tokens in each, T tokens, E experts, D domains.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from common import RESULTS, save
from moe_text import DOMAINS, held_back, rows
from shearling.data.documents import documents
from shearling.evaluate.perplexity import Windows, perplexity

WINDOWS, LENGTH = 12, 512  # of each text
ROUTED = 2  # windows of each domain whose routing is looked at


def figures(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path
) -> dict[str, Any]:
    """Perplexity of c4's last tenth and of WikiText-2, and how tokens are routed, if they are."""
    texts = {
        "c4": held_back(data, "c4"),
        "wikitext2": documents(data / "wikitext2-test.txt"),
    }
    windows = Windows(LENGTH, WINDOWS)
    measured: dict[str, Any] = {
        name: round(perplexity(model, tokenizer, text, windows)["perplexity"], 2)
        for name, text in texts.items()
    }
    if hasattr(model.config, "num_local_experts"):
        measured["routing"] = routing(model, tokenizer, data)
    return measured


@torch.inference_mode()
def routing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path
) -> list[dict[str, float]]:
    """A row for each block, on windows of the last tenths of all domains.

    ``least`` and ``most``: the load of the expert with the least and the most tokens, one where
    all have equally many. ``load_entropy``: of the load, over its largest possible. ``share``: of
    a token's first choice, its routing weight. ``domains``: how far (total variation, 0 to 1) a
    domain's load lies from the mean of all, averaged over domains.
    """
    active, experts = model.config.num_experts_per_tok, model.config.num_local_experts
    loads: list[list[Tensor]] = [[] for _ in model.model.layers]
    firsts: list[list[float]] = [[] for _ in model.model.layers]
    for domain in DOMAINS:
        ids_NL = rows(held_back(data, domain), tokenizer, ROUTED, LENGTH).to(model.device)
        logits = model.model(ids_NL, output_router_logits=True).router_logits
        for block, logits_TE in enumerate(logits):
            values, experts_TK = logits_TE.float().topk(active, 1)
            firsts[block].append(torch.softmax(values, 1)[:, 0].mean().item())
            counted_E = torch.bincount(experts_TK.flatten(), minlength=experts).float()
            loads[block].append(counted_E / counted_E.sum())
    return [_row(torch.stack(load), first) for load, first in zip(loads, firsts, strict=True)]


def _row(load_DE: Tensor, firsts: list[float]) -> dict[str, float]:
    mean_E = load_DE.mean(0)
    experts = len(mean_E)
    entropy = -(mean_E * mean_E.clamp(min=1e-12).log()).sum().item() / math.log(experts)
    row = {
        "least": mean_E.min().item() * experts,
        "most": mean_E.max().item() * experts,
        "load_entropy": entropy,
        "share": sum(firsts) / len(firsts),
        "domains": 0.5 * (load_DE - mean_E).abs().sum(1).mean().item(),
    }
    return {name: round(value, 3) for name, value in row.items()}


def record(stage: str, settings: dict[str, Any], measured: dict[str, Any]) -> None:
    """Put a row into results/mixture.json, in the place of one of the same settings.

    Args:
        stage: ``made`` or ``healed``.
        settings: of the stage.
        measured: :func:`figures`, and whatever else came of it.
    """
    file = RESULTS / "mixture.json"
    kept = json.loads(file.read_text()) if file.exists() else {}
    rows = {name: kept.get(name, []) for name in ("made", "healed")}
    row = json.loads(json.dumps({"settings": settings} | measured))
    others = [other for other in rows[stage] if other["settings"] != row["settings"]]
    save("mixture", rows | {stage: [*others, row]})


__all__ = ["figures", "record", "routing"]
