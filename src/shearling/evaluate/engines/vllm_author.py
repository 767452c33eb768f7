"""A model writes text of its own on a vLLM server; see :mod:`shearling.data.own_text`.

Shapes: B sequences of S tokens, of which T are drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from shearling.engine.sampling import Writer
from shearling.evaluate.engines.base import candidate_of
from shearling.evaluate.engines.serving import ServingOptions, ask_all, written_tokens
from shearling.model.checkpoint import Checkpoint

_BITS = 24  # of chance in a float32 that is drawn evenly from 0 to 1
# Temperature 1, and nothing left out: the model's own distribution, ends of text among it.
_WHOLE_DISTRIBUTION = {
    "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
    "ignore_eos": True, "skip_special_tokens": False, "return_token_ids": True,
}  # fmt: skip


@dataclass(frozen=True)
class VllmAuthor:
    """A server of its own, which ends with the writing.

    Every sequence is a request with a seed of its own, so that it is the same in any batch, but
    for the rounding of products. vLLM draws by the seed, not by the draws of
    :mod:`shearling.engine.sampling`: another text of the same distribution.

    Attributes:
        options: how the model is served; ``at_a_time`` sequences.
    """

    engine: ClassVar[str] = "vllm"

    options: ServingOptions

    def check(self, source: Checkpoint) -> None:
        """Whatever vLLM can load it can write; it says what it cannot."""

    def at_once(self, source: Checkpoint, length: int) -> int:
        """As many as are served."""
        return self.options.at_a_time

    @contextmanager
    def writing(self, source: Checkpoint, length: int, batch: int) -> Generator[Writer]:
        """The server, started once for all batches.

        Raises:
            ShearlingError: it does not start, or fails later; with what its log says.
        """
        options = replace(self.options, at_a_time=batch)
        with options.server(candidate_of(source), length) as server:

            def write_batch(
                ids_BS: Tensor,
                at_BT: Tensor,
                tell: Callable[[int], None],
                given_BT: Tensor | None = None,
            ) -> Tensor:
                assert given_BT is None, "a server writes on; it fills no gaps"
                new = at_BT.shape[1]
                prompts = ids_BS[:, : length - new].tolist()
                bodies = [
                    _WHOLE_DISTRIBUTION | {"prompt": prompt, "max_tokens": new, "seed": seed}
                    for prompt, seed in zip(prompts, _seeds(at_BT), strict=True)
                ]
                answered = 0

                def one_more() -> None:
                    nonlocal answered
                    answered += 1
                    tell(new * answered // len(bodies))

                asked = [(body, written_tokens) for body in bodies]
                rows = ask_all(server, asked, batch, one_more)
                if short := [len(row) for row in rows if len(row) != new]:
                    raise server.failed(f"{short[0]} tokens came where {new} were asked for")
                return torch.cat([ids_BS[:, : length - new], torch.tensor(rows)], dim=1)

            yield write_batch

    def lines(self) -> list[str]:
        """Where the server runs."""
        options = self.options
        return [f"vllm writes on {options.device}, in {options.dtype}: {options.program}"]


def _seeds(at_BT: Tensor) -> list[int]:
    """A seed for every sequence, from its first two draws: 48 bits, so that none meet."""
    whole_BT = (at_BT[:, :2].double() * 2**_BITS).long()
    return [sum(int(n) << (_BITS * i) for i, n in enumerate(row)) for row in whole_BT.tolist()]
