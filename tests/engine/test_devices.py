"""What measures whole models: a device and a type by name, settled before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from typer.testing import CliRunner

from shearling import cli
from shearling.engine import devices
from shearling.engine.devices import SMALL, measured_on
from shearling.errors import ShearlingError
from shearling.model import loading
from tiny_tokenizer import write_llama


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with two GPUs, of which nothing is asked but their number."""
    monkeypatch.setattr(devices, "num_gpus", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card {device.index}")
    monkeypatch.setattr(devices, "has_bfloat16", lambda device: device.index == 0)


def test_a_processor_computes_in_float32_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_gpus", lambda: 0)
    assert measured_on("auto", "auto", [10 * SMALL]) == ("cpu", "float32")
    assert measured_on("cpu", "float16", []) == ("cpu", "float16")


def test_a_gpu_that_is_there_is_taken(gpu: None) -> None:
    assert measured_on("auto", "auto", [SMALL - 1]) == ("cuda:0", "float32")
    # One type for all, by the largest: a source and its cut have to compare.
    assert measured_on("auto", "auto", [SMALL // 2, SMALL]) == ("cuda:0", "bfloat16")
    assert measured_on("cuda:1", "auto", [SMALL]) == ("cuda:1", "float32")
    assert measured_on("cuda", "float16", [SMALL]) == ("cuda:0", "float16")
    assert measured_on("cpu", "auto", [SMALL]) == ("cpu", "float32")
    with pytest.raises(ShearlingError, match="card 1 does not compute in bfloat16"):
        measured_on("cuda:1", "bfloat16", [1])


@pytest.mark.parametrize(
    ("device", "dtype", "said"),
    [
        (
            "cuda:2",
            "auto",
            "cuda:2 was given, but the last GPU that torch sees is cuda:1; give that",
        ),
        ("cuda:x", "auto", "auto, cpu, cuda or cuda:N"),
        ("toaster", "auto", "no device 'toaster' here .--device.; give auto, cpu, cuda or cuda:N"),
        ("meta", "auto", "no device 'meta' here"),
        ("cpu", "int3", "'int3' is not known here; give float32, bfloat16, float16"),
    ],
)
def test_what_is_not_there(gpu: None, device: str, dtype: str, said: str) -> None:
    with pytest.raises(ShearlingError, match=said):
        measured_on(device, dtype, [1])


def test_a_server_may_see_what_this_process_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "num_gpus", lambda: 0)
    assert measured_on("cuda:1", "bfloat16", [1], ours=False) == ("cuda:1", "bfloat16")
    with pytest.raises(ShearlingError, match="no GPU that torch can use"):
        measured_on("cuda:1", "bfloat16", [1])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("devices") / "model", layers=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("eval", "MODEL", "--text", "TEXT"),
        ("bench", "MODEL", "--prompt", "4", "--new", "2"),
        ("compare", "MODEL", "--text", "TEXT", "--output", "PAGE"),
        ("judge", "MODEL", "MODEL", "--prompts", "TEXT", "--output", "RESULT"),
        ("studio", "MODEL", "--port", "0"),
    ],
)
def test_every_command_that_measures_refuses_it_before_a_weight_is_read(
    arguments: tuple[str, ...], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("weights were read")

    monkeypatch.setattr(devices, "num_gpus", lambda: 0)
    monkeypatch.setattr(loading, "stock_model", read)
    text = tmp_path / "text.txt"
    text.write_text("the sheep went through the gate\n" * 9)
    places = {"MODEL": model, "TEXT": text, "PAGE": tmp_path / "a.html", "RESULT": tmp_path / "a"}
    given = [str(places.get(one, one)) for one in arguments]
    ran = CliRunner().invoke(cli.app, [*given, "--device", "cuda:1"])
    assert isinstance(ran.exception, ShearlingError)
    assert "no GPU that torch can use; give --device cpu" in str(ran.exception)
    ran = CliRunner().invoke(cli.app, [*given, "--dtype", "int3"])
    assert "'int3' is not known here" in str(ran.exception)
