"""A recipe's stages made one after the other: what is whole stays, what was begun goes on.

A stage's key is the digest of its options and of its inputs' fingerprints. It stands in the record
beside the stage's directory, which is written when the stage is begun, and again, with the digest
of every file, when the stage is whole. Another key makes the stage anew, and so, if that makes
something else, those behind it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from shearling.data.store import Store
from shearling.engine.devices import named_device
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.files.staging import check_writable
from shearling.files.unfinished import alone
from shearling.files.writer import write_json, write_text
from shearling.model.checkpoint import Checkpoint
from shearling.model.memory import free_bytes
from shearling.recipes.inputs import Inputs
from shearling.recipes.plan import plan_recipe
from shearling.recipes.read import plain_recipe
from shearling.recipes.record import StageInput, StageRecord, check_untouched, digests, joined
from shearling.recipes.schema import WholeRecipe
from shearling.recipes.stage import Stage
from shearling.recipes.work import StageWork

RECIPE = "recipe.yaml"
State = Literal["whole", "unfinished", "to do", "changed"]
Notify = Callable[[str], None]


@dataclass
class RecipeRun:
    """A recipe in a directory.

    Attributes:
        recipe: what is wanted.
        output: the run's directory.
        progress, notify: told how far the work is; told what a user should know.
        stages: what is to be done, in order.
    """

    recipe: WholeRecipe
    output: Path
    progress: Progress = silent
    notify: Notify = field(default=lambda sentence: None)

    def __post_init__(self) -> None:
        """Plan every stage (ShearlingError for what cannot be)."""
        if self.output.exists() and not self.output.is_dir():
            raise ShearlingError(f"{self.output} is a file; name a directory.")
        check_writable(self.output)
        self.stages: Sequence[Stage] = plan_recipe(self.recipe, self.notify)
        self.inputs = Inputs(self.output)
        self._records: dict[str, StageRecord] = {}  # of stages that are whole

    # --- what is there ---------------------------------------------------------------------------

    def states(self) -> dict[str, State]:
        """How far every stage is, before anything is done.

        Raises:
            ShearlingError: a stage's directory was edited, or an input changed since.
        """
        for stage in self.stages:
            self._check_inputs(stage)
        return {stage.name: self._state(stage)[0] for stage in self.stages}

    def _state(self, stage: Stage) -> tuple[State, str]:
        """How far a stage is, and its key; "" where an input is not made yet."""
        record, directory = self._record(stage), self.output / stage.name
        inputs = self.inputs.all(stage, self._records)
        key = "" if inputs is None else _key(stage, inputs)
        there = directory.is_dir() and any(directory.iterdir())
        if record is None:
            if there:
                raise ShearlingError(
                    f"{directory} is there, but no stage of this recipe made it; move it away, or "
                    "name another --output."
                )
            return "to do", key
        if record.whole and there:
            check_untouched(directory, record)
        if not there:
            return "to do", key
        if not key or record.key != key:
            return "changed" if key else "to do", key
        if record.whole:
            self._records[stage.name] = record
        return "whole" if record.whole else "unfinished", key

    def _record(self, stage: Stage) -> StageRecord | None:
        return StageRecord.load(self._file(stage))

    def _file(self, stage: Stage) -> Path:
        return self.output / f"{stage.name}.json"

    def _check_inputs(self, stage: Stage) -> None:
        """Raise ShearlingError if something given lies where it lay, and is another now."""
        record = self._record(stage)
        if record is None or not (self.output / stage.name).is_dir():
            return
        for name, now in self.inputs.given(stage).items():
            before = record.inputs.get(name)
            same = before is not None and before.place == now.place
            if same and before is not None and before.fingerprint != now.fingerprint:
                raise ShearlingError(
                    f"{now.name} changed since {self.output / stage.name} was made from it "
                    f"({name} {before.fingerprint[:12]} then, {now.fingerprint[:12]} now); put it "
                    "back, or name another --output."
                )

    # --- the plan --------------------------------------------------------------------------------

    def plan(self) -> dict[str, Any]:
        """Every stage with how far it is and what it will take.

        Raises:
            ShearlingError: as :meth:`states`.
        """
        states = self.states()
        return {
            "output": str(self.output),
            "stages": [
                {"name": stage.name, "state": states[stage.name], **stage.cost.as_json()}
                for stage in self.stages
            ],
            "seconds": sum(
                stage.cost.seconds or 0 for stage in self.stages if states[stage.name] != "whole"
            ),
        }

    def check_fits(self, plan: Mapping[str, Any]) -> None:
        """Refuse a run whose memory or disk is not there (ShearlingError names the stage)."""
        due = [one for one in plan["stages"] if one["state"] != "whole"]
        device = str(named_device(self.recipe.device))
        free = free_bytes(device)
        for one in due:
            if free is not None and (one["least"] or 0) > free:
                raise ShearlingError(
                    f"{one['name']} needs at least {one['least'] / 1e9:.1f} GB of memory, but "
                    f"{free / 1e9:.1f} GB on {device} are free; take a smaller model, heal with "
                    "recipe: lora, or another machine."
                )
        needed = sum(one["disk"] or 0 for one in due if one["state"] != "unfinished")
        place = next(p for p in (self.output, *self.output.absolute().parents) if p.is_dir())
        room = shutil.disk_usage(place).free
        if needed > room:
            raise ShearlingError(
                f"{self.output} needs about {needed / 1e9:.1f} GB, but its disk has "
                f"{room / 1e9:.1f} GB left; free some space, or name an output on another disk."
            )

    # --- the work --------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Make every stage that is not whole.

        Returns:
            The stages made and kept, and whether the run was stopped in one.

        Raises:
            ShearlingError: what does not fit, and whatever the stages refuse.
        """
        with alone(self.output, self.output):
            self.check_fits(self.plan())
            self._records.clear()
            text = yaml.safe_dump(plain_recipe(self.recipe), sort_keys=False, allow_unicode=True)
            write_text(self.output / RECIPE, text)
            made, stopped = [], None
            for number, stage in enumerate(self.stages, 1):
                state, key = self._state(stage)
                if state == "whole":
                    continue
                self.notify(f"{stage.name} ({number} of {len(self.stages)}): {stage.cost.says}.")
                if not self._make(stage, state, key):
                    stopped = stage.name
                    break
                made.append(stage.name)
            self._tell_others()
        return {
            "output": str(self.output), "made": made, "stopped": stopped,
            "kept": [name for name in self._records if name not in made],
            "model": self._last_model(), "pages": self._pages(),
        }  # fmt: skip

    def _make(self, stage: Stage, state: State, key: str) -> bool:
        """One stage, from the beginning or on from where it was; False where it was stopped."""
        directory = self.output / stage.name
        if state in ("changed", "to do") and directory.exists():
            if any(directory.iterdir()):
                self.notify(f"{stage.name} was made from something else, and is made anew.")
            shutil.rmtree(directory)
        inputs = self.inputs.all(stage, self._records)
        assert inputs is not None, "stages are in the order in which they need each other"
        record = StageRecord(
            stage=stage.kind.name, key=key, whole=False, options=dict(stage.options), inputs=inputs
        )
        write_json(self._file(stage), record.to_json())
        began = time.monotonic()
        if not self._done(stage) and stage.kind.work(self._work(stage)) is False:
            return False
        whole = StageRecord(
            stage=stage.kind.name, key=key, whole=True, options=record.options, inputs=inputs,
            files=digests(directory), output=self._output(stage),
            seconds=round(time.monotonic() - began, 1),
        )  # fmt: skip
        write_json(self._file(stage), whole.to_json())
        self._records[stage.name] = whole
        return True

    def _work(self, stage: Stage) -> StageWork:
        def progress(what: str, done: float, total: float, /) -> None:
            self.progress(f"{stage.name}: {what}", done, total)

        return StageWork(
            self.output / stage.name, self.inputs.paths(stage), stage.told, self.recipe.device,
            progress, self.notify,
        )  # fmt: skip

    def _done(self, stage: Stage) -> bool:
        """Whether a model is there already: its configuration is what comes last."""
        return stage.kind.makes == "model" and (self.output / stage.name / "config.json").is_file()

    def _output(self, stage: Stage) -> str:
        """The fingerprint of what a stage made."""
        directory = self.output / stage.name
        if stage.kind.makes == "model":
            return Checkpoint.open(directory).fingerprint
        if stage.kind.makes == "store":
            return Store.open(directory).fingerprint
        return joined(digests(directory))

    def _last_model(self) -> str | None:
        models = [
            stage.name
            for stage in self.stages
            if stage.kind.makes == "model" and stage.name in self._records
        ]
        return str(self.output / models[-1]) if models else None

    def _pages(self) -> list[str]:
        """The pages of a report that is whole."""
        return [
            str(page)
            for stage in self.stages
            if stage.kind.name == "report" and stage.name in self._records
            for page in sorted((self.output / stage.name).glob("*.html"))
        ]

    def _tell_others(self) -> None:
        """Name directories of stages that an earlier recipe had and this one has not."""
        ours = {stage.name for stage in self.stages}
        for file in sorted(self.output.glob("[0-9][0-9]-*.json")):
            if file.stem not in ours and file.with_suffix("").is_dir():
                self.notify(
                    f"{file.with_suffix('')} is of an earlier recipe and is used no more; remove "
                    "it if you like."
                )


def _key(stage: Stage, inputs: Mapping[str, StageInput]) -> str:
    """The digest of all that a stage is made from."""
    return joined(
        {
            "kind": stage.kind.name,
            "options": stage.options,
            "inputs": {name: one.fingerprint for name, one in inputs.items()},
        }
    )
