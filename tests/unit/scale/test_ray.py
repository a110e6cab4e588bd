"""A plan on a real Ray of this machine, with workers that need no ComfyUI."""

import os
import signal
import sys
import time

import pytest

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.errors import MedSteerError
from medsteer_core.scale.driver import Driver
from medsteer_core.scale.plan import Limits, Plan
from medsteer_core.scale.pool import RayPool
from medsteer_core.scale.tasks import Tasks
from medsteer_core.scale.worker import DONE, FAULT, Outcome, Settings, mark

WORKFLOW = {
    "8": {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"seed": 1, "strengths": "1"}},
    "9": {"class_type": "MedSteer_SaveCounterfactualPairs", "inputs": {"record": ["8", 5], "folder": "x"}},
}


class Napper:
    """Naps for every task; dies without a word at seed 5, once; fails at seed 9, always."""

    def __init__(self, settings):
        self.dataset = PairDataset(settings.output)

    def whoami(self):
        return {"pid": os.getpid()}

    def close(self):
        pass

    def run(self, task):
        died = self.dataset.store.exists("tasks/died")
        if task.seed == 5 and not died:
            self.dataset.store.write_whole("tasks/died", b"once")
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        if task.seed == 9:
            return Outcome(FAULT, "no such site")
        mark(self.dataset, task, ("0" * 16,))
        return Outcome(DONE, new=task.pairs, seconds={"all": 0.02})


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_a_killed_worker_is_replaced_and_a_failing_task_set_aside(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    from ray import cloudpickle

    # Ray's workers can't import a test module, so they get the class itself.
    monkeypatch.setattr(Napper, "__module__", "__main__")
    assert cloudpickle.dumps(Napper)
    plan = Plan(WORKFLOW, str(tmp_path), range(1, 13), limits=Limits(retries=1))
    said = []
    with RayPool(Settings(str(tmp_path)), workers=2, kind=Napper) as pool:
        progress = Driver(Tasks(plan), PairDataset(tmp_path), pool, say=said.append, index=False).run()
    assert (progress.done, progress.poison, progress.lost) == (11, 1, 1)
    assert len(list((tmp_path / "failed").iterdir())) == 1
    assert sum(path.suffix == ".json" for path in (tmp_path / "tasks").iterdir()) == 11
    assert any("was lost" in line for line in said)


def test_without_ray_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MedSteerError, match=r'ray is not installed.*pip install "comfyui-medsteer\[scale\]"'):
        RayPool(Settings(str(tmp_path))).__enter__()
