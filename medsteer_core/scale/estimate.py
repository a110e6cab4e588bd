"""A plan's cost before it runs, and where it stands while it does, as text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..dataset.pair_dataset import PairDataset
from .tasks import Tasks

if TYPE_CHECKING:
    from .driver import Progress

# Bytes of one image file without its pixels (workflow, record, XMP), of a record, and of a pixel: EndoPhantom's and
# photographs' PNGs have 1.3 to 1.8 bytes a pixel.
TEXTS, RECORD, PIXEL = 6_000, 5_000, 1.6


def cost(tasks: Tasks, dataset: PairDataset, workers: int, seconds_per_pair: float | None) -> str:
    """What a plan makes and takes: pairs, tasks, images, bytes, and the time where a pair's seconds are given."""
    plan = tasks.plan
    per_group = [tasks[group * plan.innermost] for group in range(min(plan.groups, 1000))]
    share = plan.groups / len(per_group) * plan.innermost
    pairs = round(sum(task.pairs for task in per_group) * share)
    drawn = sum((0 if plan.images else task.images) + task.pairs for task in per_group)
    sampled = round(drawn * share)
    finished = {name.rsplit("/", 1)[-1].removesuffix(".json") for name in dataset.store.list("tasks")}
    done = sum(tasks.id_of(number) in finished for number in range(len(tasks))) if finished else 0
    left = pairs * (len(tasks) - done) / len(tasks)
    pixels = max((_pixels(task.workflow) for task in per_group), default=0)
    lines = [
        ("workflow", f"{len(plan.workflow)} nodes, {plan.groups} variants"),
        ("real images", f"{len(plan.images):,}")
        if plan.images
        else ("seeds", f"{len(plan.seeds):,} x {per_group[0].images} images"),
        ("tasks", f"{len(tasks):,}" + (f", {done:,} of them done" if done else "")),
        ("pairs", f"{pairs:,}"),
        ("images sampled", f"{sampled:,} ({pairs:,} counterfactual)"),
        ("output", dataset.root),
    ]
    if pixels:
        size = pairs * (2 * (TEXTS + pixels * PIXEL) + RECORD)
        lines.append(("disk, about", amount(size)))
    if seconds_per_pair:
        hours = f"{duration(left * seconds_per_pair / workers)} with {workers} workers at {seconds_per_pair:g} s a pair"
        lines.append(("time, about", hours))
    else:
        lines.append(("time", "give --seconds-per-pair, as a short run of yours shows it"))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"  {name:<{width}}  {value}" for name, value in lines)


def _pixels(workflow) -> int:
    """Pixels of one image, when the workflow says its size; else 0."""
    for node in workflow.values():
        size = [node["inputs"].get(side) for side in ("width", "height")]
        if "batch_size" in node["inputs"] and all(isinstance(side, int) for side in size):
            return size[0] * size[1]
    return 0


def progress_line(progress: Progress) -> str:
    """One line: tasks, pairs a minute, the time left, workers, and what went wrong."""
    elapsed = max(progress.elapsed, 1e-9)
    left = progress.tasks - progress.over
    rest = duration(left * elapsed / progress.done) if progress.done else "unknown"
    parts = [
        f"{progress.over}/{progress.tasks} tasks",
        f"{60 * progress.pairs / elapsed:.1f} pairs/min",
        f"{rest} left" if left else f"{duration(elapsed)} taken",
        f"workers {progress.ready}/{progress.workers}",
        f"retries {progress.retries}",
        f"set aside {progress.aside + progress.poison}",
    ]
    return "  ".join([*parts, f"lost workers {progress.lost}"] if progress.lost else parts)


def summary(progress: Progress, output: str) -> str:
    """The run in two lines."""
    new = f"{progress.pairs} new pairs in {duration(progress.took)}; {output} is complete"
    aside = progress.aside + progress.poison
    if aside:
        return f"{new} but for {aside} tasks in {output}/failed; --retry-failed tries them again"
    return new


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    for size, name, most in ((86400.0, "days", 2), (3600.0, "h", 2), (60.0, "min", 2)):
        if seconds >= most * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"


def amount(size: float) -> str:
    """Bytes as a person says them."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
