"""Rotations against stock models: the same function before a cut, and what theory says after."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import shearling.engine.views.rotated
import shearling.repair.rotate
from naive import stock
from places import choose, place, prune_to, refit
from shearling.cli import main
from shearling.data.bos import TokenWindows
from shearling.data.sources import TextSource
from shearling.engine.place import Place
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.repair.calibration import Calibration
from shearling.repair.rotate import Rotation, refusal, rotate
from shearling.table.axes import Row
from shearling.table.families.base import Affine
from shearling.table.values import Keep, Shape
from tiny_cuts import relative
from tiny_models import HYBRIDS, LEADING, MIXTURES, tiny_config, tiny_model
from tiny_tokenizer import VOCAB, byte_tokenizer, write_llama

Models = Callable[[str], Path]

REFUSED = {
    "gemma2": "norms what a block writes",
    "gemma3": "norms what a block writes",
    "olmo2": "norms what a block writes",
    "olmo3": "norms what a block writes",
    "glm4": "norms what a block writes",
    "cohere2": "LayerNorms",
    "gpt_neox": "LayerNorms",
    "gpt_neox-serial": "LayerNorms",
    "opt": "LayerNorms",
    "opt-projected": "LayerNorms",
    "opt-bare": "LayerNorms",
}
ROTATED = [variant for variant in LEADING if variant not in REFUSED]
TIED = [variant for variant in ROTATED if tiny_config(variant).tie_word_embeddings]
# A multiple of nine heads, as some configs want it, of odd size.
WIDTH = 27
NARROW = Keep({"hidden": tuple(range(WIDTH))})


@pytest.fixture(scope="session")
def doubles(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Variant -> its tiny model stored in double precision."""
    root = tmp_path_factory.mktemp("doubles")

    def directory(variant: str) -> Path:
        if not (root / variant).is_dir():
            tiny_model(variant).double().save_pretrained(root / variant)
        return root / variant

    return directory


def projected(source: Path, path: Path) -> Path:
    """A model whose stream lies in a subspace of WIDTH dimensions, askew to the channels.

    Epsilon is all but nothing, as norms over fewer channels weigh it otherwise.
    """
    shutil.copytree(source, path)
    config = json.loads((path / "config.json").read_text()) | {"rms_norm_eps": 1e-12}
    (path / "config.json").write_text(json.dumps(config))
    draw = torch.randn(36, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    axes_DK, _ = torch.linalg.qr(draw)
    onto_DD = axes_DK @ axes_DK.T
    tensors = load_file(path / "model.safetensors")
    for name, tensor in tensors.items():
        if "embed_tokens" in name:
            tensors[name] = tensor @ onto_DD
        elif name.split(".")[-2] in ("o_proj", "down_proj", "output_linear"):
            tensors[name] = onto_DD @ tensor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def turned(
    path: Path, ids: Tensor, directory: Path, at: Place | None = None, **options: Any
) -> Rotation:
    source = BlockStream(Checkpoint.open(path), at or place())
    return rotate(source, ids, WIDTH, directory, **options)


@torch.no_grad()
def logits(path: Path, ids: Tensor) -> Tensor:
    """As stock transformers gives them, in double precision, its norms too."""
    model = stock(path, torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(rms_norm, module)
    return model(input_ids=ids, use_cache=False).logits


def rms_norm(module: Any, h: Tensor) -> Tensor:
    """Without the rounding to single precision that stock norms do in every type."""
    return module.weight * h / (h.square().mean(-1, keepdim=True) + module.variance_epsilon).sqrt()


@pytest.mark.parametrize("variant", ROTATED)
def test_a_rotated_model_is_the_source(
    doubles: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    found = turned(doubles(variant), ids, tmp_path / "r")
    assert relative(logits(tmp_path / "r", ids), logits(doubles(variant), ids)) < 1e-12
    assert found.figures["proof"]["tokens"] == 64
    before = load_file(doubles(variant) / "model.safetensors")
    after = load_file(tmp_path / "r" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    reading = {n for n in before if n.endswith(".bias") and "o_proj" not in n and "down" not in n}
    assert changed == before.keys() - reading - {
        n for n in before if "q_norm" in n or "k_norm" in n
    }
    norms = [t for n, t in after.items() if n.endswith("norm.weight") and len(t) == 36]
    assert len(norms) == 2 * 5 + 1
    # What reads a norm has columns of one size: the gain holds what differs between them.
    for block in range(5):
        readers = [
            t for n, t in after.items()
            if n.endswith("proj.weight") and f".{block}.self_attn." in n and "o_proj" not in n
        ]  # fmt: skip
        sizes = torch.cat(readers).square().sum(0)
        assert torch.allclose(sizes, sizes.mean().expand(36), rtol=1e-4)


@pytest.mark.parametrize("variant", [v for v in (*MIXTURES, *HYBRIDS) if "gemma4" not in v])
def test_every_reader_of_a_mixture_is_turned_by_its_own_norm(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    """Experts' stacks, routers, latent projections, linear attention; routing is the same too."""
    width = 32  # of whole 16 bytes in any type, as products of all experts at once want rows
    source = BlockStream(Checkpoint.open(models(variant)), place())
    found = rotate(source, ids, width, tmp_path / "r")
    with torch.no_grad():
        expected, rotated = (
            stock(path)(input_ids=ids, use_cache=False).logits
            for path in (models(variant), tmp_path / "r")
        )
    assert relative(rotated, expected) < 1e-4
    if variant not in ("qwen2_moe", "olmoe"):  # whose heads are as wide as the stream says
        cut(found.cuttable, Keep({"hidden": tuple(range(width))}), tmp_path / "out")  # and proof


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied"])
def test_the_first_axes_hold_the_most_energy(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    """Against hooks on the whole stock model."""
    model, seen = stock(models(variant)), []
    for name, module in model.named_modules():
        if name.endswith(("input_layernorm", "post_attention_layernorm", "model.norm")):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    states = torch.cat(seen).double()
    states /= states.norm(dim=1, keepdim=True)
    energy = torch.linalg.svdvals(states).square()
    found = turned(models(variant), ids, tmp_path / "r")
    assert found.figures["kept_energy"] == pytest.approx(float(energy[:WIDTH].sum() / energy.sum()))
    # That share of the states is what the first channels of the rotated model hold.
    embedded = {n: t.double() for n, t in found.exact.read(["model.embed_tokens.weight"])}
    before = load_file(models(variant) / "model.safetensors")["model.embed_tokens.weight"].double()
    basis = torch.linalg.lstsq(before, embedded["model.embed_tokens.weight"]).solution
    assert torch.allclose(basis.T @ basis, torch.eye(36).double(), atol=1e-5)
    share = (states @ basis)[:, :WIDTH].square().sum() / states.square().sum()
    assert float(share) == pytest.approx(found.figures["kept_energy"], rel=1e-5)


@pytest.mark.parametrize("variant", ROTATED)
def test_a_stream_in_a_subspace_is_cut_to_it_without_loss(
    doubles: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    source = projected(doubles(variant), tmp_path / "source")
    expected = logits(source, ids)
    # In single precision the axes err by its rounding over the least energy kept, which differs
    # from one processor to the next.
    found = turned(source, ids, tmp_path / "r", replace(place(False), dtype=torch.float64))
    assert found.figures["kept_energy"] == pytest.approx(1)
    cut(found.cuttable, NARROW, tmp_path / "out")
    assert relative(logits(tmp_path / "out", ids), expected) < 1e-9
    cut(Checkpoint.open(source), NARROW, tmp_path / "raw")
    assert relative(logits(tmp_path / "raw", ids), expected) > 0.05


@pytest.mark.parametrize("variant", ROTATED)
def test_a_lossy_cut_is_proven_and_loads(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    source = Checkpoint.open(models(variant))
    found = rotate(BlockStream(source, place()), ids, WIDTH, tmp_path / "r")
    (tmp_path / "solved").mkdir()
    keep = Keep({**NARROW.model, "layers": (0, 1, 3)})
    solved = refit(found.cuttable, keep, ids, tmp_path / "solved", reference=found.exact)
    for stream in (False, True):
        out = tmp_path / f"out-{stream}"
        result = cut(found.cuttable, keep, out, replaced=solved.replaced, place=place(not stream))
        manifest = json.loads((out / "shearling.json").read_text())
        assert manifest["proof"]["max_relative_difference"] < 1e-5
        assert manifest["source"]["fingerprint"] == source.fingerprint
        assert manifest["source"]["parameters"] == source.parameters
        assert result.parameters == sum(p.numel() for p in stock(out).parameters())
    assert result.config.tie_word_embeddings == source.config.tie_word_embeddings


def test_norms_are_widened_in_the_result_and_in_the_masked_source(
    models: Models, ids: Tensor, tmp_path: Path
) -> None:
    found = turned(models("llama"), ids, tmp_path / "r").cuttable
    scale = (36 / WIDTH) ** 0.5
    cut(found, NARROW, tmp_path / "out")
    norm = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    before = dict(found.read(["model.norm.weight"]))["model.norm.weight"]
    assert torch.allclose(norm, before[:WIDTH] * scale)

    def undone(row: Row, before: Shape, after: Shape) -> Affine | None:
        return Affine(scale, 0.0) if row.role == "norm" else None

    wrong = replace(found, family=replace(found.family, rescale=undone))
    with pytest.raises(ShearlingError, match="proof of surgery failed"):
        cut(wrong, NARROW, tmp_path / "wrong")


@pytest.mark.parametrize("variant", TIED)
def test_a_tied_head_reads_what_stays_with_the_gain_it_had(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    """With P the span that stays, the head is E P diag(g) P in the source's basis."""
    before = load_file(models(variant) / "model.safetensors")
    found = turned(models(variant), ids, tmp_path / "r")
    cut(found.cuttable, NARROW, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    embedding, gain = (before[f"model.{n}.weight"].double() for n in ("embed_tokens", "norm"))
    cut_embedding, cut_gain = (
        after[f"model.{n}.weight"].double() for n in ("embed_tokens", "norm")
    )
    span = torch.linalg.lstsq(embedding, cut_embedding).solution  # (36, WIDTH), orthonormal
    expected = span.T @ torch.diag(gain) @ span
    assert torch.allclose(expected, torch.diag(expected.diagonal()), atol=1e-5)
    assert torch.allclose(cut_gain, expected.diagonal() * (36 / WIDTH) ** 0.5, atol=1e-5)


@pytest.mark.parametrize("variant", ["llama", "llama-tied"])
def test_a_repair_follows_the_source_and_not_its_tied_approximation(
    doubles: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    """Where a cut loses nothing there is nothing to repair, whatever the rest of the basis is."""
    source = projected(doubles(variant), tmp_path / "source")
    found = turned(source, ids, tmp_path / "r")
    (tmp_path / "solved").mkdir()
    solved = refit(found.cuttable, NARROW, ids, tmp_path / "solved", reference=found.exact)
    assert max(step.error_before for step in solved.steps) < 1e-8
    cut(found.cuttable, NARROW, tmp_path / "out", replaced=solved.replaced)
    assert relative(logits(tmp_path / "out", ids), logits(source, ids)) < 1e-5


def test_streamed_sharded_and_resident_are_the_same(
    models: Models, ids: Tensor, tmp_path: Path
) -> None:
    path = models("llama-tied")
    one = turned(path, ids, tmp_path / "one")
    many = turned(path, ids, tmp_path / "many", place(False), shard_bytes=10_000)
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 3
    names = list(one.cuttable.files)
    found = dict(many.cuttable.read(names))
    assert all(torch.allclose(t, found[n], atol=1e-6) for n, t in one.cuttable.read(names))


def test_the_source_s_type_is_kept(ids: Tensor, tmp_path: Path) -> None:
    tiny_model("llama-tied").to(torch.bfloat16).save_pretrained(tmp_path / "half")
    found = turned(tmp_path / "half", ids, tmp_path / "r")
    assert found.figures["proof"]["max_relative_difference"] < 1e-4  # before rounding
    assert relative(logits(tmp_path / "r", ids), logits(tmp_path / "half", ids)) < 0.1
    result = cut(found.cuttable, NARROW, tmp_path / "out")
    assert set(result.dtypes.values()) == {"BF16"}


@pytest.mark.parametrize("variant", REFUSED)
def test_what_cannot_be_rotated_is_refused(
    models: Models, variant: str, ids: Tensor, tmp_path: Path
) -> None:
    checkpoint = Checkpoint.open(models(variant))
    assert REFUSED[variant] in (refusal(checkpoint) or "")
    with pytest.raises(ShearlingError, match=f"because .*{REFUSED[variant]}.*--no-rotate"):
        rotate(BlockStream(checkpoint, place()), ids, WIDTH, tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_a_wrong_rotation_fails_its_proof(
    models: Models, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table's order of norms is all that says which reader follows which."""
    monkeypatch.setattr(shearling.engine.views.rotated.Norms, "before", lambda self, row: self.head)
    with pytest.raises(ShearlingError, match="differ from its own"):
        turned(models("llama"), ids, tmp_path / "r")
    assert not (tmp_path / "r").exists()


# --- in oneshot ----------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calibration:
    """The tiny models have no tokenizers: every text is the same tokens."""

    def drawn(self: Calibration, checkpoint: Checkpoint) -> TokenWindows:
        generator = torch.Generator().manual_seed(self.seed)
        ids_NS = torch.randint(3, 101, (self.samples, self.length), generator=generator)
        return TokenWindows(ids_NS)

    monkeypatch.setattr(Calibration, "windows", drawn)
    return Calibration(
        (TextSource(tmp_path / "sheep.txt"),), samples=8, length=17, shares=(0.5,), written=2
    )


@pytest.mark.parametrize("variant", ["llama-biases", "qwen2-tied", "phi3"])
@pytest.mark.parametrize("repaired", [True, False])
def test_prune_rotates(
    models: Models, variant: str, text: Calibration, repaired: bool, tmp_path: Path
) -> None:
    source = Checkpoint.open(models(variant))
    after = source.shape.with_(hidden=WIDTH, mlp=31, layers=4)
    choice = choose(source, after, calibration=text, repaired=repaired, rotated=True)
    assert choice.keep.model["hidden"] == tuple(range(WIDTH))
    plain = choose(source, after.with_(hidden=36), calibration=text, repaired=repaired)
    assert choice.keep.blocks == plain.keep.blocks
    result = prune_to(source, choice, tmp_path / "out", calibration=text, repaired=repaired)
    assert result.shape == after
    manifest = json.loads((tmp_path / "out" / "shearling.json").read_text())
    assert manifest["source"]["fingerprint"] == source.fingerprint
    rotation = manifest["options"]["rotation"]
    assert rotation["tied_head"] == (variant == "qwen2-tied")
    assert rotation["proof"]["max_relative_difference"] < 1e-4
    assert 0.5 < rotation["kept_energy"] < 1
    assert ("repair" in manifest["options"]) == repaired
    stock(tmp_path / "out")


def test_a_rotation_that_is_not_needed_is_not_made(models: Models, text: Calibration) -> None:
    source = Checkpoint.open(models("gemma2"))
    choice = choose(source, source.shape.with_(mlp=31), calibration=text, rotated=True)
    assert not choice.rotated


def test_a_rotation_wants_text_and_rms_norms(models: Models, text: Calibration) -> None:
    source = Checkpoint.open(models("llama"))
    after = source.shape.with_(hidden=WIDTH)
    with pytest.raises(ShearlingError, match="stream's basis is chosen by a text; .*--calibration"):
        choose(source, after, by="random", repaired=False, rotated=True)
    source = Checkpoint.open(models("gemma2"))
    with pytest.raises(ShearlingError, match="--no-rotate"):
        choose(source, after, calibration=text, rotated=True)


# --- on the command line -------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    def command(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["shearling", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    for name in ("SHEARLING_TRACEBACK", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    handler = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def sheep(tmp_path: Path) -> tuple[object, ...]:
    """Options that give a calibration text."""
    path = tmp_path / "sheep.txt"
    path.write_text("".join(f"{n} sheep went through the gate. " for n in range(60)))
    return ("--calibration", path, "--samples", 4, "--length", 16, "--copies", 0, "--written", 0)


def manifest_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "shearling.json").read_text())


def test_prune_rotates_by_default(run: Run, sheep: tuple[object, ...], tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", layers=2)
    common = ("prune", model, "--shape", "hidden=27", *sheep)
    code, shown, err = run(*common, "--output", tmp_path / "turned")
    assert code == 0, err
    rotation = manifest_of(tmp_path / "turned")["options"]["rotation"]
    assert "rotated     into the principal axes: " in shown
    assert f"{rotation['kept_energy']:.1%} of the stream's energy stays" in shown
    assert "writing the rotated weights: done" in err
    code, shown, err = run(*common, "--no-rotate", "--output", tmp_path / "raw")
    assert code == 0, err
    assert "rotated" not in shown
    options = manifest_of(tmp_path / "raw")["options"]
    assert "rotation" not in options
    assert options["unit_criterion"] == "fisher-energy"
    code, _, err = run(*common, "--by", "energy", "--output", tmp_path / "named")
    assert code == 0, err
    assert "--by energy ignored: no units are to be chosen" in err


def test_prune_says_why_it_does_not_rotate(
    run: Run, sheep: tuple[object, ...], tmp_path: Path
) -> None:
    config = tiny_config("gemma2")
    config.vocab_size = VOCAB
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    common = ("prune", tmp_path / "model", "--shape", "hidden=27", "--no-refit", *sheep)
    code, _, err = run(*common, "--output", tmp_path / "out")
    assert code == 0, err
    assert "channels are cut as they are, without a rotation, because gemma2 norms what" in err
    assert "rotation" not in manifest_of(tmp_path / "out")["options"]
    code, _, err = run(*common, "--rotate", "--output", tmp_path / "none")
    assert (code, (tmp_path / "none").exists()) == (2, False)
    assert "cannot be rotated, because gemma2 norms what" in err


def test_prune_rotates_nothing_without_text(run: Run, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "model", layers=2)
    common = ("prune", model, "--by", "random", "--output", tmp_path / "out")
    code, _, err = run(*common, "--shape", "hidden=27", "--rotate")
    assert code == 2
    assert "give --calibration FILE as well, or --no-rotate" in err
    code, _, err = run(*common, "--shape", "mlp=20", "--rotate")
    assert code == 0, err
    assert "--rotate ignored: hidden stays" in err
    code, _, err = run(
        "prune", model, "--by", "random", "--shape", "hidden=27", "--output", tmp_path / "raw"
    )
    assert (code, "rotat" in err) == (0, False)
