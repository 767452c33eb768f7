"""What a run needs of other packages and of its ranks, asked before anything is loaded."""

from __future__ import annotations

from importlib.util import find_spec

from shearling.errors import ShearlingError
from shearling.train.options import Options


def check_installed(options: Options, ranks: int = 1) -> None:
    """Refuse options that this installation, or so many ranks, cannot follow.

    Raises:
        ShearlingError: moments of eight bits without torchao or on several ranks, adapters without
            peft, a tracker that is not installed, or a batch that ranks cannot share.
    """
    if options.optimizer == "adamw8bit":
        check_eight_bits(ranks)
        if find_spec("torchao") is None:
            raise no_torchao()
    if "lora" in options.recipe and find_spec("peft") is None:
        raise no_peft()
    for name in options.trackers:
        if find_spec(name) is None:
            raise no_tracker(name)
    check_shared(options.batch, ranks)


def check_eight_bits(ranks: int) -> None:
    """Refuse moments of eight bits on several ranks (ShearlingError)."""
    if ranks > 1:
        raise ShearlingError(
            f"optimizer=adamw8bit was given on {ranks} ranks, but its moments are kept by one "
            "process; use optimizer=adamw, whose moments are divided over the ranks."
        )


def check_shared(batch: int, ranks: int) -> None:
    """Refuse a batch that ranks cannot share evenly (ShearlingError)."""
    if batch % ranks:
        raise ShearlingError(
            f"a batch of {batch} sequences cannot be split over {ranks} ranks; give "
            f"batch={-(-batch // ranks) * ranks}."
        )


def no_torchao() -> ShearlingError:
    """Of the package that keeps moments in eight bits."""
    return ShearlingError(
        "optimizer=adamw8bit was given, but torchao is not installed; pip install "
        "'shearling[quantize]', or use optimizer=adamw."
    )


def no_peft() -> ShearlingError:
    """Of the package that adds adapters."""
    return ShearlingError(
        "adapters were asked for, but peft is not installed; pip install 'shearling[lora]', or "
        "use --recipe cpt."
    )


def no_tracker(name: str) -> ShearlingError:
    """Of a package that follows a run."""
    return ShearlingError(
        f"the tracker {name} was asked for, but it is not installed; pip install {name}, or "
        "leave it out: log.jsonl is always written."
    )
