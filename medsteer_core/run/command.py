"""Run a workflow in API format on a ComfyUI server that is running already, and bring its files here.

`python -m medsteer_core.run workflow_api.json --set seed=7 --server http://127.0.0.1:8188`; docs/headless.md has more.
Needs no PyTorch: the machine that asks can be another one than the machine that computes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MedSteerError
from ..steering.recipes import RECIPES
from .calibrated import with_calibration
from .client import ComfyClient
from .downloads import download
from .overrides import Change, OverrideError, applied, changes_for, read_workflow, refuse_fractions, with_recipe
from .progress_line import ProgressLine
from .result import Result
from .retrying_http import checked_address
from .server import signals_as_interrupt
from .workflow import ServerRefused, ServerUnreachable, Workflow, WorkflowError, WorkflowInterrupted, WorkflowRefused

DONE, FAILED, REFUSED, UNREACHABLE, INTERRUPTED = 0, 1, 2, 3, 130
STATUSES = """\
exit status:
  0    done: the workflow ran to its end, and its files are here where --output asked for them
  1    a node failed (its title and message are printed), the time was up, or a file could not be written
  2    wrong arguments, or ComfyUI's validation refused the workflow; nothing ran
  3    the server can't be reached, wants a token, went away, or was restarted while the workflow ran
  130  interrupted: Ctrl-C or SIGTERM here (the workflow is cancelled on the server, and no other), or Cancel there
"""
TOKEN, SERVER = "MEDSTEER_TOKEN", "MEDSTEER_SERVER"


def main(words: list[str]) -> int:
    """Run the command with these arguments; its exit status, as `STATUSES` has it."""
    options = parser()
    chosen = options.parse_args(words)
    told = sys.stderr if chosen.json or chosen.dry_run else sys.stdout
    try:
        with signals_as_interrupt():
            summary = run(chosen, told)
    except (KeyboardInterrupt, WorkflowInterrupted) as error:
        status, problem = INTERRUPTED, str(error) if isinstance(error, WorkflowError) else "stopped"
    except (ServerUnreachable, ServerRefused) as error:
        status, problem = UNREACHABLE, str(error)
    except (WorkflowRefused, BadArguments) as error:
        status, problem = REFUSED, str(error)
    except (WorkflowError, MedSteerError, OSError) as error:
        status, problem = FAILED, str(error)
    else:
        status, problem = DONE, ""
    if problem:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    if chosen.json and not chosen.dry_run:
        print(json.dumps({"status": status, **({"error": problem} if problem else summary)}, ensure_ascii=False))
    return status


class BadArguments(MedSteerError):
    """An argument that does not fit."""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m medsteer_core.run",
        description="Run a workflow in API format on a ComfyUI server and bring its files here.",
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    server = os.environ.get(SERVER) or "http://127.0.0.1:8188"
    say = options.add_argument
    say("workflow", type=Path, help="the file; in ComfyUI: File, Export (API)")
    say(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        dest="settings",
        help="another value for one input, named '#id.input', 'Title.input', 'Class.input' or 'input' where only one "
        "has that name; 'seed' is the sampler's. Can be given again",
    )
    say(
        "--recipe",
        metavar="NAME",
        help="settings for a kind of change, written into Steer and Counterfactual Sampler before --set: "
        f"{', '.join(RECIPES)}",
    )
    say(
        "--calibrate",
        metavar="'SOURCE -> TARGET'",
        help="find for each image the least strength that takes it from one class to the other: Calibrate Strength in "
        "the place of Counterfactual Sampler, whose judge, passes and most --set changes",
    )
    say("--server", default=server, metavar="URL", help=f"default: %(default)s (environment variable {SERVER})")
    say("--output", type=Path, metavar="DIR", help="bring every image, file and text here")
    say("--overwrite", action="store_true", help="replace files in DIR that have other content")
    say("--json", action="store_true", help="end with one line of JSON on standard output, all else on standard error")
    say("--dry-run", action="store_true", help="queue nothing; print the workflow with the values set")
    say(
        "--header",
        action="append",
        default=[],
        metavar="'NAME: VALUE'",
        dest="headers",
        help=f"sent with every request. Can be given again. {TOKEN}=... in the environment is sent as a bearer token",
    )
    say("--retries", type=int, default=5, metavar="N", help="how often a request without answer is repeated (5)")
    say("--timeout", type=float, default=60.0, metavar="S", help="seconds for one request (60)")
    say("--time-limit", type=float, metavar="S", help="seconds for the workflow; it is cancelled then (no limit)")
    say("--quiet", action="store_true", help="no progress")
    return options


def run(chosen: argparse.Namespace, told: Any) -> dict[str, Any]:
    """Do what the command line asks, speaking to `told`; the summary of --json."""
    workflow, changes = asked_for(chosen)
    limited = chosen.time_limit is None or chosen.time_limit > 0
    if not (0 <= chosen.retries <= 100 and 0 < chosen.timeout < 1e6 and limited):
        raise BadArguments("--retries wants 0 to 100, --timeout and --time-limit more than 0 seconds.")
    if chosen.output and chosen.output.exists() and not chosen.output.is_dir():
        raise BadArguments(f"--output {chosen.output} is a file; a folder, or a new name, was expected.")
    say = None if chosen.quiet else lambda text: print(text, file=told, flush=True)
    client = connected(chosen, say)
    for change in changes if say else ():
        say(change.text(workflow))
    if chosen.dry_run:
        print(json.dumps(workflow, indent=2, ensure_ascii=False))
        return {}
    check_fractions(client, workflow, changes)
    show = None if chosen.quiet else ProgressLine(stream=told)
    try:
        result = client.run(workflow, show, chosen.time_limit)
    except BaseException:
        if show:
            show.broken()
        raise
    if show:
        show.end()
    files = download(result, chosen.output, chosen.overwrite) if chosen.output else []
    for path in files if say else ():
        say(f"  {path}")
    return summary_of(result, files)


def asked_for(chosen: argparse.Namespace) -> tuple[Workflow, list[Change]]:
    """The workflow with its new values, and what was changed; BadArguments."""
    try:
        workflow = with_recipe(read_workflow(chosen.workflow), chosen.recipe)
        workflow = with_calibration(workflow, chosen.calibrate)
        changes = changes_for(workflow, chosen.settings)
    except WorkflowError as error:
        raise BadArguments(str(error)) from None
    except OSError as error:
        raise BadArguments(f"{chosen.workflow} can't be read: {error.strerror or error}.") from None
    return applied(workflow, changes), changes


def connected(chosen: argparse.Namespace, say: Any) -> ComfyClient:
    """A client of the server; BadArguments for an address or header that is none."""
    try:
        address = checked_address(chosen.server)
    except MedSteerError as error:
        raise BadArguments(f"--server: {error}") from None
    return ComfyClient(address, chosen.timeout, chosen.retries, headers_of(chosen.headers, os.environ), say)


def headers_of(texts: list[str], environment: Mapping[str, str]) -> dict[str, str]:
    """The headers of every request: those given, and the bearer token of the environment."""
    token = environment.get(TOKEN)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for text in texts:
        name, colon, value = text.partition(":")
        # The value stays unsaid: it may be a secret, and this message may end in a log.
        if not colon or not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name.strip()):
            raise BadArguments("--header wants 'NAME: VALUE', such as 'X-Api-Key: abc'.")
        headers[name.strip()] = value.strip()
    if not all(value.isascii() and value.isprintable() for value in headers.values()):
        raise BadArguments(f"A --header or {TOKEN} has a character that headers can't carry; plain ASCII was expected.")
    return headers


def check_fractions(client: ComfyClient, workflow: Workflow, changes: list[Change]) -> None:
    """BadArguments where a whole number was wanted; asks the server only where the file leaves it open."""
    try:
        refuse_fractions(workflow, changes, lambda name: client.object_info(name).get(name, {}))
    except OverrideError as error:
        raise BadArguments(str(error)) from None


def summary_of(result: Result, files: list[Path]) -> dict[str, Any]:
    """What --json prints about a run: `outputs` is the history's, node id -> kind -> list."""
    return {
        "prompt_id": result.prompt_id,
        "seconds": round(result.seconds, 3),
        "files": [str(path) for path in files],
        "outputs": result.outputs,
    }
