"""A cut in memory is the cut that is written."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import naive
from places import place
from shearling.engine.stream import BlockStream
from shearling.engine.views.cut import cut_view
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.cut import cut
from shearling.table.values import Keep
from tiny_cuts import Narrowed, tokens

Models = Callable[[str], Path]


def states(checkpoint: Checkpoint, ids_BS: Tensor, *, resident: bool) -> list[Tensor]:
    """The state that enters every block, the one that leaves the last, and logits."""
    stream = BlockStream(checkpoint, place(resident))
    h_BSD, calls = stream.begin(ids_BS)
    found = [h_BSD]
    for index, call in enumerate(calls):
        with stream.block(index) as block:
            found.append(call(block, found[-1]))
    return [*found, stream.logits(found[-1], ids_BS)]


@torch.no_grad()
def test_view(narrowed: Narrowed, variant: str) -> None:
    checkpoint, keep, written = narrowed(variant)
    view = cut_view(checkpoint, keep)
    stored = load_file(written.path / "model.safetensors")
    assert view.shape == written.shape
    assert view.family is written.family
    assert view.raw == written.raw
    assert view.layout == written.layout
    assert view.dtypes == written.dtypes
    assert view.parameters == written.parameters
    found = dict(view.read(stored))
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    one = sorted(stored)[len(stored) // 2]
    assert [name for name, _ in view.read([one])] == [one]
    ids_BS, _ = tokens(keep, checkpoint.shape["vocab"])
    expected = states(written, ids_BS, resident=False)
    for resident in (False, True):
        walked = states(view, ids_BS, resident=resident)
        assert len(walked) == len(expected) == 5
        assert all(torch.equal(*both) for both in zip(walked, expected, strict=True))
    torch.testing.assert_close(
        walked[-1],
        naive.stock(written.path)(input_ids=ids_BS, use_cache=False).logits,
        rtol=1e-4,
        atol=1e-4,
    )


def test_llama_becomes_mistral(models: Models) -> None:
    """Llama's code wants the hidden size to be a multiple of the heads."""
    source = Checkpoint.open(models("llama"))
    view = cut_view(source, Keep({"hidden": tuple(range(1, 32))}))
    assert (source.family.model_type, view.family.model_type) == ("llama", "mistral")
    assert type(view.config).__name__ == "MistralConfig"
    whole = cut_view(source, Keep())
    assert whole.raw == source.raw
    assert whole.shape == source.shape


def test_ids_move_with_their_tokens(models: Models, tmp_path: Path) -> None:
    source = Path(shutil.copytree(models("llama"), tmp_path / "source"))
    raw = json.loads((source / "config.json").read_text())
    ids = {"pad_token_id": 7, "bos_token_id": 50, "eos_token_id": [100, 50]}
    (source / "config.json").write_text(json.dumps(raw | ids))
    (source / "generation_config.json").write_text(json.dumps(ids))
    keep = Keep({"vocab": (7, 50, 60, 100)})
    view = cut_view(Checkpoint.open(source), keep)
    assert view.raw == cut(Checkpoint.open(source), keep, tmp_path / "out").raw
    assert view.raw["pad_token_id"] == 0
    BlockStream(view, place(False))  # an embedding whose padding lies inside it


@pytest.mark.parametrize(
    ("variant", "hidden", "sentence"),
    [("opt", 24, "nearest that can: hidden=24, heads=6"), ("gemma2", 99, "0..35")],
)
def test_what_cannot_be_cut_is_refused(
    models: Models, variant: str, hidden: int, sentence: str
) -> None:
    with pytest.raises(ShearlingError, match=sentence):
        cut_view(Checkpoint.open(models(variant)), Keep({"hidden": tuple(range(hidden))}))


def test_a_view_reads_through_its_source(models: Models) -> None:
    """Block numbers are the cut's; nothing is read but what is asked for."""
    checkpoint = Checkpoint.open(models("llama"))
    asked: list[str] = []

    class Watched:
        def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
            asked.extend(names := list(names))
            return checkpoint.tensors.read(names)

    watched = dataclasses.replace(checkpoint, tensors=Watched())
    view = cut_view(watched, Keep({"layers": (0, 2, 3)}))
    name = "model.layers.{}.mlp.down_proj.weight"
    ((found, tensor),) = view.read([name.format(1)])
    assert (found, asked) == (name.format(1), [name.format(2)])
    assert torch.equal(tensor, load_file(models("llama") / "model.safetensors")[name.format(2)])
