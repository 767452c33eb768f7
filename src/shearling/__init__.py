"""shearling: smaller language models out of larger pretrained ones.

The verbs of the command line as a typed API::

    import shearling

    source = shearling.Checkpoint.open("HuggingFaceTB/SmolLM2-135M")
    scores = shearling.score(source, "perplexity", calibration=Path("text.jsonl"))
    smaller = shearling.prune(source, shearling.keep_layers(scores, 24), Path("smaller"))

Names are imported when they are first used, since torch and transformers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shearling.errors import ShearlingError
from shearling.files.quiet import no_torchao_notices
from shearling.version import __version__

if TYPE_CHECKING:
    from shearling.evaluate.benchmark import bench_models
    from shearling.evaluate.measure import evaluate_model, generate_samples
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.inspect import inspect
    from shearling.pruning.choose import keep_layers, without
    from shearling.pruning.cut import cut as prune
    from shearling.pruning.proof import Proof, prove
    from shearling.report import write_report
    from shearling.scoring.score import score
    from shearling.scoring.scores import Scores
    from shearling.table.axes import Layout
    from shearling.table.values import Keep, Shape

no_torchao_notices()  # here, since processes of their own import transformers first of all

_HOMES = {
    "Checkpoint": "model.checkpoint.Checkpoint",
    "Keep": "table.values.Keep",
    "Layout": "table.axes.Layout",
    "Proof": "pruning.proof.Proof",
    "Scores": "scoring.scores.Scores",
    "Shape": "table.values.Shape",
    "bench_models": "evaluate.benchmark.bench_models",
    "evaluate_model": "evaluate.measure.evaluate_model",
    "generate_samples": "evaluate.measure.generate_samples",
    "inspect": "model.inspect.inspect",
    "keep_layers": "pruning.choose.keep_layers",
    "prove": "pruning.proof.prove",
    # Not `cut`: importing the module of that name would take the function's place.
    "prune": "pruning.cut.cut",
    "score": "scoring.score.score",
    "without": "pruning.choose.without",
    "write_report": "report.write_report",
}

__all__ = [
    "Checkpoint",
    "Keep",
    "Layout",
    "Proof",
    "Scores",
    "Shape",
    "ShearlingError",
    "__version__",
    "bench_models",
    "evaluate_model",
    "generate_samples",
    "inspect",
    "keep_layers",
    "prove",
    "prune",
    "score",
    "without",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shearling' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].rpartition(".")
    return getattr(import_module(f"shearling.{module}"), attribute)
