"""What runs models while they are timed: transformers, llama.cpp and vLLM."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from shearling.errors import ShearlingError
from shearling.evaluate.engines.base import Candidate, Cell, Engine, Runner, Setting, Timing

NAMES = ("transformers", "llama.cpp", "vllm")


@dataclass(frozen=True)
class Places:
    """Where engines are, as far as the user says; else they are looked for.

    Attributes:
        llama_cpp: a directory with llama.cpp's programs; else ``$LLAMA_CPP`` or the PATH.
        vllm: the program ``vllm`` of its environment; else that on the PATH.
    """

    llama_cpp: Path | None = None
    vllm: Path | None = None


def engine(name: str, places: Places | None = None) -> Engine:
    """An engine by its name.

    Raises:
        ShearlingError: no such engine, or it is not installed.
    """
    places = places or Places()
    if name == "transformers":
        from shearling.evaluate.engines.transformers import Transformers

        return Transformers()
    if name == "llama.cpp":
        from shearling.evaluate.engines.llama_cpp import LlamaCpp

        return LlamaCpp(places.llama_cpp)
    if name == "vllm":
        from shearling.evaluate.engines.vllm import Vllm

        return Vllm(places.vllm)
    raise ShearlingError(f"There is no engine {name!r}; give {', '.join(NAMES)}.")


__all__ = [
    "NAMES",
    "Candidate",
    "Cell",
    "Engine",
    "Places",
    "Runner",
    "Setting",
    "Timing",
    "engine",
]
