"""shearling: smaller language models out of larger pretrained ones.

The verbs of the command line as a typed API::

    import shearling

    source = shearling.Checkpoint.open("HuggingFaceTB/SmolLM2-135M")
    text = shearling.CalibrationText(file=Path("text.jsonl"))
    size = shearling.Size(params="0.8x")
    smaller = shearling.prune(source, Path("smaller"), size, calibration=text)

Several sizes at once are made together, each what it would be alone::

    sizes = [shearling.Size(params=share) for share in ("0.9x", "0.8x", "0.7x")]
    models = shearling.prune_family(source, Path("sizes"), sizes, calibration=text)

``cut`` is the surgery alone, of blocks or units that were chosen before::

    scores = shearling.score(source, "perplexity", calibration=Path("text.jsonl"))
    bare = shearling.cut(source, shearling.keep_layers(scores, 24), Path("bare"))

Names are imported when they are first used, since torch and transformers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shearling.errors import ShearlingError
from shearling.files.quiet import no_torchao_notices
from shearling.version import __version__

if TYPE_CHECKING:
    from shearling.data.sources import TextSource
    from shearling.evaluate.benchmark import bench_models
    from shearling.evaluate.measure import evaluate_model, generate_samples
    from shearling.model.checkpoint import Checkpoint
    from shearling.model.inspect import inspect
    from shearling.pruning.choose import keep_layers, without
    from shearling.pruning.cut import cut
    from shearling.pruning.family import prune_family
    from shearling.pruning.proof import Proof, prove
    from shearling.pruning.prune import Criteria, Repairs, Running, prune
    from shearling.pruning.size import Size
    from shearling.pruning.text import CalibrationText
    from shearling.report import write_report
    from shearling.scoring.score import score
    from shearling.scoring.scores import Scores
    from shearling.table.layout import Layout
    from shearling.table.values import Keep, Shape

no_torchao_notices()  # here, since processes of their own import transformers first of all

# No name of a room or another module at the top is among them: importing that module would take the
# place of the function.
_HOMES = {
    "CalibrationText": "pruning.text.CalibrationText",
    "Checkpoint": "model.checkpoint.Checkpoint",
    "Criteria": "pruning.prune.Criteria",
    "Keep": "table.values.Keep",
    "Layout": "table.layout.Layout",
    "Proof": "pruning.proof.Proof",
    "Repairs": "pruning.prune.Repairs",
    "Running": "pruning.prune.Running",
    "Scores": "scoring.scores.Scores",
    "Shape": "table.values.Shape",
    "Size": "pruning.size.Size",
    "TextSource": "data.sources.TextSource",
    "bench_models": "evaluate.benchmark.bench_models",
    "cut": "pruning.cut.cut",
    "evaluate_model": "evaluate.measure.evaluate_model",
    "generate_samples": "evaluate.measure.generate_samples",
    "inspect": "model.inspect.inspect",
    "keep_layers": "pruning.choose.keep_layers",
    "prove": "pruning.proof.prove",
    "prune": "pruning.prune.prune",
    "prune_family": "pruning.family.prune_family",
    "score": "scoring.score.score",
    "without": "pruning.choose.without",
    "write_report": "report.write_report",
}

__all__ = [
    "CalibrationText",
    "Checkpoint",
    "Criteria",
    "Keep",
    "Layout",
    "Proof",
    "Repairs",
    "Running",
    "Scores",
    "Shape",
    "ShearlingError",
    "Size",
    "TextSource",
    "__version__",
    "bench_models",
    "cut",
    "evaluate_model",
    "generate_samples",
    "inspect",
    "keep_layers",
    "prove",
    "prune",
    "prune_family",
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
