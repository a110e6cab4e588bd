"""The operators benchmark's record as text: a table for each pair, the ranking, the lock, and what was left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks.evidence._operators_numbers import WITHIN
from benchmarks.shared.command import aligned, with_interval


def table(record: Mapping[str, Any]) -> str:
    """All of it; intervals at 95%."""
    settings, (first, last) = record["settings"], record["seeds"][record["seeds"]["used"]]
    seeds = f"{record['seeds']['used']} seeds {first} to {last}"
    title = f"\nn = {settings['n']}, {seeds}, {settings['steps']} steps, cfg {settings['cfg']:g}; "
    text = [f"{title}each at its best strength for the kind of pair, all strengths in the JSON"]
    for pair in record["pairs"]:
        text += ["", pair, *aligned(pair_lines(record, pair))]
    text += ["", "all pairs, best first", *aligned(ranking_lines(record))]
    if record["best"]["lock"]:
        text += ["", lock_title(record), *aligned(lock_lines(record["best"]["lock"])), lock_verdict(record)]
    clean = record["clean"]
    text += [
        "",
        f"clean: flipped, and SSIM outside at least {clean['ssim_outside_at_least']:g} (diffuse findings: anatomy "
        f"drift at most {clean['anatomy_drift_at_most']:g}), of accepted factuals",
        f"switch: from source minus {settings['switch_against']} to target minus {settings['switch_against']}",
        *(f"left out: {what}: {why}" for what, why in record["left_out"].items()),
        f"largest difference from mean difference, paired: {largest_differences(record)}",
    ]
    return "\n".join(text)


def pair_lines(record: Mapping[str, Any], pair: str) -> list[tuple[str, ...]]:
    """A pair's rows, each operator and estimator at its best strength, in the order of the ranking."""
    lines = [("operator", "estimator", "strength", "accepted", "flip [95%]", "clean flips [95%]", "SSIM outside",
              "drift")]  # fmt: skip
    for entry in record["ranking"]:
        for row in record["rows"]:
            same = (row["operator"], row["estimator"]) == (entry["operator"], entry["estimator"])
            if same and row["pair"] == pair and row["strength"] == entry["strengths"][row["kind"]]:
                kept = [_number(row[key]) for key in ("ssim_outside", "anatomy_drift")]
                rates = [with_interval(row[key], row[f"{key}_ci"]) for key in ("flip", "clean_flip")]
                accepted = f"{row['accepted']} of {row['n']}"
                lines.append((row["operator"], row["estimator"], f"{row['strength']:g}", accepted, *rates, *kept))
    return lines


def ranking_lines(record: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Means over pairs, and the strengths that were best for each kind."""
    kinds = list(record["ranking"][0]["strengths"])
    lines = [("operator", "estimator", *(f"strength, {kind}" for kind in kinds), "clean flips", "flips",
              "SSIM outside, focal", "drift, diffuse")]  # fmt: skip
    for entry in record["ranking"]:
        means = (entry[key] for key in ("clean_flip", "flip", "ssim_outside_focal", "anatomy_drift_diffuse"))
        swept = (f"{entry['strengths'][kind]:g}" for kind in kinds)
        lines.append((entry["operator"], entry["estimator"], *swept, *map(_number, means)))
    return lines


def lock_title(record: Mapping[str, Any]) -> str:
    best = record["best"]
    return (f"the best row ({best['operator']}, {best['estimator']}, strength {best['lock']['strength']:g}) with the "
            f"lock '{best['lock']['lock']}' and without, focal removals")  # fmt: skip


def lock_lines(lock: Mapping[str, Any]) -> list[tuple[str, ...]]:
    lines = [("pair", "flip with [95%]", "flip without [95%]", "difference, points [95%]", "SSIM outside with",
              "without")]  # fmt: skip
    for name, row in lock["pairs"].items():
        rates = [with_interval(row[side]["flip"], row[side]["flip_ci"]) for side in ("with", "without")]
        kept = [_number(row[side]["ssim_outside"]) for side in ("with", "without")]
        lines.append((name, *rates, points(row["difference"]), *kept))
    return [*lines, ("all of them", "", "", points(lock["difference"]), "", "")]


def lock_verdict(record: Mapping[str, Any]) -> str:
    return f"with the lock flips are {verdict(record['best']['lock']['difference'])} of those without"


def points(difference: Mapping[str, Any]) -> str:
    """A difference of rates in points, with its interval."""
    if difference["difference"] is None:
        return "-"
    low, high = difference["interval"]
    return f"{100 * difference['difference']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def verdict(difference: Mapping[str, Any]) -> str:
    """What is known of a difference that should be within `WITHIN`."""
    if difference["within"] is None:
        return "not known to be within anything"
    reach = f"within {100 * WITHIN:g} points" if difference["within"] else f"MORE than {100 * WITHIN:g} points off"
    sure = "its whole interval is" if difference["surely_within"] else "its interval reaches further"
    return f"{reach} ({points(difference)}{': ' + sure if difference['within'] else ''})"


def largest_differences(record: Mapping[str, Any]) -> str:
    found = record["same_direction"]
    names = next(iter(found.values()))
    return ", ".join(f"{name} {max(of_pair[name] for of_pair in found.values()):.1g}" for name in names)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
