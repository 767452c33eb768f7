"""Checkpoints as hubs hold them, shrunk: inspected, cut, trained a step, and loaded again."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from real_configs import PUBLISHED, Published
from real_hybrids import PUBLISHED_HYBRIDS
from real_mixtures import PUBLISHED_MIXTURES
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.model.inspect import inspect, lines
from shearling.pruning.cut import cut
from shearling.table.families import FAMILIES, REFUSED
from shearling.table.families.near import NEAREST
from shearling.table.families.wrappers import is_known
from shearling.table.values import Keep
from shearling.train.build import loaded
from shearling.train.finish import save
from shearling.train.objective import Objective
from shearling.train.parallel import World
from tiny_wrappers import inputs_first

IDS = torch.randint(5, 80, (2, 17), generator=torch.Generator().manual_seed(1))


def auto(raw: dict[str, Any]) -> Any:
    """The class of transformers that loads such a model."""
    return AutoModelForImageTextToText if is_known(raw) else AutoModelForCausalLM


def write(published: Published, path: Path) -> None:
    """Random weights as transformers stores them, under the configuration as it is published."""
    path.mkdir()
    (path / "config.json").write_text(json.dumps(published.raw))
    dtype = getattr(torch, published.dtype)
    torch.manual_seed(0)
    model = auto(published.raw).from_config(AutoConfig.from_pretrained(path), dtype=dtype)
    model.save_pretrained(path, max_shard_size=published.shard_bytes)
    if published.inputs_first:
        inputs_first(path)
    (path / "config.json").write_text(json.dumps(published.raw))
    if published.buffers:
        add_buffers(published, path)


def add_buffers(published: Published, path: Path) -> None:
    """A shard more, of what no model loads."""
    names = [name.format(block) for name in published.buffers for block in range(5)]
    save_file({name: torch.ones(3) for name in names}, path / "buffers.safetensors")
    index = path / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text())["weight_map"]
    else:
        (path / "model.safetensors").rename(path / "weights.safetensors")
        from safetensors import safe_open

        with safe_open(path / "weights.safetensors", "pt") as shard:
            files = dict.fromkeys(shard.keys(), "weights.safetensors")
    files |= dict.fromkeys(names, "buffers.safetensors")
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))


def reload(path: Path) -> Any:
    """As any user loads it; nothing is missing, and nothing is left over."""
    model, info = auto(json.loads((path / "config.json").read_text())).from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def smaller(checkpoint: Checkpoint) -> Keep:
    """Fewer of all that may shrink; heads keep the width that hidden / heads gives."""
    shape, frozen, layers = checkpoint.shape, checkpoint.family.frozen, 3
    blocks = {} if "experts" in shape else {"mlp": (tuple(range(3, 34)),) * layers}
    if "experts" in shape:
        blocks["experts"] = (tuple(e for e in range(shape["experts"]) if e % 4 != 1),) * layers
        if shape["expert_mlp"] != 16 or not checkpoint.layout.axis["expert_mlp"].rigid:
            kept = tuple(16 * e + i for e in blocks["experts"][0] for i in range(1, 9))
            blocks["expert_mlp"] = (kept,) * layers
    if "linear_heads" in shape:
        blocks["linear_heads"] = ((0, 2),) * layers
    if "heads" not in frozen:
        grouped = shape.get("kv_heads") == 3
        blocks["heads"] = ((0, 1, 2, 6, 7, 8),) * layers
        if "kv_heads" in shape:
            blocks["kv_heads"] = ((0, 2) if grouped else (0, 1, 2, 6, 7, 8),) * layers
    model = {} if "hidden" in frozen else {"hidden": tuple(range(5, 29))}
    last = shape["layers"] - 1 if checkpoint.family.model_type == "gemma4_text" else 3
    return Keep({"layers": (0, 1, last), **model}, blocks)


EVERY = PUBLISHED | PUBLISHED_MIXTURES | PUBLISHED_HYBRIDS


@pytest.mark.parametrize("name", EVERY)
def test_a_published_checkpoint(name: str, tmp_path: Path) -> None:
    published = EVERY[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(published, tmp_path / "source")
    source = Checkpoint.open(tmp_path / "source")
    told = inspect(source)
    assert lines(told)
    assert told["parameters"] == source.parameters
    narrow = cut(source, smaller(source), tmp_path / "narrow")
    if "experts" in source.shape:
        assert narrow.shape["experts"] < source.shape["experts"]
    else:
        assert narrow.shape["mlp"] == 31
    assert narrow.shape["layers"] == 3
    kept = {key for key in published.raw if key != "auto_map"}
    assert kept <= json.loads((narrow.path / "config.json").read_text()).keys()
    model = loaded(narrow, World())
    before = Objective(model, plain_head=narrow.plain_head)(IDS, IDS)
    before.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()
    save(narrow, model, tmp_path / "healed", World())
    healed = Checkpoint.open(tmp_path / "healed")
    assert healed.shape == narrow.shape
    assert set(healed.dtypes.values()) == set(source.dtypes.values())
    with torch.no_grad():
        logits = reload(tmp_path / "healed")(input_ids=IDS, use_cache=False).logits
        again = reload(narrow.path)(input_ids=IDS, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(
        again[:, :-1].flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum"
    )
    assert float(nll) == pytest.approx(float(before.detach()), rel=1e-4)
    assert not torch.equal(logits, again)


@pytest.mark.parametrize(
    ("raw", "sentence"),
    [
        ({"model_type": "llama4_text"}, "llama4_text, .* not cut: its router runs every expert"),
        (
            {"model_type": "kimi_k2", "auto_map": {"AutoConfig": "code.K2"}}
            | {"quantization_config": {"quant_method": "fp8"}},
            "kimi_k2, which transformers knows as deepseek_v3 alone; write deepseek_v3 for model_t",
        ),
        ({"model_type": "kimi_vl", "text_config": {}}, "inside 'kimi_vl', .* opens.*qwen3_5_moe"),
        (
            {"model_type": "gpt_oss", "quantization_config": {"quant_method": "mxfp4"}},
            "quantised .by mxfp4.*dequantize=True",
        ),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "fp8"}},
            r"by fp8.*FineGrainedFP8Config.dequantize=True., save it",
        ),
        (
            {"model_type": "deepseek_v3", "quantization_config": {"quant_method": "gptq"}},
            "by gptq.*give the checkpoint that it was made from",
        ),
        (
            {"model_type": "falcon_h1"},
            "'falcon_h1', .*qwen3_next is the nearest, but .*Mamba.*, and CONTR.*Playbook",
        ),
        ({"model_type": "lfm2"}, "'lfm2', .*nearest, but most of its blocks are short convol"),
        ({"model_type": "abacus"}, r"'abacus', .*qwen3_5_moe_text, and CONTRIBUTING"),
        (
            {"model_type": "glm4v_moe", "text_config": {"model_type": "glm4v_moe_text"}},
            "'glm4v_moe_text'. inside 'glm4v_moe', .*CONTRIBUTING.md says how",
        ),
        ({"model_type": "qwen3_nex"}, r"it knows .* .qwen3\S* is the nearest by name., and CONTR"),
    ],
)
def test_what_is_not_known_yet_is_refused(
    raw: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ShearlingError, match=sentence):
        Checkpoint.open(tmp_path)


def test_what_comes_nearest_is_known_and_what_is_like_it_is_not() -> None:
    from transformers import CONFIG_MAPPING

    assert len(NEAREST.keys() & CONFIG_MAPPING.keys()) > 30  # older versions have not all of them
    for model_type, (near, why) in NEAREST.items():
        assert model_type not in FAMILIES.keys() | REFUSED.keys()
        assert near in FAMILIES, model_type
        assert why[-1] not in ".;"
