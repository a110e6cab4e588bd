"""Names that a workflow gives to files: what is a name inside a folder, and what is refused."""

import os
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsteer_core.errors import MedSteerError
from medsteer_core.files.inside import LONGEST_PART, name_parts, path_inside, shown


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("polyps", ("polyps",)),
        (" colon/polyps ", ("colon", "polyps")),
        ("colon\\polyps", ("colon", "polyps")),
        ("colon/", ("colon",)),
        ("\u606f\u8089/Zökum v1.2", ("\u606f\u8089", "Zökum v1.2")),
        ("console/nullable", ("console", "nullable")),
    ],
)
def test_a_plain_name_gives_its_parts(text, parts):
    assert name_parts(text, "prefix") == parts


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "/", "\\", ".", "..", "a/..", "a/./b", "/etc/passwd", "\\\\server\\share", "C:\\x", "c:x", "a//b",
        "a\0b", "a\nb", "a\tb", "\x1b[31mred", "a\u202egpj.exe", "a\u200bb", "a\ud800b", "a\u2028b",
        "CON", "nul", "aux.txt", "COM1", "lpt9.safetensors", "COM¹", "CONIN$", "NUL .txt", "colon/PRN/x",
        "a.", "a /b", "a/ b", "a*", "a?", "a|b", "a<b", 'a"b', "x" * (LONGEST_PART + 1), "é" * 61, "a/b/c/d/e/f/g/h/i",
    ],
)  # fmt: skip
def test_what_is_no_name_inside_a_folder_is_refused_in_one_line(text):
    with pytest.raises(MedSteerError, match="prefix is '.*was expected") as error:
        name_parts(text, "prefix")
    assert str(error.value).isprintable() and len(str(error.value)) < 600


def test_composed_and_decomposed_letters_are_one_name():
    composed, decomposed = unicodedata.normalize("NFC", "Zökum"), unicodedata.normalize("NFD", "Zökum")
    assert composed != decomposed and name_parts(composed, "x") == name_parts(decomposed, "x")


@given(st.text(max_size=200))
def test_whatever_is_accepted_stays_inside_and_can_be_made(tmp_path_factory, text):
    root = tmp_path_factory.getbasetemp() / "inside"
    root.mkdir(exist_ok=True)
    try:
        path = path_inside(root, name_parts(text, "prefix"), "the folder")
    except MedSteerError as error:
        assert str(error).isprintable()
        return
    assert path.resolve().is_relative_to(root.resolve()) and path != root
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_dir():
        path.write_bytes(b"")


def test_a_link_that_leads_out_is_refused_and_one_that_stays_is_followed(tmp_path):
    root, away = tmp_path / "root", tmp_path / "away"
    (root / "own").mkdir(parents=True)
    away.mkdir()
    try:
        (root / "out").symlink_to(away, target_is_directory=True)
        (root / "in").symlink_to(root / "own", target_is_directory=True)
        (root / "ring").symlink_to(root / "ring")
    except OSError:
        pytest.skip("no right to make links")
    for parts in (("out", "x"), ("out",), ("..", "away")):
        with pytest.raises(MedSteerError, match="leads out of models/x"):
            path_inside(root, parts, "models/x")
    assert path_inside(root, ("in", "x"), "models/x").parent.resolve() == (root / "own").resolve()
    assert not list(away.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="other rules for links")
def test_a_null_byte_is_refused_where_it_gets_as_far_as_a_path(tmp_path):
    with pytest.raises(MedSteerError, match="leads out of"):
        path_inside(tmp_path, ("a\0b",), "the folder")


def test_texts_from_outside_are_shown_in_one_short_line():
    assert shown("a\nb\u202ec") == "a\\u000ab\\u202ec"
    assert shown("x" * 100, 10) == "x" * 10 + "..."
    assert shown(["a"]) == "['a']"
