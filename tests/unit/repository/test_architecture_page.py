"""docs/architecture.md: every path that it names is there, and page, drawing and contract have the same rooms."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DRAWING = (ROOT / "docs" / "architecture.svg").read_text(encoding="utf-8")
CORE = ROOT / "medsteer_core"
ROOMS = sorted(path.parent.name for path in CORE.glob("*/__init__.py"))


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([\w/.]+(?:/|\.py|\.txt|\.svg))`", PAGE))))
def test_every_path_that_the_page_names_is_there(name):
    places = (ROOT, CORE, ROOT / "docs", ROOT / "benchmarks", *CORE.glob("*/"), *CORE.glob("host/*/"))
    assert any((place / name).exists() for place in places)


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_is_in_the_table_the_drawing_and_the_contract(room):
    assert re.search(rf"^\|[^|]*`{room}/", PAGE, re.M), "the table of rooms"
    assert f">{room}/<" in DRAWING
    assert re.search(rf'^    "[\w |]*\b{room}\b[\w |]*",$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)


def test_there_are_twenty_changes_and_ten_steps():
    changes, life = PAGE.split("## To change X, open Y")[1].split("## The life of a pair")
    assert len(re.findall(r"^\| (?!to change)\w", changes, re.M)) >= 20
    assert re.findall(r"^(\d+)\. .*?(?=^\d+\. |\Z)", life, re.M | re.S) == [str(step) for step in range(1, 11)]
    assert all("`" in step for step in re.findall(r"^\d+\. .*?(?=^\d+\. |\Z)", life, re.M | re.S))
