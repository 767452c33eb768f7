"""The grid, the turns, the ratios, and one run of the whole with transformers."""

from __future__ import annotations

import multiprocessing
from collections import defaultdict
from dataclasses import dataclass, field
from types import SimpleNamespace

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.evaluate import speed
from shearling.evaluate.benchmark import bench_lines, bench_models
from shearling.evaluate.engines import Cell, Engine, Timing
from shearling.evaluate.engines.memory import check_memory
from shearling.evaluate.ratios import promised, ratio, sentence
from shearling.evaluate.speed import Workload, bench, measure
from shearling.model.checkpoint import Checkpoint
from shearling.table.values import Shape

CELL = Cell(1, 6, 4)


@dataclass
class Recorder:
    """A runner of so many parts a run, which takes what it is told."""

    name: str
    parts_each: int
    seen: list
    seconds: list = field(default_factory=lambda: [1.0])
    threads: int | None = 1
    weights: str = "float32"

    def parts(self, cell, *, fresh):
        for part in range(self.parts_each):
            self.seen.append((self.name, part, fresh))
            if part < self.parts_each - 1:
                yield
        taken = self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]
        return Timing(taken, taken, cell.new, 100)


def test_turns_alternate_within_a_round_and_from_round_to_round():
    seen = []
    runners = [Recorder("A", 3, seen), Recorder("B", 3, seen)]
    steps = []
    (measured,) = measure(runners, [CELL], 2, progress=lambda *step: steps.append(step))
    letters = "".join(name for name, _, _ in seen)
    assert letters == "ABBAAB" + "BAABBA" + "ABBAAB"
    assert [fresh for _, _, fresh in seen] == [True] * 6 + [False] * 12
    # in every round each model runs each part once, in order
    for i in range(3):
        parts = defaultdict(list)
        for name, part, _ in seen[6 * i : 6 * i + 6]:
            parts[name].append(part)
        assert parts == {"A": [0, 1, 2], "B": [0, 1, 2]}
    assert [len(each) for each in measured.timings] == [2, 2]
    assert [done for _, done, _ in steps] == [0, 1, 2, 3, 4, 5, 6, 6]


def test_a_model_of_fewer_parts_ends_earlier_and_keeps_its_place():
    seen = []
    runners = [Recorder("A", 1, seen), Recorder("B", 3, seen, [9.0]), Recorder("C", 2, seen)]
    (measured,) = measure(runners, [CELL], 1)
    assert "".join(name for name, _, _ in seen) == "ABCCBB" + "CBABCB"
    assert [each[0].prefill_seconds for each in measured.timings] == [1.0, 9.0, 1.0]


def timings(*seconds: float, steps: int = 4) -> list[Timing]:
    return [Timing(each / 2, each, steps, 300) for each in seconds]


def test_ratios_are_those_within_a_round(models):
    """A machine that drifts by a factor of nine changes both models' times, and no ratio."""
    one = Checkpoint.open(models("llama"))
    found = ratio(one, one, CELL, timings(2, 6, 18), timings(1, 3, 9))
    assert found["decode_speedup"] == {"median": 2.0, "min": 2.0, "max": 2.0}
    assert found["prefill_speedup"]["median"] == 2.0
    mixed = ratio(one, one, CELL, timings(2, 6, 18), timings(2, 2, 9))
    assert mixed["decode_speedup"] == {"median": 2.0, "min": 1.0, "max": 3.0}
    assert mixed["rounds"] == 3
    assert (found["promised_decode_speedup"], found["share_of_promise"]) == (1.0, 2.0)
    assert (found["parameters_removed"], found["block_parameters_removed"]) == (0, 0)
    assert found["memory_ratio"] == 1.0


def test_an_interruption_of_one_turn_does_not_count():
    """Sums would give 0.31; the turns of each model that met give 2, 2 and 0.1."""
    one = SimpleNamespace(parameters=1, layout=None)
    before = [Timing(1, 6, 24, 300, (2.0, 2.0, 2.0))]
    after = [Timing(1, 22, 24, 300, (1.0, 1.0, 20.0))]
    assert ratio(one, one, CELL, before, after)["decode_speedup"]["median"] == 2.0
    whole = [Timing(1, 22, 24, 300)]
    assert ratio(one, one, CELL, before, whole)["decode_speedup"]["median"] == 6 / 22


def by_hand(layers: int, context: int) -> int:
    """Operations of a step of the test's Llama, from its sizes alone."""
    attention = 36 * 9 * 4 * 2 + 36 * 3 * 4 * 2  # q and o, k and v
    mlp = 3 * 36 * 50
    return 2 * (layers * (attention + mlp + 2 * 9 * 4 * context) + 36 * 300)


def test_the_promise_is_that_of_a_decode_step_with_its_head(model_directory, smaller_directory):
    first, other = Checkpoint.open(model_directory), Checkpoint.open(smaller_directory)
    cell = Cell(8, 6, 4)
    found = ratio(first, other, cell, timings(3, 3), timings(2, 2))
    assert found["promised_decode_speedup"] == pytest.approx(by_hand(3, 6 + 2.5) / by_hand(1, 8.5))
    assert found["share_of_promise"] == pytest.approx(1.5 / found["promised_decode_speedup"])
    assert found["block_parameters_removed"] == pytest.approx(2 / 3)
    assert found["parameters_removed"] == 1 - other.parameters / first.parameters
    said = sentence(
        found | {"model": {"name": "smaller"}, "against": {"name": "tiny"}, "engine": "vllm"}
    )
    assert said.startswith("smaller: 1.50x (1.50-1.50) the decode speed of tiny for 66.7% fewer")
    assert "its FLOPs promise" in said
    assert said.endswith("(vllm, batch 8, 6+4 tokens)")


def test_no_promise_for_a_model_that_only_runs(model_directory):
    first = Checkpoint.open(model_directory)
    quantised = SimpleNamespace(parameters=first.parameters, layout=None)
    found = ratio(first, quantised, CELL, timings(3), timings(2))
    assert promised(first, quantised, CELL) is None
    assert found["share_of_promise"] is None
    assert found["block_parameters_removed"] is None
    named = {"model": {"name": "q"}, "against": {"name": "tiny"}, "engine": "vllm"}
    assert "FLOPs" not in sentence(found | named)


def test_models_take_turns_on_transformers(model_directory, smaller_directory):
    """The one run of the whole."""
    others, steps = set(multiprocessing.active_children()), []
    result = bench_models(
        [model_directory, Checkpoint.open(smaller_directory)],
        Workload(batches=(1, 3), prompts=(6,), news=(4, 20), repeats=2, threads=1),
        progress=lambda *step: steps.append(step),
    )
    assert result["kind"] == "bench"
    assert result["shearling"]
    machine = result["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["cores"] >= 1
    assert machine["threads"] == 1
    assert machine["memory_bytes"] > 2**28
    assert machine["cpu"]
    grid = [(1, 4), (1, 20), (3, 4), (3, 20)]
    assert [(run["model"]["name"], run["batch"], run["new"]) for run in result["runs"]] == [
        (name, *place) for place in grid for name in ("tiny", "smaller")
    ]
    for run in result["runs"]:
        assert (run["prompt"], run["repeats"]) == (6, 2)
        assert (run["engine"], run["threads"], run["weights"]) == ("transformers", 1, "float32")
        assert run["engine_version"] == machine["transformers"]
        for name in (
            "prefill_tokens_per_s", "decode_tokens_per_s", "first_token_ms", "ms_per_token",
        ):  # fmt: skip
            assert 0 < run[name]["min"] <= run[name]["median"] <= run[name]["max"]
        fastest = run["batch"] * 1e3 / run["ms_per_token"]["min"]
        assert run["decode_tokens_per_s"]["max"] == pytest.approx(fastest)
        slowest = run["batch"] * 6 * 1e3 / run["first_token_ms"]["max"]
        assert run["prefill_tokens_per_s"]["min"] == pytest.approx(slowest)
        assert run["peak_memory_bytes"] > 2**24
    fingerprints = [run["model"]["fingerprint"] for run in result["runs"][:2]]
    assert fingerprints[0] == Checkpoint.open(model_directory).fingerprint != fingerprints[1]
    for found in result["ratios"]:
        assert (found["model"]["name"], found["against"]["name"]) == ("smaller", "tiny")
        assert found["engine"] == "transformers"
        assert found["rounds"] == 2
    assert [(found["batch"], found["new"]) for found in result["ratios"]] == grid
    assert [done for _, done, _ in steps][-1] == 4 * 3 * 2
    assert steps[:2] == [("opening models", 0, 1), ("opening models", 1, 1)]
    assert set(multiprocessing.active_children()) <= others
    lines = bench_lines(result)
    assert len(lines) == 1 + 8 + 1 + 4
    assert lines[-1].startswith("smaller: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (1, 0)}, "batch is 0"),
        ({"batches": ()}, "no batch size"),
        ({"prompts": (0,)}, "prompt is 0"),
        ({"news": (4, -1)}, "new is -1"),
        ({"news": ()}, "nothing to time"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "int3"}, "'int3' is not known"),
        ({"engines": ()}, "no engine"),
        ({"engines": ("onnx",)}, "no engine 'onnx'; give transformers, llama.cpp, vllm"),
        ({"prompts": (4, 60), "news": (5,)}, r"60 tokens and 5 new .* the 64 positions .*tiny"),
    ],
)
def test_refuses_before_any_process_starts(model_directory, monkeypatch, options, message):
    monkeypatch.setattr("shearling.evaluate.engines.transformers.ModelProcess", None)
    with pytest.raises(ShearlingError, match=message):
        bench([model_directory], Workload(**{"prompts": (4,), "news": (4,), **options}))


def test_refuses_no_model_and_what_is_none(tmp_path):
    with pytest.raises(ShearlingError, match="no model to time"):
        bench([])
    with pytest.raises(ShearlingError, match=r"config\.json"):
        bench([tmp_path])


def test_refuses_what_does_not_fit_with_the_estimate(model_directory, monkeypatch):
    monkeypatch.setattr("shearling.evaluate.engines.transformers.ModelProcess", None)
    free = SimpleNamespace(available=800_000_000)
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    message = r"2 models at once with transformers in float32 needs at least 1\.0 GB .* 0\.8 GB are"
    with pytest.raises(ShearlingError, match=message):
        bench([model_directory, model_directory], Workload(prompts=(4,), news=(4,)))


def test_one_model_at_a_time_needs_the_largest_alone(monkeypatch):
    """Exact figures: 3 GB and 5 GB, of which 6 GB are free."""

    class Stub(Engine):
        name, version = "stub", "1"

        def open(self, candidates, setting):
            raise AssertionError

        def bytes(self, candidate, setting):
            return candidate.parameters

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=6_000_000_000))
    models: list = [
        SimpleNamespace(name=f"m{n}", parameters=n * 1_000_000_000) for n in (3, 5)
    ]  # fmt: skip
    setting = speed.Setting("float32", "cpu", None, (CELL,))
    alone, together = Stub(), Stub()
    alone.resident = False
    check_memory(alone, models, setting)
    with pytest.raises(ShearlingError, match=r"2 models .* 8\.0 GB \(5\.0 GB for m5\), but 6\.0"):
        check_memory(together, models, setting)


def test_what_engines_need_of_a_model_that_only_runs(model_directory, tmp_path):
    """Quantised weights keep their size; sizes may be unknown; a second of a name is numbered."""
    checkpoint = Checkpoint.open(model_directory)
    quantised = SimpleNamespace(
        name="tiny", path=model_directory, fingerprint="f", parameters=1000, bytes=600,
        shape=Shape({"layers": 2}), layout=None, quantization={"quant_method": "torchao"},
    )  # fmt: skip
    plain, rounded = speed._candidates([model_directory, quantised], [checkpoint, quantised])
    assert (plain.name, rounded.name) == ("tiny", "tiny#2")
    assert plain.weight_bytes(2) == 2 * checkpoint.parameters
    assert plain.cache_elements == 2 * 3 * 3 * 4  # keys and values, blocks, groups, head_dim
    assert (rounded.weight_bytes(2), rounded.cache_elements) == (600, 0)
    (given,) = speed._candidates([tmp_path / "m.gguf"], [checkpoint])
    assert given.gguf == tmp_path / "m.gguf"


def test_the_cpu_has_a_name_without_proc(monkeypatch):
    def nothing(*_args: object, **_options: object):
        raise OSError("no /proc here")

    monkeypatch.setattr(speed.Path, "read_text", nothing)
    assert speed._cpu_name()
