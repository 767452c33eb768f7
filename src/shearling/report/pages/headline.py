"""The top of the page: one sentence, a few large numbers, and what the cut cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shearling.evaluate.abilities.shares import Share
from shearling.evaluate.results import Evaluation
from shearling.report import numbers
from shearling.report.decide.abilities import in_a_sentence, left_in_models
from shearling.report.decide.compare import (
    AXES,
    Change,
    by_load,
    by_text,
    change,
    same_tokens,
    sizes_changed,
    speed_change,
)
from shearling.report.draw.markup import Markup, el, join, render
from shearling.report.draw.sections import with_commands
from shearling.report.numbers import THIN, exact, figure, named, plural
from shearling.report.records.records import Manifest, ProofFigures, TimedRun
from shearling.report.records.results import Model, Results

SHORT = {  # an axis's sizes before and after, in the title
    "layers": "{} → {} blocks",
    "hidden": "hidden {} → {}",
    "heads": "{} → {} heads",
    "kv_heads": "{} → {} key/value heads",
    "linear_heads": "{} → {} linear-attention heads",
    "mlp": "MLP {} → {}",
    "experts": "{} → {} experts",
    "expert_mlp": "experts {} → {} wide",
    "vocab": "vocabulary {} → {}",
}
UNITS = {"hidden": "channels", "heads": "a block", "kv_heads": "a block", "mlp": "a block"} | {
    "layers": "kept",
    "vocab": "tokens",
    "experts": "a block",
    "linear_heads": "a block",
    "expert_mlp": "an expert",
}
NO_BREAK = "\u00a0"
IN_THE_TITLE = 3  # axes; the tiles name them all
REPAIRS = {"refit": "refitting in closed form", "heal": "training", "lora": "training adapters"} | {
    "learn": "learning what to keep"
}
MERGING = "merge"  # of an adapter that was trained elsewhere
TRAINING = ("heal", "learn", MERGING)  # stages that change weights and cut nothing
ROUNDING = "quantize"


@dataclass(frozen=True)
class Verdict:
    """The primary model against the source, as far as it was measured."""

    source: Model
    model: Model
    parameters: Change | None
    disk: Change | None
    speed: tuple[TimedRun, TimedRun, Change] | None
    perplexity: tuple[Evaluation, Evaluation] | None
    texts: int  # on how many texts both were measured
    tokens_differ: bool  # other vocabularies: perplexities do not compare
    abilities: Sequence[Share]  # of the source's, what is left; the worst first


def verdict_of(results: Results) -> Verdict | None:
    """Compare the primary model with the source; None where nothing was made."""
    source, model = results.source, results.primary
    if source is None or model is None:
        return None
    pair = (source.fingerprint, model.fingerprint)
    alike = same_tokens(source, model)
    texts = [
        (on[pair[0]], on[pair[1]])
        for on in by_text(results).values()
        if alike and set(pair) <= on.keys()
    ]
    # of several texts, the one that shows the most damage: a headline must not flatter
    worst = max(texts, key=lambda two: two[1].nll - two[0].nll, default=None)
    runs = [
        (on[pair[0]], on[pair[1]]) for on in by_load(results).values() if set(pair) <= on.keys()
    ]
    speed = speed_change(runs[0][0].decode, runs[0][1].decode) if runs else None
    return Verdict(
        source,
        model,
        _changed(source.parameters, model.parameters),
        _changed(source.bytes, model.bytes),
        (*runs[0], speed) if speed else None,
        worst,
        len(texts),
        not alike,
        left_in_models(results).get(model.fingerprint, ()),
    )


def _changed(before: int | None, after: int | None) -> Change | None:
    return None if before is None or after is None else change(before, after, True)


def page_title(results: Results) -> str:
    """The page's name, in plain text."""
    return f"{_what(results)}: a shearling report"


def header(results: Results) -> Markup:
    """Headline, tiles and verdict."""
    verdict = verdict_of(results)
    kicker = el("p", "shearling report", class_="kicker")
    if not results.models:
        rows = sum(len(panel.entries) for one in results.comparisons for panel in one.panels)
        line = el("span", f"{plural(rows, 'result')} side by side", class_="result")
        return el("header", kicker, el("h1", _what(results), " ", line))
    if verdict is None:
        return _nothing_made(results, kicker)
    tiles = [
        *_axis_tiles(verdict),
        _size_tile("Parameters", verdict, "parameters"),
        _size_tile("On disk", verdict, "disk"),
        _speed_tile(verdict),
        _perplexity_tile(verdict),
    ]
    return el(
        "header",
        kicker,
        el(
            "h1",
            _what(results),
            el("span", ": ", class_="unseen"),  # to the eye, the line break says it
            el("span", _result(verdict), class_="result"),
        ),
        el("dl", tiles, class_="tiles"),
        el("p", _cost(verdict), class_="verdict"),
        _others(results, verdict),
    )


def _nothing_made(results: Results, kicker: Markup) -> Markup:
    """The header of models of which none was made of another."""
    only = len(results.models) == 1
    sentence = (
        "the intact model; nothing has been made of it yet"
        if only
        else "measured side by side; no manifest says that one was made of another"
    )
    line = el("span", sentence, class_="result")
    hint = "`shearling prune` makes a smaller model of one, and this page will compare them."
    return el(
        "header",
        kicker,
        el("h1", _what(results), " ", line),
        el("p", with_commands(hint), class_="verdict muted"),
    )


def _what(results: Results) -> str:
    """ "SmolLM2-135M, 30 → 24 blocks, MLP 1536 → 1308", or the names of what there is."""
    source, model = results.source, results.primary
    if source is None:
        named = [one.name for one in results.models] or [one.title for one in results.comparisons]
        return " and ".join(named[:3])
    if model is None:
        blocks = source.shape.get("layers")
        return source.name + (f", {plural(blocks, 'block')}" if blocks else "")
    changed = sizes_changed(source, model)
    if "heads" in changed:  # groups of heads go together: the tile tells both
        changed.pop("kv_heads", None)
    parts = [SHORT.get(axis, f"{axis} {{}} → {{}}").format(*map(exact, sizes))
             for axis, sizes in changed.items()]  # fmt: skip
    if len(parts) > IN_THE_TITLE:
        left = len(parts) - IN_THE_TITLE + 1
        parts = [*parts[: IN_THE_TITLE - 1], f"{left} more widths"]
    if not parts:
        blocks = source.shape.get("layers")
        parts = [plural(blocks, "block") if blocks else "made anew"]
    return ", ".join((source.name, *(part.replace(" ", NO_BREAK) for part in parts)))


def _result(verdict: Verdict) -> Markup:
    """ "16 % smaller, 1.2× faster decode, perplexity 36 → 94"."""
    parts: list[Markup] = []
    if verdict.parameters:
        share = 100 * (1 - (verdict.model.parameters or 0) / (verdict.source.parameters or 1))
        digits = 0 if abs(share) >= 0.5 else 1
        size = f"{abs(share):.{digits}f}{THIN}% {'smaller' if share > 0 else 'larger'}"
        same = (
            "nothing removed" if not sizes_changed(verdict.source, verdict.model) else "no smaller"
        )
        parts.append(el("b", size if abs(share) >= 0.05 else same))
    if verdict.speed:
        ratio, better = verdict.speed[2].ratio, verdict.speed[2].better
        words = {True: f"{ratio} faster decode", False: f"decode at {ratio} the speed"}
        same = f"decode at {ratio}, within the spread of its runs"
        parts.append(
            el("span", words[better], class_="worse")
            if better is False
            else el("b", words[better] if better else same)
        )
    if verdict.perplexity:
        before, after = (_coarse(one.perplexity) for one in verdict.perplexity)
        kind = "worse" if verdict.perplexity[1].nll > verdict.perplexity[0].nll else None
        parts.append(el("span" if kind else "b", f"perplexity {before} → {after}", class_=kind))
    return join(", ", parts)


def _coarse(perplexity: float) -> str:
    return f"{perplexity:.0f}" if 10 <= perplexity < 1000 else figure(perplexity)


def tile(label: str, value: object, unit: str, note: object, cost: bool = False) -> Markup:
    """One large number; ``cost`` puts it in the colour of what was lost."""
    number = el("dd", value, el("small", f" {unit}") if unit else None, class_="number")
    return el(
        "div",
        el("dt", label),
        number,
        el("dd", note, class_="change"),
        class_="tile cost" if cost else "tile",
    )


def _axis_tiles(verdict: Verdict) -> list[Markup]:
    """One for every size that changed since the original source, whichever step changed it."""
    changed = sizes_changed(verdict.source, verdict.model)
    grouped = changed.pop("kv_heads", None) if "heads" in changed else None
    tiles = []
    for axis, (before, after) in changed.items():
        note = [f"of {exact(before)} · ", el("b", f"{exact(before - after)} removed")]
        if axis == "heads" and grouped:
            note.append(f", key/value {grouped[0]} → {grouped[1]}")
        tiles.append(tile(AXES.get(axis, axis), exact(after), UNITS.get(axis, ""), note))
    blocks = verdict.source.shape.get("layers")
    if not tiles and blocks is not None:
        tiles = [tile("Blocks", exact(blocks), "", "none removed")]
    return tiles


def _size_tile(label: str, verdict: Verdict, what: str) -> Markup | None:
    field, write = {
        "parameters": ("parameters", numbers.count),
        "disk": ("bytes", numbers.disk),
    }[what]
    before, after = getattr(verdict.source, field), getattr(verdict.model, field)
    changed: Change | None = getattr(verdict, what)
    if changed is None:
        return None
    value, _, unit = write(after).partition(THIN)
    note = [f"from {write(before)} · ", el("b", changed.percent)]
    return tile(label, value, unit, note, cost=changed.better is False)


def _speed_tile(verdict: Verdict) -> Markup | None:
    if verdict.speed is None:
        return None
    before, after, changed = verdict.speed
    note = [f"from {figure(before.decode.median)} · ", el("b", changed.ratio)]
    if changed.better is None:
        note.append(", within spread")
    label = f"Decode, batch {after.batch}"
    return tile(label, figure(after.decode.median), "tokens/s", note, changed.better is False)


def _perplexity_tile(verdict: Verdict) -> Markup | None:
    if verdict.perplexity is None:
        return None
    before, after = verdict.perplexity
    ratio = numbers.ratio(before.perplexity, after.perplexity)
    note = [f"from {figure(before.perplexity)} · ", el("b", ratio)]
    label = f"Perplexity, {after.text}"
    return tile(label, figure(after.perplexity), "", note, after.nll > before.nll)


def _cost(verdict: Verdict) -> Markup:
    """What was lost, as plainly as what was gained."""
    sentences: list[object] = []
    if verdict.tokens_differ:
        sentences.append(
            "Its vocabulary is not the source’s: it writes the same text in other tokens, and "
            "perplexities of the two do not compare."
        )
    elif verdict.perplexity is None and not verdict.abilities:
        hint = "What this cost is not known yet: `shearling eval` on both models would tell."
        sentences.append(with_commands(hint))
    elif verdict.perplexity is not None:
        sentences.append(_damage(verdict))
    if verdict.abilities:
        low = any(share.low for share in verdict.abilities)
        said = in_a_sentence(verdict.abilities)
        sentences.append([el("span", said, class_="worse") if low else said, "."])
    repairs = [name for step in verdict.model.chain for name in _repairs(step)]
    if repairs:
        sentences.append(f"This is after {named(list(dict.fromkeys(repairs)))}.")
    elif any(step.stage not in (ROUNDING, MERGING) for step in verdict.model.chain):
        sentences.append("Nothing has been done yet to repair the cut.")
    sentences += _proofs_of(verdict.model.chain)
    return join(" ", sentences)


def _proofs_of(chain: Sequence[Manifest]) -> list[Markup]:
    """Of the last cut or training, and of the rounding after it."""
    rounded = [step for step in chain if step.stage == ROUNDING]
    rest = [step for step in chain if step.stage != ROUNDING]
    said = [_proof_of(rest)] if rest or not rounded else []
    if rounded and (proof := rounded[-1].proof):
        outcome = (
            render("Its weights were rounded, and read back as what they were in memory.")
            if proof.passed
            else el("b", "Its rounded weights did not read back as they were.", class_="failed")
        )
        said.append(outcome)
    return said


def _proof_of(chain: Sequence[Manifest]) -> Markup:
    """Of the last cut, whatever was trained before it and since."""
    cuts = [place for place, step in enumerate(chain) if step.stage not in TRAINING]
    trained = bool(chain) and chain[-1].stage in TRAINING
    if not cuts:
        return proof_sentence(None, trained=trained)
    before = any(step.stage in TRAINING for step in chain[: cuts[-1]])
    against = "the trained model" if before else "the source"
    return proof_sentence(chain[cuts[-1]].proof, trained=trained, against=against)


def _repairs(step: Manifest) -> list[str]:
    """What a step did for a model besides cutting it."""
    repair = step.options.get("repair")
    repair = repair if isinstance(repair, dict) else {}
    steps = [one for one in repair.get("steps") or () if isinstance(one, dict)]
    changed = any(one.get("strength") is not None for one in steps) or repair.get("divergence")
    solved = ["refit"] if changed else []
    recipe = step.options.get("recipe")
    trained = ["lora"] if step.stage == "heal" and recipe == "lora" else [step.stage]
    return [REPAIRS[name] for name in (*solved, *trained) if name in REPAIRS]


def _damage(verdict: Verdict) -> Markup:
    assert verdict.perplexity is not None
    before, after = verdict.perplexity
    nats, ratio = after.nll - before.nll, numbers.ratio(before.perplexity, after.perplexity)
    where = f"On “{after.text}”"
    if verdict.texts > 1:
        where += f", the harder hit of {verdict.texts} texts"
    if nats <= 0:
        return render(f"{where}, no damage is measurable: {figure(-nats)} nats a token better.")
    lost = el("b", f"perplexity is {ratio} what it was", class_="worse")
    return render([f"{where}, ", lost, f": {figure(nats)} nats a token more."])


def proof_sentence(
    proof: ProofFigures | None, *, trained: bool = False, against: str = "the source"
) -> Markup:
    """Whether the written model is the one that was meant; the cut, if it was trained since."""
    if proof is None:
        missing = (
            "Its weights were trained, and nothing was cut, so that there is nothing to prove."
        )
        return render(missing if trained else "No proof of surgery was recorded.")
    differs = f"logits differ by at most {figure(proof.max_abs_difference)}"
    if proof.passed:
        source = f"{against} run without the removed parts"
        same = f"logits equal those of {source}"
        outcome = f"{differs} from {source}" if proof.max_abs_difference else same
        since = " Its weights were trained since." if trained else ""
        return render(f"Proof of surgery passed: {outcome}.{since}")
    failed = f"Proof of surgery failed: {differs}. Do not use this model."
    return el("b", failed, class_="failed")


def _others(results: Results, verdict: Verdict) -> Markup | None:
    if len(results.made) < 2:
        return None
    line = (
        f"These numbers speak of {verdict.model.name}, the smallest of "
        f"{len(results.made)} models made; all of them are compared below."
    )
    return el("p", line, class_="small muted")
