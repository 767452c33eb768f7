"""Training every weight of a mixture on text, for make_moe.py: a plain loop over stock parts.

    SHEARLING_BENCH_DATA=DIR python benchmarks/moe_heal.py MODEL --tokens 400000 --output HEALED
        [--store STORE] [--batch 4]

Needs DIR as make_moe.py does; DIR/more/*.jsonl.zst is used where it is, or a STORE that `shearling
pack` wrote, sequence by sequence. What stands is saved every few minutes. The last tenth of each
domain of DIR/redpajama is not trained on. Takes a GPU that is there, with products in bfloat16.

Legend: N windows, B windows a step, L tokens in each, T tokens, C hidden channels, E experts.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from moe_measure import figures, record
from moe_text import mixed_rows, stored_rows
from shearling.data.store import Store
from shearling.engine.devices import own_device
from shearling.engine.products import fast_products
from shearling.model.loading import load_tokenizer
from shearling.train.objective import predicting

EXPERTS = ("num_local_experts", "num_experts_per_tok")
CLIP = 1.0  # of the gradient's norm
TIMED = 20  # steps
WARM, FALLING = 0.03, 0.3  # shares of the steps in which the rate rises, and falls to nothing


@dataclass(frozen=True)
class Healing:
    """How a mixture is trained.

    Attributes:
        tokens: in all.
        length, batch: tokens of a window, windows of a step.
        rate: peak learning rate of AdamW.
        balance: weight of the load-balancing loss of each block, averaged over blocks.
        seed: of the order of the text.
        save_seconds: between saves.
        limit: seconds; after ``TIMED`` steps the rest is cut to what fits in them.
    """

    tokens: int
    length: int = 256
    batch: int = 4
    rate: float = 3e-4
    balance: float = 0.01
    seed: int = 0
    save_seconds: float = 240
    limit: float | None = None


def heal(
    model: PreTrainedModel,
    ids_NL: Tensor,
    healing: Healing,
    save: Callable[[], None],
    told: Callable[[str], None] = print,
) -> None:
    """Train the model, in place, on each window once; ``save`` is called every few minutes."""
    steps = len(ids_NL) // healing.batch
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=healing.rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _rate(step, steps))
    timed = math.inf
    model.train()
    torch.set_float32_matmul_precision("high")  # experts' weights are not cast: TF32 on a GPU
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda")
    started = saved = time.perf_counter()
    for step, ids_BL in enumerate(ids_NL[: steps * healing.batch].split(healing.batch)):
        if step == 2:  # warm by now
            timed = time.perf_counter()
        if step == TIMED and healing.limit is not None:
            pace = (time.perf_counter() - timed) / (TIMED - 2)
            left = healing.limit - (time.perf_counter() - started)
            steps = max(TIMED, min(steps, step + int(left / pace)))
        if step == steps:
            break
        with half:
            text, balance = losses(model, ids_BL.to(model.device))
        (text + healing.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step == TIMED - 1 and model.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if model.device.type == "cpu" or step % 10 == 9:
            told(
                f"step {step + 1} of {steps}: loss {text.item():.3f}, "
                f"balance {balance.item():.3f}, {now - started:.0f} s"
            )
        if now - saved > healing.save_seconds:
            save()
            saved = time.perf_counter()
    model.eval()
    save()


def _rate(step: int, steps: int) -> float:
    """Of the peak: rising, level, falling."""
    return min(1.0, (step + 1) / (WARM * steps), (steps - step) / (FALLING * steps))


def losses(model: PreTrainedModel, ids_BL: Tensor) -> tuple[Tensor, Tensor]:
    """The text's loss (nats a token), and how unevenly blocks load their experts (1 if evenly).

    The balance is stock's, but of each block by itself: summed over blocks first, as stock does
    it, uneven loads of different blocks cancel out.
    """
    config = model.config
    outputs = model.model(ids_BL, output_router_logits=True, use_cache=False)
    states_TC, next_T = predicting(outputs.last_hidden_state, ids_BL)
    text = cross_entropy(model.lm_head(states_TC).float(), next_T)
    experts, active = config.num_local_experts, config.num_experts_per_tok
    uneven = [
        torch.as_tensor(load_balancing_loss_func((r,), experts, active))
        for r in outputs.router_logits
    ]
    return text, torch.stack(uneven).mean() / active


def main() -> None:
    """Heal a mixture and measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--rate", type=float, default=Healing.rate)
    parser.add_argument("--batch", type=int, default=Healing.batch)
    parser.add_argument("--limit", type=float, help="seconds of training at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="what to train on, packed")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-record", action="store_true", help="leave results/ alone")
    given = parser.parse_args()
    store = Store.open(given.store) if given.store else None
    length = store.length if store else Healing.length
    healing = Healing(
        given.tokens, length, given.batch, given.rate, seed=given.seed, limit=given.limit
    )
    data = Path(os.environ["SHEARLING_BENCH_DATA"])
    tokenizer = load_tokenizer(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).to(own_device())
    if store:
        ids_NL = stored_rows(store, healing.tokens, healing.seed)
    else:
        ids_NL = mixed_rows(data, tokenizer, healing.tokens, healing.length, healing.seed)

    def save() -> None:
        beside = given.output.with_name(given.output.name + ".partial")
        model.save_pretrained(beside)
        for file in given.model.glob("*"):
            if file.stem in ("tokenizer", "tokenizer_config", "chat_template"):
                shutil.copyfile(file, beside / file.name)
        given.output.mkdir(exist_ok=True)
        for file in beside.iterdir():
            file.replace(given.output / file.name)

    with fast_products():
        heal(model, ids_NL, healing, save, lambda line: print(line, flush=True))
        measured = figures(model, tokenizer, data)
    print(json.dumps(measured, indent=1))
    if not given.no_record:
        experts = {key: getattr(model.config, key) for key in EXPERTS}
        record("healed", experts | asdict(healing), measured)


if __name__ == "__main__":
    main()
