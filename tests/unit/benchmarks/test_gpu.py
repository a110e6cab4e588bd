"""`dev.py bench gpu`: each part in a process of its own, within its time, whatever becomes of the others."""

import argparse
import json
import os

import pytest

from benchmarks.speed import gpu


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Options, and a folder of modules that a part can be."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    writes = "import json, pathlib, sys\nfolder = pathlib.Path(sys.argv[sys.argv.index('--output') + 1])\n"
    writes += "folder.mkdir(parents=True, exist_ok=True)\n"
    writes += "(folder / 'good.json').write_text(json.dumps({'n': sys.argv[1]}))"
    (tmp_path / "a_good_part.py").write_text(writes)
    (tmp_path / "a_bad_part.py").write_text("print('why'); raise SystemExit(3)")
    (tmp_path / "a_slow_part.py").write_text("import time; print('begun', flush=True); time.sleep(60)")
    return argparse.Namespace(output=tmp_path / "out", cpu=True, small=True, minutes=0.5, only=None)


def test_parts_that_fail_or_take_too_long_leave_the_others_alone(chosen, monkeypatch):
    parts = [("slow", "a_slow_part", 0.05, [], []), ("bad", "a_bad_part", 0.2, [], []),
             ("good", "a_good_part", 0.75, ["7"], ["1"])]  # fmt: skip
    monkeypatch.setattr(gpu, "PARTS", tuple(parts))
    record, picture = gpu.run(chosen)
    assert picture is None and {name: part["status"] for name, part in record["parts"].items()} == {
        "slow": -1, "bad": 3, "good": 0,
    }  # fmt: skip
    assert record["parts"]["good"]["record"] == {"n": "1"} and record["parts"]["bad"]["record"] is None
    assert "begun" in record["parts"]["slow"]["said"] and "why" in record["parts"]["bad"]["said"]
    assert "slow       out of time" in gpu.table(record) and json.dumps(record)
    assert "-1" not in gpu.table(record)


def test_without_a_gpu_it_says_how_to_try(chosen, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 1
    assert "--cpu --small" in capsys.readouterr().err


def test_the_parts_share_the_whole_time():
    assert sum(part[2] for part in gpu.PARTS) == pytest.approx(1.0)
