"""The house's plan, held against the imports: rooms know only the rooms above them."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

from shearling.table.families import FAMILIES

SOURCE = Path(__file__).resolve().parent.parent / "src" / "shearling"
# From the ground up; a room may import from itself and from those before it.
ROOMS = (
    "errors", "version", "table", "files", "model", "engine", "data", "scoring", "repair",
    "pruning", "train", "gates", "ship", "evaluate", "targets", "report", "judge", "studio",
    "recipes", "commands", "cli",
)  # fmt: skip
TOP_FILES = 8
# The report's inside, from the ground up; what is not named here may import all of them.
REPORT = ("numbers", "records", "draw", "decide", "pages")
# Names that others still have to change; nothing else may be added.
TWICE: set[str] = set()
# The rooms that decide where something is computed.
DEVICE_ROOMS = ("engine", "train")
# Files elsewhere that name a device, and why; nothing else may be added.
DEVICES_ELSEWHERE = {
    "data/teacher.py": "the type of an argument: kept predictions are moved where training is",
    "evaluate/engines/transformers.py": "left: waits for a GPU and reads its peak, to time it",
    "evaluate/speed.py": "left: writes down which GPU figures were taken on",
    "gates/learn.py": "left: compiles gates once on a GPU, which train should decide",
    "model/memory.py": "how much memory is free on a device, which everybody asks here",
    "model/subject.py": "the meta device, on which parameters are counted and take no memory",
}
# Comparisons of model types outside table/families, and why; nothing else may be added.
COMPARISONS_ELSEWHERE = {
    "model/gguf/tokenizer.py: words.kind == 'llama'": "a kind of vocabulary",
    "model/gguf/tokenizer.py: model not in ('gpt2', 'llama')": "kinds of vocabularies",
    "model/gguf/tokenizer.py: file.architecture == 'phi3'": "its vocabulary's beginning of text",
    "model/sanity.py: raw.get('model_type') == 'llama'": "a sentence that names Mistral instead",
}


@cache
def parsed(file: Path) -> ast.Module:
    """A file's syntax, read once for all tests."""
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shearling"):
            if node.module in ("shearling", "shearling.report"):  # what is named is a module of it
                found |= {f"{node.module}.{each.name}" for each in node.names}
            else:
                found.add(str(node.module))
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names if each.name.startswith("shearling")}
    return found


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "shearling"


def files() -> list[tuple[str, Path]]:
    """Every file of the package but its front door, with its room."""
    found = []
    for file in sorted(SOURCE.rglob("*.py")):
        inside = file.relative_to(SOURCE)
        if str(inside) != "__init__.py":
            found.append((inside.parts[0].removesuffix(".py"), file))
    return found


def test_every_room_is_on_the_plan() -> None:
    assert {room for room, _ in files()} <= set(ROOMS)


def test_rooms_import_only_from_rooms_above_them() -> None:
    wrong = [
        f"{file.relative_to(SOURCE)} imports {module}"
        for room, file in files()
        for module in sorted(imports(file))
        if ROOMS.index(room_of(module)) > ROOMS.index(room)
    ]
    assert wrong == []


def test_few_files_stand_at_the_top() -> None:
    assert len(list(SOURCE.glob("*.py"))) <= TOP_FILES


def test_the_table_knows_nothing_of_the_rest() -> None:
    wrong = {
        f"{file.relative_to(SOURCE)} imports {module}"
        for room, file in files()
        if room == "table"
        for module in imports(file)
        if room_of(module) not in ("table", "errors")
    }
    assert wrong == set()


def test_the_report_knows_only_what_lies_below() -> None:
    """Records, then drawing, then deciding, then pages: no circles."""
    place = {name: floor for floor, name in enumerate(REPORT)}
    wrong = [
        f"{file.relative_to(SOURCE)} imports {module}"
        for name, floor in place.items()
        for file in [SOURCE / f"report/{name}.py", *(SOURCE / "report" / name).rglob("*.py")]
        if file.is_file()
        for module in sorted(imports(file))
        if module.startswith("shearling.report")
        and place.get((*module.split("."), "")[2], len(place)) > floor
    ]
    assert wrong == []


def test_a_class_name_stands_once() -> None:
    seen: dict[str, list[str]] = {}
    for _, file in files():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                seen.setdefault(node.name, []).append(str(file.relative_to(SOURCE)))
    assert {
        name: where for name, where in seen.items() if len(where) > 1 and name not in TWICE
    } == {}


# --- devices and model types ---------------------------------------------------------------------


def names_a_device(tree: ast.AST) -> bool:
    """Whether code says torch.cuda or torch.device, or has a string that begins with "cuda"."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="cuda" | "device"):
                return True
            case ast.Constant(value=str(text)) if text.startswith("cuda"):
                return True
            case ast.ImportFrom(module=str(module)) if module.startswith("torch.cuda"):
                return True
            case ast.ImportFrom(module="torch", names=names):
                if {name.name for name in names} & {"cuda", "device"}:
                    return True
    return False


def model_type_comparisons(tree: ast.AST) -> list[str]:
    """Comparisons of something called model_type with a value, or of anything with a family's name.

    Whether a type is among those that are known may be asked (``in FAMILIES``).
    """
    comparisons = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Match):
            compared: list[ast.expr] = [node.subject]
            literal = "model_type" in ast.unparse(node.subject)
        elif isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
            literal = any(isinstance(operator, ast.Eq | ast.NotEq) for operator in node.ops) or any(
                isinstance(side, ast.Tuple | ast.List | ast.Set) for side in node.comparators
            )
        else:
            continue
        constants = {
            inner.value
            for side in compared
            for inner in ast.walk(side)
            if isinstance(inner, ast.Constant) and isinstance(inner.value, str)
        }
        typed = any("model_type" in ast.unparse(side) for side in compared)
        if literal and (typed or not constants.isdisjoint(FAMILIES)):
            comparisons.append(ast.unparse(node).splitlines()[0])
    return comparisons


def test_only_engine_and_train_name_a_device() -> None:
    """An exception that is none any more has to leave the list."""
    naming = {
        str(file.relative_to(SOURCE))
        for room, file in files()
        if room not in DEVICE_ROOMS and names_a_device(parsed(file))
    }
    assert naming == DEVICES_ELSEWHERE.keys()


def test_only_families_compare_model_types() -> None:
    """An exception that is none any more has to leave the list."""
    comparing = {
        f"{inside}: {comparison}"
        for _, file in files()
        if not (inside := file.relative_to(SOURCE)).is_relative_to("table/families")
        for comparison in model_type_comparisons(parsed(file))
    }
    assert comparing == COMPARISONS_ELSEWHERE.keys()


@pytest.mark.parametrize(
    ("code", "device"),
    [
        ("torch.cuda.is_available()", True),
        ("def to(self, device: torch.device): ...", True),
        ("x.to('cuda:0')", True),
        ("from torch.cuda import Event", True),
        ("from torch import device", True),
        ("tensor.device", False),
        ("print('no cuda here')", False),
    ],
)
def test_a_device_that_is_named_is_seen(code: str, device: bool) -> None:
    assert names_a_device(ast.parse(code)) is device


@pytest.mark.parametrize(
    ("code", "seen"),
    [
        ("config.model_type == 'new'", 1),
        ("raw['model_type'] != wanted", 1),
        ("raw.get('model_type') in ('new', 'newer')", 1),
        ("architecture == 'gemma3_text'", 1),
        ("architecture in {'phi3', 'new'}", 1),
        ("match config.model_type:\n    case 'new':\n        pass", 1),
        ("raw.get('model_type') in FAMILIES", 0),
        ("kind == 'new'", 0),
    ],
)
def test_a_comparison_of_model_types_is_seen(code: str, seen: int) -> None:
    assert len(model_type_comparisons(ast.parse(code))) == seen
