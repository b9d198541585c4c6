"""Files and folders appear whole or not at all, and what can't be written is known beforehand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peft_variator.files import check_new_file, check_new_folder, new_folder, replacing_folder, write_text


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
