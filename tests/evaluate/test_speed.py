from __future__ import annotations

import multiprocessing
import os
import shutil
import signal

import pytest
import torch

from shearling.errors import ShearlingError
from shearling.evaluate import speed
from shearling.evaluate.speed import _Job, _time, _Worker, bench


def test_two_models_take_turns(model_directory, smaller_directory):
    """The one run of the whole; what it times is told apart by its figures, not their size."""
    steps = []
    result = bench(
        [model_directory, smaller_directory],
        batches=(1, 3),
        prompt=6,
        new=4,
        repeats=2,
        threads=1,
        progress=lambda *step: steps.append(step),
    )
    assert result["kind"] == "bench"
    machine = result["machine"]
    assert machine["torch"] == torch.__version__
    assert machine["cores"] >= 1
    assert machine["threads"] == 1
    assert machine["memory_bytes"] > 2**28
    assert machine["cpu"]
    assert [(run["model"]["name"], run["batch"]) for run in result["runs"]] == [
        ("tiny", 1),
        ("smaller", 1),
        ("tiny", 3),
        ("smaller", 3),
    ]
    for run in result["runs"]:
        assert (run["prompt"], run["new"], run["repeats"]) == (6, 4, 2)
        for figure in (run["prefill_tokens_per_s"], run["decode_tokens_per_s"]):
            assert 0 < figure["min"] <= figure["median"] <= figure["max"]
        assert run["peak_memory_bytes"] > 2**24
    assert result["runs"][0]["model"]["path"] == str(model_directory)
    assert [done for _, done, _ in steps] == list(range(2 * 3 * 2 + 1))
    assert not multiprocessing.active_children()


def test_a_worker_that_fails_or_dies_is_named(model_directory, tmp_path):
    """Two models at once, to pay for one import: one has no weights, one is killed."""
    broken = shutil.copytree(model_directory, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with (
        _Worker(broken, "float32", "cpu", None) as failing,
        _Worker(model_directory, "float32", "cpu", None) as dying,
    ):
        with pytest.raises(ShearlingError, match=r"model in .*broken could not be timed: .*loaded"):
            failing.receive()
        dying.receive()
        assert dying.process.pid is not None
        os.kill(dying.process.pid, signal.SIGKILL)
        with pytest.raises(ShearlingError, match=r"model in .*tiny ended with exit code -9"):
            dying.run(_Job(1, 2, 2, fresh=True))
    assert not multiprocessing.active_children()


def test_a_job_is_one_prefill_and_one_token_a_step(model):
    """Shapes seen by the model, and the cache behind them."""
    calls = []

    def record(_module, args, kwargs, output):
        calls.append((tuple(args[0].shape), kwargs["past_key_values"].get_seq_length()))
        assert output.logits.shape[1] == 1

    model.register_forward_hook(record, with_kwargs=True)
    timing = _time(model, _Job(batch=2, prompt=5, new=3, fresh=True))
    assert calls == [((2, 5), 5), ((2, 1), 6), ((2, 1), 7), ((2, 1), 8)]
    assert timing.prefill_seconds > 0
    assert timing.decode_seconds > 0


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux alone restarts it")
def test_peak_memory_is_since_its_restart():
    device = torch.device("cpu")
    big = torch.ones(64 * 2**20)  # 256 MiB, every page touched
    before = speed._peak_bytes(device)
    del big
    speed._restart_peak(device)
    if speed._peak_bytes(device) == before:
        pytest.skip("this system does not let a process restart its peak")
    assert before - speed._peak_bytes(device) > 200 * 2**20


def test_peak_memory_without_proc(monkeypatch):
    def nothing(*_args: object, **_options: object):
        raise OSError("no /proc here")

    monkeypatch.setattr(speed.Path, "read_text", nothing)
    monkeypatch.setattr(speed.Path, "write_text", nothing)
    speed._restart_peak(torch.device("cpu"))
    assert speed._peak_bytes(torch.device("cpu")) > 2**24
    assert speed._cpu_name()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batches": (1, 0)}, "batch is 0"),
        ({"batches": ()}, "no batch size"),
        ({"prompt": 0}, "prompt is 0"),
        ({"new": -1}, "new is -1"),
        ({"repeats": 0}, "repeats is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"dtype": "int3"}, "'int3' is not known"),
        ({"prompt": 60, "new": 5}, r"60 tokens and 5 new .* the 64 positions .*tiny"),
    ],
)
def test_refuses_before_any_process_starts(model_directory, monkeypatch, options, message):
    monkeypatch.setattr(speed, "_Worker", None)
    with pytest.raises(ShearlingError, match=message):
        bench([model_directory], **{"prompt": 4, "new": 4, **options})


def test_refuses_no_model_and_what_is_none(tmp_path):
    with pytest.raises(ShearlingError, match="no model to time"):
        bench([])
    with pytest.raises(ShearlingError, match="is not a model directory"):
        bench([tmp_path])
