"""Outputs that appear whole or not at all, whatever happens on the way."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from shearling.errors import ShearlingError
from shearling.files import writer
from shearling.files.writer import (
    check_output,
    check_space,
    disk_errors,
    file_digest,
    new_directory,
    plan_shards,
    write_json,
    write_text,
    write_weights,
)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request: pytest.FixtureRequest) -> Generator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def full(*_: Any, **__: Any) -> NoReturn:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_for_safetensors(*_: Any, **__: Any) -> NoReturn:
    """What save_file raises; see test_a_limit_of_the_system for the real thing."""
    raise SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )


# --- directories ---------------------------------------------------------------------------------


def test_a_directory_appears_when_it_is_whole(tmp_path: Path) -> None:
    output = tmp_path / "a" / "b" / "model"
    with new_directory(output) as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        assert not output.exists()
        assert staging.parent == output.parent, "a rename must not cross file systems"
    assert (output / "sub" / "file").read_text() == "x"
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, MemoryError])
def test_nothing_is_left_of_a_directory_that_failed(
    tmp_path: Path, error: type[BaseException]
) -> None:
    def fail() -> None:
        with new_directory(tmp_path / "model") as staging:
            (staging / "half").write_text("x")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_accepted(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with new_directory(tmp_path / "model") as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "model" / "file").read_text() == "x"
    assert len(list(tmp_path.iterdir())) == 1


def test_an_empty_directory_survives_a_failure(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    with pytest.raises(ShearlingError), new_directory(tmp_path / "model"):
        full()
    assert list(tmp_path.rglob("*")) == [tmp_path / "model"]


def test_a_link_to_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with new_directory(tmp_path / "link") as staging:
        (staging / "file").write_text("x")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == "x"


def test_the_working_directory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename onto it would leave the shell in a directory that is gone."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for name in (".", "../here", str(tmp_path / "here")):
        with pytest.raises(ShearlingError, match=r"is the working directory; name a new one"):
            check_output(Path(name))
    check_output(Path("inside"))


def test_a_directory_with_something_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ShearlingError, match="exists and is not empty") as error:
        check_output(tmp_path)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ShearlingError, match="not empty"), new_directory(tmp_path):
        raise AssertionError("no work may be done")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_a_file_in_the_place_is_refused(tmp_path: Path, kind: str) -> None:
    output = tmp_path / "model"
    output.write_text("x") if kind == "file" else output.symlink_to("nowhere")
    with pytest.raises(ShearlingError, match=r"model is a file; name a new directory"):
        check_output(output)


def test_a_directory_filled_meanwhile_is_not_lost(tmp_path: Path) -> None:
    """Two runs with one output: the first to finish has it, the other fails."""

    def race() -> None:
        with new_directory(tmp_path / "model") as staging:
            (staging / "file").write_text("second")
            (tmp_path / "model").mkdir()
            (tmp_path / "model" / "file").write_text("first")

    with pytest.raises(OSError, match="not empty"):
        race()
    assert (tmp_path / "model" / "file").read_text() == "first"
    assert len(list(tmp_path.iterdir())) == 1


def test_permissions_follow_the_umask(tmp_path: Path, umask: int) -> None:
    with new_directory(tmp_path / "model") as staging:
        (staging / "sub").mkdir()
        (staging / "sub" / "file").write_text("x")
        write_json(staging / "config.json", {})
        save(staging, {"a": torch.zeros(3)})
    model = tmp_path / "model"
    assert mode(model) == mode(model / "sub") == 0o777 & ~umask
    files = {path.name: mode(path) for path in model.rglob("*") if path.is_file()}
    assert files == dict.fromkeys(["file", "config.json", "model.safetensors"], 0o666 & ~umask)


def test_everything_is_flushed_before_the_name_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[tuple[str, int]] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: (order.append(("sync", os.fstat(fd).st_ino)), sync(fd))
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b: (order.append(("rename", os.stat(a).st_ino)), replace(a, b))
    )
    with new_directory(tmp_path / "model") as staging:
        (staging / "sub").mkdir()
        for name in ("one", "sub/two"):
            (staging / name).write_text(name)
        order.clear()
    model = tmp_path / "model"
    inside = {path.stat().st_ino for path in (model, *model.rglob("*"))}
    renamed = order.index(("rename", model.stat().st_ino))
    assert {inode for kind, inode in order[:renamed] if kind == "sync"} == inside
    assert order[renamed + 1 :] == [("sync", tmp_path.stat().st_ino)]


# --- a full disk ---------------------------------------------------------------------------------


@pytest.mark.parametrize("flavour", [full, full_for_safetensors])
def test_a_full_disk_is_one_sentence(tmp_path: Path, flavour: Callable[..., NoReturn]) -> None:
    with pytest.raises(ShearlingError, match="disk ran full") as error:
        with_directory(tmp_path / "model", flavour)
    assert str(tmp_path / "model") in str(error.value)
    assert list(tmp_path.iterdir()) == []


def with_directory(output: Path, then: Callable[[], object]) -> None:
    with new_directory(output) as staging:
        (staging / "half").write_text("x")
        then()


@pytest.mark.parametrize("number", [0, 1])
def test_a_disk_that_runs_full_while_flushing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """Delayed allocation: the error may come with the fsync of any file, or of the directory."""
    calls = iter(range(100))
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: full() if next(calls) == number else sync(fd))
    with pytest.raises(ShearlingError, match="nothing was left behind"):
        with_directory(tmp_path / "model", lambda: None)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_the_rename_leaves_the_whole_and_says_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: full() if next(calls) == 2 else sync(fd))
    with pytest.raises(OSError, match="No space left") as error:
        with_directory(tmp_path / "model", lambda: None)
    assert "nothing was left" not in str(error.value)
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["half"]


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied"),
        SafetensorError("Error while serializing: I/O error: Permission denied (os error 13)"),
        SafetensorError("Error while deserializing header: invalid header length"),
        ValueError("os error 28"),
    ],
    ids=repr,
)
def test_other_errors_are_not_taken_for_a_full_disk(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as caught, disk_errors(tmp_path):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_quotas_are_full_disks_as_well(tmp_path: Path, number: int) -> None:
    with pytest.raises(ShearlingError, match="disk ran full"), disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))


_LIMITED = """
import resource, sys
from pathlib import Path
import torch
from shearling.errors import ShearlingError
from shearling.files.writer import new_directory, write_weights

resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
output = Path(sys.argv[1])
try:
    with new_directory(output) as staging:
        tensors = {"a": torch.zeros(2048)}
        write_weights(staging, {"a": 8192}, lambda names: tensors, shard_bytes=10**9)
except ShearlingError as error:
    print(error)
"""


def test_a_limit_of_the_system_is_met_for_real(tmp_path: Path) -> None:
    """No double: the kernel refuses to let the file of weights grow beyond 4 KiB."""
    pytest.importorskip("resource")
    command = [sys.executable, "-c", _LIMITED, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.stdout == (
        f"the disk ran full while writing {tmp_path / 'model'}, of which nothing was left behind; "
        "free some space, or name an output on another disk.\n"
    ), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = writer.shutil.disk_usage(tmp_path)
    asked: list[Path] = []

    def disk_usage(path: Path) -> Any:
        asked.append(path)
        return usage._replace(free=5 * 10**9)

    monkeypatch.setattr(writer.shutil, "disk_usage", disk_usage)
    output = tmp_path / "not" / "yet" / "there"
    check_space(output, 5 * 10**9)
    with pytest.raises(ShearlingError, match=r"needs 7\.25 GB, but its disk has 5\.00 GB") as error:
        check_space(output, 7_250_000_000)
    assert str(output) in str(error.value)
    assert set(asked) == {tmp_path.resolve()}


# --- weights -------------------------------------------------------------------------------------


def save(directory: Path, tensors: dict[str, Tensor], shard_bytes: int = 10**9) -> dict[str, str]:
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    return write_weights(
        directory, sizes, lambda names: {n: tensors[n] for n in names}, shard_bytes=shard_bytes
    )


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.integers(0, 50), max_size=20),
    st.integers(1, 60),
)
def test_shards_keep_the_order_and_the_limit(sizes: dict[str, int], limit: int) -> None:
    shards = plan_shards(sizes, limit)
    assert [name for shard in shards for name in shard] == list(sizes)
    assert all(shards)
    totals = [sum(sizes[name] for name in shard) for shard in shards]
    for shard, total in zip(shards, totals, strict=True):
        assert total <= limit or len([name for name in shard if sizes[name]]) == 1
    for total, following in zip(totals, shards[1:], strict=False):
        assert total + sizes[following[0]] > limit, "no shard is closed while there is room"


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(5.0), "b": torch.ones(2, 3, dtype=torch.bfloat16)}
    digests = save(tmp_path, tensors)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    digest = hashlib.sha256((tmp_path / "model.safetensors").read_bytes()).hexdigest()
    assert digests == {"model.safetensors": digest}


def test_shards_come_with_an_index_and_one_is_held_at_a_time(tmp_path: Path) -> None:
    tensors = {str(i): torch.full((i + 1,), float(i)) for i in range(6)}
    loads: list[list[str]] = []
    steps: list[tuple[float, float]] = []

    def load(names: list[str]) -> dict[str, Tensor]:
        loads.append(names)
        return {name: tensors[name] for name in names}

    digests = write_weights(
        tmp_path,
        {name: tensor.nbytes for name, tensor in tensors.items()},
        load,
        shard_bytes=24,
        progress=lambda _, done, total: steps.append((done, total)),
    )
    assert loads == [["0", "1", "2"], ["3"], ["4"], ["5"]]
    assert steps == [(24, 84), (40, 84), (60, 84), (84, 84)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 84
    files = [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert list(digests) == files
    for file, names in zip(files, loads, strict=True):
        assert {n for n, where in index["weight_map"].items() if where == file} == set(names)
        assert set(load_file(tmp_path / file)) == set(names)
        assert digests[file] == file_digest(tmp_path / file)


def test_a_shard_that_cannot_be_written_stops_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = writer.save_file, []

    def second_fails(*args: Any, **kwargs: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            full_for_safetensors()
        original(*args, **kwargs)

    monkeypatch.setattr(writer, "save_file", second_fails)

    def run() -> None:
        with new_directory(tmp_path / "model") as staging:
            save(staging, {str(i): torch.zeros(4) for i in range(5)}, shard_bytes=16)

    with pytest.raises(ShearlingError, match="disk ran full"):
        run()
    assert len(calls) == 2
    assert list(tmp_path.iterdir()) == []


# --- single files --------------------------------------------------------------------------------


def test_json_is_read_back_as_it_was(tmp_path: Path) -> None:
    value = {"ä": [1, 2.5, None], "b": {"c": "☃"}}
    write_json(tmp_path / "deep" / "er" / "file.json", value)
    text = (tmp_path / "deep" / "er" / "file.json").read_text(encoding="utf-8")
    assert json.loads(text) == value
    assert "☃" in text
    assert text.endswith("}\n")


def test_permissions_of_a_file_follow_the_umask(tmp_path: Path, umask: int) -> None:
    write_json(tmp_path / "file.json", {})
    assert mode(tmp_path / "file.json") == 0o666 & ~umask


@pytest.mark.parametrize("at", ["fsync", "replace"])
@pytest.mark.parametrize("interrupt", [False, True])
def test_the_old_content_survives_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, interrupt: bool
) -> None:
    file = tmp_path / "file.json"
    write_json(file, {"old": 1})

    def fail(*args: object) -> NoReturn:
        raise KeyboardInterrupt if interrupt else OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, at, fail)
    with pytest.raises(KeyboardInterrupt if interrupt else ShearlingError):
        write_json(file, {"new": 2})
    monkeypatch.undo()
    assert json.loads(file.read_text()) == {"old": 1}
    assert list(tmp_path.iterdir()) == [file]


def test_what_is_no_json_leaves_the_old_content(tmp_path: Path) -> None:
    write_json(tmp_path / "file.json", {"old": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "file.json", {"new": object()})
    assert json.loads((tmp_path / "file.json").read_text()) == {"old": 1}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_directory_where_a_file_was_wanted(tmp_path: Path) -> None:
    with pytest.raises(ShearlingError, match="is a directory; name a file") as error:
        write_text(tmp_path, "x")
    assert str(tmp_path) in str(error.value)
