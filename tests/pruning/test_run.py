"""From a shape to a repaired checkpoint, in the library's own words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import naive
import shearling.files.writer
import shearling.pruning.run
import shearling.scoring.score
from places import choose, place, prune_to
from shearling.data.bos import TokenWindows
from shearling.data.sources import TextSource
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.choose import without
from shearling.repair.calibration import Calibration
from shearling.scoring.registry import criteria_for, kinds, names
from shearling.scoring.score import score
from shearling.scoring.score_units import score_units
from shearling.scoring.scores import Scores
from shearling.table.values import Shape
from tiny_cuts import AXES, sizes_of
from tiny_tokenizer import write_llama

Models = Callable[[str], Path]
GUARDED = Scores("mine", "layers", ((1.0,) * 5,), protected=(0, 1, 3, 4))
SOME = ["llama", "qwen2-tied", "gemma2", "gemma3", "phi3", "gpt_neox", "opt-projected", "opt-bare"]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    path = tmp_path_factory.mktemp("text") / "sheep.txt"
    path.write_text("".join(f"{n} sheep went through the gate. " for n in range(60)))
    return Calibration((TextSource(path),), samples=8, length=17, shares=(0.5,), written=0)


@pytest.fixture(autouse=True)
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny models have no tokenizers: every text is the same tokens."""

    def drawn(self: Calibration, checkpoint: Checkpoint) -> TokenWindows:
        generator = torch.Generator().manual_seed(self.seed)
        ids_NS = torch.randint(3, 101, (self.samples, self.length), generator=generator)
        return TokenWindows(ids_NS)

    monkeypatch.setattr(Calibration, "windows", drawn)


def shape_of(checkpoint: Checkpoint, variant: str, *axes: str) -> Shape:
    known = tuple(axis for axis in axes if axis in checkpoint.shape)
    return checkpoint.shape.with_(**sizes_of(variant, known))


# --- criteria ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("by", "repaired", "expected"),
    [
        (None, True, ("repair", "fisher-energy")),
        (None, False, ("perplexity", "fisher-energy")),
        ("repair", False, ("repair", "fisher-energy")),
        ("influence", True, ("influence", "fisher-energy")),
        ("flap", True, ("repair", "flap")),
        ("flap", False, ("perplexity", "flap")),
        ("taylor+,obs", True, ("taylor+", "obs")),
        ("obs, taylor+", True, ("taylor+", "obs")),
        ("taylor", True, ("taylor", "taylor")),
        ("taylor,obs", True, ("taylor", "obs")),
        ("obs,taylor", True, ("taylor", "obs")),
        ("perplexity,taylor", True, ("perplexity", "taylor")),
        ("taylor,perplexity", True, ("perplexity", "taylor")),
    ],
)
def test_criteria(
    models: Models, by: str | None, repaired: bool, expected: tuple[str, str]
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    assert criteria_for(by, checkpoint, repaired=repaired) == (*expected, "reroute")


def test_default_where_repair_cannot_score(models: Models, variant: str) -> None:
    found = criteria_for(None, Checkpoint.open(models(variant)), repaired=True)
    others = ("gemma2", "gemma3", "olmo2", "olmo3", "glm4", "opt-projected")
    assert found == (
        "perplexity" if variant in others else "repair",
        "fisher-energy",
        "reroute",
    )


def test_every_criterion_is_of_a_kind() -> None:
    both = {"taylor": ("blocks", "units")}
    assert {name: kinds(name) for name in names("blocks")} == {
        name: both.get(name, ("blocks",)) for name in names("blocks")
    }
    assert {name: kinds(name) for name in names("units")} == {
        name: both.get(name, ("units",)) for name in names("units")
    }
    assert {name: kinds(name) for name in names("experts")} == dict.fromkeys(
        names("experts"), ("experts",)
    )


@pytest.mark.parametrize(
    ("by", "sentence"),
    [
        ("entropy", "'entropy' is not known; .* repair, perplexity, .* fisher-energy, fisher"),
        ("", "criterion '' is not known"),
        ("taylor,", "criterion '' is not known"),
        ("repair,perplexity", "names two criteria for blocks"),
        ("flap,fisher", "names two criteria for units"),
        ("taylor,taylor", "names two criteria for"),
        ("perplexity,flap,taylor", "names two criteria for"),
        ("flap,flap", "names two criteria for units"),
    ],
)
def test_criteria_that_are_refused(models: Models, by: str, sentence: str) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        criteria_for(by, Checkpoint.open(models("llama")), repaired=True)


# --- choices -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", [None, "influence,flap", "magnitude,magnitude-l2"])
@pytest.mark.parametrize("variant", SOME)
def test_a_choice_is_legal(models: Models, variant: str, by: str | None, text: Calibration) -> None:
    checkpoint = Checkpoint.open(models(variant))
    after = shape_of(checkpoint, variant, *AXES[:-1])
    choice = choose(checkpoint, after, by=by, calibration=text)
    assert checkpoint.layout.cut(choice.keep, checkpoint.shape).after == after
    blocks, units, _ = criteria_for(by, checkpoint, repaired=True)
    assert choice.options["criterion"] == blocks
    assert choice.options["unit_criterion"] == units
    gone = set(range(5)) - set(choice.keep.model["layers"])
    assert choice.options["removed"] == sorted(gone)
    assert choice.options["calibration"] == text.as_json() | {"bos": False}
    json.dumps(dict(choice.options), allow_nan=False)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("by", ["repair", "perplexity", "magnitude", "greedy"])
def test_blocks_are_those_of_the_scores(
    models: Models, by: str, stream: bool, text: Calibration, ids: torch.Tensor
) -> None:
    """And the units of those that survive are those that score highest there."""
    path = models("llama")
    checkpoint = Checkpoint.open(path)
    after = checkpoint.shape.with_(layers=3, mlp=20)
    choice = choose(checkpoint, after, by=by, calibration=text, repaired=False, stream=stream)
    if by == "perplexity":
        ids_NS = text.windows(checkpoint).ids_NS
        values = [naive.perplexity(path, ids_NS, [block]) for block in range(5)]
        assert choice.options["scores"] == pytest.approx(values, rel=1e-5)
        assert choice.options["removed"] == sorted(sorted(range(5), key=values.__getitem__)[:2])
    if by == "repair":
        first = choice.options["removed"][0]
        assert choice.options["removed"] == [first, first + 1]
    blocks, ids_NS = BlockStream(checkpoint, place(not stream)), text.windows(checkpoint).ids_NS
    units = score_units(blocks, "fisher-energy", ids_NS, ["mlp"])["mlp"].rows
    for block, kept in zip(choice.keep.model["layers"], choice.keep.blocks["mlp"], strict=True):
        highest = sorted(range(50), key=units[block].__getitem__)[-20:]
        assert list(kept) == sorted(highest)


def test_ten_sequences_are_enough_to_score_blocks(
    models: Models, text: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}
    real = shearling.scoring.score.score_tokens

    def score_tokens(stream: Any, name: str, ids_NS: torch.Tensor, **options: Any) -> Scores:
        seen[name] = tuple(ids_NS.shape)
        return real(stream, name, ids_NS[:4, :9], **options)

    monkeypatch.setattr(shearling.scoring.score, "score_tokens", score_tokens)
    monkeypatch.setattr(shearling.pruning.run, "check_length", lambda *_: None)  # of 64 positions
    checkpoint = Checkpoint.open(models("llama"))
    much = replace(text, samples=12, length=150)
    for by in ("influence", "repair"):
        choose(checkpoint, checkpoint.shape.with_(layers=4), by=by, calibration=much)
    assert seen == {"influence": (10, 128), "repair": (12, 150)}


def test_blocks_chosen_before(models: Models, text: Calibration, ids: torch.Tensor) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    after = checkpoint.shape.with_(layers=3, mlp=20)
    named = choose(checkpoint, after, keep_blocks=without([0, 3], 5), calibration=text)
    assert named.keep.model == {"layers": (1, 2, 4)}
    assert named.options["criterion"] is None
    scores = Scores(
        "mine", "layers", ((5.0, 1.0, 4.0, 2.0, 3.0),), details={"calibration": {"a": 1}}
    )
    chosen = choose(checkpoint, after, scores=scores, by="magnitude-l1", repaired=False)
    assert chosen.keep.model == {"layers": (0, 2, 4)}
    assert chosen.options["scores"] == [5.0, 1.0, 4.0, 2.0, 3.0]
    assert chosen.options["calibration"] == {"a": 1}  # what the scores were taken on


def test_protected_blocks_stay(models: Models, text: Calibration) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    after = checkpoint.shape.with_(layers=3)
    for by in ("repair", "perplexity", "magnitude"):
        choice = choose(checkpoint, after, by=by, calibration=text, protect=(1, 2))
        assert choice.keep.model["layers"] == (0, 3, 4)


def test_chance_is_seeded(models: Models, text: Calibration) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    after = checkpoint.shape.with_(mlp=20, hidden=35)
    keeps = [
        choose(checkpoint, after, by="random", calibration=replace(text, seed=seed)).keep
        for seed in (0, 0, 1)
    ]
    assert keeps[0] == keeps[1] != keeps[2]
    assert choose(checkpoint, after, by="random", repaired=False).keep == keeps[0]


@pytest.mark.parametrize(
    ("variant", "sizes", "options", "sentence"),
    [
        ("llama", {"layers": 6}, {}, "layers=6 was given"),
        ("llama", {"heads": 4}, {}, "heads=4, kv_heads=3 cannot be written"),
        ("llama", {"layers": 4}, {"by": "entropy"}, "'entropy'"),
        ("llama", {"layers": 4}, {"calibration": None}, "criterion repair .* --calibration FILE"),
        ("llama", {"mlp": 4}, {"calibration": None}, "criterion fisher-energy .* --calibration"),
        ("llama", {"vocab": 60}, {"calibration": None}, "smaller vocabulary .* --calibration"),
        ("llama", {"layers": 4}, {"protect": (3, 2)}, "leaves none to remove"),
        ("llama", {"layers": 3}, {"protect": (2, 2)}, "only 1 is not protected"),
        ("llama", {"layers": 3}, {"scores": GUARDED}, "only 1 is not protected"),
        ("gemma2", {"layers": 4}, {"by": "repair"}, "those of gemma2 are not"),
        ("llama", {"layers": 1}, {"by": "repair", "protect": (0, 1)}, "no 4 neighbouring"),
    ],
)
def test_choices_that_are_refused_before_a_weight_is_read(
    models: Models,
    variant: str,
    sizes: dict[str, int],
    options: dict[str, Any],
    sentence: str,
    text: Calibration,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    monkeypatch.setattr(shearling.pruning.run, "BlockStream", lambda *_, **__: pytest.fail("begun"))
    options = {"calibration": text} | options
    with pytest.raises(ShearlingError, match=sentence):
        choose(checkpoint, checkpoint.shape.with_(**sizes), **options)


@pytest.mark.parametrize(
    ("by", "axis", "sentence"),
    [
        ("repair", "mlp", "'repair' does not score units of mlp; choose one of fisher-energy"),
        ("random", "layers", "'random' is not known; choose one of repair, perplexity"),
        ("random", "vocab", "'vocab' has no units .* hidden, heads, kv_heads, mlp"),
        ("fisher", "mlp", "fisher runs the model on text; give --calibration"),
    ],
)
def test_unit_scores_that_are_refused(
    models: Models, by: str, axis: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        shearling.scoring.score, "BlockStream", lambda *_, **__: pytest.fail("begun")
    )
    with pytest.raises(ShearlingError, match=sentence):
        score(Checkpoint.open(models("llama")), by, axis=axis)


# --- to the end ----------------------------------------------------------------------------------


@pytest.mark.parametrize("repaired", [True, False])
@pytest.mark.parametrize("variant", ["llama", "gpt_neox", "gemma2", "phi3"])
def test_prune(
    models: Models, variant: str, repaired: bool, text: Calibration, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    after = shape_of(checkpoint, variant, *AXES[:-1])
    text = replace(text, samples=32)
    choice = choose(checkpoint, after, calibration=text, repaired=repaired)
    result = prune_to(
        checkpoint, choice, tmp_path / "out", calibration=text, repaired=repaired,
        shard_bytes=20_000,
    )  # fmt: skip
    assert result.shape == after
    stock = naive.stock(tmp_path / "out")
    assert sum(p.numel() for p in stock.parameters()) == checkpoint.layout.count(after)
    manifest = json.loads((tmp_path / "out" / "shearling.json").read_text())
    assert manifest["proof"]["passed"]
    assert manifest["keep"] == json.loads(json.dumps(choice.keep.as_json()))
    assert manifest["seed"] == text.seed
    assert ("repaired" in manifest) == ("repair" in manifest["options"]) == repaired
    assert {**manifest["options"], "repair": None} == {**choice.options, "repair": None}

    ids_BS = torch.randint(3, 101, (2, 17), generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        found = stock(input_ids=ids_BS, use_cache=False).logits
    expected = naive.masked_logits(models(variant), choice.keep, ids_BS)
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert difference > 1e-3 if repaired else difference < 1e-5
    if repaired:
        assert manifest["options"]["repair"]["tokens"] == 2 * 32 * 17
        plain = prune_to(checkpoint, choice, tmp_path / "plain", repaired=False)
        before = load_file(plain.path / "model.safetensors")
        after_repair = {
            name: tensor
            for file in (tmp_path / "out").glob("*.safetensors")
            for name, tensor in load_file(file).items()
        }
        changed = {name for name in before if not torch.equal(before[name], after_repair[name])}
        assert changed == set(manifest["repaired"])
        assert changed
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "plain"}


def test_what_the_model_says_serves_the_repair(
    models: Models, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    real = shearling.pruning.run.refit_all

    def refit_all(stream: Any, cuts: Any, ids_NS: torch.Tensor, **options: Any) -> Any:
        seen.append(ids_NS)
        return real(stream, cuts, ids_NS, **options)

    monkeypatch.setattr(shearling.pruning.run, "refit_all", refit_all)
    checkpoint = Checkpoint.open(models("llama"))
    choice = choose(checkpoint, checkpoint.shape.with_(mlp=20), by="random", calibration=text)
    for shares, written, stream in (((), 0, None), ((0.5, 1.0), 5, None), ((0.5,), 5, True)):
        given = replace(text, shares=shares, written=written)
        place = tmp_path / f"{len(seen)}"
        prune_to(checkpoint, choice, place, calibration=given, stream=stream)
    # A model that is streamed writes nothing.
    assert [len(ids_NS) for ids_NS in seen] == [8, 29, 16]
    assert torch.equal(seen[0], text.windows(checkpoint).ids_NS)
    assert torch.equal(seen[1][:8], seen[0])
    assert not torch.equal(seen[1][8:16], seen[0])


def test_a_repair_needs_text(models: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    choice = choose(checkpoint, checkpoint.shape.with_(mlp=20), by="random", repaired=False)
    with pytest.raises(ShearlingError, match="a repair runs the model on text; give --calibration"):
        prune_to(checkpoint, choice, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_refused_before_a_repair(
    models: Models, text: Calibration, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(models("llama"))
    choice = choose(checkpoint, checkpoint.shape.with_(mlp=30), by="magnitude-l2", calibration=text)
    needed = shearling.pruning.run.written_bytes(checkpoint, choice.keep)
    usage = shutil.disk_usage(tmp_path)._replace(free=needed - 1)
    monkeypatch.setattr(shearling.files.writer.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(shearling.pruning.run, "refit_all", None)
    with pytest.raises(ShearlingError, match="free some space"):
        prune_to(checkpoint, choice, tmp_path / "out", calibration=text)
    monkeypatch.undo()
    written = prune_to(checkpoint, choice, tmp_path / "plain", repaired=False)
    assert (
        sum(tensor.nbytes for tensor in load_file(written.path / "model.safetensors").values())
        == needed
    )


def test_weights_that_are_not_finite(text: Calibration, tmp_path: Path) -> None:
    path = write_llama(tmp_path / "broken", layers=5)
    model = naive.stock(path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(path)
    checkpoint = Checkpoint.open(path)
    after = checkpoint.shape.with_(layers=4)
    with pytest.raises(ShearlingError, match=r"^the tensor model\.norm\.weight of"):
        choose(checkpoint, after, by="perplexity", calibration=text)
    with pytest.raises(ShearlingError, match=r"^the tensor model\.norm\.weight of"):
        choose(checkpoint, after, calibration=text)


def test_scores_from_the_other_command_agree(tmp_path: Path, text: Calibration) -> None:
    """`shearling score` and a prune by the same criterion, on a model with a tokenizer."""
    checkpoint = Checkpoint.open(write_llama(tmp_path / "llama", layers=5))
    choice = choose(checkpoint, checkpoint.shape.with_(layers=3), by="magnitude", repaired=False)
    assert choice.options["scores"] == list(score(checkpoint, "magnitude").values)
