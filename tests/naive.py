"""References for what shearling computes cleverly: whole stock models, one at a time."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class Skip(nn.Module):
    """A removed block: the identity."""

    def forward(self, h_BSD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return h_BSD


def stock(path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole model as stock transformers loads it; the caller's own copy."""
    return copy.deepcopy(_loaded(path, _stamp(path), dtype)[0])


def accounted(path: Path) -> Any:
    """The same, none of its tensors missing and none of the file's left over."""
    model, info = _loaded(path, _stamp(path), torch.float32)
    assert not any(info.values()), info
    return copy.deepcopy(model)


@lru_cache(maxsize=16)
def _loaded(path: Path, _: object, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    """A model, and what is said of its loading; that takes six times as long as a copy of it."""
    from transformers import AutoModelForCausalLM

    with torch.inference_mode(False):  # else nobody could train a copy
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True
        )
    return loaded[0].eval(), loaded[1]


def _stamp(path: Path) -> tuple[tuple[str, int, int, int], ...]:
    """Another one once any file of a directory has been written anew."""
    facts = ((file.name, file.stat()) for file in sorted(path.iterdir()))
    return tuple((name, stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in facts)


def blocks(model: Any) -> nn.ModuleList:
    """The model's blocks: the one list that is as long as the model is deep."""
    depth = model.config.num_hidden_layers
    (found,) = (m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    return found


def stock_without(path: Path, removed: Iterable[int]) -> Any:
    """A fresh stock model in which some blocks do nothing."""
    model = stock(path)
    for index in removed:
        blocks(model)[index] = Skip()
    return model


def check_cache(model: Any, prompts_BS: Tensor, new: int = 6) -> None:
    """What a model generates with its cache is what it says without."""
    model.generation_config.eos_token_id = None
    written = model.generate(prompts_BS, max_new_tokens=new, do_sample=False, use_cache=True)
    begun = prompts_BS.shape[1]
    assert written.shape[1] == begun + new
    for end in range(begun, begun + new):
        logits = model(input_ids=written[:, :end], use_cache=False).logits[:, -1]
        assert torch.equal(logits.argmax(-1), written[:, end])


def token_nll(model: Any, ids_BS: Tensor) -> Tensor:
    """Nats (B, S-1) of every token after the first, from log_softmax in double precision."""
    log_p = model(input_ids=ids_BS, use_cache=False).logits.double().log_softmax(-1)
    return -log_p[:, :-1].gather(-1, ids_BS[:, 1:, None])[..., 0]


def mean_nll(path: Path, ids_BS: Tensor, removed: Iterable[int] = ()) -> float:
    ids = tuple(map(tuple, ids_BS.tolist()))
    return _mean_nll(path, _stamp(path), ids, frozenset(removed))


@lru_cache(maxsize=4096)
def _mean_nll(
    path: Path, _: object, ids: tuple[tuple[int, ...], ...], removed: frozenset[int]
) -> float:
    """Several tests ask for the same."""
    with torch.no_grad():
        return float(token_nll(stock_without(path, removed), torch.tensor(ids)).mean())


def perplexity(path: Path, ids_BS: Tensor, removed: Iterable[int] = ()) -> float:
    return math.exp(mean_nll(path, ids_BS, removed))


# --- masking, by hooks on a stock model ----------------------------------------------------------

_MLP_OUT = ("down_proj", "dense_4h_to_h", "fc2", "output_linear")
_HEADS_OUT = ("o_proj", "dense", "out_proj")
_OF_HEADS = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
_GAINS_OF_ONE_MORE = ("Gemma", "Qwen3NextRMSNorm", "Qwen3_5")


def zeroed(x: Tensor, kept: Iterable[int]) -> Tensor:
    """``x`` with zeros at all but ``kept`` of its last dimension."""
    alive = torch.zeros(x.shape[-1])
    alive[list(kept)] = 1
    return x * alive


def norm_over(kept: list[int]) -> Any:
    """A hook that puts in the place of a norm's output that over some channels, in double."""

    def hook(norm: Any, args: Any, _: Tensor) -> Tensor:
        x, ones = args[0].double()[..., kept], torch.ones(args[0].shape[-1])
        weight = ones if norm.weight is None else norm.weight.double()
        if "LayerNorm" in type(norm).__name__:
            x = x - x.mean(-1, keepdim=True)
        elif any(name in type(norm).__name__ for name in _GAINS_OF_ONE_MORE):
            weight = 1 + weight
        eps = norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps
        x = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight[kept]
        if getattr(norm, "bias", None) is not None:
            x = x + norm.bias[kept]
        out = torch.zeros_like(args[0])
        out[..., kept] = x.to(out.dtype)
        return out

    return hook


def masked(path: Path, keep: Any) -> Any:
    """A stock model whose hooks silence what ``keep`` removes; logits are of all tokens."""
    model = stock(path)
    config, width = model.config, model.config.hidden_size
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    each = heads // getattr(config, "num_key_value_heads", heads)
    stream = list(keep.model.get("hidden", range(width)))
    layers = list(keep.model.get("layers", range(len(blocks(model)))))

    def alive(leaf: str, at: int, columns: int) -> list[int]:
        if "linear_heads" in keep.blocks and leaf == "out_proj":
            wide = columns // config.linear_num_key_heads
            return [h * wide + i for h in keep.blocks["linear_heads"][at] for i in range(wide)]
        if leaf in _MLP_OUT:
            return list(keep.blocks["mlp"][at]) if "mlp" in keep.blocks else list(range(columns))
        return over_heads(False, at)

    def over_heads(groups: bool, at: int) -> list[int]:
        """Surviving positions of all queries, or of all keys, of a block."""
        if "kv_heads" in keep.blocks:
            held = list(keep.blocks["kv_heads"][at])
        else:
            held = list(range(heads // each))
        chosen = held if groups else [h for h in range(heads) if h // each in held]
        if not groups and "heads" in keep.blocks:
            chosen = keep.blocks["heads"][at]
        return [h * head_dim + i for h in chosen for i in range(head_dim)]

    for number, block in enumerate(blocks(model)):
        if number not in layers:
            blocks(model)[number] = Skip()
            continue
        for name, module in block.named_modules():
            leaf = name.split(".")[-1]
            if leaf in _MLP_OUT + _HEADS_OUT:
                units = alive(leaf, layers.index(number), module.in_features)
                module.register_forward_pre_hook(lambda _, args, u=units: (zeroed(args[0], u),))
                module.register_forward_hook(lambda _, __, out: zeroed(out, stream))
    for name, module in model.named_modules():
        table = isinstance(module, nn.Embedding) and module.embedding_dim == width
        if table or name.endswith("project_in"):
            module.register_forward_hook(lambda _, __, out: zeroed(out, stream))
        elif "NormGated" in type(module).__name__:
            continue  # head by head
        elif "Norm" in type(module).__name__ and not name.endswith(_OF_HEADS):
            module.register_forward_hook(norm_over(stream))
        elif "Norm" in type(module).__name__ and len(module.weight) != head_dim:
            at = layers.index(int(name.split(".layers.")[1].split(".")[0]))
            module.register_forward_hook(norm_over(over_heads(name.endswith("k_norm"), at)))
    return model


def masked_logits(path: Path, keep: Any, ids_BS: Tensor) -> Tensor:
    with torch.no_grad():
        logits_BSV = masked(path, keep)(input_ids=ids_BS, use_cache=False).logits
    return logits_BSV[..., list(keep.model.get("vocab", range(logits_BSV.shape[-1])))]
