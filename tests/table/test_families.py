"""Every family's table against stock models of transformers, in depth and in width."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.table.families import FAMILIES, Family, family_of
from shearling.table.families.legal import Rule, divided_hidden, nearest, whole_heads
from shearling.table.values import Shape
from tiny_models import VARIANTS, tiny_config

Models = Callable[[str], Path]

# Stock transformers computes the width of a head from hidden size and heads in some families; a
# shape that keeps 4 = 24/6 = 36/9 can be said in all of them.
PROPORTIONAL = {"hidden": 24, "heads": 6, "kv_heads": 2}
# Those that cannot lose heads alone.
WHOLE = ("gpt_neox", "gpt_neox-serial", "opt", "opt-projected", "opt-bare")
SEPARATE = [variant for variant in VARIANTS if variant not in WHOLE]


@pytest.fixture
def variant(every_variant: str) -> str:
    return every_variant


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
    homes = checkpoint.block_homes(3).values()
    assert {home.parameter for home in homes} == set(blocks[3].state_dict())


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
    checkpoint.family.check(checkpoint.config, shape)
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


def test_the_residual_stream_changes_size(models: Models, variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models(variant))
    shape = resized(checkpoint, layers=2, mlp=8, **PROPORTIONAL)
    check_resized(checkpoint, shape, (1, 4), tmp_path)


@pytest.mark.parametrize("variant", SEPARATE)
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
    assert changed <= {"num_hidden_layers", "layer_types", "no_rope_layers"}
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


# --- what cannot be written ----------------------------------------------------------------------


def refused(models: Models, variant: str, **sizes: int) -> str:
    """The sentence that refuses a shape."""
    checkpoint = Checkpoint.open(models(variant))
    with pytest.raises(ShearlingError) as error:
        checkpoint.family.check(checkpoint.config, checkpoint.shape.with_(**sizes))
    return str(error.value)


@pytest.mark.parametrize(
    ("variant", "sizes", "given_", "legal"),
    [
        ("gpt_neox", {"hidden": 30}, "hidden=30, heads=9", "hidden=32, heads=8 or hidden=28, hea"),
        ("gpt_neox", {"heads": 6}, "hidden=36, heads=6", "hidden=24, heads=6 or hidden=28, hea"),
        ("opt", {"hidden": 24}, "hidden=24, heads=9", "hidden=24, heads=6 or hidden=28, heads=7"),
        ("opt-bare", {"hidden": 3, "heads": 1}, "hidden=3, heads=1", "hidden=4, heads=1 or"),
        # 20 is the width of its embeddings, which OPT would no longer project.
        ("opt-projected", {"hidden": 20, "heads": 5}, "hidden=20, heads=5", "hidden=16, heads=4"),
        ("gemma2", {"hidden": 30}, "hidden=30, heads=9", "hidden=30, heads=6, kv_heads=3 or"),
        ("gemma3", {"hidden": 35}, "hidden=35, heads=9", "hidden=36, heads=9, kv_heads=3 or"),
        ("llama-biases", {"hidden": 28}, "hidden=28, heads=9", "hidden=27, heads=9, kv_heads=3"),
        ("llama", {"heads": 8}, "heads=8, kv_heads=3", "heads=9, kv_heads=3 or heads=6, kv_h"),
        ("qwen2", {"kv_heads": 2}, "heads=9, kv_heads=2", "heads=6, kv_heads=2"),
        # Divisible, but heads would have to move into groups that were never theirs.
        ("mistral", {"heads": 6, "kv_heads": 1}, "heads=6, kv_heads=1", "heads=3, kv_heads=1"),
    ],
)
def test_the_nearest_legal_shapes_are_named(
    models: Models, variant: str, sizes: dict[str, int], given_: str, legal: str
) -> None:
    sentence = refused(models, variant, **sizes)
    assert sentence.startswith(f"{given_} cannot be written: ")
    assert f"the nearest that can: {legal}" in sentence


@pytest.mark.parametrize("variant", SEPARATE)
def test_what_is_named_can_be_written(models: Models, variant: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    rules = checkpoint.family.legality(checkpoint.config)
    wanted = checkpoint.shape.with_(hidden=31, heads=7)
    found = nearest(rules, checkpoint.shape, wanted, count=5)
    assert len(set(found)) == 5
    for shape in found:
        checkpoint.family.check(checkpoint.config, shape)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        ({"mlp": 0}, r"^mlp=0 was given, but .* llama model has between 1 and the source's 50;"),
        ({"mlp": -3}, "^mlp=-3 was given"),
        ({"hidden": 37}, r"^hidden=37 was given, but .* between 1 and the source's 36;"),
        ({"layers": 6}, "^layers=6 was given, .* the source's 5;"),
        ({"head_dim": 4}, "^head_dim=4 was given, .* cannot be cut; leave it at 6"),
        ({"hiden": 8}, r"no axis 'hiden' \(nearest: hidden\); it has layers, hidden, voc"),
        ({"experts": 8}, r"no axis 'experts'; it has layers"),
        ({"vocab": 102}, "^vocab=102 was given"),
    ],
)
def test_general_refusals(models: Models, sizes: dict[str, int], sentence: str) -> None:
    assert re.search(sentence, refused(models, "llama", **sizes))


def test_groups_are_no_axis_of_gpt_neox(models: Models) -> None:
    assert "no axis 'kv_heads' (nearest: heads" in refused(models, "gpt_neox", kv_heads=1)


def test_every_rule_is_transformers_own(models: Models, variant: str, tmp_path: Path) -> None:
    """What the rules allow loads as that very shape; what they forbid does not."""
    checkpoint = Checkpoint.open(models(variant))
    family, config = checkpoint.family, checkpoint.config
    rules = family.legality(config)
    for hidden, heads in ((24, 6), (20, 5), (27, 9), (26, 6), (30, 6), (31, 6), (28, 7)):
        shape = resized(checkpoint, hidden=hidden, heads=heads, kv_heads=heads // 2)
        own = [rule for rule in rules if "kv_heads" not in rule.axes]
        raw = family.write(checkpoint.raw, config, shape, (0, 1, 2, 3, 4))
        try:
            after = resolved(raw, tmp_path)
            model = stock(after)
            reader = FAMILIES[after.model_type]
            tensors = {
                family.renamed.get(name, name): sizes
                for name, sizes in checkpoint.layout.tensors(shape).items()
            }
            state = {name: tuple(t.shape) for name, t in model.state_dict().items()}
            works = reader.shape(after) == shape and all(
                state.get(name) == sizes for name, sizes in tensors.items()
            )
        except (ValueError, StrictDataclassClassValidationError):
            works = False
        assert works == all(rule.holds(shape) for rule in own), (hidden, heads)


def test_long_context_factors_of_phi3(models: Models, tmp_path: Path) -> None:
    """Phi3Config wants one for every second of hidden // heads, whatever head_dim says."""
    raw = dict(Checkpoint.open(models("phi3")).raw)
    raw["rope_parameters"] = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0, 1.5],
        "long_factor": [2.0, 3.0],
        "original_max_position_embeddings": 32,
    }
    config, family = resolved(raw, tmp_path), FAMILIES["phi3"]
    shape = family.shape(config)
    for hidden, heads, legal in ((36, 9, True), (24, 6, True), (29, 6, True), (18, 6, False)):
        after = shape.with_(hidden=hidden, heads=heads)
        written = family.write(raw, config, after, (0, 1, 2, 3, 4))
        if legal:
            family.check(config, after)
            assert family.shape(resolved(written, tmp_path)) == after
        else:
            with pytest.raises(ShearlingError, match="long-context factors .* there are 2"):
                family.check(config, after)
            with pytest.raises(StrictDataclassClassValidationError, match="short_factor"):
                resolved(written, tmp_path)


RULES = st.lists(
    st.sampled_from(
        [
            whole_heads("x"),
            divided_hidden("x"),
            Rule(("hidden",), "", lambda shape: shape["hidden"] % 3 == 1),
            Rule(("heads", "mlp"), "", lambda shape: shape["heads"] != shape["mlp"]),
        ]
    ),
    min_size=1,
    max_size=3,
)


@given(RULES, st.integers(1, 14), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_nothing_legal_is_nearer(rules, hidden: int, heads: int, mlp: int) -> None:
    """Against all shapes there are."""
    before = Shape({"hidden": 14, "heads": 5, "mlp": 3, "head_dim": 2})
    wanted = before.with_(hidden=hidden, heads=heads, mlp=mlp)
    weight = {a: (8 if wanted[a] != before[a] else 1) / before[a] for a in before}

    def distance(shape: Shape) -> float:
        return sum(weight[a] * abs(shape[a] - wanted[a]) for a in before)

    found = nearest(tuple(rules), before, wanted, count=3)
    every = [
        distance(shape)
        for h in range(1, 15)
        for n in range(1, 6)
        for m in range(1, 4)
        if all(r.holds(shape := wanted.with_(hidden=h, heads=n, mlp=m)) for r in rules)
    ]
    distances = [distance(shape) for shape in found]
    assert distances[:1] == [pytest.approx(min(every))] if every else not found
    assert distances == sorted(distances)
    assert len(set(found)) == len(found)
    assert all(rule.holds(shape) for shape in found for rule in rules)


def test_what_granite_4_wants_of_blocks_it_has_not(tmp_path: Path) -> None:
    """Its config checks the widths of Mamba blocks where there are none."""
    raw = tiny_config("granitemoehybrid").to_dict() | {"mamba_n_heads": 8, "mamba_d_head": 9}
    config, family = resolved(raw, tmp_path), FAMILIES["granitemoehybrid"]
    shape = family.shape(config)
    family.check(config, shape.with_(hidden=28))
    after = resolved(family.write(raw, config, shape.with_(hidden=28), (0, 1, 2, 3, 4)), tmp_path)
    assert family.shape(after) == shape.with_(hidden=28)
    with pytest.raises(ShearlingError, match="mamba_n_heads=8; .*: hidden=28 or hidden=32"):
        family.check(config, shape.with_(hidden=30))
    wrong = family.write(raw, config, shape.with_(hidden=30), (0, 1, 2, 3, 4))
    with pytest.raises(StrictDataclassClassValidationError, match="mamba_n_heads must divide"):
        resolved(wrong, tmp_path)


@pytest.mark.parametrize(
    "change", [{"num_local_experts": 4}, {"layer_types": ["mamba", *["attention"] * 4]}]
)
def test_a_granite_4_that_is_not_dense(change: dict[str, Any], tmp_path: Path) -> None:
    config = resolved(tiny_config("granitemoehybrid").to_dict() | change, tmp_path)
    with pytest.raises(ShearlingError, match="Mamba blocks or experts .* such as granite-4.0-mic"):
        FAMILIES["granitemoehybrid"].layout(config)


# --- how it is written, then ---------------------------------------------------------------------


def narrowed(models: Models, variant: str, **sizes: int) -> tuple[Checkpoint, dict[str, Any]]:
    checkpoint = Checkpoint.open(models(variant))
    shape, config = checkpoint.shape.with_(**sizes), checkpoint.config
    checkpoint.family.check(config, shape)
    return checkpoint, checkpoint.family.write(checkpoint.raw, config, shape, (0, 1, 2, 3, 4))


def test_llama_becomes_mistral_only_where_it_must(models: Models) -> None:
    for sizes, model_type in (({"hidden": 30}, "mistral"), ({"hidden": 27}, "llama")):
        checkpoint, raw = narrowed(models, "llama", **sizes)
        assert raw["model_type"] == model_type
        assert raw["architectures"] == [f"{model_type.title()}ForCausalLM"]
        notes = checkpoint.family.remarks(checkpoint.config, checkpoint.shape.with_(**sizes))
        assert bool(notes) == (model_type == "mistral")
    assert narrowed(models, "llama-biases", hidden=27)[1]["model_type"] == "llama"


def test_what_llama_and_mistral_take_for_granted_is_written_down(tmp_path: Path) -> None:
    """Mistral would fill in 8 groups, a window of 4,096 and 131,072 positions."""
    raw = {"model_type": "llama", "vocab_size": 101, "hidden_size": 36, "num_attention_heads": 9}
    config, family = resolved(raw, tmp_path), FAMILIES["llama"]
    shape = family.shape(config).with_(hidden=31)
    after = resolved(family.write(raw, config, shape, tuple(range(32))), tmp_path)
    assert after.model_type == "mistral"
    assert FAMILIES["mistral"].shape(after) == shape
    assert shape["kv_heads"] == 9
    assert after.sliding_window is None
    same = {key: getattr(config, key) for key in config.to_dict() if hasattr(after, key)}
    different = {key for key, value in same.items() if getattr(after, key) != value}
    allowed = {"model_type", "architectures", "hidden_size", "head_dim", "keys_to_ignore"}
    assert different <= allowed, different
    assert (config.head_dim, after.head_dim) == (4, 4)


@pytest.mark.parametrize("variant", ["qwen2", "phi3", "llama-tied"])
def test_the_width_of_a_head_is_written_where_sizes_no_longer_give_it(
    models: Models, variant: str
) -> None:
    source = Checkpoint.open(models(variant))
    raw = {key: value for key, value in source.raw.items() if key != "head_dim"}
    write = source.family.write
    for sizes, written_ in (
        ({}, None),
        ({"mlp": 10}, None),
        ({"hidden": 24, "heads": 6, "kv_heads": 2}, None),
        ({"hidden": 18}, 4),
        ({"heads": 6}, 4),
        ({"hidden": 37 - 1, "heads": 3}, 4),
    ):
        shape = source.shape.with_(**sizes)
        assert write(raw, source.config, shape, (0, 1, 2, 3, 4)).get("head_dim") == written_
        null = write({**raw, "head_dim": None}, source.config, shape, (0, 1, 2, 3, 4))
        assert null["head_dim"] == written_


def test_opt_s_embeddings_follow_the_hidden_size(models: Models) -> None:
    _, raw = narrowed(models, "opt", hidden=24, heads=6)
    assert (raw["hidden_size"], raw["word_embed_proj_dim"]) == (24, 24)
    _, raw = narrowed(models, "opt-projected", hidden=24, heads=6)
    assert (raw["hidden_size"], raw["word_embed_proj_dim"]) == (24, 20)
    source = Checkpoint.open(models("opt"))
    silent = {key: value for key, value in source.raw.items() if key != "word_embed_proj_dim"}
    shape = source.shape.with_(hidden=24, heads=6)
    assert "word_embed_proj_dim" not in source.family.write(silent, source.config, shape, (0,))


@pytest.mark.parametrize(
    ("variant", "sizes", "word"),
    [
        ("gemma2", {"hidden": 27}, r"sqrt\(27/36\)"),
        ("phi3", {"hidden": 27}, "llama.cpp"),
        ("qwen2", {"heads": 6}, "vLLM"),
        ("llama", {"hidden": 31}, "hidden=31 with heads=9, .* Mistral"),
    ],
)
def test_notes(models: Models, variant: str, sizes: dict[str, int], word: str) -> None:
    checkpoint = Checkpoint.open(models(variant))
    family, config = checkpoint.family, checkpoint.config
    (note,) = family.remarks(config, checkpoint.shape.with_(**sizes))
    assert re.search(word, note)
    assert family.remarks(config, checkpoint.shape.with_(layers=2)) == []


def test_a_norm_without_parameters_is_in_the_table(models: Models) -> None:
    checkpoint = Checkpoint.open(models("opt-bare"))
    bare = [row.name for row in checkpoint.layout.rows if row.bare]
    model = stock(checkpoint.config)
    for name in bare:
        assert isinstance(
            model.get_submodule(name.format(0).rpartition(".")[0]), torch.nn.LayerNorm
        )
    assert len(bare) == 3
    norms = [m for m in model.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 5 + 1
    assert not set(bare) & {row.name for row in checkpoint.layout.stored}


def test_families_say_nothing_of_what_does_not_change() -> None:
    plain = Family("x", "", lambda _: None, {}, lambda _: {})
    shape = Shape({"hidden": 3})
    assert plain.rescale(None, shape, shape) is None
    assert (plain.rules(None), plain.remarks(None, shape)) == ((), [])
    assert plain.adapt({"a": 1}, None, shape) == {"a": 1}
