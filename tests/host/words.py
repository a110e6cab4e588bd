"""The pack's words: the English ones from the nodes' schemas, and which Chinese ones are older than their English.

`COMFYUI_PATH=... python tests/host/words.py` (from the checkout, in ComfyUI's Python) writes locales/en/nodeDefs.json.
`... words.py --reviewed` also records that everything in Chinese says what the English says now.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[2]
LOCALES, PAGES = CHECKOUT / "locales", CHECKOUT / "web" / "docs"
# What each Chinese text was translated from. Beside the locales it would be sent to every browser.
REVIEWED = CHECKOUT / "tests" / "fixtures" / "words" / "reviewed.json"
DYNAMIC_COMBO = "COMFY_DYNAMICCOMBO_V3"


def node_words(object_info: Mapping[str, Any]) -> dict[str, Any]:
    """What ComfyUI's `/object_info` says of MedSteer's nodes, in the form of the front end's nodeDefs.json."""
    return {
        name: {
            "display_name": info["display_name"],
            "description": info["description"],
            "inputs": _input_words(info),
            "outputs": {
                str(index): {"name": label, "tooltip": tooltip or ""}
                for index, (label, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True))
            },
        }
        for name, info in sorted(object_info.items())
        if name.startswith("MedSteer_")
    }


def _input_words(info: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for name, (kind, *options) in _inputs(info["input"]):
        facts = options[0] if options else {}
        found[name] = {"name": facts.get("display_name", name), "tooltip": facts.get("tooltip", "")}
        if kind == DYNAMIC_COMBO:
            found |= _nested_words(name, facts["options"])
    return found


def _nested_words(outer: str, options: list[Mapping[str, Any]]) -> dict[str, dict[str, str]]:
    """The inputs that a choice brings along: the front end writes the dot in their names as `_`, and has one text for
    an input that several choices bring along."""
    texts: dict[str, dict[str, list[str]]] = {}
    for option in options:
        for name, (_, facts) in _inputs(option["inputs"]):
            texts.setdefault(name, {}).setdefault(facts.get("tooltip", ""), []).append(option["key"])
    return {
        f"{outer}_{name}": {
            "name": name,
            "tooltip": next(iter(by_text))
            if len(by_text) == 1
            else "\n".join(f"{', '.join(keys)}: {text}" for text, keys in by_text.items()),
        }
        for name, by_text in texts.items()
    }


def _inputs(kinds: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for kind in ("required", "optional"):
        yield from kinds.get(kind, {}).items()


def flat(words: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested words as one dict of dotted paths."""
    found: dict[str, str] = {}
    for key, value in words.items():
        path = f"{prefix}{key}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def read_words(language: str, kind: str = "nodeDefs") -> dict[str, Any]:
    """The words in a locale's file."""
    return json.loads((LOCALES / language / f"{kind}.json").read_text(encoding="utf-8"))


def sources() -> dict[str, str]:
    """A short hash of every English text that has a Chinese one: words by path, help pages by file name."""
    texts = flat(read_words("en")) | {page.name: page.read_text(encoding="utf-8") for page in PAGES.glob("*.md")}
    return {path: hashlib.sha256(text.encode()).hexdigest()[:8] for path, text in sorted(texts.items())}


def reviewed() -> dict[str, str]:
    """Those hashes as they were when the Chinese was last held against the English."""
    return json.loads(REVIEWED.read_text(encoding="utf-8"))


def stale() -> list[str]:
    """Paths and pages whose English changed, came or went since."""
    now, then = sources(), reviewed()
    return sorted(path for path in {*now, *then} if now.get(path) != then.get(path))


def _write(path: Path, value: Any, indent: int = 2) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")


def main(arguments: list[str]) -> None:
    from medsteer_core.run.client import ComfyClient
    from medsteer_core.run.server import ComfyServer, comfyui_from_environment

    with ComfyServer(comfyui_from_environment(), CHECKOUT, cpu=True) as server:
        _write(LOCALES / "en" / "nodeDefs.json", node_words(ComfyClient(server.address).object_info()))
    if "--reviewed" in arguments:
        _write(REVIEWED, sources(), indent=0)
    print("\n".join(stale()) or "The Chinese is as new as the English.")


if __name__ == "__main__":
    sys.path.insert(0, str(CHECKOUT))
    main(sys.argv[1:])
