"""The contract between the rooms: `lint-imports` keeps it, and every kind of forbidden import breaks it."""

import ast
import importlib.util
import shutil
import subprocess
import sys

import pytest

if importlib.util.find_spec("importlinter") is None:
    pytest.skip("import-linter is not installed", allow_module_level=True)

RUN = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]


def lint(folder):
    """The status of `lint-imports` in a folder, and what it says."""
    done = subprocess.run([*RUN, "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.fixture(scope="module")
def house(checkout, tmp_path_factory):
    """A copy of the code and its contract, to break."""
    folder = tmp_path_factory.mktemp("house")
    shutil.copy(checkout / "pyproject.toml", folder)
    only_code = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(checkout / "medsteer_core", folder / "medsteer_core", ignore=only_code)
    return folder


def test_the_house_keeps_its_contract(house):
    status, said = lint(house)
    assert status == 0 and "0 broken" in said, said


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("scores/pair.py", "import comfy.samplers", "Only host/ knows ComfyUI"),
        ("vectors/recipe.py", "from ..extraction import capture", "A room knows only the rooms below it"),
        ("files/inside.py", "from ..vectors import schedule", "A room knows only the rooms below it"),
        ("run/workflow.py", "from ..host.canvas import notes", "A room knows only the rooms below it"),
        ("host/patching/sites.py", "from ..sampling import runs", "So do the rooms of host/"),
        ("run/workflow.py", "from . import client", "No files or rooms know each other in a circle"),
        ("attic/boxes.py", "", "A room knows only the rooms below it"),
    ],
)
def test_a_forbidden_import_breaks_it(house, file, line, broken):
    path = house / "medsteer_core" / file
    before = path.read_text(encoding="utf-8") if path.exists() else None
    path.parent.mkdir(exist_ok=True)
    try:
        if before is None:
            (path.parent / "__init__.py").touch()
        path.write_text(f"{before or ''}\n{line}\n", encoding="utf-8")
        status, said = lint(house)
    finally:
        if before is None:
            shutil.rmtree(path.parent)
        else:
            path.write_text(before, encoding="utf-8")
    assert status == 1 and f"{broken} BROKEN" in said, said


def imports_of(path):
    """(level, module) of every `from ... import` in a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [(node.level, node.module or "") for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def test_no_relative_import_leaves_the_core(checkout):
    # The linter does not see such a one: what lies above the core is ComfyUI's folder of custom nodes.
    core = checkout / "medsteer_core"
    for path in core.rglob("*.py"):
        depth = len(path.relative_to(core).parts)
        assert all(level <= depth for level, _module in imports_of(path)), path


def test_nodes_know_the_core_and_each_other_only(checkout):
    for path in (checkout / "nodes").glob("*.py"):
        outside = [module for level, module in imports_of(path) if level > 1]
        assert all(module.split(".")[0] == "medsteer_core" for module in outside), path
