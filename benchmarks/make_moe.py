"""A real mixture of experts, made of SmolLM2-135M-Instruct: its MLPs split, and a router fitted.

    SHEARLING_BENCH_DATA=DIR python benchmarks/make_moe.py --experts 16 --active 8 --output MODEL
        [--tokens 32768] [--seed 0] [--no-record]

MODEL is a stock Mixtral. Block by block, from the first on: the neurons of an MLP are clustered
into experts of equal size by the part of their firing that a linear router can know; the router is
a ridge regression of what each expert writes; then all down-projections of the block are solved at
once on the tokens that reach them, so that the stream after the block is the source's, errors of
earlier blocks included. Nothing is trained: moe_heal.py does that. Writes what came of it to
results/mixture.json, a row for each split. Needs DIR, which holds redpajama/*.jsonl and
wikitext2-test.txt; the last tenth of a domain is never fitted to.

Legend: N windows, L tokens in each, T tokens, C hidden channels, U neurons, E experts.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from common import source_directory
from moe_measure import figures, record
from moe_split import Mlp, centred_ridge, contributions, equal_clusters, ridge, seen_firing, shares
from moe_text import calibration_rows
from shearling.engine.devices import own_device
from shearling.model.loading import load_model, load_tokenizer

BATCH = 16  # windows at a time
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Split:
    """How the MLPs are split.

    Attributes:
        experts: of a block.
        active: experts a token is sent to.
        tokens: calibration tokens.
        length: of a window.
        sharpness: standard deviation of the router's logits over a token's experts.
        evenness: how much of an expert's mean contribution the router leaves out; with 1 it asks
            who writes more than usual, and the load is nearly even.
        router_ridge: penalty; see :func:`moe_split.ridge`.
        down_ridges: penalties to choose from; see :func:`moe_split.centred_ridge`.
        seed: of every random choice.
    """

    experts: int
    active: int
    tokens: int
    length: int = 256
    sharpness: float = 0.1
    evenness: float = 0.5
    router_ridge: float = 0.01
    down_ridges: tuple[float, ...] = (0.05, 0.2, 0.8)
    seed: int = 0


def mixture_config(source: Any, split: Split) -> MixtralConfig:
    """The stock configuration: the source's, its MLPs shared out over experts."""
    return MixtralConfig(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size // split.experts,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        hidden_act=source.hidden_act,
        max_position_embeddings=source.max_position_embeddings,
        rms_norm_eps=source.rms_norm_eps,
        rope_parameters=source.rope_parameters,
        tie_word_embeddings=source.tie_word_embeddings,
        num_local_experts=split.experts,
        num_experts_per_tok=split.active,
        bos_token_id=source.bos_token_id,
        eos_token_id=source.eos_token_id,
        pad_token_id=source.pad_token_id,
    )


def mixture_of(source: LlamaForCausalLM, split: Split) -> MixtralForCausalLM:
    """The stock mixture with all of the source's weights but the MLPs'."""
    mixture = MixtralForCausalLM(mixture_config(source.config, split)).eval()
    weights = {n: t for n, t in source.state_dict().items() if ".mlp." not in n}
    missing, unexpected = mixture.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".mlp." in name for name in missing)
    return mixture


@torch.no_grad()
def split_model(
    source: LlamaForCausalLM, ids_NL: Tensor, split: Split, told: Callable[[str], None] = print
) -> MixtralForCausalLM:
    """The mixture, fitted block by block on windows of tokens."""
    mixture = mixture_of(source, split).to(ids_NL.device)
    positions = torch.arange(ids_NL.shape[1], device=ids_NL.device)[None]
    source_NLC = source.model.embed_tokens(ids_NL)
    rotary = source.model.rotary_emb(source_NLC, positions)
    mixture_NLC = source_NLC.clone()
    blocks: list[tuple[Any, Any]] = list(
        zip(source.model.layers, mixture.model.layers, strict=True)
    )
    for number, (theirs, ours) in enumerate(blocks):
        started = time.perf_counter()
        source_NLC = _batched(lambda h, block=theirs: _block(block, h, rotary), source_NLC)
        middle_NLC = _batched(lambda h, block=ours: _attended(block, h, rotary), mixture_NLC)
        x_TC = _batched(ours.post_attention_layernorm, middle_NLC).flatten(0, 1)
        fitted = fit_block(_mlp(theirs.mlp), x_TC, (source_NLC - middle_NLC).flatten(0, 1),
                           _token_weights(source_NLC), split, seed=split.seed + number)  # fmt: skip
        _set(ours.mlp, fitted)
        mixture_NLC = middle_NLC + _batched(ours.mlp, x_TC.view_as(middle_NLC))
        off = ((mixture_NLC - source_NLC).square().sum(-1).flatten()) @ _token_weights(source_NLC)
        told(
            f"block {number}: error {off.item() / ids_NL.numel():.4f} of the stream's energy, "
            f"{time.perf_counter() - started:.0f} s"
        )
    return mixture


def _batched(run: Callable[[Tensor], Tensor], states_NLC: Tensor) -> Tensor:
    return torch.cat([run(part) for part in states_NLC.split(BATCH)])


def _block(block: Any, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    return block(h, position_embeddings=rotary, attention_mask=None)


def _attended(block: Any, h: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """The stream behind the attention of a block; the kernel is causal where no mask is given."""
    normed = block.input_layernorm(h)
    return h + block.self_attn(normed, position_embeddings=rotary, attention_mask=None)[0]


def _mlp(mlp: Any) -> Mlp:
    return Mlp(mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)


def _token_weights(states_NLC: Tensor) -> Tensor:
    """One over a token's energy (T): a few tokens have a thousand times that of others."""
    return 1 / states_NLC.square().sum(-1).flatten()


@dataclass(frozen=True, slots=True)
class FittedBlock:
    """Weights of a block of experts: router_EC, clusters_U, and the MLP with new down_CU."""

    router_EC: Tensor
    clusters_U: Tensor
    mlp: Mlp


def fit_block(
    mlp: Mlp, x_TC: Tensor, wanted_TC: Tensor, weight_T: Tensor, split: Split, seed: int
) -> FittedBlock:
    """Experts for one block.

    Args:
        mlp: the source's.
        x_TC: what the MLP of the mixture reads.
        wanted_TC: what it should add to the mixture's stream.
        weight_T: weights of the tokens' squared errors.
        split: how to split.
        seed: of the clusters.
    """
    neurons_TU = mlp.neurons(x_TC)
    scale_T1 = weight_T.sqrt()[:, None]
    firing_TU = neurons_TU.abs() * mlp.down_CU.norm(dim=0) * scale_T1
    features_UC = seen_firing(x_TC, firing_TU, split.router_ridge)
    clusters_U = equal_clusters(features_UC.cpu(), split.experts, seed).to(x_TC.device)
    written_TE = contributions(neurons_TU, mlp.down_CU, clusters_U, split.experts) * scale_T1
    written_TE -= split.evenness * written_TE.mean(0)
    router_EC = ridge(x_TC, written_TE, split.router_ridge).T
    logits_TE = x_TC @ router_EC.T
    spread = (logits_TE - logits_TE.mean(1, keepdim=True)).std()
    router_EC *= split.sharpness / spread
    weights_TE = split.active * shares(logits_TE * (split.sharpness / spread), split.active)
    neurons_TU *= weights_TE[:, clusters_U]
    left_TC = wanted_TC - neurons_TU @ mlp.down_CU.T
    change_UC, _ = centred_ridge(neurons_TU, left_TC, weight_T, split.down_ridges)
    down_CU = split.active * (mlp.down_CU + change_UC.T)
    return FittedBlock(router_EC, clusters_U, Mlp(mlp.gate_UC, mlp.up_UC, down_CU))


def _set(moe: Any, fitted: FittedBlock) -> None:
    moe.gate.weight.copy_(fitted.router_EC)
    mlp = fitted.mlp
    for expert in range(len(fitted.router_EC)):
        own_U = fitted.clusters_U == expert
        moe.experts.gate_up_proj[expert] = torch.cat([mlp.gate_UC[own_U], mlp.up_UC[own_U]])
        moe.experts.down_proj[expert] = mlp.down_CU[:, own_U]


def write(mixture: MixtralForCausalLM, source: Path, output: Path) -> None:
    """The checkpoint as the hub has Mixtral's, a tensor an expert, with the source's tokenizer."""
    mixture.save_pretrained(output)
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            shutil.copyfile(source / name, output / name)


def main() -> None:
    """Make a mixture, write it, measure it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--active", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32_768, help="to fit to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--no-record", action="store_true", help="leave results/ alone")
    given = parser.parse_args()
    split = Split(given.experts, given.active, given.tokens, seed=given.seed)
    data, directory = Path(os.environ["SHEARLING_BENCH_DATA"]), source_directory()
    tokenizer = load_tokenizer(directory)
    device = own_device()
    source = cast(LlamaForCausalLM, load_model(directory, device=str(device)))
    ids_NL = calibration_rows(data, tokenizer, split.tokens, split.length, split.seed).to(device)
    mixture = split_model(source, ids_NL, split)
    write(mixture, directory, given.output)
    print(f"written to {given.output}", flush=True)
    measured = {"dense": figures(source, tokenizer, data)} | figures(mixture, tokenizer, data)
    print(json.dumps(measured, indent=1))
    if not given.no_record:
        record("made", asdict(split), measured)


if __name__ == "__main__":
    main()
