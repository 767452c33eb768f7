"""What llama.cpp has built in: a model that it would not run is refused before any work."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.ship import converter
from shearling.ship.computes import check_counted
from shearling.ship.converter import NO_AHEAD, convert, linked

Models = Callable[[str], Path]


@pytest.mark.parametrize(
    ("variant", "sizes", "wants"),
    [
        ("qwen2", {"heads": 6}, r"hidden to be heads \* head_dim, which are 36 and 6 \* 4 here"),
        ("olmo2", {"hidden": 40}, r"which are 40 and 9 \* 4 here"),
        ("cohere2", {"heads": 6}, r"which are 36 and 6 \* 4 here"),
        ("granite", {"heads": 6}, r"heads as wide as hidden / heads, which are 36 and 6, and 4 w"),
        ("olmoe", {}, "as many key heads as heads, which are 3 and 9 here"),
        ("qwen3", {}, "no bias on what attention writes"),
        ("gpt_neox-serial", {}, "biases in attention, where this model has none"),
        ("qwen3_moe-mixed", {}, "experts in every block"),
        ("deepseek_v3", {"layers": 26}, "which must have none; this one has 26 blocks"),
        ("deepseek_v3-moonlight", {}, "queries from a latent .* this one has 5 blocks"),
        ("qwen3_next", {}, "rms_norm_eps=1e-06, where this model has rms_norm_eps=0.01"),
        ("seed_oss", {}, "no bias on what attention writes"),
        ("ernie4_5", {}, "no biases, which this model has"),
        ("hunyuan_v1_dense", {}, "rope_theta=10000 and 32,768 or 262,144 positions"),
        ("exaone4", {"hidden": 40}, "hidden to be heads"),
        ("exaone4", {"head_dim": 4}, "64 blocks where some slide.*this model has 5"),
        ("ernie4_5_moe", {}, "all blocks without experts before those with"),
        ("ministral3", {}, "rope_parameters of the type yarn with mscale_all_dim"),
    ],
)
def test_what_its_code_does_not_expect_is_refused(
    models: Models, variant: str, sizes: dict[str, int], wants: str
) -> None:
    source = Checkpoint.open(models(variant))
    given = replace(source, shape=source.shape.with_(**sizes))
    with pytest.raises(ShearlingError, match=f"cannot be exported to GGUF: .* wants .*{wants}"):
        check_counted(given)


@pytest.mark.parametrize(
    ("variant", "key", "value", "wants"),
    [
        ("llama", "hidden_act", "gelu", "hidden_act=silu, where this model has hidden_act=gelu"),
        ("qwen3_moe", "norm_topk_prob", False, "weights of chosen experts that add up to 1"),
        ("olmoe", "rms_norm_eps", 1e-6, "rms_norm_eps=1e-05"),
        ("deepseek_v3", "topk_group", 3, "a router that leaves out some of its groups"),
        ("granitemoehybrid", "position_embedding_type", None, "rotary positions"),
    ],
)
def test_settings_that_no_file_can_say_are_refused(
    models: Models, variant: str, key: str, value: Any, wants: str
) -> None:
    source = Checkpoint.open(models(variant))
    setattr(source.config, key, value)
    with pytest.raises(ShearlingError, match=wants):
        check_counted(source)


def test_the_converter_is_told_what_transformers_does_not_give_on(models: Models) -> None:
    with linked(Checkpoint.open(models("gpt_neox"))) as folder:
        assert json.loads((folder / "config.json").read_text())["llm_config"] == {"rotary_pct": 0.5}
    with linked(Checkpoint.open(models("llama"))) as folder:
        assert "llm_config" not in json.loads((folder / "config.json").read_text())


def test_an_older_converter_is_not_told_to_leave_out_what_it_does_not_know(
    models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = tmp_path / "converter.py"
    script.write_text(
        "import sys\n"
        f"if {NO_AHEAD!r} in sys.argv: sys.exit('error: unrecognized arguments: {NO_AHEAD}')\n"
        "open(sys.argv[sys.argv.index('--outfile') + 1], 'w').close()\n"
    )
    monkeypatch.setattr(converter, "find_converter", lambda: [sys.executable, str(script)])
    source, made = Checkpoint.open(models("glm4_moe")), tmp_path / "made.gguf"
    convert(source, made, "f32", tmp_path / "out.gguf")
    assert made.is_file()


def test_parts_hold_every_number_once(models: Models) -> None:
    """What files hold in parts or in another order is all of the tensor, whatever the order."""
    from shearling.model.gguf.layout import parts

    moved = 0
    for variant in ("gpt_oss", "granitemoe", "granitemoehybrid", "deepseek_v3", "qwen3_next"):
        source = Checkpoint.open(models(variant))
        places = source.layout.places(source.shape)
        plain = replace(source.family, gain_offset=0.0)
        for name, tensor in source.read(source.files):
            if name.endswith(("A_log", "q_proj.weight", "k_proj.weight")):
                continue
            held = parts(plain, source.config, source.shape, name, places[name][0], tensor)
            values = torch.cat([part.flatten() for part in held.values()])
            assert torch.equal(values.sort().values, tensor.flatten().sort().values), name
            moved += list(held) != [name]
    assert moved > 50
