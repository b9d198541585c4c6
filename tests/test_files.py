"""Files are written whole or not at all."""

import pytest

from peft_variator.files import replacing, write_text


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
