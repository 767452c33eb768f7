"""Who makes an output, and what becomes of what a killed process left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from shearling.errors import ShearlingError
from shearling.files import locks, scratch, staging
from shearling.files.staging import check_file, partial, reserved
from shearling.files.unfinished import alone
from shearling.files.writer import check_output, claimed, new_directory, write_text


def killed(work: Callable[[], None]) -> None:
    """Do some work in a process of its own that is killed in the midst of it."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def half_a_model(output: Path) -> None:
    with new_directory(output) as directory:
        (directory / "model.safetensors").write_text("half")
        kill()


def test_the_next_removes_what_a_killed_process_left(tmp_path: Path) -> None:
    output = tmp_path / "model"
    killed(lambda: half_a_model(output))
    assert list(tmp_path.iterdir()) == [partial(output)]
    with new_directory(output) as directory:
        assert list(directory.iterdir()) == []
        (directory / "config.json").write_text("{}")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "config.json"]


def test_without_locks_the_dead_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging, "lock", lambda handle, wait=False: None)
    output = tmp_path / "model"
    killed(lambda: half_a_model(output))
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(partial(output).name)
    with reserved(output) as one, reserved(tmp_path / "other") as other:
        assert not left.exists()
        assert one != other
    assert list(tmp_path.iterdir()) == []


def test_the_second_process_is_told_who_is_at_work(tmp_path: Path) -> None:
    output, refusal = tmp_path / "a" / "model", tmp_path / "refusal"

    def second() -> None:
        for work in (lambda: claimed(output), lambda: alone(tmp_path / "store", output)):
            try:
                with work():
                    pass
            except ShearlingError as error:
                with refusal.open("a") as file:
                    print(error, file=file)
        kill()

    with claimed(output), alone(tmp_path / "store", output):
        killed(second)
    sentence = f"{output} is being written by process {os.getpid()}; wait for it, or name another"
    assert [line.startswith(sentence) for line in refusal.read_text().splitlines()] == [True] * 2
    assert [path.name for path in tmp_path.iterdir()] == ["refusal"], "nothing came of it"


def test_claimed_from_before_the_work_until_it_is_made(tmp_path: Path) -> None:
    with claimed(tmp_path / "model"):
        assert [path.name for path in tmp_path.iterdir()] == [partial(tmp_path / "model").name]
        with new_directory(tmp_path / "model") as directory:
            (directory / "file").write_text("x")
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "file"]


def test_a_file_is_whole_though_one_writer_was_killed(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    partial(file).write_text("a killed writer's, longer than what comes")
    write_text(file, "whole")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [
        ("result.json", "whole")
    ]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to(os.devnull)])
def test_what_is_no_regular_file_is_refused(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "output")
    for refuse in (check_file, lambda path: write_text(path, "x")):
        with pytest.raises(ShearlingError, match="no regular file; name a new file"):
            refuse(tmp_path / "output")
    with pytest.raises(ShearlingError, match="name a new directory"):
        check_output(tmp_path / "output")
    assert not (tmp_path / "output").is_file()


def test_where_nothing_can_be_written_is_found_before(tmp_path: Path) -> None:
    """A file where a directory should be, and /proc, in which nobody can make anything."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "output", Path("/proc/output")):
        for refuse in (check_file, lambda path: claimed(path).__enter__()):
            with pytest.raises(ShearlingError, match=r"cannot be written \("):
                refuse(place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_scratch_of_the_dead_goes_and_of_the_living_stays(tmp_path: Path) -> None:
    def work() -> None:
        scratch.new_scratch(tmp_path)
        kill()

    killed(work)
    (tmp_path / "shearling-of-a-user").mkdir()
    (left,) = tmp_path.glob("shearling-*-*-*-*")
    with scratch.scratch(tmp_path) as ours:
        assert not left.exists()
        scratch.sweep(tmp_path)
        assert ours.is_dir()
        of_another_host = ours.with_name(f"shearling-00000000-1-1-{ours.name[-8:]}")
        of_another_host.mkdir()
        scratch.sweep(tmp_path)
        assert of_another_host.is_dir(), "nobody here can tell whether it lives"
    assert {path.name for path in tmp_path.iterdir()} == {
        "shearling-of-a-user", of_another_host.name
    }  # fmt: skip


def test_a_process_is_known_by_when_it_began() -> None:
    host, process, begun = locks.owner().split("-")
    assert int(process) == os.getpid()
    assert not locks.is_dead(locks.owner())
    assert locks.is_dead(f"{host}-{process}-{int(begun) + 1}"), "its number was given away again"
