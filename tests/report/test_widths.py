"""Cuts of widths and of the vocabulary, alone, mixed with blocks, and healed since."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from sample_run import SampleRun

from shearling.report import collect, page


@pytest.fixture
def run(tmp_path: Path) -> SampleRun:
    """SmolLM2-135M measured, and nothing made of it yet."""
    sample = SampleRun(tmp_path / "run")
    sample.write_evaluation("source", sample.source, "news", 36.0, 16_368)
    sample.write_evaluation("cut", sample.pruned, "news", 72.0, 16_368)
    return sample


def cut(run: SampleRun, layers: int = 30, **sizes: int) -> dict[str, Any]:
    """Write the manifest of a cut to these sizes."""
    shape = run.shape(layers) | sizes
    keep: dict[str, Any] = {} if layers == 30 else {"layers": list(range(layers))}
    for axis in sizes.keys() & {"mlp", "heads", "kv_heads"}:
        keep[axis] = [list(range(sizes[axis]))] * layers
    for axis in sizes.keys() & {"hidden", "vocab"}:
        keep[axis] = list(range(sizes[axis]))
    path = run.write_manifest("pruned", run.pruned, [], keep=keep, shape=shape)
    return json.loads(path.read_text())


def text_of(html: str) -> str:
    """What a reader sees, thin and no-break spaces made plain ones."""
    return " ".join(re.sub(r"<style>.*?</style>|<[^>]*>", " ", html, flags=re.S).split())


def tiles(html: str) -> list[str]:
    found = re.search(r'<dl class="tiles">(.*?)</dl>', html, flags=re.S)
    assert found
    return [text_of(f"<{one}") for one in found[1].split('<div class="tile')[1:]]


def widths(html: str) -> list[tuple[str, str]]:
    """Of every bar of the anatomy: how much is filled, and what it says."""
    return re.findall(
        r'<i style="width:([\d.]+)%"></i></span><span class="sizes"><b>(.*?)</b>', html
    )


def test_a_width_alone(run: SampleRun) -> None:
    cut(run, mlp=1308)
    html = page(collect([run.root]))
    assert "SmolLM2-135M, MLP 1 536 → 1 308" in text_of(html)
    assert tiles(html)[0] == "MLP neurons 1 308 a block of 1 536 · 228 removed"
    assert not any(tile.startswith("Blocks") for tile in tiles(html))
    assert widths(html) == [("85.16", "1\u202f308 of 1\u202f536")]
    assert "keeps all 30 blocks, narrower" in html
    assert 'class="block gone"' not in html
    assert "1 308 of 1 536 kept in each block" in text_of(html)


def test_blocks_and_widths(run: SampleRun) -> None:
    cut(run, layers=27, mlp=1308, heads=6, kv_heads=2, hidden=512)
    html = page(collect([run.root]))
    assert "SmolLM2-135M, 30 → 27 blocks, hidden 576 → 512, 2 more widths" in text_of(html)
    assert [tile.split(" ")[0] for tile in tiles(html)[:4]] == ["Blocks", "Hidden", "Query", "MLP"]
    assert tiles(html)[0] == "Blocks 27 kept of 30 · 3 removed"
    assert "key/value 3 → 2" in tiles(html)[2]
    assert [float(share) for share, _ in widths(html)] == pytest.approx(
        [100 * 512 / 576, 100 * 6 / 9, 100 * 2 / 3, 100 * 1308 / 1536], abs=0.005
    )
    assert html.count('class="block gone"') == 3


def test_a_healed_model_is_compared_with_the_root_of_its_lineage(run: SampleRun) -> None:
    first = cut(run, layers=27, mlp=1308)
    (run.root / "pruned/shearling.json").unlink()
    source = {**run.pruned, "shape": first["shape"], "parameters": first["parameters"]}
    healed = {"name": "healed", "fingerprint": "cd" * 32}
    run.write_manifest(
        "h", healed, [], keep={}, stage="heal", source=source, parent=first, proof=None,
        shape=first["shape"], source_shape=first["shape"], parameters=first["parameters"],
        source_parameters=first["parameters"], options={"recipe": "lora"},
    )  # fmt: skip
    html = page(collect([run.root]))
    assert "SmolLM2-135M, 30 → 27 blocks, MLP 1 536 → 1 308" in text_of(html)
    assert tiles(html)[:2] == [
        "Blocks 27 kept of 30 · 3 removed", "MLP neurons 1 308 a block of 1 536 · 228 removed",
    ]  # fmt: skip
    assert "from 134.5 M" in tiles(html)[2]
    assert "· 0 removed" not in text_of(html)
    assert "This is after training adapters." in html
    assert len(widths(html)) == 1


def test_training_without_a_cut_removes_nothing(run: SampleRun) -> None:
    parameters = 134_515_008
    run.write_manifest(
        "h", run.pruned, [], keep={}, stage="heal", shape=run.shape(30), parameters=parameters,
        proof=None,
    )  # fmt: skip
    html = page(collect([run.root]))
    assert tiles(html)[0] == "Blocks 30 none removed"
    assert "SmolLM2-135M, 30 blocks : nothing removed" in text_of(html)
    assert "nothing was cut" in html


def test_perplexities_of_different_vocabularies_are_not_compared(run: SampleRun) -> None:
    cut(run, vocab=20_000)
    html = page(collect([run.root]))
    assert "SmolLM2-135M, vocabulary 49 152 → 20 000" in text_of(html)
    assert "perplexities of the two do not compare" in html
    assert "2.00×" not in html
    assert "36 → 72" not in text_of(html)
    assert "keeps all 30 blocks, fewer tokens" in html
    cut(run, mlp=1308)  # the same two measurements do compare where the tokens are the same
    assert "2.00×" in page(collect([run.root]))


@pytest.mark.parametrize(
    ("repair", "said"),
    [
        ({"steps": [{"strength": 0.1}, {"strength": None}], "divergence": None}, True),
        ({"steps": [{"strength": None}], "divergence": [0.2, 0.1]}, True),
        ({"steps": [{"strength": None}], "divergence": None}, False),
        (None, False),
    ],
)
def test_a_repair_counts_where_it_changed_something(
    run: SampleRun, repair: Any, said: bool
) -> None:
    cut(run, layers=27)
    manifest = json.loads((run.root / "pruned/shearling.json").read_text())
    run.write_manifest(
        "pruned", run.pruned, [], keep=manifest["keep"], shape=run.shape(27),
        options={"repair": repair},
    )  # fmt: skip
    html = page(collect([run.root]))
    assert ("This is after refitting in closed form." in html) is said
    assert ("Nothing has been done yet to repair the cut." in html) is not said
