"""The vocabulary axis: which tokens stay, and a tokenizer that knows no others.

A token that goes takes its row of the embedding with it, and its text is from then on spelt with
the tokens it was merged from. Nothing becomes unwritable: byte tokens, special tokens and whatever
the kept tokens are merged from always stay, so any text still decodes to what it decoded to.
"""

from shearling.model.token_ids import renumber_ids
from shearling.pruning.vocabulary.choose import choose_tokens
from shearling.pruning.vocabulary.prove import prove_round_trip
from shearling.pruning.vocabulary.rewrite import REWRITTEN, rewrite_tokenizer

__all__ = [
    "REWRITTEN",
    "choose_tokens",
    "prove_round_trip",
    "renumber_ids",
    "rewrite_tokenizer",
]
