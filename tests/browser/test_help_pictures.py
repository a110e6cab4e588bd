"""The command that makes the help pages' pictures makes those that the pages show."""

from pathlib import Path

from help_pictures import PICTURES

PAGES = Path(__file__).resolve().parents[2] / "web" / "docs"


def test_the_command_makes_every_picture_of_the_pages_and_no_other():
    assert set(PICTURES) == {path.relative_to(PAGES).as_posix() for path in PAGES.rglob("*.jpg")}
