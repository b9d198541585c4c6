"""Files are written whole or not at all."""

import os
import stat

import pytest

from peft_variator.files import new_folder, replacing, write_text


def test_text_is_written_into_new_folders_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write_text(path, "first")
    write_text(str(path), "zweite Zeile: ü\n")
    assert path.read_bytes() == "zweite Zeile: ü\n".encode()
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "b.txt"
    write_text(path, "old")

    def fail():
        with replacing(path) as temporary:
            assert temporary.name == "b.txt"
            temporary.write_text("half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_who_reads_the_old_file_meanwhile_keeps_reading_it(tmp_path):
    """The new file takes the name of the old one; it is not written over its bytes."""
    path = tmp_path / "b.txt"
    write_text(path, "old")
    with path.open() as reader:
        write_text(path, "new")
        assert reader.read() == "old"
    assert path.read_text() == "new"


def test_a_new_folder_appears_when_it_is_full(tmp_path):
    out = tmp_path / "a" / "out"
    with new_folder(out) as folder:
        (folder / "file").write_text("text")
        assert not out.exists()
        assert folder.parent == out.parent
        assert folder.name.startswith(".out.partial-")
    assert (out / "file").read_text() == "text"
    assert list(out.parent.iterdir()) == [out]
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(out.stat().st_mode) == 0o777 & ~umask, "as mkdir would have made it"


def test_a_failure_leaves_no_folder(tmp_path):
    def fail():
        with new_folder(tmp_path / "out") as folder:
            (folder / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("mine")
    for taken in (tmp_path / "out", tmp_path / "out" / "file"):
        with pytest.raises(FileExistsError, match="already exists and is not empty"), new_folder(taken):
            pass
    assert (tmp_path / "out" / "file").read_text() == "mine"
