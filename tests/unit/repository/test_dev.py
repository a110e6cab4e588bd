"""dev.py: what each command runs, and what its status is."""

import importlib.util
import sys

import pytest


@pytest.fixture(scope="module")
def dev(checkout):
    """dev.py as a module."""
    spec = importlib.util.spec_from_file_location("dev", checkout / "dev.py")
    module = sys.modules["dev"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("checks", "tests", "status"),
    [(0, [0, 0], 0), (1, [0, 0], 1), (0, [1, 0], 1), (0, [0, 2], 2), (0, [5, 0], 0), (0, [0, 5], 0), (0, [5, 5], 5)],
)
def test_the_status_of_test_is_bad_when_any_part_is(dev, checks, tests, status):
    assert dev.overall_status(checks, tests) == status


def test_unit_host_and_browser_tests_run_apart_unless_paths_are_named(dev):
    assert dev.suites(["-k", "steer"]) == [["tests/unit"], ["tests/host"], ["tests/browser"]]
    assert dev.suites(["-k", "steer"], browser=False) == [["tests/unit"], ["tests/host"]]
    assert dev.suites(["tests/unit/repository/test_dev.py::test_x"]) == [[]]


@pytest.fixture
def only_path(monkeypatch, tmp_path):
    """A PATH with nothing but an empty folder, and no variable that says anything about a browser."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("PATHEXT", ".exe")
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.delenv("MEDSTEER_BROWSER", raising=False)
    return tmp_path


def program(path):
    path = path.with_suffix(".exe") if sys.platform == "win32" else path
    path.write_text("")
    path.chmod(0o755)
    return str(path)


def test_the_chromium_is_what_the_variable_names_else_the_first_on_the_path(dev, monkeypatch, only_path):
    assert dev.chromium() is None
    chrome = program(only_path / "google-chrome")
    assert dev.chromium() == chrome
    chromium = program(only_path / "chromium")
    assert dev.chromium() == chromium
    monkeypatch.setenv("CHROMIUM", chrome)
    assert dev.chromium() == chrome
    monkeypatch.setenv("CHROMIUM", str(only_path / "gone"))
    with pytest.raises(dev.SetupError, match="CHROMIUM names .*gone, which is no program"):
        dev.chromium()


def test_without_a_chromium_the_browser_tests_are_left_out_and_that_is_said(dev, monkeypatch, capsys, only_path):
    ran = []
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment(sys.executable, dev.ROOT))
    monkeypatch.setattr(dev, "run_child", lambda command, made, **variables: ran.append((command[2:], variables)) or 0)
    assert dev.main(["test"]) == 0
    checks = [(["ruff", "check", "."], {}), ([dev.IMPORT_LINTER, "--no-logo", "--no-cache"], {})]
    assert ran == [*checks, (["pytest", "tests/unit"], {}), (["pytest", "tests/host"], {})]
    assert "NOT RUN: the browser tests: no Chromium was found" in capsys.readouterr().out
    chromium = program(only_path / "chromium")
    monkeypatch.setattr(dev, "browser_lacks", lambda made: None)
    assert dev.main(["test"]) == 0
    assert ran[-1] == (["pytest", "tests/browser"], {"CHROMIUM": chromium})
    assert "NOT RUN" not in capsys.readouterr().out


def test_a_required_browser_that_is_missing_is_a_failure_and_nothing_runs(dev, monkeypatch, capsys, only_path):
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment(sys.executable, dev.ROOT))
    monkeypatch.setattr(dev, "run_child", None)
    assert dev.main(["export"]) == 1
    assert "exported by ComfyUI's front end in a browser, but no Chromium was found" in capsys.readouterr().err
    assert dev.main(["pictures"]) == 1
    assert "taken of ComfyUI's front end in a browser, but no Chromium was found" in capsys.readouterr().err
    monkeypatch.setenv("MEDSTEER_BROWSER", "required")
    assert dev.main(["test"]) == 1
    assert "MEDSTEER_BROWSER=required is set, but no Chromium was found" in capsys.readouterr().err


def test_words_that_dev_does_not_know_are_passed_on(dev, monkeypatch):
    passed = []
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment("python", dev.ROOT))
    monkeypatch.setattr(dev, "run_child", lambda command, made: passed.append(command) or 0)
    assert dev.main(["demo", "--seed", "3", "--", "--output", "x"]) == 0
    assert passed == [["python", "-m", "medsteer_core.run.demo", "--seed", "3", "--output", "x"]]


def test_pictures_are_made_by_name_and_with_a_chromium(dev, monkeypatch, only_path):
    ran, chromium = [], program(only_path / "chromium")
    monkeypatch.setattr(dev, "environment", lambda command: dev.Environment("python", dev.ROOT))
    monkeypatch.setattr(dev, "browser_lacks", lambda made: None)
    monkeypatch.setattr(dev, "run_child", lambda command, made, **variables: ran.append((command, variables)) or 0)
    assert dev.main(["pictures", "sweep", "--output", "x", "panel"]) == 0
    words = ["python", "tests/browser/help_pictures", "sweep", "--output", "x", "panel"]
    assert ran == [(words, {"CHROMIUM": chromium})]
    assert (dev.ROOT / words[1] / "__main__.py").is_file()


def test_a_missing_or_unknown_benchmark_is_answered_with_those_there_are(dev, monkeypatch, capsys):
    monkeypatch.setattr(dev, "benchmarks", lambda: ["pair", "speed"])
    assert dev.main(["bench", "nonesuch"]) == 1 and dev.main(["bench"]) == 1
    said = capsys.readouterr().err
    assert "no benchmark 'nonesuch'; those there are: pair, speed" in said and "name a benchmark" in said
