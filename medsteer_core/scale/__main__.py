"""Make a plan's pairs on one machine or on many: `python -m medsteer_core.scale plan.yaml`. See docs/scale.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from ..dataset.pair_dataset import PairDataset
from ..errors import MedSteerError
from ..run.server import ServerError, checked_comfyui, comfyui_from_environment, signals_as_interrupt
from ..run.workflow import WorkflowError
from .driver import Driver, Progress
from .estimate import cost, progress_line, summary
from .plan import read_plan
from .pool import RayPool
from .tasks import Tasks
from .worker import Settings

DONE, FAILED, ASIDE, INTERRUPTED = 0, 1, 3, 130
STATUSES = """\
exit status:
  0    every pair of the plan is in the output
  1    the plan is wrong, or the run could not go on; what was made stays, the same command goes on
  2    wrong arguments
  3    done, but some tasks failed again and again: each is in failed/ of the output with its error
  130  interrupted; the same command goes on
"""


def main(words: list[str]) -> int:
    """Run the command with these arguments; its exit status, as `STATUSES` has it."""
    chosen = parser().parse_args(words)
    try:
        with signals_as_interrupt():
            return run(chosen)
    except (MedSteerError, ServerError, WorkflowError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("\nstopped; what was made is whole, and the same command goes on", file=sys.stderr)
        return INTERRUPTED


def parser() -> argparse.ArgumentParser:
    """The command line."""
    options = argparse.ArgumentParser(
        prog="python -m medsteer_core.scale",
        description=__doc__,
        epilog=STATUSES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    say = options.add_argument
    say("plan", type=Path, help="the plan, a YAML file")
    say("--address", metavar="ADDRESS", help="a Ray cluster: auto, or ray://HOST:10001 (default: this machine alone)")
    say("--workers", type=_count, metavar="N", help="default: one for each GPU that Ray has, else one on the CPU")
    say("--server", action="append", default=[], metavar="URL", dest="servers",
        help="attach to a ComfyUI that runs there instead of starting one. Again for each worker")  # fmt: skip
    say("--comfyui", metavar="DIR", help="ComfyUI's folder on the workers' machines (default: their COMFYUI_PATH)")
    say("--cpu", action="store_true", help="use no GPU")
    say(
        "--extra", action="append", default=[], metavar="WORD", help="a word for ComfyUI's command line, --extra=--WORD"
    )
    say("--output", metavar="PATH", help="another output than the plan's")
    say("--dry-run", action="store_true", help="make nothing; print what the plan is and what it costs")
    say("--seconds-per-pair", type=float, metavar="S", help="for --dry-run, as measured on your machine")
    say("--retry-failed", action="store_true", help="try the tasks in failed/ again")
    say("--stats", type=Path, metavar="FILE", help="write what the run took to a JSON file")
    return options


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= 10_000:
        raise argparse.ArgumentTypeError("1 to 10000 was expected")
    return number


def run(chosen: argparse.Namespace) -> int:
    """Do what the command line asks; the exit status."""
    plan = read_plan(chosen.plan)
    tasks = Tasks(plan)
    output = chosen.output or plan.output
    if ".." in Path(output).parts:
        raise MedSteerError(f"--output {output}: a path without '..' was expected.")
    dataset = PairDataset(output)
    workers = chosen.workers or len(chosen.servers) or None
    if chosen.dry_run:
        print(cost(tasks, dataset, workers or 1, chosen.seconds_per_pair))
        return DONE
    if not (chosen.servers or chosen.address):  # said now, and not by every worker
        checked_comfyui(Path(chosen.comfyui)) if chosen.comfyui else comfyui_from_environment()
    probe(dataset)
    # A relative path means another folder in every worker's process.
    where = output if "://" in output else str(Path(output).resolve())
    settings = Settings(where, chosen.comfyui, None, True if chosen.cpu else None, tuple(chosen.extra),
                        plan.limits.timeout, plan.limits.start)  # fmt: skip
    line = Line()
    with RayPool(settings, chosen.address, workers, chosen.servers) as pool:
        driver = Driver(tasks, dataset, pool, line, line.say, chosen.retry_failed)
        line(driver.progress)
        progress = driver.run()
        line.end(progress)
    print(summary(progress, output))
    if chosen.stats:
        chosen.stats.write_text(json.dumps(stats(progress), indent=1), encoding="utf-8")
    return ASIDE if progress.poison or progress.aside else DONE


def probe(dataset: PairDataset) -> None:
    """MedSteerError when nothing can be written to the output: before workers start, not after their first hour."""
    name = "tasks/.probe"
    try:
        dataset.store.write_whole(name, b"")
        dataset.store.remove(name)
    except OSError as error:
        why = error.strerror or error
        raise MedSteerError(f"{dataset.root} can't be written to: {why}. Take another output, or free it.") from error


def stats(progress: Progress) -> dict[str, Any]:
    """What a run took, for benchmarks: seconds by part summed over workers, each worker's busy seconds."""
    names = ("tasks", "found", "aside", "workers", "done", "pairs", "retries", "poison", "lost", "starts")
    numbers = {name: getattr(progress, name) for name in names}
    return {**numbers, "elapsed": progress.took, "working": progress.working, "seconds": dict(progress.seconds),
            "busy": {str(number): seconds for number, seconds in sorted(progress.busy.items())}}  # fmt: skip


class Line:
    """The progress line: it moves on a terminal, elsewhere a new one comes every half minute."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        self._told = -1e9

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._told >= (1.0 if self.terminal else 30.0):
            self._told = time.monotonic()
            text = progress_line(progress)
            print(f"\r{text:<110}" if self.terminal else text, end="" if self.terminal else "\n", flush=True)

    def say(self, text: str) -> None:
        """Something happened: a line of its own."""
        lines = [line for line in str(text).splitlines() if line.strip()]
        cut = lines if len(lines) <= 5 else [lines[0], "  ...", *lines[-3:]]
        print(("\r" if self.terminal else "") + "\n".join(line[:300] for line in cut), flush=True)

    def end(self, progress: Progress) -> None:
        self._told = -1e9
        self(progress)
        if self.terminal:
            print()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
