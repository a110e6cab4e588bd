#!/usr/bin/env python3
"""MedSteer in one command: the demo, the tests, ComfyUI in the browser, the help pages' pictures, the benchmarks.

Needs Python 3.10 or newer and nothing else. On first use it makes an environment (PyTorch, ComfyUI 0.30.0, the test
tools) in a per-user cache; every later use, of this or another clone, finds it there. With COMFYUI_PATH set, that
ComfyUI and the packages of the Python that runs this file are used, and nothing is installed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from medsteer_core.run.server import ComfyServer, ServerError, free_port, signals_as_interrupt

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "tests"))  # at the end, so that it hides nothing
from dev_environment import Environment, SetupError, environment  # noqa: E402

# Ruff, and the contract between the rooms that pyproject.toml holds.
IMPORT_LINTER = "from importlinter.cli import lint_imports_command; lint_imports_command()"
CHECKS = (("-m", "ruff", "check", "."), ("-c", IMPORT_LINTER, "--no-logo", "--no-cache"))
CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome")


def chromium() -> str | None:
    """The Chromium for the browser tests: what CHROMIUM names, else the first of its names on the PATH, else None."""
    named = os.environ.get("CHROMIUM")
    if named and not shutil.which(named):
        raise SetupError(f"CHROMIUM names {named}, which is no program. Give a Chromium's path, or unset CHROMIUM.")
    return next(filter(None, map(shutil.which, [named] if named else CHROMIUM_NAMES)), None)


def browser_lacks(made: Environment) -> str | None:
    """What the browser tests lack, with the way to get it; None when they can run.

    SetupError instead when MEDSTEER_BROWSER=required is set, so that no browser test is left out unnoticed.
    """
    lacks = None
    if not chromium():
        lacks = "no Chromium was found (Debian: apt install chromium; elsewhere set CHROMIUM to its path)"
    elif subprocess.run([made.python, "-c", "import playwright"], capture_output=True, check=False).returncode:
        lacks = f"{made.python} lacks playwright (install it there; it needs no browser of its own)"
    if lacks and os.environ.get("MEDSTEER_BROWSER") == "required":
        raise SetupError(f"MEDSTEER_BROWSER=required is set, but {lacks}.")
    return lacks


def run_child(command: list[str], made: Environment, **variables: str) -> int:
    """Run a command of the environment in the checkout and return its status; it ends whenever this program does."""
    variables = {**os.environ, "COMFYUI_PATH": str(made.comfyui), **variables}
    process = subprocess.Popen(command, cwd=ROOT, env=variables)
    try:
        return process.wait()
    except KeyboardInterrupt as interrupt:
        # A Ctrl-C in the terminal reached the child too, and it is cleaning up; a signal reached only this process.
        if str(interrupt):
            process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(15)
        raise
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def command_demo(arguments: argparse.Namespace) -> int:
    made = environment("demo")
    return run_child([made.python, "-m", "medsteer_core.run.demo", *arguments.rest], made)


def command_test(arguments: argparse.Namespace) -> int:
    made = environment("test")
    lacks = browser_lacks(made)
    variables = {} if lacks else {"CHROMIUM": chromium()}
    checks = [run_child([made.python, *words], made) for words in CHECKS]
    statuses = []
    for suite in suites(arguments.rest, browser=not lacks):
        statuses.append(run_child([made.python, "-m", "pytest", *suite, *arguments.rest], made, **variables))
    if lacks:
        print(f"NOT RUN: the browser tests: {lacks}", flush=True)
    return overall_status(max(checks), statuses)


def command_export(arguments: argparse.Namespace) -> int:
    test = "tests/browser/test_workflow_files.py"
    words = ["-m", "pytest", test, "-k", "api_file", "--write-api", *arguments.rest]
    return run_with_browser("the API files are exported by ComfyUI's front end in a browser", words)


def command_pictures(arguments: argparse.Namespace) -> int:
    words = ["tests/browser/help_pictures", *arguments.rest]
    return run_with_browser("the pictures are taken of ComfyUI's front end in a browser", words)


def run_with_browser(what: str, words: list[str]) -> int:
    """Run Python with these words and a Chromium; without one SetupError, which begins with what it is for."""
    made = environment("test")
    if lacks := browser_lacks(made):
        raise SetupError(f"{what}, but {lacks}.")
    return run_child([made.python, *words], made, CHROMIUM=chromium())


def suites(rest: list[str], browser: bool = True) -> list[list[str]]:
    """The paths of each pytest process: unit, host and browser tests apart, or none when the user names paths.

    Apart, because the host tests put ComfyUI's folder first on the module path, and the unit tests must do without it.
    """
    named = [word for word in rest if not word.startswith("-") and (ROOT / word.split("::")[0]).exists()]
    return [[]] if named else [["tests/unit"], ["tests/host"], *([["tests/browser"]] if browser else [])]


def overall_status(checks: int, tests: list[int]) -> int:
    """0 when checks and every pytest passed. pytest's 5 (no test matched) counts as failure only when all say it."""
    failed = [status for status in tests if status not in (0, 5)]
    return checks or (failed[0] if failed else min(tests))


def command_serve(arguments: argparse.Namespace) -> int:
    made = environment("serve")
    keep = ROOT / "output" / "serve"
    port = arguments.port or free_port(8188, "127.0.0.1" if ":" in arguments.listen else arguments.listen.split(",")[0])
    options = {"port": port, "listen": arguments.listen, "keep": keep, "cpu": True if arguments.cpu else None}
    print("starting ComfyUI with this checkout as a custom node", flush=True)
    with ComfyServer(made.comfyui, ROOT, python=made.python, extra=tuple(arguments.rest), **options) as server:
        print(f"ComfyUI runs on the {server.device} at {server.address}")
        print(f"models, images and saved workflows stay in {keep}; its log is {server.base / 'comfyui.log'}")
        print("Ctrl-C stops it", flush=True)
        server.process.wait()
        print(f"ComfyUI ended by itself. Its log ends:\n{server.log_tail()}", file=sys.stderr)
    return 1


def benchmarks() -> dict[str, str]:
    """The names that `bench` takes, and the module of each: every file of the rooms but what they share."""
    found = [path for path in (ROOT / "benchmarks").glob("*/[!_]*.py") if path.parent.name != "shared"]
    return {path.stem: f"benchmarks.{path.parent.name}.{path.stem}" for path in sorted(found, key=lambda p: p.stem)}


def command_bench(arguments: argparse.Namespace) -> int:
    if arguments.name not in benchmarks():
        what = f"there is no benchmark {arguments.name!r}" if arguments.name else "name a benchmark"
        raise SetupError(f"{what}; those there are: {', '.join(benchmarks()) or 'none yet'}")
    made = environment("bench")
    return run_child([made.python, "-m", benchmarks()[arguments.name], *arguments.rest], made)


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: Callable, text: str, passed_to: str) -> argparse.ArgumentParser:
        after = f"Every other argument, and all that stand behind a lone --, are passed on to {passed_to}."
        one = commands.add_parser(name, help=text, description=text, epilog=after, allow_abbrev=False)
        one.set_defaults(run=run)
        return one

    command("demo", command_demo, "make a counterfactual pair in output/demo", "the demo")
    test = "run ruff, lint-imports and all tests (the browser's need a Chromium; MEDSTEER_BROWSER=required insists)"
    command("test", command_test, test, "pytest")
    command("export", command_export, "write example_workflows/api anew, as ComfyUI's front end exports it", "pytest")
    pictures = "make the help pages' pictures anew: all, or by NAME; --output DIR: elsewhere than in web/docs"
    command("pictures", command_pictures, pictures, "tests/browser/help_pictures (whose help -- --help shows)")
    serve = command("serve", command_serve, "start ComfyUI with the pack for the browser", "ComfyUI")
    serve.add_argument("--port", type=int, help="default: the first free one from 8188")
    serve.add_argument("--listen", default="127.0.0.1", metavar="IP", help="default: %(default)s, this machine only")
    serve.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    bench = command("bench", command_bench, "run a benchmark: a table here, output/bench/NAME.json", "the benchmark")
    bench.add_argument("name", nargs="?", metavar="NAME", help=f"one of: {', '.join(benchmarks()) or 'none yet'}")
    return top


def main(words: list[str]) -> int:
    cut = words.index("--") if "--" in words else len(words)
    arguments, others = parser().parse_known_args(words[:cut])
    arguments.rest = others + words[cut + 1 :]
    try:
        with signals_as_interrupt():
            return arguments.run(arguments)
    except (SetupError, ServerError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
