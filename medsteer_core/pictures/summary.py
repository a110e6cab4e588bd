"""A pathology vector in a few lines of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..extraction.sample_estimators import ESTIMATORS
from ..extraction.sample_report import describe_separability
from ..vectors.class_gap import gaps_in_spreads
from ..vectors.combined_facts import describe_combined, is_combined
from ..vectors.pathology_vector import PathologyVector
from ..vectors.reference_vectors import describe_imported, is_imported


def describe(vector: PathologyVector) -> str:
    """A vector in the words of how it came about: extracted, imported or combined, also after it was saved."""
    if is_imported(vector):
        return describe_imported(vector)
    return describe_combined(vector) if is_combined(vector) else _describe_extracted(vector)


def _describe_extracted(vector: PathologyVector) -> str:
    """Prompts, samples, schedule and sites of a vector, where its class gap is largest, how it fares at new samples."""
    facts = vector.provenance
    texts = {k: v.get("text") for k, v in facts.get("prompts", {}).items() if isinstance(v, dict)}
    pair = f"{texts.get('present') or 'present'} - {texts.get('absent') or 'absent'}"
    sizes = sorted({vector.channels(name) for name in vector.site_names})
    same_state = facts.get("noise") == "same state"
    noise = f"{facts.get('samples', '?')} {facts.get('noise', '')} samples{'' if same_state else ' a prompt'}"
    lines = [
        f"{pair}  [{vector.short_hash()}]",
        f"{noise}, seed {facts.get('seed', '?')}, "
        f"{facts.get('sampler', '?')}/{facts.get('scheduler', '')}, {vector.steps} levels, cfg {facts.get('cfg', '?')}",
        f"{len(vector.site_names)} sites of {', '.join(map(str, sizes))} channels, rank {vector.rank}",
        _largest_gap(vector),
    ]
    if facts.get("estimator") in ESTIMATORS and facts["estimator"] != "mean_difference":
        lines.append(f"estimator: {facts['estimator'].replace('_', ' ')}")
    if contexts := _contexts(facts):
        lines.append(f"{contexts} contexts of the prompts, in turns")
    lines += describe_separability(vector)
    if facts.get("explained") is not None:
        lines.append(
            f"affine: {facts['explained']:.0%} of the difference predicted at unseen images, "
            f"from {facts.get('token_pairs', '?')} token pairs a site and level"
        )
    if facts.get("degenerate"):
        lines.append(f"Warning: {facts['degenerate']} site-steps show no difference between the prompts.")
    return "\n".join(lines)


def _largest_gap(vector: PathologyVector) -> str:
    gaps, why = gaps_in_spreads(vector)
    means = {name: float(levels.mean()) for name, levels in gaps.items()}
    if not means:
        return f"class gap: no number, since {why.removesuffix(' there')}"
    best = max(means, key=means.__getitem__)
    left = f" ({len(vector.sites) - len(means)} sites left out: {why})" if why else ""
    return f"largest class gap: {means[best]:.1f} x the spread within a class, at {best}{left}"


def _contexts(facts: Mapping[str, Any]) -> int:
    """How many contexts the prompts came in; 0 where there were none."""
    prompts = facts.get("prompts", {}).values()
    return max((len(p["contexts"]) for p in prompts if isinstance(p, dict) and "contexts" in p), default=0)
