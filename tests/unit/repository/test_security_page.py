"""docs/security.md: every claim's test is there, and every part of the code that it names."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")


def test_every_test_that_the_page_names_is_a_test():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    found = {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    }
    assert len(named) > 25 and named <= found, sorted(named - found)


def test_every_file_and_heading_that_the_page_names_is_there():
    assert all((ROOT / name).is_file() for name in re.findall(r"`(medsteer_core/[\w/]+\.py)`", PAGE))
    for file, heading in re.findall(r"\]\((\w+\.md)(?:#([\w-]+))?\)", PAGE):
        text = (ROOT / "docs" / file).read_text(encoding="utf-8")
        titles = [re.sub(r"[^\w -]", "", line.lstrip("# ")).lower().replace(" ", "-") for line in text.splitlines()
                  if line.startswith("#")]  # fmt: skip
        assert not heading or heading in titles
