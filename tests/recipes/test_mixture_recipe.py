"""The shipped recipe for mixtures, on a tiny one."""

from __future__ import annotations

import json
from pathlib import Path

from tiny_farm import Farm
from tiny_models import tiny_model
from tiny_tokenizer import byte_tokenizer

VOCAB = 300
SMALL = (
    "data.length=32", "data.held_out=0.1", "method.samples=4", "method.length=16",
    "method.written=2", "evaluate.windows=2", "evaluate.window=32",
)  # fmt: skip


def test_a_quarter_of_the_experts_goes_and_the_rest_is_repaired(farm: Farm, tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    model.resize_token_embeddings(VOCAB)
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    run = Farm(tmp_path, tmp_path / "model", farm.text).run("run", *SMALL, recipe="experts")
    made = run.run()["made"]
    assert [name[3:] for name in made] == ["pack", "text", "prune", "evaluate", "report"]
    manifest = json.loads((run.output / "03-prune" / "shearling.json").read_text())
    assert manifest["shape"]["experts"] == 3  # of 5, rounded down
    assert manifest["options"]["repair"]
    config = json.loads((run.output / "03-prune" / "config.json").read_text())
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (3, 2)
