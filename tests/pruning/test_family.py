"""Several sizes at once: each is what it is alone, whole or not there, and kept where it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import shearling.pruning.run
from places import place
from shearling import CalibrationText, Checkpoint, Criteria, Repairs, Running, Size, prune
from shearling.cli import app
from shearling.data.bos import TokenWindows
from shearling.data.sources import TextSource
from shearling.errors import ShearlingError
from shearling.files.writer import file_digest
from shearling.pruning.family import FamilyPruning, prune_family
from shearling.pruning.nested import require_nested
from shearling.pruning.prune import prunings
from shearling.pruning.results import FamilyFile
from shearling.pruning.run import Run, Wanted, repair_need
from shearling.repair.calibration import Calibration, Tokens
from shearling.report import collect, page
from shearling.table.values import Keep
from tiny_tokenizer import write_llama

Models = Callable[[str], Path]
SHAPES = ("layers=7", "layers=5,mlp=24", "layers=6,hidden=28")  # the last one is rotated
NAMES = ("layers7", "layers6-hidden28", "layers5-mlp24")  # the largest first
OPTIONS = ("--samples", "8", "--length", "16", "--written", "4", "--seed", "3")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("family") / "flock", layers=8)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> CalibrationText:
    path = tmp_path_factory.mktemp("text") / "sheep.jsonl"
    lines = [f"{n} sheep went through the gate, and {n + 1} came back." for n in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return CalibrationText(file=path, samples=8, length=16, written=4, seed=3)


def pruned(model: Path, text: CalibrationText, output: Path, *more: str) -> Any:
    """The command, of all sizes."""
    shapes = [part for shape in SHAPES for part in ("--shape", shape)]
    command = ["prune", f"{model}", *shapes, "--calibration", f"{text.file}", *OPTIONS]
    return CliRunner().invoke(app, [*command, "--output", f"{output}", *more])


@pytest.fixture(scope="module")
def made(model: Path, text: CalibrationText, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("made") / "flocks"
    result = pruned(model, text, output)
    assert result.exit_code == 0, result.output
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["size", *NAMES, "wrote"]
    return output


def files_of(directory: Path) -> dict[str, str]:
    """File -> digest, but for the manifest."""
    return {
        file.name: file_digest(file)
        for file in directory.iterdir()
        if file.name != "shearling.json"
    }


def told(directory: Path) -> dict[str, Any]:
    """The manifest without what differs from one run to the next, or between one size and many."""
    manifest = json.loads((directory / "shearling.json").read_text())
    options = manifest["options"]
    for of, key in (
        (manifest, "created"), (manifest, "seconds"), (manifest["model"], "name"),
        (options, "family"), (options, "seconds_choosing"), (options["repair"], "seconds"),
        (options.get("rotation", {}), "seconds"),
    ):  # fmt: skip
        of.pop(key, None)
    return manifest


@pytest.mark.parametrize("shape", SHAPES)
def test_each_size_is_what_it_is_alone(
    model: Path, text: CalibrationText, made: Path, shape: str, tmp_path: Path
) -> None:
    size = Size(shape=shape)
    alone = prune(Checkpoint.open(model), tmp_path / "alone", size, calibration=text).path
    assert size.name in NAMES
    assert files_of(alone) == files_of(made / size.name)
    assert told(alone) == told(made / size.name)
    assert told(alone)["proof"]["passed"]


def test_what_lies_beside_them(model: Path, made: Path) -> None:
    values = json.loads((made / "family.json").read_text())
    family = FamilyFile.from_json(values, made)
    assert {path.name for path in made.iterdir()} == {*NAMES, "family.json", "report.html"}
    assert tuple(size.name for size in family.sizes) == NAMES
    assert family.source.fingerprint == Checkpoint.open(model).fingerprint
    for size in family.sizes:
        opened, manifest = Checkpoint.open(made / size.name), told(made / size.name)
        assert size.model.fingerprint == opened.fingerprint
        assert (size.parameters, size.shape) == (opened.parameters, dict(opened.shape))
        steps = manifest["options"]["repair"]["steps"]
        mean = sum(step["error_after"] for step in steps) / len(steps)
        assert size.error_after == pytest.approx(mean)
        assert 0 < mean < (size.error_before or 0)
        named = json.loads((made / size.name / "shearling.json").read_text())["options"]["family"]
        assert (named["name"], named["sizes"], named["nested"]) == ("flocks", [*NAMES], False)
    (section,) = page(collect([made])).split('id="sizes"')[1:]
    for name in NAMES:
        assert name.replace("_", "") in section.split("</section>")[0]


def test_what_is_there_is_kept_and_what_failed_is_made_again(
    model: Path, text: CalibrationText, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, cut = tmp_path / "flocks", shearling.pruning.run.cut
    written: list[str] = []

    def failing(source: Checkpoint, keep: Any, directory: Path, **options: Any) -> Checkpoint:
        if written:
            raise ShearlingError("the disk ran full")
        written.append(directory.name)
        return cut(source, keep, directory, **options)

    monkeypatch.setattr(shearling.pruning.run, "cut", failing)
    assert pruned(model, text, output).exit_code == 1
    assert written == ["layers7"]
    assert [path.name for path in output.iterdir()] == written  # nothing half, no family yet
    before = (output / "layers7" / "shearling.json").read_bytes()
    monkeypatch.setattr(shearling.pruning.run, "cut", cut)
    result = pruned(model, text, output)
    assert result.exit_code == 0
    assert "layers7 is there already, of the same inputs, and is kept" in result.stderr
    assert (output / "layers7" / "shearling.json").read_bytes() == before
    for name in NAMES:
        assert files_of(output / name) == files_of(made / name)
    # Of other inputs, it is not taken for one of these; nothing is made.
    other = pruned(model, text, output, "--final-norm", "--seed", "4")
    assert other.exit_code == 1
    assert "layers7 is there already, and was not made of the same model" in f"{other.exception}"


def test_all_there_runs_nothing(
    model: Path, text: CalibrationText, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shearling.pruning.run, "BlockStream", lambda *_, **__: pytest.fail("begun"))
    before = (made / "family.json").read_bytes()
    sizes = [Size(shape=shape) for shape in SHAPES]
    models = prune_family(Checkpoint.open(model), made, sizes, calibration=text)
    assert tuple(models) == NAMES
    assert (made / "family.json").read_bytes() == before
    planned = pruned(model, text, made, "--dry-run", "--json")
    assert all(plan["made"] for plan in json.loads(planned.stdout)["sizes"].values())


@pytest.mark.parametrize(
    ("sizes", "nested", "sentence"),
    [
        ([Size(params="0.9x"), Size(params="0.9x")], False, "--params 0.9x was asked for twice"),
        ([Size(params="0.9x"), Size(params="0.90x")], False, "0.9x and --params 0.90x come to the"),
        ([Size(params="0.9x"), Size(params="1x")], False, "1x asks for 90,180 parameters, but"),
        ([Size(params="0.9x"), Size(shape="layers=8")], False, "is the model's own"),
        ([Size(params="0.9x"), Size(remove=(1,))], False, "--remove 1 names the blocks .* 2 sizes"),
        ([Size(params="0.9x")], True, "--nested has .* one size was asked for"),
        (
            [Size(shape="layers=7,mlp=20"), Size(shape="layers=4,mlp=30")], True,
            "--shape layers=4,mlp=30 would keep mlp=30, but the larger --shape layers=7,mlp=20",
        ),
    ],
)  # fmt: skip
def test_sizes_that_are_refused(
    model: Path, sizes: list[Size], nested: bool, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        FamilyPruning.of(Checkpoint.open(model), tmp_path / "out", sizes, nested=nested)
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    taken = tmp_path / "taken"
    (taken / "layers7").mkdir(parents=True)
    (taken / "layers7" / "wool.txt").write_text("")
    sizes = [Size(shape="layers=7"), Size(shape="layers=6")]
    source = Checkpoint.open(model)
    for output, sentence in (
        (tmp_path / "file", "is a file; name a directory for the sizes"),
        (model, "is a model itself; name a directory for the sizes"),
        (taken, "layers7 is there already, and was not made of"),
    ):
        with pytest.raises(ShearlingError, match=sentence):
            prune_family(source, output, sizes)


def test_names() -> None:
    assert [
        size.name
        for size in (
            Size(params="113 M"), Size(params=5000), Size(active_params="0.5x"), Size(layers=3),
            Size(shape={"layers": 4, "mlp": 24}), Size(shape=" layers=4, mlp=24"),
            Size(remove=(1, 2)),
        )
    ] == [
        "113M", "5000", "active-0.5x", "layers3", "layers4-mlp24", "layers4-mlp24", "without-1-2",
    ]  # fmt: skip


def test_options_are_told_of_once_and_more_cuts_need_more_room(
    model: Path, text: CalibrationText
) -> None:
    said: list[str] = []
    source = Checkpoint.open(model)
    sizes = [Size(layers=7), Size(layers=6)]
    settled = prunings(
        source, sizes, calibration=text, criteria=Criteria(by="flap"),
        repairs=Repairs(router=True), running=Running(notify=said.append),
    )  # fmt: skip
    assert said == sorted(set(said), key=said.index)
    assert settled[0].place is settled[1].place
    calibration = settled[0].calibration
    one, two, three = (repair_need(source, calibration, cuts).bytes for cuts in (1, 2, 3))
    assert one < two < three
    assert three - two == two - one


# --- nested --------------------------------------------------------------------------------------


def drawn() -> Tokens:
    ids_NS = torch.randint(3, 101, (8, 17), generator=torch.Generator().manual_seed(1))
    plain = Calibration((TextSource(Path("none.txt")),), samples=8, length=17, shares=(), written=0)
    fields = {name: getattr(plain, name) for name in plain.__dataclass_fields__}
    return Tokens(**fields, tokens=TokenWindows(ids_NS))


@pytest.mark.parametrize("by", [None, "greedy,magnitude-l2"])
def test_nested(models: Models, by: str | None) -> None:
    source = Checkpoint.open(models("llama"))
    sizes = [
        {"layers": 4, "mlp": 40, "heads": 6}, {"layers": 3, "mlp": 20, "heads": 6},
        {"layers": 2, "mlp": 10, "heads": 4, "kv_heads": 2, "hidden": 30},
        {"layers": 2, "mlp": 10, "heads": 2, "kv_heads": 2, "hidden": 20},
    ]  # fmt: skip
    wanted = [Wanted(source.shape.with_(**size), by=by) for size in sizes]
    run = Run(source, drawn(), place=place())
    nested = run.choose_all(wanted, nested=True)
    shape = source.shape
    for larger, smaller in pairwise(nested):
        layers = [one.keep.model.get("layers", ()) for one in (larger, smaller)]
        assert set(layers[1]) <= set(layers[0])
        for axis in ("mlp", "heads", "kv_heads"):
            all_of = tuple(range(shape[axis]))
            rows = [
                dict(zip(kept, one.keep.blocks.get(axis, [all_of] * 9), strict=False))
                for kept, one in zip(layers, (larger, smaller), strict=True)
            ]
            for layer in layers[1]:
                assert set(rows[1][layer]) <= set(rows[0][layer])
        hidden = [set(one.keep.model.get("hidden", range(shape["hidden"])))
                  for one in (larger, smaller)]  # fmt: skip
        assert hidden[1] <= hidden[0]
    for one, size in zip(nested, wanted, strict=True):
        assert source.layout.cut(one.keep, shape).after == size.after
    # The largest is chosen as it is alone, and each is, where nobody asks for nesting.
    first = Run(source, drawn(), place=place()).choose(wanted[0])
    assert first.keep == nested[0].keep
    free = run.choose_all(wanted)
    for choice, size in zip(free, wanted, strict=True):
        again = Run(source, drawn(), place=place()).choose(size)
        assert choice.keep == again.keep
        timed = {"seconds_choosing": 0}
        assert {**choice.options, **timed} == {**again.options, **timed}


def test_what_cannot_be_nested(models: Models) -> None:
    source = Checkpoint.open(models("llama"))
    larger = Keep({"layers": (0, 1, 2, 3)}, {"mlp": ((0, 1, 2),) * 4})
    inside = Keep({"layers": (0, 3)}, {"mlp": ((0, 2), (1, 2))})
    after = source.layout.cut(inside, source.shape).after
    require_nested(inside, larger, source, after)
    for keep, axis in (
        (Keep({"layers": (0, 4)}, {"mlp": ((0, 2), (1, 2))}), "layers"),
        (Keep({"layers": (0, 3)}, {"mlp": ((0, 2), (1, 3))}), "mlp"),
        (Keep({"layers": (0, 3)}), "mlp"),
    ):
        with pytest.raises(ShearlingError, match=f"cannot lie within .* too few of {axis};"):
            require_nested(keep, larger, source, after)
