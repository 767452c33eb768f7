"""Every family's table against stock models of transformers, in depth and in width."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from shearling.axes import Shape
from shearling.checkpoint import Checkpoint
from shearling.errors import ShearlingError
from shearling.families import FAMILIES, family_of

Models = Callable[[str], Path]

# Stock transformers computes the width of a head from hidden size and heads in some families; a
# shape that keeps 4 = 24/6 = 36/9 can be said in all of them, but for OPT's word_embed_proj_dim.
PROPORTIONAL = {"hidden": 24, "heads": 6, "kv_heads": 2}
RESIZABLE = (
    "llama",
    "llama-tied",
    "llama-biases",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt_neox",
    "gpt_neox-serial",
    "opt-projected",
)
# Those whose config carries the width of a head can lose heads alone.
EXPLICIT_HEAD_DIM = ("llama", "llama-biases", "mistral", "qwen3", "gemma2", "gemma3")


def stock(config: Any) -> Any:
    """A stock model without weights."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def numel(model: Any) -> int:
    """Parameters of a stock model; parameters() gives a tied one once."""
    return sum(parameter.numel() for parameter in model.parameters())


def resolved(raw: dict[str, Any], directory: Path) -> Any:
    """What stock transformers makes of a config.json."""
    from transformers import AutoConfig

    (directory / "config.json").write_text(json.dumps(raw))
    return AutoConfig.from_pretrained(directory)


def resized(checkpoint: Checkpoint, **sizes: int) -> Shape:
    return checkpoint.shape.with_(**{a: n for a, n in sizes.items() if a in checkpoint.shape})


def test_the_table_counts_every_parameter(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    file = load_file(models(variant) / "model.safetensors")
    count = checkpoint.layout.count(checkpoint.shape)
    assert count == numel(stock(checkpoint.config))
    assert count == sum(tensor.numel() for tensor in file.values())
    assert count == checkpoint.parameters


def test_the_table_names_every_tensor(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    file = load_file(models(variant) / "model.safetensors")
    expected = {name: tuple(tensor.shape) for name, tensor in file.items()}
    assert checkpoint.layout.tensors(checkpoint.shape) == expected


def test_blocks_are_where_the_family_says(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    model = stock(checkpoint.config)
    blocks = model.get_submodule(checkpoint.family.blocks)
    assert len(blocks) == checkpoint.shape["layers"] == 5
    assert checkpoint.layout.count_block(checkpoint.shape) == numel(blocks[3])
    assert set(checkpoint.block_names(3).values()) == set(blocks[3].state_dict())


def test_the_rows_of_a_variant_have_roles_that_fit(models: Models, variant: str) -> None:
    """Look-ups, matrix products, norms and biases, told from the stock module that holds them."""
    checkpoint = Checkpoint.open(models(variant))
    model = stock(checkpoint.config)
    renamed = checkpoint.family.renamed
    for row in checkpoint.layout.rows:
        name = renamed.get(row.name, row.name).format(0)
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "bias":
            expected = "bias"
        elif isinstance(module, torch.nn.Linear):
            expected = "head" if module is model.get_output_embeddings() else "linear"
        elif isinstance(module, torch.nn.Embedding):
            expected = "embedding"
        else:
            expected = "norm"
        assert row.role == expected, row.name


def test_the_shape_is_read_from_the_configuration(models: Models) -> None:
    assert Checkpoint.open(models("llama")).shape == {
        "layers": 5,
        "hidden": 36,
        "vocab": 101,
        "heads": 9,
        "kv_heads": 3,
        "head_dim": 6,
        "mlp": 50,
    }
    assert Checkpoint.open(models("qwen2")).shape["head_dim"] == 4
    opt = Checkpoint.open(models("opt-projected")).shape
    assert (opt["positions"], opt["embed"], opt["mlp"]) == (64, 20, 50)
    assert "kv_heads" not in opt
    assert "embed" not in Checkpoint.open(models("opt")).shape


# --- shapes that a cut could leave ---------------------------------------------------------------


def check_resized(checkpoint: Checkpoint, shape: Shape, layers: tuple[int, ...], tmp: Path) -> None:
    raw = checkpoint.family.write(checkpoint.raw, checkpoint.config, shape, layers)
    config = resolved(raw, tmp)
    model = stock(config)
    assert checkpoint.family.shape(config) == shape
    assert checkpoint.layout.count(shape) == numel(model)
    # The table does not depend on the sizes: the result's own table says the same.
    assert checkpoint.family.layout(config).tensors(shape) == checkpoint.layout.tensors(shape)


def test_neurons_and_blocks_change_size(models: Models, variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(variant))
    shape = resized(checkpoint, layers=3, mlp=34)
    check_resized(checkpoint, shape, (0, 2, 3), tmp_path)


@pytest.mark.parametrize("variant", RESIZABLE)
def test_the_residual_stream_changes_size(models: Models, variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(variant))
    shape = resized(checkpoint, layers=2, mlp=8, **PROPORTIONAL)
    check_resized(checkpoint, shape, (1, 4), tmp_path)


@pytest.mark.parametrize("variant", EXPLICIT_HEAD_DIM)
@pytest.mark.parametrize("heads", [{"heads": 6}, {"heads": 6, "kv_heads": 2}, {"heads": 3}])
def test_heads_change_in_number(
    models: Models, variant: str, heads: dict[str, int], tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    check_resized(checkpoint, resized(checkpoint, **heads), (0, 1, 2, 3, 4), tmp_path)


# --- the configuration of the result -------------------------------------------------------------


def written(directory: Path, layers: tuple[int, ...], **raw: Any) -> dict[str, Any]:
    checkpoint = Checkpoint.open(directory)
    shape = checkpoint.shape.with_(layers=len(layers))
    return checkpoint.family.write({**checkpoint.raw, **raw}, checkpoint.config, shape, layers)


def test_unknown_keys_stay_and_the_source_is_untouched(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    raw = {**checkpoint.raw, "a_lab's_own_key": {"deep": [1, 2]}}
    before, config = copy.deepcopy(raw), checkpoint.config.to_dict()
    after = checkpoint.family.write(
        raw, checkpoint.config, checkpoint.shape.with_(layers=2), (1, 3)
    )
    assert raw == before
    assert checkpoint.config.to_dict() == config
    assert after["a_lab's_own_key"] == {"deep": [1, 2]}
    assert after["num_hidden_layers"] == 2
    changed = {key for key in after if after[key] != before.get(key)}
    assert changed <= {"num_hidden_layers", "layer_types"}
    assert before.keys() - after.keys() == set()


def test_keeping_every_block_writes_the_same_configuration(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    raw = dict(checkpoint.raw)
    assert checkpoint.family.write(raw, checkpoint.config, checkpoint.shape, (0, 1, 2, 3, 4)) == raw


FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("variant", "before", "after"),
    [
        ("qwen2", [FULL, FULL, SLIDING, SLIDING, SLIDING], [FULL, SLIDING, SLIDING]),
        ("qwen3", [FULL] * 5, [FULL] * 3),
        ("gemma2", [SLIDING, FULL, SLIDING, FULL, SLIDING], [FULL, SLIDING, SLIDING]),
        ("gemma3", [SLIDING, SLIDING, FULL, SLIDING, SLIDING], [SLIDING, FULL, SLIDING]),
    ],
)
def test_block_types_follow_the_blocks(
    models: Models, variant: str, before: list[str], after: list[str], tmp_path: Path
) -> None:
    assert Checkpoint.open(models(variant)).config.layer_types == before
    raw = written(models(variant), (1, 2, 4))
    assert raw["layer_types"] == after
    assert resolved(raw, tmp_path).layer_types == after


@pytest.mark.parametrize(
    ("variant", "key", "value", "after"),
    [
        ("gemma3", "sliding_window_pattern", 3, [SLIDING, FULL, SLIDING]),
        ("qwen2", "max_window_layers", 2, [FULL, SLIDING, SLIDING]),
        ("gemma2", None, None, [FULL, SLIDING, SLIDING]),
    ],
)
def test_block_types_that_only_a_rule_gives_become_explicit(
    models: Models, variant: str, key: str | None, value: int, after: list[str], tmp_path: Path
) -> None:
    """Old configs say "every third" or "from the second on": wrong once blocks are gone."""
    checkpoint = Checkpoint.open(models(variant))
    dropped = ("layer_types", "sliding_window_pattern", "_sliding_window_pattern")
    old = {k: v for k, v in checkpoint.raw.items() if k not in dropped}
    if key is not None:
        old[key] = value
    config = resolved(old, tmp_path)
    assert config.layer_types == checkpoint.config.layer_types
    raw = checkpoint.family.write(old, config, checkpoint.shape.with_(layers=3), (1, 2, 4))
    assert raw["layer_types"] == after
    assert resolved(raw, tmp_path).layer_types == after


def test_a_configuration_without_block_types_gets_none(models: Models) -> None:
    for variant in ("llama", "mistral", "phi3", "gpt_neox", "opt"):
        assert "layer_types" not in written(models(variant), (1, 2))


def test_old_configurations_without_groups_stay_without(tmp_path: Path) -> None:
    """A Llama 1 config knows no num_key_value_heads; the result must not invent one."""
    from transformers import LlamaConfig

    raw = {
        "model_type": "llama",
        "vocab_size": 101,
        "hidden_size": 36,
        "num_hidden_layers": 5,
        "num_attention_heads": 9,
        "intermediate_size": 50,
    }
    config = resolved(raw, tmp_path)
    assert isinstance(config, LlamaConfig)
    family = FAMILIES["llama"]
    shape = family.shape(config)
    assert (shape["kv_heads"], shape["head_dim"]) == (9, 4)
    after = family.write(raw, config, shape.with_(layers=2), (0, 4))
    assert after == {**raw, "num_hidden_layers": 2}
    assert family.layout(config).count(shape) == numel(stock(config))


@pytest.mark.parametrize("model_type", ["mamba", None, 7, ["llama"], ""])
def test_an_unknown_architecture_names_those_we_know(model_type: object) -> None:
    with pytest.raises(ShearlingError) as error:
        family_of(model_type, "some/model")
    sentence = str(error.value)
    assert "some/model" in sentence
    assert repr(model_type) in sentence
    assert all(known in sentence for known in FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_is_tried_here(models: Models, model_type: str) -> None:
    assert Checkpoint.open(models(model_type.removesuffix("_text"))).family is FAMILIES[model_type]
    assert family_of(model_type, "x") is FAMILIES[model_type]
