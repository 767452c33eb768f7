"""What must hold of the repository as a whole."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import shearling

ROOT = Path(__file__).resolve().parent.parent

# In pieces, so that this file does not hold what it forbids. Home directories of made-up people
# ("someone", "you") may stand in examples.
FORBIDDEN = {
    "a path of somebody's machine": r"(?<![\w.])/"
    r"(?:wo{0}rk|ro{0}ot|(?:ho{0}me|Us{0}ers)/(?!someone\b|you\b)\w+)/",
    "a private package mirror": r"/opt/py{0}pi|://[^/\s]*/(?:simple|artifactory)/",
    "the host of a package registry": r"py{0}pi\.org|python{0}hosted|npm{0}js\.|crates\.i{0}o",
    "a host of extra wheels": r"download\.py{0}torch|--(?:extra-)?index{0}-url",
}


def tracked():
    """Files that are, or are about to be, under version control."""
    if shutil.which("git") is None:
        pytest.skip("no git")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not in a git checkout")
    return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_nothing_of_this_machine_in_any_file(what):
    pattern = re.compile(FORBIDDEN[what].replace("{0}", "").encode())
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.decode(errors='replace').strip()[:120]}"
        for path in tracked()
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if pattern.search(line)
    ]
    assert not found, f"{what} in " + "\n".join(found)


def test_forbidden_patterns_find_what_they_should():
    samples = {
        "a path of somebody's machine": "open('/ho" + "me/ada/model/config.json')",
        "a private package mirror": "pip -i http://mirror/" + "simple/ torch",
        "the host of a package registry": "https://py" + "pi.org/project/torch",
        "a host of extra wheels": "pip install --index" + "-url there",
    }
    assert samples.keys() == FORBIDDEN.keys()
    for what, sample in samples.items():
        assert re.search(FORBIDDEN[what].replace("{0}", ""), sample)


def test_version_is_the_newest_of_the_changelog():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## \[(\d+\.\d+\.\d+)\] - (Unreleased|\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert newest is not None
    assert newest[1] == shearling.__version__


def test_source_files_stay_short():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines())
        for path in (ROOT / "src").rglob("*.py")
    }
    assert {name: lines for name, lines in lengths.items() if lines >= 500} == {}


@pytest.mark.parametrize("module", ["shearling", "shearling.cli", "shearling.commands.demo_text"])
def test_import_is_light(module):
    """Importing torch takes seconds, transformers up to ten: ``--help`` must not wait for them."""
    if find_spec(module) is None:
        pytest.skip(f"no {module}")
    program = f"import sys, {module}; print(*{{'torch', 'transformers'}} & set(sys.modules))"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == []


def test_constraints_pin_everything_that_is_declared():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    declared = project["dependencies"] + extras["gguf"] + extras["dev"]
    pinned = {_canonical(pin.split("==")[0]) for pin in pins}
    names = {_canonical(re.split(r"[<>=!~;\[ ]", requirement)[0]) for requirement in declared}
    assert names - pinned == set()


def test_ci_is_executable():
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_lists_its_targets():
    command = ["make", "--no-print-directory"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    listed = {line.split()[1] for line in run.stdout.splitlines()}
    assert listed >= {"help", "setup", "demo", "test", "check", "bench", "clean"}


def _canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()
