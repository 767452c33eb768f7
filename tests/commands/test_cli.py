"""The command line in this process: what it prints, writes and refuses."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.utils
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import naive
import shearling
import shearling.files.writer
import shearling.model.checkpoint
import shearling.pruning.cut
from shearling.cli import main
from shearling.scoring.registry import names
from shearling.table.values import Keep
from tiny_tokenizer import VOCAB, byte_tokenizer, write_llama

DEPTH = 8  # the + forms leave two blocks that may go
SAMPLES = ("--samples", "2", "--length", "16")


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, which has to be JSON and nothing else."""
        assert self.code == 0, self.err
        return json.loads(self.out)


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    def command(*arguments: object) -> Result:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["shearling", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            main()
        return Result(int(stopped.value.code or 0), *capsys.readouterr())

    # What main() may change of the process, put back afterwards.
    for name in ("SHEARLING_TRACEBACK", "TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    huggingface_hub.utils.disable_progress_bars()  # main() does it before the first import
    handler = signal.getsignal(signal.SIGTERM)
    yield command
    signal.signal(signal.SIGTERM, handler)
    huggingface_hub.utils.enable_progress_bars()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("cli") / "tiny-llama", layers=DEPTH)


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "sheep.jsonl"
    lines = [f"{n} sheep went through the gate, and {n + 1} came back." for n in range(40)]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out"


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


@torch.no_grad()
def same_logits(pruned: Path, source: Path, removed: list[int]) -> bool:
    ids = torch.randint(3, VOCAB, (2, 15), generator=torch.Generator().manual_seed(4))
    expected = naive.stock_without(source, removed)(input_ids=ids, use_cache=False).logits
    found = naive.stock(pruned)(input_ids=ids).logits
    return float((found - expected).abs().max() / expected.abs().max()) <= 1e-5


# --- what it does


LIGHT = [["--version"], ["--help"], *([name, "--help"] for name in ("score", "prune", "demo"))]
END = "-- end --"


def test_help_is_fast() -> None:
    """torch takes seconds to import; help must not wait for it."""
    code = (
        "import sys; sys.argv[0] = 'shearling'\n"
        "from shearling.cli import main\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors', 'matplotlib'}\n"
        f"for arguments in {LIGHT}:\n"
        "    sys.argv[1:] = arguments\n"
        "    try: main()\n"
        "    except SystemExit: pass\n"
        f"    print({END!r})\n"
        "    print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.split("\n") == [*["[]"] * len(LIGHT), ""]
    version, *pages = done.stdout.split(f"{END}\n")[:-1]
    assert version == f"shearling {shearling.__version__}\n"
    assert len(pages) == len(LIGHT) - 1
    assert all("Usage: shearling" in page for page in pages)


@pytest.mark.parametrize(("ranks", "torn_down"), [("1", True), ("2", False)])
def test_a_rank_skips_the_interpreter_teardown(ranks: str, torn_down: bool) -> None:
    script = (
        "import atexit, sys; atexit.register(print, 'teardown'); "
        "sys.argv = ['shearling', '--version']; from shearling.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=os.environ | {"WORLD_SIZE": ranks},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith(f"shearling {shearling.__version__}\n")
    assert ("teardown" in done.stdout) == torn_down


def test_inspect_counts_exactly(run: Run, model: Path) -> None:
    found = run("inspect", model, "--json").json
    stock = naive.stock(model)
    count = sum(parameter.numel() for parameter in stock.parameters())
    in_blocks = sum(parameter.numel() for parameter in naive.blocks(stock).parameters())
    products = sum(
        m.weight.numel() for m in stock.modules() if isinstance(m, torch.nn.Linear)
    )  # the head included
    attention = 2 * DEPTH * 36 * 1024
    assert found["name"] == "tiny-llama"
    assert found["architecture"] == "llama"
    assert found["parameters"] == count
    assert found["parameters_in_blocks"] == in_blocks == DEPTH * found["parameters_per_block"]
    assert found["bytes"] == 4 * count
    assert found["dtypes"] == ["F32"]
    assert found["tied_embeddings"] is False
    assert found["flops_per_token"] == 2 * (products + attention)
    assert found["kv_cache_bytes_per_token"] == 2 * DEPTH * 3 * 4 * 2
    assert found["shape"] == {
        "layers": DEPTH, "hidden": 36, "vocab": VOCAB, "heads": 9, "kv_heads": 3, "mlp": 50,
        "head_dim": 4,
    }  # fmt: skip
    assert found["manifest"] is None
    shown = run("inspect", model)
    assert shown.code == 0
    assert f"{count:,} ({in_blocks:,} in blocks" in shown.out
    assert shown.err == ""


@pytest.mark.parametrize("by", [name for name in names("blocks") if name != "repair"])
def test_score(run: Run, model: Path, text: Path, output: Path, by: str) -> None:
    file = output / "scores.json"
    found = run(
        "score", model, "--by", by, "--calibration", text, *SAMPLES, "--output", file, "--json"
    )
    assert json.loads(file.read_text()) == found.json
    data = found.json
    assert (data["kind"], data["criterion"], data["axis"]) == ("scores", by, "layers")
    assert len(data["scores"]) == DEPTH
    assert (data["baseline_perplexity"] is not None) == (by in ("perplexity", "greedy"))
    assert data["protected"] == ([0, 1, 2, 3, 6, 7] if by.endswith("+") else [])
    assert sorted(data["order"] + data["protected"]) == list(range(DEPTH))
    assert [file.name for file in output.iterdir()] == ["scores.json"]
    stages = without_place(found.err)
    assert stages
    assert all(line.endswith(": done") for line in stages)


def test_score_for_people(run: Run, model: Path, text: Path) -> None:
    shown = run("score", model, "--calibration", text, *SAMPLES, "--protect-first", 2)
    data = run("score", model, "--calibration", text, *SAMPLES, "--json").json
    lines = shown.out.splitlines()
    assert lines[0].startswith("perplexity scores, first to go first")
    assert [int(line.split(":")[0]) for line in lines[1:]] == [
        block for block in data["order"] if block > 1
    ]


def test_streamed_scores_are_the_same(run: Run, model: Path, text: Path) -> None:
    common = ("score", model, "--calibration", text, *SAMPLES, "--json")
    assert run(*common, "--stream").json["scores"] == run(*common, "--no-stream").json["scores"]


def test_prune_by_criterion(run: Run, model: Path, text: Path, output: Path) -> None:
    before = digests(model)
    options = ("--by", "taylor", "--calibration", text, *SAMPLES)
    order = run("score", model, *options, "--json").json["order"]
    common = ("prune", model, "--layers", 5, *options, "--no-refit", "--output", output)

    planned = run(*common, "--dry-run", "--json").json
    assert not output.exists()
    assert list(output.parent.iterdir()) == []
    assert planned["removed"] == sorted(order[:3])
    assert "would remove blocks" in run(*common, "--dry-run").out

    manifest = run(*common, "--json").json
    assert manifest == json.loads((output / "shearling.json").read_text())
    assert manifest["kind"] == "manifest"
    assert manifest["options"]["criterion"] == "taylor"
    assert manifest["options"]["removed"] == sorted(order[:3])
    assert manifest["options"]["calibration"]["file"] == "sheep.jsonl"
    assert manifest["keep"] == {"layers": sorted(order[3:])}
    assert manifest["parameters"] == planned["parameters"]
    assert manifest["source_parameters"] == planned["source_parameters"]
    assert manifest["parameters"] == sum(p.numel() for p in naive.stock(output).parameters())
    assert same_logits(output, model, order[:3])
    assert digests(model) == before
    assert list(output.parent.iterdir()) == [output]


def test_bare_surgery_defaults_to_perplexity(
    run: Run, model: Path, text: Path, output: Path
) -> None:
    options = ("--calibration", text, *SAMPLES)
    done = run("prune", model, "--layers", 6, *options, "--no-refit", "--output", output)
    assert done.code == 0, done.err
    assert "not repaired" in done.out
    order = run("score", model, *options, "--json").json["order"]
    assert same_logits(output, model, order[:2])


@pytest.mark.parametrize("by", ["greedy", "magnitude+"])
def test_prune_by_scores(run: Run, model: Path, text: Path, tmp_path: Path, by: str) -> None:
    file, output = tmp_path / "scores.json", tmp_path / "pruned"
    data = run(
        "score", model, "--by", by, "--calibration", text, *SAMPLES, "--output", file, "--json"
    ).json
    done = run("prune", model, "--layers", 6, "--scores", file, "--output", output)
    assert done.code == 0, done.err
    assert same_logits(output, model, data["order"][:2])
    manifest = json.loads((output / "shearling.json").read_text())
    assert manifest["options"]["scores"] == data["scores"]
    assert manifest["options"]["criterion"] == by
    assert "proof of surgery" in done.out


def test_prune_by_list_and_again(run: Run, model: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("prune", model, "--remove", "6,1", "--output", first).code == 0
    assert same_logits(first, model, [1, 6])
    sharded = run("prune", first, "--remove", "0", "--output", second, "--shard-size", 0.001)
    assert sharded.code == 0, sharded.err
    assert same_logits(second, model, [0, 1, 6])
    shown = run("inspect", second).out
    assert "made from    first" in shown
    assert "blocks 1-5 kept" in shown
    assert "made from    tiny-llama" in shown
    assert "blocks 0, 2-5, 7 kept" in shown
    lineage = run("inspect", second, "--json").json["manifest"]
    assert lineage["parent"]["keep"] == {"layers": [0, 2, 3, 4, 5, 7]}


def test_a_number_of_blocks_and_their_list_may_agree(run: Run, model: Path, tmp_path: Path) -> None:
    """`prune MODEL --layers 24 --remove 13,14,15,16,17,18`, the contract, on eight blocks."""
    both, alone = tmp_path / "both", tmp_path / "alone"
    done = run("prune", model, "--layers", 6, "--remove", "3,4", "--output", both)
    assert done.code == 0, done.err
    assert run("prune", model, "--remove", "3,4", "--output", alone).code == 0
    name = "model.safetensors"
    assert digests(both)[name] == digests(alone)[name]
    assert same_logits(both, model, [3, 4])


EVERY_AXIS = "layers=6,hidden=28,heads=4,kv_heads=2,mlp=24,vocab=290"
ENOUGH = ("--samples", "8", "--length", "16", "--copies", "1", "--written", "4")


@pytest.fixture(scope="session")
def wordy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with a tokenizer that merges bytes into words, and rows of padding."""
    from tiny_tokenizer import NAMES, byte_level

    path = write_llama(tmp_path_factory.mktemp("cli") / "wordy-llama", layers=DEPTH)
    (path / "tokenizer.json").unlink()
    raw = byte_level()
    PreTrainedTokenizerFast(tokenizer_object=raw, **NAMES).save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    rows = raw.get_vocab_size() + 3
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, 36, generator=torch.Generator().manual_seed(1))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config |= {"vocab_size": rows, "bos_token_id": 1, "eos_token_id": 2}
    (path / "config.json").write_text(json.dumps(config))
    (path / "generation_config.json").unlink()
    return path


@pytest.mark.parametrize(
    ("stream", "shares", "written"),
    [("--no-stream", [0.5], 32), ("--stream", [0.3, 0.5, 0.7], 0)],
)
def test_how_much_text_a_repair_makes_by_default(
    run: Run, model: Path, text: Path, output: Path,
    stream: str, shares: list[float], written: int,
) -> None:  # fmt: skip
    options = ("--calibration", text, "--samples", "8", "--length", "16", stream)
    found = run("prune", model, "--shape", "mlp=24", *options, "--output", output, "--json").json
    said = found["options"]["calibration"]
    assert (said["rewritten_shares"], said["written"]) == (shares, written)
    assert found["options"]["repair"]["tokens"] == (8 * (1 + len(shares)) + written) * 16


def test_a_streamed_model_writes_no_text(run: Run, model: Path, text: Path, output: Path) -> None:
    options = ("--calibration", text, "--samples", "8", "--length", "16", "--stream")
    options += ("--written", "5", "--output", output)
    found = run("prune", model, "--shape", "mlp=24", *options)
    assert "--written ignored: a streamed model writes no text" in found.err
    manifest = json.loads((output / "shearling.json").read_text())
    assert manifest["options"]["calibration"]["written"] == 0


def test_prune_on_every_axis(run: Run, wordy: Path, text: Path, output: Path) -> None:
    before = digests(wordy)
    options = ("--shape", EVERY_AXIS, "--calibration", text, *ENOUGH, "--output", output)
    planned = run("prune", wordy, *options, "--dry-run", "--json").json
    assert not output.exists()
    found = run("prune", wordy, *options, "--json")
    manifest = found.json
    assert found.err.splitlines()[-3:] == [
        "writing weights: done", "proving the cut: done", "flushing to disk: done",
    ]  # fmt: skip
    assert manifest == json.loads((output / "shearling.json").read_text())
    sizes = {"layers": 6, "hidden": 28, "heads": 4, "kv_heads": 2, "mlp": 24, "vocab": 290}
    assert manifest["shape"] == sizes | {"head_dim": 4} == planned["shape"]
    assert manifest["parameters"] == planned["parameters"]
    assert (manifest["proof"]["passed"], manifest["proof"]["loaded_with"]) == (
        True, "AutoModelForCausalLM",
    )  # fmt: skip
    chosen = manifest["options"]
    assert (chosen["criterion"], chosen["unit_criterion"]) == ("repair", "fisher-energy")
    assert chosen["calibration"] == {
        "file": "sheep.jsonl", "samples": 8, "length": 16, "seed": 0, "rewritten_shares": [0.5],
        "written": 4, "bos": True,
    }  # fmt: skip
    assert chosen["removed"] == list(range(chosen["removed"][0], chosen["removed"][0] + 2))
    assert chosen["repair"]["tokens"] == (2 * 8 + 4) * 16
    assert len(chosen["repair"]["steps"]) == 2 * 6
    assert manifest["repaired"]
    found = {name.split(".")[-2] for name in manifest["repaired"]}
    assert found <= {"o_proj", "down_proj", "norm"}

    config = json.loads((output / "config.json").read_text())
    for axis, key in {
        "layers": "num_hidden_layers", "hidden": "hidden_size", "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "vocab": "vocab_size",
    }.items():  # fmt: skip
        assert config[key] == sizes[axis]
    stock = naive.stock(output)
    assert manifest["parameters"] == sum(p.numel() for p in stock.parameters())
    assert stock.model.layers[0].mlp.down_proj.weight.shape == (28, 24)
    assert stock.model.layers[5].self_attn.k_proj.weight.shape == (8, 28)
    assert stock.lm_head.weight.shape == (290, 28)
    tokenizers: list[Any] = [AutoTokenizer.from_pretrained(path) for path in (wordy, output)]
    assert len(tokenizers[0]) > len(tokenizers[1]) == 290
    for document in ("the shepherd's 12 sheep", "déjà vu — 毛"):
        ids = tokenizers[1](document)["input_ids"]
        assert max(ids) < 290
        assert tokenizers[1].decode(ids, skip_special_tokens=True) == document
    assert digests(wordy) == before
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("refit", ["--refit", "--no-refit"])
def test_the_cut_is_what_the_manifest_says(
    run: Run, model: Path, text: Path, output: Path, refit: str
) -> None:
    """Against a stock model under hooks; a repair differs from it, and only in its tensors."""
    options = ("--shape", "layers=6,heads=6,kv_heads=2,mlp=24", "--calibration", text, *ENOUGH)
    manifest = run("prune", model, *options, refit, "--output", output, "--json").json
    model_axes = {axis: tuple(i) for axis, i in manifest["keep"].items() if axis == "layers"}
    blocks = {
        axis: tuple(map(tuple, rows)) for axis, rows in manifest["keep"].items() if axis != "layers"
    }
    ids = torch.randint(3, 250, (2, 15), generator=torch.Generator().manual_seed(4))
    expected = naive.masked_logits(model, Keep(model_axes, blocks), ids)
    with torch.no_grad():
        found = naive.stock(output)(input_ids=ids, use_cache=False).logits
    difference = float((found - expected).abs().max() / expected.abs().max())
    assert set(blocks) == {"heads", "kv_heads", "mlp"}
    assert manifest["options"]["unit_criterion"] == "fisher-energy"
    if refit == "--refit":
        assert difference > 1e-3
        return
    assert difference < 1e-5
    assert manifest["options"]["criterion"] == "perplexity"
    assert "repair" not in manifest["options"]
    assert "repaired" not in manifest


def test_prune_to_a_number_of_parameters(run: Run, model: Path, text: Path, output: Path) -> None:
    common = ("prune", model, "--params", "0.8x", "--output", output)
    planned = run(*common, "--dry-run", "--calibration", text, *ENOUGH)
    assert planned.code == 0, planned.err
    assert not output.exists()
    assert "blocks      8 -> 7" in planned.out
    assert "mlp         50 -> 32" in planned.out
    done = run(*common, "--calibration", text, *ENOUGH)
    assert done.code == 0, done.err
    assert "mlp         50 -> 32" in done.out
    assert "repaired    " in done.out
    counts = [sum(p.numel() for p in naive.stock(path).parameters()) for path in (model, output)]
    assert counts[1] <= 0.8 * counts[0]
    assert json.loads((output / "config.json").read_text())["intermediate_size"] == 32


def test_criteria_named(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    """One for blocks and one for units; whichever is not named is the default."""
    common = ("prune", model, "--shape", "layers=7,mlp=40", "--calibration", text, *ENOUGH)
    for number, (by, expected) in enumerate(
        {
            "taylor": ["taylor", "taylor"],
            "flap": ["repair", "flap"],
            "magnitude-l2,influence": ["influence", "magnitude-l2"],
        }.items()
    ):
        output = ("--output", tmp_path / f"{number}")
        options = run(*common, "--by", by, *output, "--json").json["options"]
        assert [options["criterion"], options["unit_criterion"]] == expected
    assert "repair" in options


def test_too_few_samples_leave_the_repair_out(
    run: Run, model: Path, text: Path, output: Path
) -> None:
    done = run("prune", model, "--layers", 6, "--calibration", text, *SAMPLES, "--output", output)
    assert done.code == 0
    assert [line for line in without_place(done.err) if not line.endswith(": done")] == [
        "shearling: warning: the repair is left out, as it needs at least 4 calibration sequences "
        "and --samples is 2."
    ]
    options = json.loads((output / "shearling.json").read_text())["options"]
    assert options["criterion"] == "perplexity"
    assert "repair" not in options


def test_options_that_do_nothing_are_told(run: Run, model: Path, output: Path) -> None:
    common = ("prune", model, "--dry-run", "--output", output)
    found = run(*common, "--shape", "mlp=40", "--by", "influence,random", "--protect-first", 2)
    assert found.code == 0
    assert found.err.splitlines() == [
        "shearling: warning: --by influence ignored: no blocks are to be chosen.",
        "shearling: warning: --protect-first ignored: all blocks stay.",
    ]
    found = run(*common, "--layers", 6, "--by", "magnitude,flap")
    assert found.err.splitlines() == [
        "shearling: warning: --by flap ignored: no units are to be chosen."
    ]


def test_score_units(run: Run, model: Path, text: Path, output: Path) -> None:
    options = ("--calibration", text, *SAMPLES)
    found = run("score", model, "--axis", "mlp", *options, "--output", output, "--json").json
    assert found == json.loads(output.read_text())
    assert (found["kind"], found["criterion"], found["axis"]) == (
        "unit-scores", "fisher-energy", "mlp",
    )  # fmt: skip
    assert [len(row) for row in found["scores"]] == [50] * DEPTH
    assert found["calibration"]["samples"] == 2
    shown = run(
        "score", model, "--axis", "hidden", "--by", "magnitude-l1", "--protect-first", 1
    )  # fmt: skip
    assert shown.code == 0, shown.err
    assert "--protect-first ignored: units of hidden" in shown.err
    assert shown.out.startswith("magnitude-l1 scores of hidden by block")
    # The highest of each row are what a cut keeps.
    pruned = output.parent / "pruned"
    keep = run(
        "prune", model, "--shape", "mlp=20", *options, "--no-refit", "--output", pruned, "--json"
    ).json["keep"]
    for row, kept in zip(found["scores"], keep["mlp"], strict=True):
        assert kept == sorted(sorted(range(50), key=row.__getitem__)[-20:])


def test_score_by_repair(run: Run, model: Path, text: Path) -> None:
    options = ("--calibration", text, *ENOUGH[:4], "--remove", 2)
    data = run("score", model, "--by", "repair", *options, "--json").json
    assert list(data["runs"]) == [str(start) for start in range(1, 7)]
    best = int(min(data["runs"], key=data["runs"].get))
    assert data["order"][:2] == [best, best + 1]


def test_eval(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    found = run(
        "eval", model, "--text", text, "--window", 32, "--max-windows", 3, "--output", results,
        "--prompt", "One sheep", "--prompt", "Two", "--max-new-tokens", 4, "--json",
    )  # fmt: skip
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    ids = torch.tensor(byte_tokenizer()("\n\n".join(documents))["input_ids"][: 3 * 32]).view(3, 32)
    data = found.json
    assert data["perplexity"] == pytest.approx(naive.perplexity(model, ids), rel=1e-5)
    assert (data["kind"], data["text"], data["window"], data["windows"]) == (
        "evaluation", "sheep.jsonl", 32, 3,
    )  # fmt: skip
    assert data["model"]["name"] == "tiny-llama"
    samples = data.pop("generations")
    assert [sample["prompt"] for sample in samples["samples"]] == ["One sheep", "Two"]
    assert sorted(file.name for file in results.iterdir()) == [
        "evaluation-sheep.json", "generations.json",
    ]  # fmt: skip
    assert json.loads((results / "evaluation-sheep.json").read_text()) == data
    assert json.loads((results / "generations.json").read_text()) == samples


def test_eval_for_people(run: Run, model: Path, text: Path) -> None:
    shown = run("eval", model, "--text", text, "--window", 16, "--max-windows", 2, "--bos")
    assert shown.code == 0, shown.err
    assert shown.out.startswith("perplexity ")
    assert "on sheep.jsonl (2 windows of 16 tokens, each behind BOS)" in shown.out


def test_bench(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    found = run(
        "bench", model, "--batch", "1,2", "--prompt", 4, "--new", 2, "--repeats", 1,
        "--output", file, "--json",
    )  # fmt: skip
    assert json.loads(file.read_text()) == found.json
    assert [one["batch"] for one in found.json["runs"]] == [1, 2]
    assert {one["model"]["name"] for one in found.json["runs"]} == {"tiny-llama"}


def test_report_of_a_whole_run(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    there = tmp_path / "run"
    page = tmp_path / "page" / "report.html"
    for command in (
        ("score", model, "--calibration", text, *SAMPLES, "--output", there / "scores.json"),
        ("prune", model, "--layers", 7, "--scores", there / "scores.json",
         "--output", there / "pruned"),
        ("eval", there / "pruned", "--text", text, "--window", 16, "--max-windows", 2,
         "--output", there / "pruned.results"),
        ("report", there, "--output", page),
    ):  # fmt: skip
        done = run(*command)
        assert done.code == 0, done.err
    assert str(page) in done.out
    html = page.read_text()
    assert html.startswith("<!doctype html>")
    assert html.rstrip().endswith("</html>")
    assert "pruned" in html


def test_stdout_of_the_real_program_is_json(model: Path, text: Path, output: Path) -> None:
    """A process of its own: libraries' bars and warnings must not reach either stream."""
    done = subprocess.run(
        [sys.executable, "-m", "shearling.cli", "prune", model, "--shape",
         "layers=7,mlp=40", "--calibration", text, *SAMPLES, "--samples", "4",
         "--output", output, "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(done.stdout)["kind"] == "manifest"
    assert PLACE.match(done.stderr)
    assert without_place(done.stderr) == [
        "scoring runs after repair: done", "scoring units by fisher-energy: done",
        "rewriting calibration text: done", "writing calibration text: done",
        "repairing the cut: done", "fitting the final norm: done",
        "writing weights: done", "proving the cut: done", "flushing to disk: done",
    ]  # fmt: skip


# --- what it refuses


def copy(model: Path, to: Path) -> Path:
    shutil.copytree(model, to)
    return to


def unknown_family(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"model_type": "mamba"}))


def no_config(path: Path) -> None:
    (path / "config.json").unlink()


def broken_config(path: Path) -> None:
    (path / "config.json").write_text("{")


def truncated(path: Path) -> None:
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def empty_weights(path: Path) -> None:
    (path / "model.safetensors").write_bytes(b"")


def missing_tensor(path: Path) -> None:
    tensors = load_file(path / "model.safetensors")
    del tensors["model.layers.3.mlp.up_proj.weight"]
    save_file(tensors, path / "model.safetensors")


def absent_shard(path: Path) -> None:
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def no_weights(path: Path) -> None:
    (path / "model.safetensors").unlink()


# What is said of where a model runs, once it is opened.
PLACE = re.compile(r"shearling: cpu, float32, weights (in memory|read block by block): ")


def without_place(said: str) -> list[str]:
    return [line for line in said.splitlines() if not PLACE.match(line)]


def refused(found: Result, *expected: str) -> None:
    """Exit code 2 and one sentence on stderr, which holds what is expected."""
    lines = [line for line in without_place(found.err) if not line.endswith(": done")]
    assert found.code == 2
    assert found.out == ""
    assert len(lines) == 1, found.err
    assert lines[0].startswith("shearling: ")
    assert lines[0].endswith(".")
    assert ". " not in lines[0]
    for part in expected:
        assert part in lines[0]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (no_config, ("config.json cannot be read",)),
        (broken_config, ("config.json is not valid JSON",)),
        (truncated, ("model.safetensors is truncated or corrupt", "fetch it again")),
        (empty_weights, ("model.safetensors is truncated or corrupt",)),
        (missing_tensor, ("lacks the tensor model.layers.3.mlp.up_proj.weight",)),
        (absent_shard, ("index.json names model-00002-of-00002.safetensors", "fetch")),
        (pickled, ("pytorch_model.bin", "refused", "safetensors")),
        (no_weights, ("holds no weights; expected model.safetensors",)),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "score", "prune", "eval"])
def test_damaged_models(
    run: Run, model: Path, text: Path, tmp_path: Path,
    command: str, damage: Callable[[Path], None], expected: tuple[str, ...],
) -> None:  # fmt: skip
    broken = copy(model, tmp_path / "broken")
    damage(broken)
    arguments = {
        "inspect": (),
        "score": ("--calibration", text),
        "prune": ("--remove", "1", "--output", tmp_path / "out"),
        "eval": ("--text", text, "--window", 16),
    }[command]
    refused(run(command, broken, *arguments), "broken", *expected)
    assert list(tmp_path.iterdir()) == [broken]


def quantised(path: Path) -> None:
    config = json.loads((path / "config.json").read_text())
    how = {"quantization_config": {"quant_method": "torchao"}}
    (path / "config.json").write_text(json.dumps(config | how))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (unknown_family, ("'mamba'", "it knows llama, mistral")),
        (quantised, ("quantised (by torchao)", "the checkpoint that it was made from")),
    ],
)
def test_models_that_can_be_measured_but_not_cut(
    run: Run, model: Path, tmp_path: Path, damage: Callable[[Path], None], expected: tuple[str, ...]
) -> None:
    other = copy(model, tmp_path / "other")
    damage(other)
    refused(run("prune", other, "--remove", "1", "--output", tmp_path / "out"), "other", *expected)
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--layers", 0), ("--layers 0", "8 blocks", "between 1 and 7")),
        (("--layers", -1), ("--layers -1", "between 1 and 7")),
        (("--layers", 8), ("--layers 8", "between 1 and 7")),
        (("--layers", 9), ("--layers 9", "between 1 and 7")),
        (("--remove", "8"), ("--remove 8", "0 to 7")),
        (("--remove=-1",), ("--remove -1", "0 to 7")),
        (("--remove", "1,x"), ("--remove '1,x'", "whole numbers")),
        (("--remove", "1,,2"), ("--remove '1,,2'", "whole numbers")),
        (("--remove", ""), ("--remove ''", "whole numbers")),
        (("--remove", "3,3"), ("--remove 3,3", "twice")),
        (("--remove", "0,1,2,3,4,5,6,7"), ("8 of 8", "between 1 and 7")),
        (
            ("--remove", "1", "--layers", 5),
            ("--layers 5 and --remove 1", "--layers 7"),
        ),
        (("--remove", "1", "--params", "0.8x"), ("--remove", "--params")),
        (("--remove", "1", "--by", "taylor"), ("--remove", "--by")),
        (("--remove", "1", "--scores", "s.json"), ("--remove", "--scores")),
        (("--layers", 5, "--by", "taylor", "--scores", "s.json"), ("--by", "--scores")),
        ((), ("--layers", "--remove")),
        (("--by", "taylor"), ("--layers", "--remove")),
        (("--layers", 5), ("perplexity", "--calibration")),
        (("--layers", 5, "--by", "entropy"), ("'entropy'", "repair, perplexity, taylor+")),
        (("--layers", 5, "--by", "magnitude+"), ("3 of 8", "only 2", "--protect-first")),
        (("--layers", 5, "--by", "magnitude", "--protect-last", 8), ("last 8 of 8",)),
        (("--layers", 5, "--scores", "absent.json"), ("absent.json", "No such file")),
        (("--shape", "heads=7"), ("heads=7, kv_heads=3", "multiple of kv_heads", "nearest")),
        (("--shape", "kv_heads=5"), ("kv_heads=5", "between 1 and the source's 3")),
        (("--shape", "mlp=0"), ("mlp=0", "between 1 and the source's 50")),
        (("--shape", "mlp=51"), ("mlp=51", "between 1 and the source's 50")),
        (("--shape", "layer=5"), ("'layer'", "nearest: layers")),
        (("--shape", "head_dim=2"), ("head_dim=2", "cannot be cut")),
        (("--shape", "mlp=50"), ("the model's own", "at least one smaller")),
        (("--shape", "mlp=-1"), ("'mlp=-1'", "layers=24,mlp=1024")),
        (("--shape", "mlp=²"), ("'mlp=²'", "layers=24,mlp=1024")),
        (("--shape", "mlp"), ("'mlp'", "layers, hidden, heads, kv_heads, mlp, vocab")),
        (("--shape", ""), ("''", "layers=24,mlp=1024")),
        (("--shape", "mlp=40,mlp=30"), ("mlp twice",)),
        (("--params", "2x"), ("--params 2x", "parameters, but the model has", "such as 0.8x")),
        (("--params", "0"), ("--params 0", "0 parameters")),
        (("--params", "-1x"), ("'-1x'", "0.8x")),
        (("--params", "smaller"), ("'smaller'", "113M")),
        (("--params", "9" * 400), ("113M",)),
        (("--params", "0.01x"), ("one block", "ask for more")),
        (("--params", "0.8x", "--layers", 5), ("--params and --layers", "choose one")),
        (("--params", "0.8x", "--shape", "mlp=5"), ("--shape and --params", "choose one")),
        (("--shape", "mlp=40", "--remove", "1"), ("--remove", "--shape")),
        (("--shape", "mlp=40"), ("fisher-energy", "--calibration")),
        (("--shape", "mlp=40", "--refit", "--by", "random"), ("--refit", "--calibration")),
        (("--shape", "vocab=258"), ("vocabulary", "--calibration")),
        (("--layers", 5, "--by", "perplexity,taylor+"), ("two criteria for blocks",)),
        (("--shape", "mlp=40", "--by", "flap,obs"), ("two criteria for units",)),
        (("--layers", 5, "--by", "taylor,influence,flap"), ("two criteria for",)),
        (("--layers", 5, "--by", "taylor,"), ("criterion ''",)),
        (("--layers", 5, "--by", "flap,obs", "--dry-run"), ("two criteria for units",)),
        (("--layers", 5, "--by", "entropy", "--dry-run"), ("'entropy'",)),
        (("--layers", 5, "--by", "repair"), ("repair", "--calibration")),
    ],
)
@pytest.mark.usefixtures("nothing_is_run")
def test_prune_refuses(
    run: Run, model: Path, output: Path, arguments: tuple[object, ...], expected: tuple[str, ...]
) -> None:
    refused(run("prune", model, *arguments, "--output", output), *expected)
    assert not output.exists()
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--layers", 5, "--refit", "--samples", 3), ("--samples 3", "at least 4", "--no-refit")),
        (("--layers", 5, "--by", "repair", "--no-refit", "--samples", 3), ("3 cal", "raise --sam")),
        (("--layers", 2, "--by", "repair", "--protect-first", 1, "--protect-last", 2), ("only 5",)),
        (("--layers", 5, "--protect-first", 4, "--protect-last", 3), ("only 1 is not protected",)),
        (("--shape", "vocab=257"), ("257 tokens", "258 must stay")),
        (("--shape", "layers=5,vocab=259", "--by", "magnitude"), ("259 tokens", "258 must stay")),
        (("--layers", 5, "--by", "magnitude", "--samples", 9999), ("9,999 samples of 16",)),
    ],
)
@pytest.mark.usefixtures("nothing_is_run")
def test_prune_with_text_refuses(
    run: Run, model: Path, text: Path, output: Path,
    arguments: tuple[object, ...], expected: tuple[str, ...],
) -> None:  # fmt: skip
    common = ("--calibration", text, "--samples", 8, "--length", 16, "--output", output)
    refused(run("prune", model, *common, *arguments), *expected)
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize("variant", ["gemma2", "opt-projected"])
@pytest.mark.usefixtures("nothing_is_run")
def test_what_repair_cannot_score_is_refused(
    run: Run, models: Callable[[str], Path], text: Path, tmp_path: Path, variant: str
) -> None:
    source = copy(models(variant), tmp_path / "source")
    byte_tokenizer().save_pretrained(source)
    common = ("--calibration", text, *ENOUGH, "--output", tmp_path / "out")
    found = run("prune", source, "--layers", 4, "--by", "repair", *common)
    refused(found, variant.split("-")[0], "with no norm behind", "--by perplexity")
    assert list(tmp_path.iterdir()) == [source]


@pytest.fixture
def nothing_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refusals come before work: no block is built and no weight read."""

    def never(*_: object, **__: object) -> None:
        pytest.fail("work was begun")

    monkeypatch.setattr(shearling.engine.stream.BlockStream, "__init__", never)
    monkeypatch.setattr(shearling.model.checkpoint.Checkpoint, "read", never)


@pytest.mark.parametrize("taken", ["directory", "file"])
def test_a_taken_output_is_refused_first(
    run: Run, model: Path, output: Path, taken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = output / "precious.txt" if taken == "directory" else output
    inside.parent.mkdir(exist_ok=True)
    inside.write_text("mine")
    monkeypatch.setattr(
        shearling.model.checkpoint.Checkpoint, "open", lambda _: pytest.fail("opened")
    )
    refused(run("prune", model, "--remove", "1", "--output", output), str(output), "name a new")
    assert inside.read_text() == "mine"


def test_an_empty_output_directory_will_do(run: Run, model: Path, output: Path) -> None:
    output.mkdir()
    assert run("prune", model, "--remove", "1", "--output", output).code == 0


def test_scores_of_another_model(run: Run, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "scores.json"
    other = {"criterion": "taylor", "axis": "layers", "scores": [1.0, 2.0]}
    file.write_text(json.dumps(other))
    prune = ("prune", model, "--layers", 5, "--scores", file, "--output", tmp_path / "out")
    refused(run(*prune), str(file), "scores 2 units", "8 layers")
    file.write_text("[")
    refused(run(*prune), str(file), "not valid JSON", "shearling score")
    file.write_text(json.dumps(other | {"scores": [1.0] * 8, "protected": [0, 1, 2, 3, 4, 5]}))
    refused(run(*prune), "--layers 5", "only 2 are not protected")


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("empty.txt", "", ("empty.txt", "no text")),
        ("blank.jsonl", '{"text": "  "}\n\n', ("blank.jsonl", "no text")),
        ("short.txt", "a sheep", ("7 tokens", "10 samples of 128", "fewer samples")),
        ("wrong.jsonl", '{"text": "a"}\n{"txt": "b"}', ("Line 2 of", "wrong.jsonl", '"text"')),
        ("paper.pdf", "%PDF", ("paper.pdf", ".jsonl")),
        ("latin.txt", "Schäfer".encode("latin-1"), ("latin.txt", "UTF-8")),
        (None, None, ("absent.txt", "There is no text")),
    ],
)
@pytest.mark.parametrize("command", ["score", "prune", "eval"])
def test_texts_that_will_not_do(
    run: Run, model: Path, tmp_path: Path,
    command: str, name: str | None, content: str | bytes | None, expected: tuple[str, ...],
) -> None:  # fmt: skip
    path = tmp_path / (name or "absent.txt")
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    before = list(tmp_path.iterdir())
    arguments = {
        "score": ("--calibration", path, "--output", tmp_path / "scores.json"),
        "prune": ("--layers", 5, "--calibration", path, "--output", tmp_path / "out"),
        "eval": ("--text", path, "--window", 16, "--output", tmp_path / "results"),
    }[command]
    if command == "eval" and name == "short.txt":
        expected = ("7 tokens", "needs 16", "smaller window")
    if command == "prune" and name == "short.txt":
        expected = ("7 tokens", "64 samples of 256", "fewer samples")
    refused(run(command, model, *arguments), *expected)
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--axis", "mlp", "--by", "entropy"), ("'entropy'", "mlp", "fisher-energy, fisher")),
        (("--axis", "mlp", "--by", "perplexity"), ("'perplexity'", "mlp", "fisher-energy")),
        (("--axis", "mlp"), ("fisher-energy", "--calibration")),
        (("--axis", "neurons", "--by", "random"), ("'neurons'", "hidden, heads, kv_heads, mlp")),
        (("--axis", "mlp", "--remove", 2), ("--remove 2", "repair")),
        (("--by", "repair"), ("repair", "--calibration")),
        (("--by", "entropy"), ("'entropy'",)),
        (("--by", "taylor"), ("taylor", "--calibration")),
        (("--by", "taylor", "--remove", 2), ("--remove 2", "greedy", "taylor")),
        (("--by", "greedy", "--remove", 9), ("9 of 8",)),
        (("--by", "magnitude", "--output", "/"), ("--output /", "is a directory")),
        (("--by", "magnitude", "--protect-first", 5, "--protect-last", 3), ("leaves none",)),
    ],
)
@pytest.mark.usefixtures("nothing_is_run")
def test_score_refuses(
    run: Run, model: Path, arguments: tuple[object, ...], expected: tuple[str, ...]
) -> None:
    refused(run("score", model, *arguments), *expected)


def test_sequences_longer_than_the_model_takes(run: Run, model: Path, text: Path) -> None:
    found = run("score", model, "--calibration", text, "--samples", 1, "--length", 65)
    refused(found, "65 tokens", "64 positions of tiny-llama", "--length")


def test_a_tokenizer_of_another_model(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    other = copy(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:70].clone()
    save_file(tensors, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    config |= {"vocab_size": 70, "bos_token_id": 1, "eos_token_id": 2}
    (other / "config.json").write_text(json.dumps(config))
    refused(run("score", other, "--calibration", text, *SAMPLES), "token", "0 to 69", "tokenizer")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--dtype", "int3"), ("'int3'", "float32")),
        (("--output", "{file}"), ("--output", "is a file")),
    ],
)
def test_eval_refuses(
    run: Run, model: Path, text: Path, tmp_path: Path,
    arguments: tuple[str, ...], expected: tuple[str, ...],
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("mine")
    given = [argument.format(file=tmp_path / "file") for argument in arguments]
    refused(run("eval", model, "--text", text, "--window", 16, *given), *expected)


def test_models_that_are_not_there(run: Run, tmp_path: Path) -> None:
    refused(run("inspect", tmp_path / "absent"), "absent", "neither a directory, a .gguf file")
    (tmp_path / "model.safetensors").write_bytes(b"")
    refused(run("inspect", tmp_path / "model.safetensors"), "is a file", "directory")
    refused(run("bench", tmp_path / "absent", "--batch", "1"), "absent")


def test_bench_and_report_refuse(run: Run, model: Path, tmp_path: Path) -> None:
    refused(run("bench", model, "--batch", "one"), "--batch 'one'", "whole numbers")
    refused(run("report", tmp_path), str(tmp_path), "no result")
    refused(run("report", tmp_path, "--output", tmp_path), "is a directory")


def test_an_output_that_cannot_be_made(run: Run, model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    file = tmp_path / "file" / "scores.json"
    found = run("score", model, "--by", "magnitude", "--output", file)
    refused(found, str(tmp_path / "file"), "cannot be written", "is no directory")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_nothing(
    run: Run, model: Path, output: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, file: Path, **_: object) -> None:
        Path(file).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(shearling.files.writer, "save_file", full)
    found = run("prune", model, "--remove", "1", "--output", output)
    refused(found, "disk ran full", str(output), "nothing was left behind")
    assert list(output.parent.iterdir()) == []


def test_too_little_space_is_seen_first(
    run: Run, model: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 10**4

    monkeypatch.setattr(shearling.files.writer.shutil, "disk_usage", lambda _: Usage)
    monkeypatch.setattr(
        shearling.files.writer, "save_file", lambda *_, **__: pytest.fail("written")
    )
    refused(run("prune", model, "--remove", "1", "--output", output), str(output), "GB left")
    assert list(output.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("stop", "code"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGTERM), 143),
        (lambda: os.kill(os.getpid(), signal.SIGINT), 130),
    ],
)
def test_a_stopped_prune_leaves_nothing(
    run: Run, model: Path, output: Path, stop: Callable[[], None], code: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def stopped(*_: object, **__: object) -> None:
        assert any(output.parent.iterdir())
        stop()

    monkeypatch.setattr(shearling.pruning.cut, "prove", stopped)
    found = run("prune", model, "--remove", "1", "--output", output)
    assert found.code == code
    assert "Traceback" not in found.err
    assert ("interrupted" in found.err) == (code == 130)
    assert list(output.parent.iterdir()) == []


def test_traceback_when_asked(run: Run, tmp_path: Path) -> None:
    found = run("--traceback", "inspect", tmp_path / "absent")
    assert found.code == 2
    assert found.err.startswith("Traceback (most recent call last)")
    assert found.err.splitlines()[-1].startswith("shearling: ")
    assert found.out == ""


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (("score", "{model}", "--samples", "0"), "--samples"),
        (("score", "{model}", "--length", "1"), "--length"),
        (("score", "{model}", "--seed", "-1"), "--seed"),
        (("score", "{model}", "--protect-first", "-1"), "--protect-first"),
        (("prune", "{model}", "--remove", "1"), "--output"),
        (("prune", "{model}", "--layers", "many", "--output", "out"), "--layers"),
        (("eval", "{model}"), "--text"),
        (("eval", "{model}", "--text", "t", "--top-p", "2"), "--top-p"),
        (("inspect",), "MODEL"),
        (("shave", "{model}"), "shave"),
    ],
)
def test_usage(run: Run, model: Path, arguments: tuple[str, ...], culprit: str) -> None:
    found = run(*(argument.format(model=model) for argument in arguments))
    assert found.code == 2
    assert culprit in found.err
    assert "Traceback" not in found.err
    assert found.out == ""


def test_a_perplexity_is_a_number(run: Run, model: Path, text: Path, tmp_path: Path) -> None:
    """NaN weights stop a score rather than end up in a file that is not JSON."""
    broken = copy(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.nan
    save_file(tensors, broken / "model.safetensors")
    file = tmp_path / "scores.json"
    found = run("score", broken, "--calibration", text, *SAMPLES, "--output", file)
    refused(found, "the tensor model.norm.weight of", "fetch")
    assert not file.exists()
    common = ("--calibration", text, *ENOUGH, "--output", tmp_path / "out")
    found = run("prune", broken, "--layers", 5, "--by", "perplexity", *common)
    refused(found, "the tensor model.norm.weight of", "fetch")
    found = run("prune", broken, "--layers", 5, *common)
    refused(found, "the tensor model.norm.weight of", "fetch")
    assert not (tmp_path / "out").exists()
