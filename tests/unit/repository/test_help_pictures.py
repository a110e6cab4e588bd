"""The help pages' pictures: what `dev.py pictures` makes is what the pages show, and each has a name of its own."""

import re
import sys
from pathlib import Path

PICTURE = re.compile(r"!\[[^\]]*\]\(([^)\s]+)\)")


def test_the_pictures_that_are_made_are_those_that_the_pages_show(checkout, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(checkout / "tests" / "browser")])
    from help_pictures import PICTURES

    pages = (path.read_text(encoding="utf-8") for path in (checkout / "web" / "docs").rglob("*.md"))
    assert {source for page in pages for source in PICTURE.findall(page)} == set(PICTURES)
    assert len({Path(path).stem for path in PICTURES}) == len(PICTURES)
