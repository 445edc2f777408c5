"""A file or folder is written whole or not at all."""

import os

import pytest

from clip_jax.files import atomic_path, write_atomically


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    file = tmp_path / "figures.json"
    write_atomically(file, "é")
    assert file.read_bytes() == "é".encode()
    write_atomically(file, b"\xff")
    assert file.read_bytes() == b"\xff"
    assert os.listdir(tmp_path) == ["figures.json"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_an_error_leaves_what_was_there(tmp_path, kind):
    def write(content: str) -> None:
        with atomic_path(tmp_path / "made.pt") as unfinished:
            assert unfinished.suffix == ".pt"
            if kind == "folder":
                unfinished.mkdir()
                (unfinished / "part").write_text(content)
            else:
                unfinished.write_text(content)
            if content == "bad":
                raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        write("bad")
    assert os.listdir(tmp_path) == []
    write("good")
    with pytest.raises(RuntimeError, match="in the middle"):
        write("bad")
    assert os.listdir(tmp_path) == ["made.pt"]
    made = tmp_path / "made.pt"
    assert (made / "part" if kind == "folder" else made).read_text() == "good"


def test_the_temporary_name_may_be_in_another_folder(tmp_path):
    (tmp_path / "parts").mkdir()
    with atomic_path(tmp_path / "pairs-0", folder=tmp_path / "parts") as unfinished:
        unfinished.write_text("x")
        assert os.listdir(tmp_path) == ["parts"]
        assert not list(tmp_path.glob("pairs-*"))
    assert sorted(os.listdir(tmp_path)) == ["pairs-0", "parts"] and os.listdir(tmp_path / "parts") == []


def test_an_error_of_the_disk_names_the_file_that_was_asked_for(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        write_atomically(tmp_path / "none/file", "x")
    assert caught.value.filename == str(tmp_path / "none/file")
