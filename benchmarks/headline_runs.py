"""The runs of headline.py: from names to shearling's commands, with all of their options."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

Gates = Literal["sheared", "warm", "top-k"]
UPDATES = 12  # of a dynamic mix in a run of ours
WORDS = ("MODEL", "STORE", "CALIBRATION", "REFERENCE")  # paths, put in when a command is run


@dataclass(frozen=True)
class Size:
    """How small a model is to be.

    Attributes:
        layers: blocks, where blocks alone are removed.
        params: what those leave of all parameters; our cut is to have as many.
        shape: on all four axes, with as many parameters as well.
    """

    layers: int
    params: int
    shape: str


# 0.8 and 0.6 of the parameters in the blocks of SmolLM2-135M: 24 and 18 of 30 blocks. Narrower
# models have smaller embeddings, so that blocks have more where all parameters are as many.
SIZES = {
    "0.8": Size(24, 113_274_432, "layers=28,hidden=544,heads=6,mlp=1504"),
    "0.6": Size(18, 92_033_856, "layers=26,hidden=512,heads=6,mlp=1288"),
}


@dataclass(frozen=True)
class Scale:
    """How much everything is given.

    Attributes:
        tokens: of a run: calibration, gates and healing together.
        length: of the store's sequences.
        batch: sequences a step of healing; ``gate_batch``: of training gates, which need steps.
        micro: sequences in memory at a time.
        looks: at held-out text, about so many; ``sequences``: of each domain, in each of them.
        samples, window: calibration text, sequences and tokens of each; ``real``: sequences where
            a repair reads real text alone, and nothing that the model writes.
        windows: of 512 tokens, of each text that perplexity is measured on.
        rate: the peak learning rate of all that heals every weight.
        sizes: by name.
    """

    tokens: int = 5_000_000
    length: int = 512
    batch: int = 32
    gate_batch: int = 8
    micro: int = 32
    looks: int = 12
    sequences: int = 24
    samples: int = 64
    real: int = 384  # as many tokens as 64 with what is written beside them
    window: int = 256
    windows: int = 140
    rate: str = "5e-4"
    sizes: dict[str, Size] = field(default_factory=lambda: dict(SIZES))

    @property
    def step(self) -> int:
        """Tokens of a step of healing."""
        return self.batch * self.length

    @property
    def every(self) -> int:
        """Steps of healing between looks."""
        return max(1, self.tokens // self.step // self.looks)


# What two cores give in two hours: about 50 tokens a second are trained on.
REDUCED = Scale(
    tokens=65_536, batch=2, gate_batch=1, micro=2, looks=5, sequences=3, samples=10, real=96,
    window=128, windows=24, rate="3e-4", sizes={"0.8": SIZES["0.8"]},
)  # fmt: skip


@dataclass(frozen=True)
class Command:
    """A shearling command, but for where it writes.

    Attributes:
        words: from the command's name on, with ``WORDS`` for paths.
        tokens: it takes: of calibration, or trained on.
    """

    words: tuple[str, ...]
    tokens: int


@dataclass(frozen=True)
class Run:
    """A cut, or gates, and then healing.

    Attributes:
        size: a key of the sizes.
        title: of its line in a plot.
        part: the cut that it shares with other runs, a key of :func:`parts`; None with gates.
        gates: what takes the place of a cut; ``calibration``: tokens that it is given besides.
        heal: the healing.
        cost: of a token, about, where one of continued pretraining costs 1.
    """

    size: str
    title: str
    part: str | None
    gates: Command | None
    heal: Command
    cost: float
    calibration: int = 0

    @property
    def tokens(self) -> int:
        """Of training; calibration is not among them."""
        return self.heal.tokens + (self.gates.tokens if self.gates else 0)


def parts(scale: Scale) -> dict[str, Command]:
    """The cuts, by name."""
    text, real = (
        ("--calibration", "CALIBRATION", "--samples", str(n), "--length", str(scale.window))
        for n in (scale.samples, scale.real)
    )
    as_much, real = real, (*real, "--copies", "0", "--written", "0")
    read, read_real = scale.samples * scale.window, scale.real * scale.window
    # The default repair also sees a rewritten copy of each window, and four that the model writes.
    repaired = 6 * read
    plain = ("--by", "perplexity", "--no-refit", "--no-final-norm")
    cuts = {}
    for name, size in scale.sizes.items():
        layers = ("prune", "MODEL", "--layers", str(size.layers))
        cuts |= {
            f"ours-{name}": Command(
                ("prune", "MODEL", "--params", str(size.params), *text), repaired
            ),
            f"perplexity-{name}": Command((*layers, *plain, *text), read),
            f"perplexity-real-{name}": Command((*layers, *plain, *as_much), read_real),
            f"depth-{name}": Command((*layers, *text), repaired),
            f"ours-real-{name}": Command(
                ("prune", "MODEL", "--params", str(size.params), *real), read_real
            ),
            f"depth-real-{name}": Command((*layers, *real), read_real),
        }
    return cuts


def runs(scale: Scale) -> dict[str, Run]:
    """All runs by name, in the order of their importance."""
    made: dict[str, Run] = {}
    for some in (_first, _rest):
        for size in scale.sizes:
            made |= {f"{name}-{size}": run for name, run in some(scale, size)}
    return made


def _first(scale: Scale, size: str) -> Iterator[tuple[str, Run]]:
    distil = _distilled(scale)
    yield "ours", _cut(scale, size, "ours", "ours, CPT")
    fifth = _a_fifth(scale)
    yield "ours-fifth", _cut(fifth, size, "ours", "ours, CPT, a fifth of the tokens")
    yield "ours-distilled", _cut(scale, size, "ours", "ours, distilled", distil, 1.7)
    yield "shortened-cpt", _cut(scale, size, "perplexity", "shortened, CPT")
    yield "sheared", _gated(scale, size, "sheared", "sheared")
    lora = ("--recipe", "lora", "lr=2e-3")
    yield "shortened-lora", _cut(scale, size, "perplexity", "shortened, LoRA", lora, 0.9)


def _rest(scale: Scale, size: str) -> Iterator[tuple[str, Run]]:
    fifth = _a_fifth(scale)
    distil = _distilled(scale)
    both = (*distil, "text_share=0.5")
    yield "depth", _cut(scale, size, "depth", "depth repaired, CPT")
    yield "ours-real", _cut(scale, size, "ours-real", "ours, real text alone, CPT")
    own = scale.real * scale.window
    title = "ours, real text alone, CPT, dynamic mix"
    balanced = _balanced(scale, scale.tokens - own)
    yield "ours-real-balanced", _cut(scale, size, "ours-real", title, balanced)
    if own + scale.step <= fifth.tokens:  # something is left for healing
        title = "ours, real text alone, a fifth of the tokens"
        yield "ours-real-fifth", _cut(fifth, size, "ours-real", title)
        title, balanced = f"{title}, dynamic mix", _balanced(fifth, fifth.tokens - own)
        yield "ours-real-balanced-fifth", _cut(fifth, size, "ours-real", title, balanced)
    yield (
        "ours-real-distilled",
        _cut(scale, size, "ours-real", "ours, real text alone, distilled", distil, 1.7),
    )
    yield (
        "ours-real-both",
        _cut(scale, size, "ours-real", "ours, real text alone, distilled and text", both, 1.7),
    )
    balanced = _balanced(scale, scale.tokens - scale.samples * scale.window)
    title = "shortened, CPT, dynamic mix"
    yield "shortened-balanced", _cut(scale, size, "perplexity", title, balanced)
    title = "shortened, chosen on as much text as ours, CPT"
    yield "shortened-real", _cut(scale, size, "perplexity-real", title)
    yield "depth-real", _cut(scale, size, "depth-real", "depth repaired on real text, CPT")
    yield "ours-both", _cut(scale, size, "ours", "ours, distilled and text", both, 1.7)
    yield "warm", _gated(scale, size, "warm", "gates from scores")
    yield "top-k", _gated(scale, size, "top-k", "top-k from scores")


def _a_fifth(scale: Scale) -> Scale:
    return replace(scale, tokens=scale.tokens // 5)


def _distilled(scale: Scale) -> tuple[str, ...]:
    return ("--recipe", "distill", "--teacher", "MODEL", f"lr={scale.rate}")


def _cpt(scale: Scale) -> tuple[str, ...]:
    return ("--recipe", "cpt", f"lr={scale.rate}")


def _balanced(scale: Scale, tokens: int) -> tuple[str, ...]:
    """CPT whose mix follows the losses, about as often in every run, however short it is."""
    every = max(1, tokens // scale.step // UPDATES)
    mixed = ("mix=dynamic", "--reference", "REFERENCE", f"update_every={every}")
    return (*_cpt(scale), *mixed)


def _cut(
    scale: Scale, size: str, part: str, title: str, how: tuple[str, ...] = (), cost: float = 1.0
) -> Run:  # fmt: skip
    spent, how = parts(scale)[f"{part}-{size}"].tokens, how or _cpt(scale)
    return Run(
        size, title, f"{part}-{size}", None, _heal(scale, scale.tokens - spent, how), cost, spent
    )


def _gated(scale: Scale, size: str, kind: Gates, title: str) -> Run:
    """Half of the steps for gates, the rest for healing, by CPT."""
    ratio = scale.batch // scale.gate_batch
    mixed = ("mix=dynamic", "--reference", "REFERENCE") if kind == "sheared" else ()
    often = scale.every * ratio
    spent = 0 if kind == "sheared" else scale.samples * scale.window  # scores and refit
    half = scale.tokens // 2 // scale.step * scale.step
    words = (
        "learn", "MODEL", "--shape", scale.sizes[size].shape, "--data", "STORE", "--tokens",
        str(half), "--recipe", "sheared" if kind == "sheared" else "warm", *mixed,
        *(("gates=top-k",) if kind == "top-k" else ()), "lr=3e-4", f"batch={scale.gate_batch}",
        f"micro={min(scale.micro, scale.gate_batch)}", *_looks(scale, often),
        *((f"update_every={often}",) if mixed else ()),
        *(() if kind == "sheared" else (
            f"samples={scale.samples}", f"sample_length={scale.window}")),
    )  # fmt: skip
    again = (*_cpt(scale), *mixed, *((f"update_every={scale.every}",) if mixed else ()))
    heal = _heal(scale, scale.tokens - half - spent, again)
    return Run(size, title, None, Command(words, half), heal, 1.4, spent)


def _heal(scale: Scale, tokens: int, how: tuple[str, ...]) -> Command:
    whole = max(1, tokens // scale.step) * scale.step
    words = (
        "heal", "CUT", "--data", "STORE", "--tokens", str(whole), *how, f"batch={scale.batch}",
        f"micro={scale.micro}", "warmup=0.05", *_looks(scale, scale.every),
    )  # fmt: skip
    return Command(words, whole)


def _looks(scale: Scale, every: int) -> tuple[str, ...]:
    return (
        "checkpointing=false", f"eval_every={every}", f"eval_sequences={scale.sequences}",
        "save_every=1000000", "keep=1",
    )  # fmt: skip


__all__ = ["REDUCED", "SIZES", "WORDS", "Command", "Run", "Scale", "Size", "parts", "runs"]
