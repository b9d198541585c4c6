"""Files and folders appear whole or not at all, and what can't be written is known beforehand."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors import SafetensorError

from peft_variator.files import (
    check_new_file,
    check_new_folder,
    new_folder,
    replacing_folder,
    replacing_with,
    write_text,
)


LONG = "n" * 250


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_name_of_250_bytes_is_written(tmp_path: Path) -> None:
    with new_folder(tmp_path / LONG) as folder:
        write_text(folder / LONG, "text")
    assert names(tmp_path) == [LONG]
    assert (tmp_path / LONG / LONG).read_text() == "text"


@pytest.mark.parametrize("check", [check_new_file, check_new_folder])
def test_a_name_that_is_too_long_is_refused_beforehand(tmp_path: Path, check: object) -> None:
    with pytest.raises(OSError, match="too long"):
        check(tmp_path / "made" / ("n" * 256))  # type: ignore[operator]
    assert names(tmp_path) == []


@pytest.mark.parametrize("path", [".", "..", "/", "/dev/null", "/proc", "/proc/new"])
def test_folders_that_could_only_fail_at_the_end(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(OSError, match=r"Name|written"):
        check_new_folder(path)


def test_a_link_is_no_folder_to_make(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "nowhere").symlink_to("gone")
    for name in ("link", "nowhere"):
        with pytest.raises(FileExistsError, match="link"):
            check_new_folder(tmp_path / name)


def test_an_empty_mount_point_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "mounted")
    with pytest.raises(OSError, match="mount point"):
        check_new_folder(tmp_path / "mounted")


def test_devices_are_not_replaced_by_files() -> None:
    with pytest.raises(FileExistsError, match="device"):
        check_new_file("/dev/null")


def test_a_file_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real.json")
    check_new_file(tmp_path / "link")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real.json").read_text() == "new"


def interrupt(path: Path) -> None:
    with replacing_folder(path) as folder:
        (folder / "result").write_text("half")
        raise KeyboardInterrupt


def test_an_earlier_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "run") as folder:
        (folder / "result").write_text("first")
    with pytest.raises(KeyboardInterrupt):
        interrupt(tmp_path / "run")
    assert (tmp_path / "run" / "result").read_text() == "first"
    with replacing_folder(tmp_path / "run") as folder:
        assert (tmp_path / "run" / "result").read_text() == "first"
        (folder / "result").write_text("second")
    assert (tmp_path / "run" / "result").read_text() == "second"
    assert names(tmp_path) == ["run"]


@pytest.mark.skipif(os.name == "nt", reason="folders cannot be locked there")
def test_what_killed_processes_left_goes_away_and_nothing_else(tmp_path: Path) -> None:
    """What another process is filling, what is new and was not locked yet, and what only looks alike stay."""
    killed, held, new = (tmp_path / f".out.partial-{letter * 8}" for letter in "abc")
    killed_now, held_now = (tmp_path / f".out.partial-{letter * 8}-locked" for letter in "de")
    others = [tmp_path / name for name in (".out.partial-backup", ".out.backup12", ".outer.partial-aaaaaaaa")]
    for folder in (killed, held, new, killed_now, held_now, *others):
        folder.mkdir()
        (folder / "file").touch()
        if folder not in (new, killed_now, held_now):
            os.utime(folder, (0, 0))
    lock = "[fcntl.flock(os.open(path, 0), 2) for path in sys.argv[1:]]"
    program = f"import fcntl, os, sys; {lock}; print(flush=True); input()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = [sys.executable, "-c", program, str(held), str(held_now)]
    with subprocess.Popen(words, **pipes) as process:  # type: ignore[call-overload]
        process.stdout.readline()
        with new_folder(tmp_path / "out"):
            pass
        process.communicate(b"\n")
    assert names(tmp_path) == sorted(["out", *(folder.name for folder in (held, new, held_now, *others))])


def test_an_earlier_folder_comes_back_after_a_kill_between_the_two(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-earlier").mkdir()
    (tmp_path / ".out.partial-earlier" / "file").write_text("earlier")
    with pytest.raises(FileNotFoundError), replacing_folder(tmp_path / "out") as folder:
        (folder / "missing").read_text()
    assert names(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "earlier"


@pytest.mark.skipif(os.name == "nt", reason="processes cannot be killed so there")
def test_a_process_that_is_killed_leaves_nothing_after_the_next(tmp_path: Path) -> None:
    program = (
        "import os, sys\nsys.argv[0] = 'peft-variator'\n"  # which imports nothing heavy
        "from peft_variator.files import new_folder\n"
        "with new_folder(sys.argv[1]) as folder:\n    (folder / 'half').touch()\n    os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "out")], capture_output=True)
    assert len(names(tmp_path)) == 1
    with new_folder(tmp_path / "out") as folder:
        (folder / "whole").touch()
    assert names(tmp_path) == ["out"]


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def write_model(folder: Path, model: str, others: dict[str, bytes]) -> None:
    with replacing_with(folder / "model", others) as file:
        file.write_text(model)


OLD = {"a": b"old", "b": b"old", "same": b"same"}
NEW = {"a": b"new", "b": b"new", "same": b"same", "c": b"new"}


@pytest.mark.parametrize("interrupted", range(6))
def test_a_file_is_never_beside_the_others_of_another(
    interrupted: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each rename, which is what a kill leaves, and when an error comes after the n-th of 5; 0: none comes."""
    write_model(tmp_path, "old", OLD)
    (tmp_path / "mine").write_text("mine")
    whole, seen, replace = contents(tmp_path), [], os.replace

    def looking(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append(contents(tmp_path))
        if len(seen) == interrupted:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", looking)
    with pytest.raises(KeyboardInterrupt) if interrupted else nullcontext():
        write_model(tmp_path, "new", NEW)
    if interrupted in (0, 5):
        assert len(seen) == 5
        whole = {name: content.decode() for name, content in NEW.items()} | {"mine": "mine", "model": "new"}
    assert contents(tmp_path) == whole
    assert names(tmp_path) == sorted(whole)
    assert all("model" not in files or files == seen[-1] for files in seen)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 384 vs 320"),
    ],
)
def test_a_full_disk_is_told_by_the_name_of_what_was_written(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left") as raised, new_folder(tmp_path / "out"):
        raise error
    assert raised.value.filename == str(tmp_path / "out")
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/another/disk")
    with pytest.raises(OSError, match="No space left") as raised, new_folder(tmp_path / "out"):
        raise elsewhere
    assert raised.value is elsewhere
    assert names(tmp_path) == []
