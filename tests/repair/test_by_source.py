"""The held-out damage on each calibration source, against stock models on the same windows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import naive
from places import place
from shearling.data.calibration import Drawing, mixed_windows, origins
from shearling.data.sources import TextSource
from shearling.engine.moments import held_rows
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.run import Run, Wanted
from shearling.repair.calibration import Calibration
from tiny_tokenizer import CHAT, write_llama


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("by-source")
    write_llama(root / "model", layers=4, template=CHAT)
    texts = [{"text": f"{n} sheep in the fell, {n * n} in the pen"} for n in range(60)]
    talks = [
        {"messages": [{"role": role, "content": said} for role, said in turns]}
        for turns in ((("user", f"{n}?"), ("assistant", "a ewe " * n)) for n in range(1, 40))
    ]
    for name, lines in (("web", texts), ("chat", talks)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    return root


@pytest.mark.parametrize(
    ("sizes", "resident"), [({"layers": 3}, True), ({"mlp": 30, "hidden": 28}, False)]
)
def test_against_stock_models(
    here: Path, tmp_path: Path, sizes: dict[str, int], resident: bool
) -> None:
    """Perplexities and the divergence of what is written down, of the windows that are held out."""
    source = Checkpoint.open(here / "model")
    sources = (
        TextSource(here / "web.jsonl", "web", 0.6),
        TextSource(here / "chat.jsonl", "chat", 0.4),
    )
    text = Calibration(sources, samples=16, length=24, shares=(0.5,), written=16)
    run = Run(source, text, place=place(resident))
    rotated = "hidden" in sizes
    choice = run.choose(Wanted(source.shape.with_(**sizes), rotated=rotated))
    run.write(choice, tmp_path / "out")
    options = json.loads((tmp_path / "out/shearling.json").read_text())["options"]
    assert [(one["name"], one["windows"]) for one in options["calibration"]["sources"]] == [
        ("web", 10), ("chat", 6),
    ]  # fmt: skip
    assert "file" not in options["calibration"]
    windows = mixed_windows(sources, source.tokenizer(), Drawing(samples=16, length=24, seed=0))
    of_N, held_N = torch.tensor(origins(sources, 16, 0)), held_rows(16)
    before, after = (naive.stock(path).double() for path in (here / "model", tmp_path / "out"))
    told = {one["name"]: one for one in options["repair"]["sources"]}
    assert list(told) == ["web", "chat"]
    for number, name in enumerate(told):
        ids = windows.ids_NS[held_N & (of_N == number)]
        with torch.no_grad():
            p, q = (
                model(input_ids=ids).logits[:, :-1].log_softmax(-1) for model in (before, after)
            )
        losses = [-of.gather(-1, ids[:, 1:, None]).mean() for of in (p, q)]
        divergence = (p.exp() * (p - q)).sum(-1).mean()
        found = told[name]
        assert (found["windows"], found["tokens"]) == (len(ids), len(ids) * 23)
        assert len(ids)
        assert found["perplexity_before"] == pytest.approx(math.exp(losses[0]), rel=1e-4)
        assert found["perplexity_after"] == pytest.approx(math.exp(losses[1]), rel=1e-4)
        assert found["divergence"] == pytest.approx(float(divergence), rel=1e-3)


def test_of_one_source_nothing_is_told_apart(here: Path, tmp_path: Path) -> None:
    source = Checkpoint.open(here / "model")
    text = Calibration((TextSource(here / "web.jsonl"),), samples=8, length=16, written=0)
    run = Run(source, text, place=place())
    run.write(run.choose(Wanted(source.shape.with_(layers=3))), tmp_path / "out")
    options = json.loads((tmp_path / "out/shearling.json").read_text())["options"]
    assert "sources" not in options["repair"]
    assert options["calibration"]["file"] == "web.jsonl"
    assert "sources" not in options["calibration"]
