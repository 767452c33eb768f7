"""From a recipe to its stages: what each is made from and told; refused before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shearling.data.calibration import check_sources
from shearling.data.sources import parse_sources
from shearling.data.store import Store
from shearling.engine.devices import named_device
from shearling.engine.place import Wish
from shearling.errors import ShearlingError
from shearling.evaluate.tasks.run import require_lm_eval
from shearling.gates.learn import check_shape
from shearling.model.checkpoint import Checkpoint
from shearling.model.dtypes import name_of
from shearling.pruning.exportable import tell_limits
from shearling.recipes.cost import CPU, GPU, Costs, StageCost, text_tokens
from shearling.recipes.record import joined
from shearling.recipes.schema import (
    DataSection,
    EvaluateSection,
    GatesMethod,
    HealSection,
    ScoresMethod,
    StepSection,
    WholeRecipe,
)
from shearling.recipes.stage import Given, Made, Stage
from shearling.recipes.target import size_of
from shearling.recipes.work import (
    CALIBRATION,
    HELD_OUT,
    KINDS,
    LOSSES,
    suite_of,
    trained_tokens,
)
from shearling.scoring.registry import criteria_for
from shearling.table.values import Shape
from shearling.train.installed import check_installed
from shearling.train.options import Options
from shearling.train.reference import SEQUENCES
from shearling.train.setup import FREE

Notify = Callable[[str], None]
WINDOWS_DRAWN = 4  # times as much text to calibrate on as windows are taken of it


@dataclass(frozen=True)
class _Grown:
    """A model on its way: where it is, or will be, and its facts; only its shape is its own."""

    at: Given | Made
    facts: Checkpoint


@dataclass(frozen=True)
class _Packed:
    """A store that is there, or will be: about how many tokens it has to train on."""

    at: Given | Made
    length: int
    tokens: int


def plan_recipe(recipe: WholeRecipe, notify: Notify = lambda sentence: None) -> list[Stage]:
    """The stages of a recipe, in order.

    Args:
        recipe: what is wanted.
        notify: told what was settled otherwise than the recipe says.

    Raises:
        ShearlingError: no source, a file that is not there, a shape that cannot be, options that
            do not go together.
    """
    return _Planner(recipe, notify).stages()


class _Planner:
    """The stages of one recipe, as they are added one by one."""

    def __init__(self, recipe: WholeRecipe, notify: Notify) -> None:
        if recipe.source is None:
            raise ShearlingError(
                "the recipe names no model to make smaller; give --source MODEL, or source: in it."
            )
        self.recipe, self.notify = recipe, notify
        device = named_device(recipe.device)
        self.source = Checkpoint.open(recipe.source)
        self.origin = Given("model", (recipe.source,))
        self.tokenizer = Given("tokenizer", (recipe.source,))
        self.costs = Costs(CPU if device.type == "cpu" else GPU, self.source)
        wish = Wish(device=recipe.device, dtype=recipe.dtype)
        self.dtype = name_of(wish.torch_dtype(device, self.source))
        self.positions = getattr(self.source.config, "max_position_embeddings", None)
        self._stages: list[Stage] = []
        self._stores: dict[str, _Packed] = {}
        self._references: dict[Given | Made, Made] = {}

    def stages(self) -> list[Stage]:
        """All of them."""
        recipe = self.recipe
        if recipe.data is not None:
            self._store(recipe.data)
        text = self._text()
        model = _Grown(self.origin, self.source)
        models = [model]
        for step in recipe.cuts:
            model = self._cut(step, model, text)
            models.append(model)
            for heal in step.heal or ():
                model = self._heal(heal, model)
                models.append(model)
        if recipe.evaluate is not None and recipe.evaluate.models == "ends":
            models = [models[0], models[-1]]
        results = [*self._evaluate(models, text), *self._bench(models)]
        self._report(models, results)
        return self._stages

    def _add(
        self, kind: str, inputs: Mapping[str, Any], options: Mapping[str, Any], cost: StageCost,
        free: Mapping[str, Any] | None = None,
    ) -> Made:  # fmt: skip
        """Add a stage; inputs that are None are left out."""
        name = f"{len(self._stages) + 1:02}-{kind}"
        several = {
            role: one if isinstance(one, tuple) else (one,)
            for role, one in inputs.items()
            if one is not None
        }
        self._stages.append(Stage(name, KINDS[kind], several, dict(options), free or {}, cost))
        return Made(name)

    def _within(self, what: str, tokens: int) -> int:
        """A length that the model has positions for."""
        if self.positions is None or tokens <= self.positions:
            return tokens
        self.notify(
            f"{what} is {tokens}, but {self.source.name} has {self.positions} positions; "
            f"{self.positions} are taken."
        )
        return self.positions

    # --- data ------------------------------------------------------------------------------------

    def _store(self, data: DataSection) -> _Packed:
        """The store of a section; packed by a stage, unless it is there."""
        key = joined(data.model_dump(mode="json", exclude={"calibration"}))
        if key not in self._stores:
            self._stores[key] = self._packed(data)
        return self._stores[key]

    def _packed(self, data: DataSection) -> _Packed:
        if data.store is not None:
            store = Store.open(Path(data.store))
            store.check_tokenizer(self.source.path, data.bos)
            return _Packed(Given("store", (data.store,)), store.length, trained_tokens(store))
        tokens, length = text_tokens(data.specs), self._within("data.length", data.length)
        options = {
            "length": length, "held_out": data.held_out, "bos": data.bos, "seed": self.recipe.seed,
        }  # fmt: skip
        itemsize = 2 if self.source.shape["vocab"] < 2**16 else 4
        inputs = {"text": Given("text", data.specs), "tokenizer": self.tokenizer}
        made = self._add("pack", inputs, options, self.costs.pack(tokens, itemsize))
        return _Packed(made, length, round(tokens * (1 - data.held_out)))

    def _text(self) -> Made | None:
        """Text for calibration and for measuring, if any is drawn from the store."""
        recipe = self.recipe
        if recipe.data is None:
            return None
        scores = [step.method for step in recipe.cuts if isinstance(step.method, ScoresMethod)]
        drawn = 0
        if not recipe.data.calibrated and scores:
            drawn = WINDOWS_DRAWN * max(one.samples * one.length for one in scores)
        measured = recipe.evaluate
        held = measured.windows * measured.window if measured and measured.held_out else 0
        if not drawn and not held:
            return None
        inputs = {"store": self._store(recipe.data).at, "tokenizer": self.tokenizer}
        cost = StageCost(10.0, None, None, 5 * (drawn + held), "text out of the store")
        return self._add("text", inputs, {"train": drawn, "held_out": held}, cost)

    def _calibration(self, text: Made | None) -> Given | Made | None:
        """What cuts are calibrated on."""
        data = self.recipe.data
        if data is not None and data.calibrated:
            if isinstance(data.calibration, str):
                _require(data.calibration, "data.calibration")
            parsed = parse_sources(data.calibrated)
            check_sources(parsed, self.source.tokenizer)
            named = [f"{one.name}={one.file}" if one.name else str(one.file) for one in parsed]
            return Given("text", tuple(named))
        return None if text is None else replace(text, file=CALIBRATION)

    def _sharing(self, method: ScoresMethod) -> dict[str, Any]:
        """Options of the text that were not always there, where they are not the default."""
        calibrated = () if self.recipe.data is None else self.recipe.data.calibrated
        told: dict[str, Any] = {}
        if len(calibrated) > 1:
            told["shares"] = [one.share for one in parse_sources(calibrated)]
        if method.written_from != "text":
            told["written_from"] = method.written_from
        return told

    # --- models ----------------------------------------------------------------------------------

    def _cut(self, step: StepSection, model: _Grown, text: Made | None) -> _Grown:
        method = step.method
        depth_only = isinstance(method, ScoresMethod) and method.kind == "blocks"
        if step.target.timed and (isinstance(method, GatesMethod) or len(self.recipe.cuts) > 1):
            raise ShearlingError(
                "the recipe's target asks for a speed or a latency, which one cut by kind: scores "
                "or blocks times when it is made; give shape, params or footprint instead."
            )
        size, after = size_of(step.target, self.source, model.facts, depth_only=depth_only)
        tell_limits(model.facts, after, self.notify)
        if isinstance(method, GatesMethod):
            made = self._learned(method, model, after)
        else:
            assert isinstance(method, ScoresMethod)
            made = self._pruned(method, model, size, after, self._calibration(text))
        return _Grown(made, replace(model.facts, shape=after))

    def _pruned(
        self, method: ScoresMethod, model: _Grown, size: Mapping[str, Any], after: Shape,
        calibration: Given | Made | None,
    ) -> Made:  # fmt: skip
        repaired = calibration is not None and method.refit is not False
        criteria_for(method.criteria, model.facts, repaired=repaired)
        told = method.model_dump()
        length = self._within("method.length", method.length)
        bos = None if self.recipe.data is None else self.recipe.data.bos
        options = {
            "size": size,
            "criteria": {"by": method.criteria}
            | {key: told[key] for key in ("protect_first", "protect_last", "keep_pattern")},
            "repairs": {key: told[key] for key in ("refit", "rotate", "final_norm")},
            "text": {"length": length, "seed": self.recipe.seed, "bos": bos}
            | {key: told[key] for key in ("samples", "copies", "written")}
            | self._sharing(method),
            "dtype": self.recipe.dtype,
        }
        cost = self.costs.cut(model.facts, after, method, repaired=repaired)
        return self._add("prune", {"model": model.at, "calibration": calibration}, options, cost)

    def _learned(self, method: GatesMethod, model: _Grown, after: Shape) -> Made:
        store = self._training_store(None, "gates are learned")
        short = {"sample_length": min(256, store.length)}
        options = method.learning(self._defaults() | short)
        check_installed(options)
        check_shape(model.facts, after, gated=options.gates != "scores")
        told, free = _split(options)
        teacher = self.origin if method.distil else None
        reference, losses = self._reference(options, method.reference, store)
        inputs = {
            "model": model.at, "store": store.at, "teacher": teacher, "reference": reference,
        }  # fmt: skip
        cost = self.costs.train(
            model.facts, after, options, store.length, self.source if teacher else None
        )
        return self._add(
            "learn", inputs, {"shape": dict(after), "learning": told, "losses": losses}, cost,
            {"learning": free},
        )  # fmt: skip

    def _heal(self, heal: HealSection, model: _Grown) -> _Grown:
        store = self._training_store(heal.data, "it is healed")
        tokens = heal.tokens or max(1, round((heal.epochs or 1) * store.tokens))
        options = heal.healing(self._defaults(), tokens)
        check_installed(options)
        told, free = _split(options)
        if heal.epochs is not None:
            told |= {"tokens": 1}  # counted when the store is there
        if options.tokens > store.tokens:
            self.notify(
                f"heal asks for {options.tokens:,} tokens and the data has about "
                f"{store.tokens:,}: they would be seen {options.tokens / store.tokens:.1f} times."
            )
        teacher = self.origin if options.recipe == "distill" else None
        reference, losses = self._reference(options, heal.reference, store)
        inputs = {
            "model": model.at, "store": store.at, "teacher": teacher, "reference": reference,
        }  # fmt: skip
        cost = self.costs.train(
            model.facts, {}, options, store.length, self.source if teacher else None
        )
        made = self._add(
            "heal", inputs, {"healing": told, "epochs": heal.epochs, "losses": losses}, cost,
            {"healing": free},
        )  # fmt: skip
        return _Grown(made, model.facts)

    def _defaults(self) -> dict[str, Any]:
        """What the recipe says of all training."""
        data = self.recipe.data
        return {
            "seed": self.recipe.seed, "dtype": self.recipe.dtype,
            "bos": None if data is None else data.bos,
        }  # fmt: skip

    def _training_store(self, data: DataSection | None, purpose: str) -> _Packed:
        data = data or self.recipe.data
        if data is None:
            raise ShearlingError(
                f"the recipe names no data, on which {purpose}; give --text FILE, or data: in it."
            )
        return self._store(data)

    def _reference(
        self, options: Options, given: Any, store: _Packed
    ) -> tuple[Made | None, dict[str, float] | None]:
        """Where the losses of a dynamic mix come from: a stage, or the recipe."""
        if options.mix != "dynamic":
            return None, None
        if isinstance(given, dict):
            return None, given
        if store.at not in self._references:
            sequences = min(SEQUENCES, options.eval_sequences)
            inputs = {"model": self.origin, "store": store.at}
            cost = self.costs.run([self.source], sequences * store.length, "losses of the source")
            made = self._add("reference", inputs, {"sequences": sequences}, cost)
            self._references[store.at] = replace(made, file=LOSSES)
        return self._references[store.at], None

    # --- measuring -------------------------------------------------------------------------------

    def _evaluate(self, models: list[_Grown], text: Made | None) -> list[Made]:
        wanted = self.recipe.evaluate
        if wanted is None:
            return []
        texts: list[Given | Made] = [Given("text", (path,)) for path in wanted.texts]
        for path in wanted.texts:
            _require(path, "evaluate.text")
        if text is not None and wanted.held_out:
            texts.insert(0, replace(text, file=HELD_OUT))
        if not (texts or wanted.suite or wanted.prompts):
            return []
        options = self._measuring(wanted)
        suite = None if wanted.suite is None else Given("suite", (wanted.suite,))
        inputs = {
            "models": tuple(model.at for model in models), "text": tuple(texts), "suite": suite,
        }  # fmt: skip
        if suite is not None:
            _, parts = suite_of({"suite": suite.values}, options)
            require_lm_eval(parts.tasks)
        tokens = wanted.windows * options["window"] * len(texts)
        tasks = f", and {wanted.suite}" if wanted.suite else ""
        said = f"{len(models)} models on {len(texts)} texts{tasks}"
        cost = self.costs.run([model.facts for model in models], tokens, said)
        return [self._add("evaluate", inputs, options, cost)]

    def _measuring(self, wanted: EvaluateSection) -> dict[str, Any]:
        bos = None if self.recipe.data is None else self.recipe.data.bos
        return {
            "window": self._within("evaluate.window", wanted.window), "windows": wanted.windows,
            "limit": wanted.limit, "prompts": list(wanted.prompts),
            "max_new_tokens": wanted.max_new_tokens, "bos": bos, "seed": self.recipe.seed,
            "dtype": self.dtype,
        }  # fmt: skip

    def _bench(self, models: list[_Grown]) -> list[Made]:
        wanted = self.recipe.bench
        if wanted is None:
            return []
        told = wanted.model_dump()
        options = {
            "batches": list(told["batches"]), "prompts": list(told["prompts"]),
            "news": list(told["new"]), "repeats": told["repeats"], "budget": told["budget"],
            "threads": told["threads"], "dtype": self.dtype,
        }  # fmt: skip
        held = 4 * sum(model.facts.parameters for model in models)
        cost = StageCost(wanted.budget, held, None, 100_000, f"{len(models)} models in turns")
        return [self._add("bench", {"models": tuple(m.at for m in models)}, options, cost)]

    def _report(self, models: list[_Grown], results: list[Made]) -> None:
        wanted = self.recipe.report
        made = tuple(Made(stage.name) for stage in self._stages if stage.kind.makes == "model")
        if wanted is None or not made:
            return
        inputs = {
            "made": made, "models": tuple(model.at for model in models), "results": tuple(results),
        }  # fmt: skip
        cost = StageCost(10.0, None, None, 2_000_000, "one page on the run, one that compares")
        self._add("report", inputs, {"within": wanted.within}, cost)


def _require(path: str, key: str) -> None:
    """Raise ShearlingError unless there is something at ``path``, which a recipe's key names."""
    if not Path(path).exists():
        raise ShearlingError(
            f"{key} {path} is not there; give a .jsonl or .txt file, or a directory of such."
        )


def _split(options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """A training's options: those that matter to the result, and those that do not."""
    told = options.model_dump(mode="json")
    return {key: told[key] for key in told if key not in FREE}, {key: told[key] for key in FREE}
