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
from shearling.quiet import no_torchao_notices

if TYPE_CHECKING:
    from shearling.axes import Keep, Layout, Shape
    from shearling.checkpoint import Checkpoint
    from shearling.choose import keep_layers, without
    from shearling.criteria import score
    from shearling.cut import Proof, prove
    from shearling.cut import cut as prune
    from shearling.evaluate.benchmark import bench_models
    from shearling.inspection import inspect
    from shearling.measure import evaluate_model, generate_samples
    from shearling.report import write_report
    from shearling.scores import Scores

__version__ = "0.1.0"
no_torchao_notices()  # here, since processes of their own import transformers first of all

_HOMES = {
    "Checkpoint": "checkpoint.Checkpoint",
    "Keep": "axes.Keep",
    "Layout": "axes.Layout",
    "Proof": "cut.Proof",
    "Scores": "scores.Scores",
    "Shape": "axes.Shape",
    "bench_models": "evaluate.benchmark.bench_models",
    "evaluate_model": "measure.evaluate_model",
    "generate_samples": "measure.generate_samples",
    "inspect": "inspection.inspect",
    "keep_layers": "choose.keep_layers",
    "prove": "cut.prove",
    # Not `cut`: importing the module of that name would take the function's place.
    "prune": "cut.cut",
    "score": "criteria.score",
    "without": "choose.without",
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
