"""Closed-form repair: against whole stock models under hooks, on every family."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import naive
import shearling.engine.place
from places import place, refit
from shearling.engine.moments import STRENGTHS
from shearling.engine.stream import BlockStream
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.repair.final_norm import gain_name
from shearling.repair.refit import HELD_OUT, Repair
from shearling.repair.solve import ROUNDING
from shearling.table.values import Keep
from tiny_cuts import AXES, PRODUCT, random_keep, relative, sizes_of
from tiny_models import LEADING, tiny_model

Models = Callable[[str], Path]

WRITERS = {
    "heads": ("o_proj", "dense", "out_proj"),
    "mlp": ("down_proj", "dense_4h_to_h", "fc2", "output_linear"),
}
POST_NORMS = {"heads": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}
GLM_NORMS = {"heads": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}
POST_LN = "opt-projected"  # a norm follows every addition; its stream is no sum of branches
# The first block goes, the last one, and two between: the first that stays stands for three.
DEPTH = Keep({"layers": (1, 3)})


def drawn(sequences: int, seed: int = 1, length: int = 17) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 101, (sequences, length), generator=generator)


def post_norms(variant: str) -> dict[str, str]:
    """Norms between a half of a block and the stream."""
    if variant.startswith("glm4"):
        return GLM_NORMS
    return POST_NORMS if variant.startswith(("gemma", "olmo")) else {}


@pytest.fixture(scope="session")
def mild(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Variant -> a tiny model whose blocks write little, so that others can stand for them."""
    root = tmp_path_factory.mktemp("mild")

    def directory(variant: str) -> Path:
        if not (root / variant).is_dir():
            model = tiny_model(variant)
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    path = name.split(".")
                    if path[-2] in WRITERS["heads"] + WRITERS["mlp"]:
                        tensor.mul_(0.1)
                    if path[-2] in post_norms(variant).values():
                        one = float("gemma" in variant)
                        tensor.copy_(0.1 * (one + tensor) - one)
            model.save_pretrained(root / variant)
        return root / variant

    return directory


def gain_of(checkpoint: Checkpoint) -> str | None:
    return gain_name(BlockStream(checkpoint, place(True)))


def keep_of(checkpoint: Checkpoint, variant: str, *axes: str) -> Keep:
    if axes == ("layers",):
        return DEPTH
    known = tuple(axis for axis in axes if axis in checkpoint.shape)
    return random_keep(checkpoint, sizes_of(variant, known))


def repaired(
    source: Path, keep: Keep, ids_NS: Tensor, place: Path, *, stream: bool | None = False
) -> tuple[Repair, Path, Path]:
    """The repair, the cut without it, and the cut with it; proved, and nothing else touched."""
    digests = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(source.iterdir())]
    checkpoint = Checkpoint.open(source)
    (place / "tensors").mkdir(parents=True)
    repair = refit(checkpoint, keep, ids_NS, place / "tensors", stream=stream)
    plain = cut(checkpoint, keep, place / "plain").path
    result = cut(checkpoint, keep, place / "out", replaced=repair.replaced).path
    proof = json.loads((result / "shearling.json").read_text())["proof"]
    assert proof["passed"]
    assert proof["loaded_with"] == "AutoModelForCausalLM"
    now = [hashlib.sha256(file.read_bytes()).digest() for file in sorted(source.iterdir())]
    assert now == digests
    return repair, plain, result


SEQUENCES = 23  # that cases are repaired on


@pytest.fixture(scope="session")
def case(mild: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Case]:
    """Variant and axes -> the cut and its repair, made once, five sequences in a batch."""
    made: dict[tuple[str, tuple[str, ...]], Case] = {}

    def repair(variant: str, axes: tuple[str, ...]) -> Case:
        if (variant, axes) not in made:
            checkpoint = Checkpoint.open(mild(variant))
            keep = keep_of(checkpoint, variant, *axes)
            root = tmp_path_factory.mktemp("repaired")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(shearling.engine.place, "BATCH_TOKENS", 5 * 17)
                outcome = repaired(mild(variant), keep, drawn(SEQUENCES), root)
            made[variant, axes] = Case(checkpoint, keep, *outcome)
        return made[variant, axes]

    return repair


class Case(NamedTuple):
    """A model, a choice, its repair, the cut without it and the cut with it."""

    checkpoint: Checkpoint
    keep: Keep
    repair: Repair
    plain: Path
    result: Path


@lru_cache(maxsize=4)
@torch.no_grad()
def seen(path: Path) -> dict[tuple[int, str], Tensor]:
    """What enters and leaves the blocks of a stock model, and their writers, in double."""
    ids_NS = drawn(SEQUENCES)
    model, found = naive.stock(path).double(), {}

    def watch(module: nn.Module, before: tuple[int, str], after: tuple[int, str]) -> None:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            found[before], found[after] = (t.reshape(*ids_NS.shape, -1) for t in (args[0], out))

        module.register_forward_hook(hook)

    for number, block in enumerate(naive.blocks(model)):
        watch(block, (number, "in"), (number, "out"))
        for name, module in block.named_modules():
            for axis, leaves in WRITERS.items():
                leaf = name.split(".")[-1]
                if leaf in leaves:
                    watch(module, (number, f"{axis} x"), (number, f"{axis} y"))
                if leaf == post_norms(model.config.model_type).get(axis):
                    watch(module, (number, f"{axis} x2"), (number, f"{axis} normed"))
    model(input_ids=ids_NS, use_cache=False)
    return found


def stream_error(source: Path, path: Path, keep: Keep) -> float:
    """Mean share of the last state's squared norm that a cut misses."""
    channels = list(keep.model.get("hidden", range(36)))
    ends = [seen(each) for each in (source, path)]
    wanted, found = (end[max(n for n, _ in end), "out"] for end in ends)
    wanted = wanted[..., channels]
    if "gemma" in str(source):  # embeddings are scaled by the root of the hidden size
        wanted = wanted * (len(channels) / 36) ** 0.5
    return float(((found - wanted).square().sum(-1) / wanted.square().sum(-1)).mean())


# --- every family --------------------------------------------------------------------------------

# Every variant loses a bit of everything; what else it loses takes turns.
_TURNS = (("layers",), ("mlp",), ("heads",), ("kv_heads",), ("hidden",))
_COUPLED_TURNS = (("layers",), ("mlp",), ("hidden", "heads"))
CASES = [
    (variant, axes)
    for number, variant in enumerate(LEADING)
    for turns in (_COUPLED_TURNS if variant in PRODUCT else _TURNS,)
    for axes in (turns[number % len(turns)], AXES[:-1])
]


@pytest.mark.parametrize(("variant", "axes"), CASES, ids=str)
def test_repair(
    mild: Models, case: Callable[..., Case], variant: str, axes: tuple[str, ...]
) -> None:
    checkpoint, keep, repair, plain, result = case(variant, axes)
    layers = keep.model.get("layers", tuple(range(5)))
    order = [(block, axis) for block in layers for axis in ("heads", "mlp")]
    assert [(step.block, step.axis) for step in repair.steps] == order
    assert repair.tokens == SEQUENCES * 17
    assert repair.warnings == ()
    assert all(0 <= step.error_after <= step.error_before for step in repair.steps)
    changed = [step for step in repair.steps if step.strength is not None]
    assert changed
    assert all(step.error_after < step.error_before for step in changed)
    before, after = (load_file(path / "model.safetensors") for path in (plain, result))
    differing = {name for name in before if not torch.equal(before[name], after[name])}
    assert differing == repair.replaced.keys()
    writers = {name.rpartition(".")[0] for name in differing if name != gain_of(checkpoint)}
    assert len(writers) == len(changed)
    assert (gain_of(checkpoint) in differing) == (repair.divergence is not None)
    assert {writer.split(".")[-1] for writer in writers} <= {*WRITERS["heads"], *WRITERS["mlp"]}
    errors = [stream_error(mild(variant), path, keep) for path in (plain, result)]
    if variant != POST_LN:
        assert errors[1] < errors[0]


# --- the reference -------------------------------------------------------------------------------


def solved(
    x: Tensor, r: Tensor, w: Tensor, strength: float, *, bias: bool
) -> tuple[Tensor, Tensor]:
    """Weight (D, K) and bias (D) by least squares on the augmented system."""
    k, root = x.shape[1], w.sqrt()[:, None]
    energy = (w[:, None] * x.square()).sum(0)
    penalty = (strength * (energy * energy.mean()).sqrt()).sqrt()
    x1 = torch.cat([x, torch.full_like(x[:, :1], float(bias))], 1)
    rows = torch.cat([x1 * root, penalty[:, None] * torch.eye(k, k + 1)])
    wanted = torch.cat([r * root, r.new_zeros(k, r.shape[1])])
    found = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution
    return found[:-1].T, found[-1]


def share(
    x: Tensor, r: Tensor, w: Tensor, gain: Tensor, weight: Tensor, bias: Tensor | float
) -> float:
    """Mean over tokens of what a correction leaves of the stream."""
    return float((w[:, None] * ((r - x @ weight.T - bias) * gain).square()).sum() / len(x))


REFERENCE = [
    ("llama", ("layers",)),
    ("llama", AXES[:-1]),
    ("llama-biases", AXES[:-1]),
    ("phi3", ("layers",)),
    ("gpt_neox", AXES[:-1]),
    ("opt", ("mlp",)),
    (POST_LN, AXES[:-1]),
    ("gemma2", ("layers",)),
    ("gemma3", AXES[:-1]),
    ("olmo2", AXES[:-1]),
    ("glm4", AXES[:-1]),
    ("granite", AXES[:-1]),
    ("cohere2", AXES[:-1]),
]


@pytest.mark.parametrize(("variant", "axes"), REFERENCE, ids=str)
def test_against_whole_models(
    mild: Models, case: Callable[..., Case], variant: str, axes: tuple[str, ...]
) -> None:
    """Every writer of the repaired model, from what a stock model of it and the source see."""
    checkpoint, keep, repair, plain, result = case(variant, axes)
    before, after = (load_file(path / "model.safetensors") for path in (plain, result))
    source, now = seen(mild(variant)), seen(result)
    channels = list(keep.model.get("hidden", range(36)))
    layers = keep.model.get("layers", tuple(range(5)))
    scale = (len(channels) / 36) ** 0.5 if "gemma" in variant else 1.0
    held = torch.arange(SEQUENCES) % HELD_OUT == HELD_OUT - 1
    chosen = set()
    for step in repair.steps:
        at, i, axis = layers.index(step.block), step.block, step.axis
        (name,) = (
            name.removesuffix(".weight")
            for name in before
            if f".layers.{at}." in name and name.endswith(".weight")
            if name.split(".")[-2] in WRITERS[axis]
        )
        weight, bias = before[f"{name}.weight"].double(), before.get(f"{name}.bias")
        x, own = now[at, f"{axis} x"], source[i, f"{axis} y"][..., channels]
        given = x @ weight.T + (0 if bias is None else bias.double())
        what = "normed" if post_norms(variant) else "y"
        times = checkpoint.config.residual_multiplier if "granite" in variant else 1.0
        stream = source[i, "in"] + times * source[i, f"heads {what}"]
        if axis == "mlp":
            following = layers[at + 1] if at + 1 < len(layers) else 5
            stream = source[following - 1, "out"]
        stream = stream[..., channels] * scale
        has = now[at, "in"] + (times * now[at, f"heads {what}"] if axis == "mlp" else 0)
        wanted, w = (stream - has) / times, times**2 / stream.square().sum(-1)
        gain = torch.ones(len(channels))
        if variant == POST_LN:
            wanted, w = own, 1 / own.square().sum(-1)
        if post_norms(variant):
            behind = before[f"model.layers.{at}.{post_norms(variant)[axis]}.weight"].double()
            gain = float("gemma" in variant) + behind
            rms = own.square().mean(-1, keepdim=True).sqrt()
            wanted, w = wanted / gain * rms, w / rms[..., 0].square()
        r = wanted - given
        fit, test = (
            (x[rows].flatten(0, 1), r[rows].flatten(0, 1), w[rows].flatten())
            for rows in (~held, held)
        )
        nothing = share(*test, gain, torch.zeros_like(weight), 0.0)
        errors = {
            strength: share(*test, gain, *solved(*fit, strength, bias=bias is not None))
            for strength in STRENGTHS
        }
        assert step.error_before == pytest.approx(nothing, rel=1e-3)
        assert step.error_after == pytest.approx(errors.get(step.strength, nothing), rel=1e-3)
        assert step.error_after == pytest.approx(min(nothing, *errors.values()), rel=1e-3)
        chosen.add(step.strength)
        whole = x.flatten(0, 1), r.flatten(0, 1), w.flatten()
        if step.strength is None:
            assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
            continue
        dw, db = solved(*whole, step.strength, bias=bias is not None)
        assert relative(after[f"{name}.weight"], weight + dw) < 1e-4
        assert relative(weight, weight + dw) > 1e-3
        if bias is not None:
            assert relative(after[f"{name}.bias"], bias.double() + db) < 1e-4
    assert chosen != {None}


# --- where nothing is to be done, and where nothing may change -----------------------------------


def test_nothing_removed(models: Models, variant: str, tmp_path: Path) -> None:
    repair = refit(Checkpoint.open(models(variant)), Keep(), drawn(8), tmp_path)
    assert len(repair.steps) == 10
    assert {step.strength for step in repair.steps} == {None}
    # OLMo's blocks multiply the stream with itself before anything norms it, and rounding with it.
    most = ROUNDING if variant == "olmo2" else 1e-10
    assert max(step.error_after for step in repair.steps) < most
    assert not repair.replaced
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("variant", ["llama", "gemma2"])
def test_blocks_before_the_first_that_goes_stay(mild: Models, variant: str, tmp_path: Path) -> None:
    keep = Keep({"layers": (0, 1, 4)})
    repair = refit(Checkpoint.open(mild(variant)), keep, drawn(32), tmp_path)
    assert [step.strength is None for step in repair.steps[:4]] == [True, True, True, False]
    gain = gain_of(Checkpoint.open(mild(variant)))
    assert {name.split(".")[2] for name in repair.replaced if name != gain} <= {"1", "2"}


@pytest.mark.parametrize("variant", ["llama", "gemma3", "gpt_neox", POST_LN])
def test_streamed_is_resident(mild: Models, variant: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(mild(variant))
    keep = keep_of(checkpoint, variant, *AXES[:-1])
    found = []
    for stream in (True, False):
        (tmp_path / f"{stream}").mkdir()
        repair = refit(checkpoint, keep, drawn(8), tmp_path / f"{stream}", stream=stream)
        found.append({name: read() for name, read in repair.replaced.items()})
    assert found[0].keys() == found[1].keys()
    assert found[0]
    for name, tensor in found[0].items():
        torch.testing.assert_close(tensor, found[1][name])


@pytest.mark.parametrize("stream", [False, True])
def test_freed_memory_is_given_back_only_when_streamed(
    mild: Models, stream: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs half of the time: every larger array is then cleared by the system anew."""
    kept: list[bool] = []
    monkeypatch.setattr(shearling.engine.place, "keep_freed_memory", kept.append)
    refit(Checkpoint.open(mild("llama")), DEPTH, drawn(4), tmp_path, stream=stream)
    assert kept == [not stream], "one place for both streams"


def test_a_cut_vocabulary_changes_nothing(mild: Models, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(mild("llama"))
    vocab = (0, 1, 2, *range(50, 101))
    found = []
    for name, model in (("whole", {}), ("narrow", {"vocab": vocab})):
        (tmp_path / name).mkdir()
        keep = Keep({**DEPTH.model, **model})
        repair = refit(checkpoint, keep, drawn(8), tmp_path / name)
        found.append({name: read() for name, read in repair.replaced.items()})
        result = cut(checkpoint, keep, tmp_path / f"{name}-out", replaced=repair.replaced)
        assert result.shape["vocab"] == len(model.get("vocab", range(101)))
    assert found[0].keys() == found[1].keys()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


PROFIT = [(each, ("layers",)) for each in ("llama", "gpt_neox", "opt", "gemma2", POST_LN)]


@pytest.mark.parametrize(
    ("variant", "axes"), [*PROFIT, ("gemma3", AXES[:-1]), (POST_LN, AXES[:-1])], ids=str
)
def test_other_text_profits(
    mild: Models, variant: str, axes: tuple[str, ...], tmp_path: Path
) -> None:
    """On tokens that took no part in it, logits are nearer the source's."""
    checkpoint = Checkpoint.open(mild(variant))
    keep = keep_of(checkpoint, variant, *axes)
    _, *paths = repaired(mild(variant), keep, drawn(64), tmp_path)
    ids_BS = drawn(16, seed=4)
    with torch.no_grad():
        logits = [
            naive.stock(path)(input_ids=ids_BS, use_cache=False).logits.log_softmax(-1)
            for path in (mild(variant), *paths)
        ]
    source = logits[0]
    cost = [float((source.exp() * (source - each)).sum(-1).mean()) for each in logits[1:]]
    assert cost[1] < cost[0]


# --- what a user can get wrong -------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_too_few_tokens_are_told(mild: Models, stream: bool, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(mild("llama"))  # o_proj has 54 columns, down_proj 50
    wide, *rest = refit(checkpoint, DEPTH, drawn(4, length=13), tmp_path, stream=stream).warnings
    assert not rest
    assert wide.startswith("52 calibration tokens")
    assert "of 54 columns" in wide
    assert "216 tokens or more" in wide
    assert "--samples 17 at" in wide
    both = refit(checkpoint, DEPTH, drawn(4, length=10), tmp_path, stream=stream).warnings
    assert ["of 54 col" in both[0], "of 50 col" in both[1], len(both)] == [True, True, 2]
    assert refit(checkpoint, DEPTH, drawn(6, length=9), tmp_path, stream=stream).warnings == ()


@pytest.mark.parametrize("sequences", [0, 3])
def test_too_few_sequences_are_refused(mild: Models, sequences: int, tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match=f"{sequences} calibration .* at least 4 .*--samples"):
        refit(Checkpoint.open(mild("llama")), DEPTH, drawn(4)[:sequences], tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("layers", [(0, 2, 4), (0, 1, 4), (3, 4)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), 1e30])
def test_a_block_that_is_not_finite_is_named(
    mild: Models, layers: tuple[int, ...], value: float, tmp_path: Path
) -> None:
    """Whether it survives or goes, and in a channel that survives or goes."""
    source = Path(shutil.copytree(mild("llama"), tmp_path / "source"))
    model = naive.stock(source)
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7, 3] = value
        model.model.layers[2].mlp.down_proj.weight[0, 7] = 1e20
    model.save_pretrained(source)
    keep = Keep({"layers": layers, "hidden": tuple(range(9, 27))})
    named = r"^the tensor model\.layers\.2\.mlp\.up_proj\.weight of"
    sentence = named if math.isnan(value) else "^block 2 gives states that are not finite"
    with pytest.raises(ShearlingError, match=sentence):
        refit(Checkpoint.open(source), keep, drawn(4), tmp_path)


def test_what_it_tells(mild: Models, tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    checkpoint = Checkpoint.open(mild("llama"))
    repair = refit(checkpoint, DEPTH, drawn(4), tmp_path, progress=lambda *each: told.append(each))
    assert told[:2] == [("repairing the cut", 1, 2), ("repairing the cut", 2, 2)]
    assert {stage for stage, _, _ in told[2:]} == {"fitting the final norm"}
    found = json.loads(json.dumps(repair.as_json(), allow_nan=False))
    assert found["tokens"] == 68
    assert found["seconds"] >= 0
    assert [len(found["steps"]), found["steps"][0]["block"]] == [4, 1]
    assert set(found["steps"][0]) == {"block", "axis", "strength", "error_before", "error_after"}
