"""The demo: one counterfactual pair from the example workflow, run in a real ComfyUI, judged and reported.

`python dev.py demo` runs it as `python -m medsteer_core.run.demo` with COMFYUI_PATH set. The workflow has three
SaveImage nodes titled Factual, Counterfactual and Difference; everything else about it is free.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import MedSteerError
from ..files.whole_file import write_whole
from .client import ComfyClient, Result
from .overrides import read_workflow, with_seed
from .progress_line import ProgressLine
from .server import ComfyServer, ServerError, comfyui_from_environment
from .workflow import Workflow, WorkflowError, node_title

ROOT = Path(__file__).resolve().parents[2]
WORKFLOW = ROOT / "example_workflows" / "api" / "counterfactual_pair.json"
IMAGES = {"factual": "Factual", "counterfactual": "Counterfactual", "difference": "Difference"}


def main(words: list[str]) -> int:
    options = argparse.ArgumentParser(prog="dev.py demo", description="Make a counterfactual pair in output/demo.")
    options.add_argument("--workflow", type=Path, default=WORKFLOW, help="another workflow in API format")
    options.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="another folder for the results")
    options.add_argument("--seed", type=int, help="another seed for the sampled images")
    options.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    chosen = options.parse_args(words)
    try:
        workflow = with_seed(read_workflow(chosen.workflow), chosen.seed)
        report = run_demo(workflow, chosen.output, cpu=True if chosen.cpu else None)
    except (ServerError, WorkflowError, MedSteerError, OSError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130  # the server is gone; dev.py says that it stopped
    print(table(report))
    print(f"\n{verdict(report['scores'])}")
    files = [*(f"{image}.png" for image in (*IMAGES, "pair")), "report.json"]
    print("\n".join(f"  {chosen.output / name}" for name in files))
    return 0


def run_demo(workflow: Workflow, output: Path, cpu: bool | None) -> dict[str, Any]:
    """Run the workflow in a server of its own, write the images and report.json to `output`; the report."""
    begun = time.monotonic()
    print("starting ComfyUI ...", end="", flush=True)
    with ComfyServer(comfyui_from_environment(), ROOT, cpu=cpu) as server:
        print(f" on the {server.device}, {server.seconds_to_start:.1f} s", flush=True)
        client = ComfyClient(server.address)
        show = ProgressLine()
        result = client.run(workflow, show)
        show.end()
        try:
            images = {name: result.images(title)[0] for name, title in IMAGES.items()}
        except KeyError as error:
            raise WorkflowError(error.args[0]) from None
        stats, device = client.system_stats()["system"], server.device
    seconds = {"server_start": server.seconds_to_start, "workflow": result.seconds, "nodes": dict(result.node_seconds)}
    scored = time.monotonic()
    first, second = (pixels(images[name]) for name in ("factual", "counterfactual"))
    scores = judge(first, second, workflow)
    images["pair"] = strip(first, second)
    seconds |= {"scoring": time.monotonic() - scored, "total": time.monotonic() - begun}
    report = {
        **workflow_facts(workflow),
        "scores": scores,
        "compare": compare_metrics(result),
        "seconds": rounded(seconds),
        "device": device,
        "versions": versions(stats),
        "notice": "Synthetic images for research. Not for diagnosis.",
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, data in images.items():
        write_whole(output / f"{name}.png", data)
    write_whole(output / "report.json", json.dumps(report, indent=2, ensure_ascii=False).encode())
    return report


def workflow_facts(workflow: Workflow) -> dict[str, Any]:
    """What the workflow asks for, read from its nodes: prompts by node title, seed, operator and its parameters."""

    def inputs(part: str) -> list[tuple[str, Mapping[str, Any]]]:
        return [(node_title(workflow, i), n["inputs"]) for i, n in workflow.items() if part in n["class_type"]]

    steer = next((values for _, values in inputs("MedSteer_Steer")), {})
    sampler = next((values for _, values in inputs("Sampler")), {})
    extract = next((values for _, values in inputs("MedSteer_Extract")), {})
    plain = {name: value for name, value in steer.items() if not isinstance(value, list)}
    return {
        "prompts": {title: values["text"] for title, values in inputs("CLIPTextEncode")},
        "seed": sampler.get("seed"),
        "sampling": {name: sampler.get(name) for name in ("steps", "cfg", "sampler_name", "scheduler")},
        "operator": steer.get("operator"),
        "strength": steer.get("operator.strength"),
        "steering": plain,
        "extraction": {name: value for name, value in extract.items() if not isinstance(value, list)},
    }


def pixels(data: bytes) -> Any:
    """An image file as a tensor ``(3, H, W)`` in 0..1."""
    import numpy
    import torch
    from PIL import Image

    values = numpy.array(Image.open(io.BytesIO(data)).convert("RGB"))
    return torch.from_numpy(values).permute(2, 0, 1).float() / 255


def judge(factual: Any, counterfactual: Any, workflow: Workflow) -> dict[str, Any]:
    """The pair's scores by the one scorer, between the classes that the extraction's two prompts name."""
    from ..scores.scorer import class_of, score_pair

    source, target = (class_of(extraction_prompt(workflow, role)) for role in ("present", "absent"))
    return score_pair(factual, counterfactual, source, target).to_dict()


def strip(factual: Any, counterfactual: Any) -> bytes:
    """Factual, counterfactual and difference in one captioned PNG."""
    from ..pictures.difference import pair_strip, png

    return png(pair_strip(factual, counterfactual))


def extraction_prompt(workflow: Workflow, role: str) -> str:
    """The text that is linked to `present` or `absent` of the workflow's extraction node."""
    extract = next((n for n in workflow.values() if n["class_type"] == "MedSteer_ExtractPathologyVector"), None)
    link = extract["inputs"].get(role) if extract else None
    text = workflow.get(link[0], {}).get("inputs", {}).get("text") if isinstance(link, list) else None
    if not isinstance(text, str):
        raise WorkflowError(f"The workflow has no prompt at '{role}' of Extract Pathology Vector; scores need it.")
    return text


def compare_metrics(result: Result) -> Any:
    """The metrics that the graph's own compare node showed; None when the workflow has no such node."""
    try:
        return json.loads(result.output("MedSteer_CounterfactualCompare")["text"][0])
    except KeyError:
        return None


def versions(stats: Mapping[str, Any]) -> dict[str, str]:
    """The versions that made the pair."""
    project = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    return {
        "medsteer": project.group(1) if project else "unknown",
        "comfyui": stats.get("comfyui_version", "unknown"),
        "torch": stats.get("pytorch_version", "unknown"),
        "python": platform.python_version(),
        "platform": platform.platform(),
    }


def rounded(value: Any) -> Any:
    """Seconds to the millisecond, through nested dicts."""
    return {name: rounded(part) for name, part in value.items()} if isinstance(value, dict) else round(value, 3)


def table(report: Mapping[str, Any]) -> str:
    """The report's numbers as aligned lines, nested names joined by a dot; parts that took no time are left out."""

    def lines(value: Any, name: str) -> list[tuple[str, str]]:
        if isinstance(value, dict):
            return [line for key, part in value.items() for line in lines(part, f"{name}.{key}" if name else str(key))]
        return [(name, cell(value))]

    seconds = {**report["seconds"]}
    seconds["nodes"] = {title: spent for title, spent in seconds["nodes"].items() if spent >= 0.1}
    shown = {name: report[name] for name in ("prompts", "seed", "operator", "strength", "scores")}
    # one number for each factor of the anatomy is for report.json; their mean stands here
    shown["scores"] = {name: value for name, value in report["scores"].items() if name != "anatomy_drifts"}
    shown["seconds"] = seconds
    rows = lines(shown, "")
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"  {name:<{width}}  {value}".rstrip() for name, value in rows)


def cell(value: Any) -> str:
    """One value as text; two numbers are before and after."""
    if isinstance(value, (list, tuple)):
        if all(isinstance(item, str) for item in value):
            return ", ".join(value) or "none"
        return " -> ".join(map(cell, value))
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def verdict(scores: Mapping[str, Any]) -> str:
    """One sentence on whether the pair counts as flipped, and if not, what it misses."""
    seen = f"{scores['factual_label']} before, {scores['counterfactual_label']} after"
    if scores["accepted"] and scores["flipped"]:
        return f"The judge sees {seen}: the pair is flipped."
    if scores["accepted"]:
        missed = f"the pair is not flipped ({', '.join(scores['misses'])})"
    elif scores["factual_label"] != scores["source"]:
        missed = f"the factual image is not of {scores['source']}"
    else:
        missed = "the factual image is unlike any render"
    return f"WARNING: the judge sees {seen}: {missed}. Try another --seed."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
