"""Which engine runs the models that tasks are asked of, as the user names it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shearling.errors import ShearlingError

NAMES = ("transformers", "vllm")


@dataclass(frozen=True)
class TaskEngine:
    """What runs the models that tasks are asked of.

    Attributes:
        name: transformers, in this process, or vllm, on a server of its own.
        version: vLLM's; of transformers the results' versions tell.
        program: of vLLM.
        device: a torch device, for vLLM; a model for transformers comes loaded.
    """

    name: str = "transformers"
    version: str | None = None
    program: Path | None = None
    device: str = "cpu"

    @property
    def served(self) -> bool:
        """Whether the model is on a server, and this process loads none."""
        return self.name != "transformers"

    @property
    def label(self) -> str:
        """Its name and version, as a sentence shows them."""
        return f"{self.name} {self.version}" if self.version else self.name


def task_engine(name: str, program: Path | None = None, device: str = "cpu") -> TaskEngine:
    """An engine by its name, looked for.

    Args:
        name: transformers or vllm.
        program: vLLM's; None looks on the PATH.
        device: where vLLM runs.

    Raises:
        ShearlingError: an engine that asks no tasks, or that is not there.
    """
    if name == "vllm":
        from shearling.evaluate.engines.vllm import Vllm

        vllm = Vllm(program)
        return TaskEngine(name, vllm.version, vllm.program, device)
    if name != "transformers":
        raise ShearlingError(
            f"--engine {name} was given, but tasks are asked of {' or '.join(NAMES)}; give one of "
            "these."
        )
    return TaskEngine()
