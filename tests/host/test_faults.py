"""The short form of `python dev.py bench faults`: one process of each kind is killed, nothing is lost."""

import random

from benchmarks.trust.faults import COMFYUI, DRIVER, WORKER, Trial, compared, harm

SEEDS, CHUNK = 6, 4
PAIRS = SEEDS * CHUNK
NOTHING = {"duplicates": 0, "differing": 0, "missing": 0, "left_over": 0, "unreadable": 0}


def test_pairs_are_all_there_once_and_the_same_after_three_kills(tmp_path):
    extra = ("--workers", "2", "--cpu")
    whole = Trial(tmp_path, "undisturbed", SEEDS, extra, CHUNK)
    whole.finish()
    harmed = Trial(tmp_path, "harmed", SEEDS, extra, CHUNK)
    kills = [(0, 0.0, COMFYUI), (CHUNK, 0.0, WORKER), (2 * CHUNK, 0.0, DRIVER)]
    done = harm(harmed, kills, random.Random(1))
    found = compared(whole.output, harmed.output, PAIRS)
    assert [kill["what"] for kill in done] == [COMFYUI, WORKER, DRIVER]
    assert harmed.starts == 2
    assert found == {**NOTHING, "pairs": PAIRS, "expected": PAIRS, "files": found["files"]}
    assert found["files"] > 3 * PAIRS

    # What the comparison must see, one of each.
    changed, broken, lost = sorted(harmed.output.rglob("*.png"))[:3]
    changed.write_bytes(changed.read_bytes() + b"0")
    broken.write_bytes(broken.read_bytes()[:60])
    lost.unlink()
    (harmed.output / "stray.txt").write_text("")
    index = next(harmed.output.glob("*/metadata.jsonl"))
    lines = index.read_text().splitlines(keepends=True)
    index.write_text("".join([*lines, lines[0]]))
    damage = {"duplicates": 1, "differing": 3, "missing": 1, "left_over": 1, "unreadable": 1}
    assert compared(whole.output, harmed.output, PAIRS) == {**found, **damage}
