"""The house's plan, held against the imports: rooms know only the rooms above them."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).resolve().parent.parent / "src" / "shearling"
# From the ground up; a room may import from itself and from those before it.
ROOMS = (
    "errors", "version", "table", "files", "model", "engine", "data", "scoring", "repair",
    "pruning", "train", "gates", "ship", "evaluate", "report", "judge", "studio", "recipes",
    "commands", "cli",
)  # fmt: skip
TOP_FILES = 8
# The report's inside, from the ground up; what is not named here may import all of them.
REPORT = ("numbers", "records", "draw", "decide", "pages")
# Names that others still have to change; nothing else may be added.
TWICE = {"Proof", "Scores"}


def imports(file: Path) -> set[str]:
    """Modules of ours that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
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
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                seen.setdefault(node.name, []).append(str(file.relative_to(SOURCE)))
    assert {
        name: where for name, where in seen.items() if len(where) > 1 and name not in TWICE
    } == {}
