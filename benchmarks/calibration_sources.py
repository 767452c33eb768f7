"""What text that an instruct model writes for its repair should begin with.

    SHEARLING_BENCH_DATA=DIR python benchmarks/calibration_sources.py
        [--only text,template,both] [--draws 0,1,2] [--size 0.8x] [--items 8] [--chat talks.jsonl]

SmolLM2-135M-Instruct loses 20 % of its blocks' parameters by default, as in draws.py, on 64 windows
of 256 tokens from the first nine tenths of c4.jsonl; what it writes itself begins with the text,
behind its chat template, or half of it each (`--written-from`). With ``--chat FILE`` 0.3 of the
windows are conversations of that file. Each draw is another seed: other documents, windows and
draws. Written down for each: perplexity on 12 windows of 512 tokens of c4's last tenth and of
WikiText-2, and what is left of the source's abilities (docs/abilities.md), on so many items of
each, or all. Rows that are known are not run again. Needs DIR, which holds redpajama/c4.jsonl and
wikitext2-test.txt.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RESULTS, first_nine_tenths, save, source_directory, text_file
from shearling.data.sources import TextSource
from shearling.evaluate.abilities.measure import Asking, measure_abilities
from shearling.evaluate.abilities.results import Abilities
from shearling.evaluate.abilities.shares import mean_share, moved, shares
from shearling.evaluate.perplexity import Windows, evaluate
from shearling.model.checkpoint import Checkpoint
from shearling.model.loading import load_model
from shearling.model.manifest import read_manifest
from shearling.model.subject import open_subject
from shearling.pruning.prune import Running, Size, prune
from shearling.pruning.text import CalibrationText

KINDS: tuple[Any, ...] = ("text", "template", "both")
NAME, WINDOW, WINDOWS = "calibration_sources", 512, 12


def main() -> None:
    """Measure what has not been measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default=",".join(KINDS), help="which of these")
    parser.add_argument("--draws", default="0,1,2", help="seeds")
    parser.add_argument("--size", default="0.8x", help="of the blocks' parameters, what stays")
    parser.add_argument("--chat", type=Path, help="conversations, 0.3 of the windows")
    parser.add_argument("--items", type=int, help="of each ability; all, if not given")
    parser.add_argument("--samples", type=int, default=64, help="windows")
    parser.add_argument("--trial", action="store_true", help="save nothing")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        texts = _texts(Path(place))
        figures, source = _measured(source_directory(), texts, arguments.items)
        print(f"source: {figures}", flush=True)
        if not arguments.trial:
            save(NAME, _known() | {"source": figures}, shown=False)
        for seed in map(int, arguments.draws.split(",")):
            for kind in arguments.only.split(","):
                row = {
                    "written_from": kind, "seed": seed, "size": arguments.size,
                    "samples": arguments.samples, "items": arguments.items,
                    "chat": arguments.chat.name if arguments.chat else None,
                }  # fmt: skip
                known = _known()  # read again: another run may be beside this one
                if any(row.items() <= one.items() for one in known["rows"]):
                    continue
                row |= _row(kind, seed, arguments, texts, source, Path(place) / f"{kind}-{seed}")
                print(json.dumps({key: row[key] for key in row if key != "abilities"}), flush=True)
                if not arguments.trial:
                    save(NAME, known | {"rows": [*known["rows"], row]}, shown=False)


def _known() -> dict[str, Any]:
    file = RESULTS / f"{NAME}.json"
    result = json.loads(file.read_text()) if file.exists() else {}
    return {"rows": []} | {key: result[key] for key in ("source", "rows") if key in result}


def _texts(place: Path) -> dict[str, Path]:
    """What calibration may see of c4, and what it is judged by."""
    c4 = text_file("redpajama/c4.jsonl", place)
    lines = c4.read_text(encoding="utf-8").splitlines(keepends=True)
    held = place / "c4.jsonl"
    held.write_text("".join(lines[len(lines) * 9 // 10 :]), encoding="utf-8")
    wikitext = text_file("wikitext2-test.txt", place)
    return {"calibration": first_nine_tenths(c4, place), "c4": held, "wikitext2": wikitext}


def _row(
    kind: Any, seed: int, arguments: Any, texts: dict[str, Path], source: Abilities, place: Path
) -> dict[str, Any]:
    """A cut, with its figures."""
    web = TextSource(texts["calibration"], "web", 0.7 if arguments.chat else None)
    talks = (TextSource(arguments.chat, "chat", 0.3),) if arguments.chat else ()
    text = CalibrationText(
        sources=(web, *talks), samples=arguments.samples, seed=seed, written_from=kind
    )
    started, processor = time.perf_counter(), time.process_time()
    model = Checkpoint.open(source_directory())
    blocks = model.shape["layers"] * model.layout.count_block(model.shape)
    gone = round((1 - float(arguments.size.rstrip("x"))) * blocks)
    cut = prune(
        model, place, Size(params=model.parameters - gone), calibration=text,
        running=Running(progress=_told),
    )  # fmt: skip
    spent = time.perf_counter() - started, time.process_time() - processor
    options = (read_manifest(place) or {})["options"]
    figures, abilities = _measured(place, texts, arguments.items)
    left = shares(source, abilities)
    kept = {share.ability: round(share.left, 4) for share in left}
    mean = mean_share(left)
    return figures | {
        "parameters": cut.parameters, "shape": str(cut.shape), "removed": options.get("removed"),
        "divergence": options["repair"]["divergence"],
        "by_source": options["repair"].get("sources"),
        "left": mean.left, "left_interval": list(mean.interval), "moved": moved(source, abilities),
        "abilities": kept, "seconds": round(spent[0]), "processor_seconds": round(spent[1]),
    }  # fmt: skip


def _measured(
    path: Path, texts: dict[str, Path], items: int | None
) -> tuple[dict[str, float], Abilities]:
    """A model's perplexities, and its abilities."""
    figures = {
        name: round(evaluate(path, texts[name], Windows(WINDOW, WINDOWS))["perplexity"], 3)
        for name in ("c4", "wikitext2")
    }
    return figures, _abilities(path, items)


def _abilities(path: Path, items: int | None) -> Abilities:
    subject = open_subject(path)
    asked = measure_abilities(subject, load_model(path), subject.tokenizer(), Asking(limit=items))
    return Abilities.from_json(asked, Path("abilities.json"))


_stages: list[str] = []


def _told(stage: str, done: float, total: float, /) -> None:
    """Print a stage when it begins."""
    if _stages[-1:] != [stage]:
        _stages.append(stage)
        print(f"{time.process_time():7.0f} processor seconds: {stage}", flush=True)


if __name__ == "__main__":
    main()
