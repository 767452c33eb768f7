"""What a GGUF file says becomes a model with the source's logits, or is refused.

Files are written by the gguf package from models of stock transformers (see ``tiny_gguf.py``), and
read back through stock transformers: no code of ours is on both sides.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shearling.errors import ShearlingError
from shearling.model.gguf import GgufFile, convert_by_transformers, convert_gguf, known
from shearling.model.loading import load_model, load_tokenizer
from tiny_gguf import tiny_llama, write_gguf
from tiny_models import tiny_config

pytest.importorskip("gguf", reason="the gguf package is not installed")

ARCHITECTURES = {
    "llama": "llama", "llama-tied": "llama", "llama-biases": "llama", "mistral": "llama",
    "qwen2-tied": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3",
    "phi3": "phi3", "gpt_neox": "gptneox", "gpt_neox-serial": "gptneox",
}  # fmt: skip
LINEAR = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
        "rope.scaling.original_context_length": 16}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
SHORT, LONG = [1.0, 1.1], [1.5, 3.0]


def random_model(config: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def scaled(variant: str, **rope: Any) -> Any:
    """A variant's configuration with another rotary scaling; its base stays."""
    config = tiny_config(variant)
    base = {"rope_theta": 10000.0} | {
        key: value
        for key, value in config.rope_parameters.items()
        if key == "partial_rotary_factor"
    }
    config.rope_parameters = base | rope
    return config


def read_back(file: Path, directory: Path) -> Any:
    header = GgufFile.open(file)
    assert known(header)
    directory.mkdir()
    convert_gguf(header, directory)
    return load_model(directory)


def far(model: Any, other: Any, ids: torch.Tensor) -> float:
    """The largest difference of two models' logits."""
    with torch.no_grad():
        return float((model(ids, use_cache=False).logits - other(ids, use_cache=False).logits)
                     .abs().max())  # fmt: skip


@pytest.mark.parametrize("variant", sorted(ARCHITECTURES))
def test_every_family_has_its_logits_back(variant, ids, tmp_path):
    config = tiny_config(variant)
    if variant == "gemma3":  # as llama.cpp counts, every sixth block attends to everything
        config = type(config)(**config.to_dict() | {
            "num_hidden_layers": 7, "layer_types": None, "sliding_window_pattern": 6})  # fmt: skip
    if variant.startswith("gemma"):
        config.query_pre_attn_scalar = 9  # not the width of a head, which is 6
    model = random_model(config)
    extra = {"attention.scale": 9**-0.5} if variant.startswith("gemma") else {}
    if variant == "gemma3":
        extra["rope.freq_base_swa"] = 10000.0
    file = write_gguf(model, tmp_path / "a.gguf", ARCHITECTURES[variant], extra)
    read = read_back(file, tmp_path / "a")
    assert far(model, read, ids) < 1e-4
    assert read.config.num_hidden_layers == config.num_hidden_layers


@pytest.mark.parametrize(
    ("rope", "metadata"),
    [
        ({"rope_type": "linear", "factor": 4.0}, LINEAR),
        ({"rope_type": "linear", "factor": 4.0}, {"rope.scale_linear": 4.0}),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, YARN),
    ],
    ids=["linear", "linear of old files", "yarn"],
)
def test_scaling_in_the_metadata_arrives(rope, metadata, ids, tmp_path):
    model = random_model(scaled("llama", **rope))
    read = read_back(write_gguf(model, tmp_path / "a.gguf", "llama", metadata), tmp_path / "a")
    assert read.config.rope_parameters["rope_type"] == rope["rope_type"]
    assert far(model, read, ids) < 1e-4
    # It matters: without a word of it, the logits are others.
    bare = read_back(write_gguf(model, tmp_path / "b.gguf", "llama"), tmp_path / "b")
    assert far(model, bare, ids) > 1e-2


def test_llama_3_s_factors_arrive(ids, tmp_path):
    config = scaled("llama", **LLAMA3)
    model = random_model(config)
    turned, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 10000.0 ** (-torch.arange(0, 6, 2) / 6)
    factors = {"rope_freqs.weight": (plain / turned).float()}
    read = read_back(
        write_gguf(model, tmp_path / "a.gguf", "llama", tensors=factors), tmp_path / "a"
    )
    assert far(model, read, ids) < 1e-4
    bare = read_back(write_gguf(model, tmp_path / "b.gguf", "llama"), tmp_path / "b")
    assert far(model, bare, ids) > 1e-2


@pytest.mark.parametrize("length", [17, 40], ids=["short", "long"])
def test_long_contexts_have_factors_of_their_own(length, tmp_path):
    rope = {"rope_type": "longrope", "short_factor": SHORT, "long_factor": LONG,
            "original_max_position_embeddings": 32, "factor": 2.0}  # fmt: skip
    config = scaled("phi3", **rope)
    config.sliding_window, config.original_max_position_embeddings = None, 32
    model = random_model(config)
    metadata = {"rope.scaling.original_context_length": 32,
                "rope.scaling.attn_factor": (1 + torch.tensor(2.0).log() /
                                             torch.tensor(32.0).log()).sqrt().item()}  # fmt: skip
    factors = {"rope_factors_short.weight": torch.tensor(SHORT),
               "rope_factors_long.weight": torch.tensor(LONG)}  # fmt: skip
    file = write_gguf(model, tmp_path / "a.gguf", "phi3", metadata, factors)
    read = read_back(file, tmp_path / "a")
    ids = torch.randint(3, 101, (2, length), generator=torch.Generator().manual_seed(1))
    assert far(model, read, ids) < 1e-4


def test_a_phi_3_keeps_its_window(ids, tmp_path):
    model = random_model(tiny_config("phi3"))
    read = read_back(write_gguf(model, tmp_path / "a.gguf", "phi3"), tmp_path / "a")
    assert read.config.sliding_window == model.config.sliding_window == 7
    model.config.sliding_window = None
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert far(model, read, ids) > 1e-2


def test_every_token_that_ends_a_text_is_kept(tmp_path):
    model = tiny_llama()
    ends = {"tokenizer.ggml.eot_token_id": 3, "tokenizer.ggml.eom_token_id": 1}
    read_back(write_gguf(model, tmp_path / "a.gguf", "llama", ends), tmp_path / "a")
    said = json.loads((tmp_path / "a" / "generation_config.json").read_text())
    assert said["eos_token_id"] == [1, 3]
    assert load_tokenizer(tmp_path / "a").eos_token_id == 1


def fields(held: bytes) -> list[tuple[int, Any]]:
    """Number and value of every field of a protobuf message, whatever it means."""
    found, at = [], 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = held[at]
            at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
            if byte < 128:
                return value

    while at < len(held):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            found.append((number, varint()))
            continue
        size = 4 if wire == 5 else varint()
        found.append((number, held[at : at + size]))
        at += size
    return found


def test_a_sentencepiece_vocabulary_is_written_as_one_too(tmp_path):
    """llama.cpp's converter reads Gemma's and Phi-3's from tokenizer.model alone."""
    tokens = ["<unk>", "<s>", "</s>", "<turn>", "▁", "a", "b", "▁a", "ab", "  "]
    scores = [0.0, 0.0, 0.0, -1000.0, -4.0, -5.0, -6.0, -1.0, -2.0, -3.0]
    kinds = [2, 3, 3, 4, 1, 1, 1, 1, 1, 4]
    model = random_model(type(tiny_llama().config)(**tiny_llama().config.to_dict()))
    model.resize_token_embeddings(len(tokens))
    told = {"tokens": tokens, "scores": scores, "token_type": kinds, "model": "llama",
            "merges": None, "pre": None, "bos_token_id": 1, "eos_token_id": 2,
            "unknown_token_id": 0}  # fmt: skip
    metadata = {f"tokenizer.ggml.{key}": value for key, value in told.items()}
    read_back(write_gguf(model, tmp_path / "a.gguf", "llama", metadata), tmp_path / "a")
    message = fields((tmp_path / "a" / "tokenizer.model").read_bytes())
    pieces = [dict(fields(value)) for number, value in message if number == 1]
    assert [piece[1].decode() for piece in pieces] == [*tokens[:-1], "▁▁"]
    assert [struct.unpack("<f", piece[2])[0] for piece in pieces] == scores
    assert [piece[3] for piece in pieces] == kinds
    said = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
    users = {key: value["content"] for key, value in said["added_tokens_decoder"].items()}
    assert users == {"3": "<turn>", "9": "▁▁"}
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer("a<turn>ab", add_special_tokens=False)["input_ids"] == [7, 3, 8]
    library = pytest.importorskip("sentencepiece")
    whole = library.SentencePieceProcessor(model_file=str(tmp_path / "a" / "tokenizer.model"))
    assert whole.encode("a<turn>ab") == [7, 3, 8]


@pytest.mark.parametrize(
    ("metadata", "tensors", "without", "said"),
    [
        ({"attention.max_alibi_bias": 8.0}, {}, (), "attention.max_alibi_bias=8.0"),
        ({"attention.scale": 0.9}, {}, (), "no other scale"),
        ({"attention.sliding_window": 2, "context_length": 1}, {}, (), None),
        ({"rope.scaling.type": "su"}, {}, (), "the kind 'su'"),
        ({"rope.scaling.type": "yarn"}, {}, (), "context it was trained with"),
        (LINEAR, {"rope_freqs.weight": torch.tensor([1.0, 2.0])}, (), "another in a tensor"),
        ({}, {"rope_freqs.weight": torch.tensor([1.0, 2.0, 3.0])}, (), "3 rotary factors for 2"),
        ({}, {"rope_factors_long.weight": torch.tensor([1.0, 2.0])}, (), "rope_factors_short"),
        ({}, {}, ["blk.0.ffn_up.weight"], "lacks blk.0.ffn_up.weight"),
        ({}, {"blk.0.ffn_up.bias": torch.zeros(12)}, (), "holds blk.0.ffn_up.bias"),
        ({"block_count": 10**7}, {}, (), "10000000 blocks in"),
        ({"feed_forward_length": 13}, {}, (), r"\[12, 8\], and its metadata call for \[13, 8\]"),
        ({"attention.head_count": 0}, {}, (), "attention.head_count=0"),
        ({"tokenizer.ggml.bos_token_id": 40}, {}, (), "and it has 40 tokens"),
    ],
)
def test_what_is_not_understood_or_contradicts_itself_is_refused(
    metadata, tensors, without, said, tmp_path
):
    file = write_gguf(tiny_llama(), tmp_path / "a.gguf", "llama", metadata, tensors, without)
    if said is None:  # a window no text is longer than changes nothing
        read_back(file, tmp_path / "a")
        return
    with pytest.raises(ShearlingError, match=said):
        read_back(file, tmp_path / "a")


def test_transformers_own_reader_invents_no_weights(tmp_path):
    """The way for architectures that have no family here, on one that both know."""
    whole = write_gguf(tiny_llama(), tmp_path / "a.gguf", "llama")
    convert_by_transformers(GgufFile.open(whole), tmp_path / "a")
    left_out = ["blk.0.ffn_up.weight"]
    file = write_gguf(tiny_llama(), tmp_path / "b.gguf", "llama", without=left_out)
    with pytest.raises(ShearlingError, match=r"lacks 1 .* model\.layers\.0\.mlp\.up_proj\.weight"):
        convert_by_transformers(GgufFile.open(file), tmp_path / "b")
    assert not (tmp_path / "b").exists()
