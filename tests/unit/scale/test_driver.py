"""Who gets which task, and what becomes of those that go wrong; with workers of this process, without Ray."""

import json
import os
from collections import deque

import pytest

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.errors import MedSteerError
from medsteer_core.scale.__main__ import main, probe
from medsteer_core.scale.driver import Driver, RunFailed
from medsteer_core.scale.estimate import cost, progress_line
from medsteer_core.scale.ledger import AGAIN, POISON, Ledger
from medsteer_core.scale.plan import Limits, Plan
from medsteer_core.scale.pool import WorkerLost
from medsteer_core.scale.tasks import Tasks
from medsteer_core.scale.worker import CRASH, DONE, FAULT, OUTPUT, START, Outcome, mark

WORKFLOW = {
    "8": {"class_type": "MedSteer_CounterfactualSampler", "inputs": {"seed": 1, "strengths": "1"}},
    "9": {"class_type": "MedSteer_SaveCounterfactualPairs", "inputs": {"record": ["8", 5], "folder": "x"}},
}
LOST = "lost"


class Pool:
    """Workers that answer at once, with what `answers` says for the task's seed: a kind, or a list of them in turn."""

    def __init__(self, dataset, answers=None, workers=2):
        self.dataset, self.answers, self.workers = dataset, answers or {}, workers
        self.given, self.made, self.ended = [], 0, []
        self._ready, self._references = deque(), {}

    def start(self):
        self.made += 1
        return self.made

    def ready(self, worker):
        return self._later(("ready", worker, None))

    def submit(self, worker, task):
        self.given.append((worker, task.seed))
        return self._later(("task", worker, task))

    def _later(self, what):
        number = len(self._references)
        self._references[number] = what
        self._ready.append(number)
        return number

    def wait(self, references, seconds):
        return [self._ready.popleft()] if self._ready else []

    def result(self, reference):
        what, _, task = self._references[reference]
        if what == "ready":
            return {}
        answer = self.answers.get(task.seed, DONE)
        kind = (answer.pop(0) if answer else DONE) if isinstance(answer, list) else answer
        if kind == LOST:
            raise WorkerLost("it was killed")
        if kind == DONE:
            mark(self.dataset, task, ("0" * 16,))
        return Outcome(kind, "" if kind == DONE else f"{kind} of {task.seed}", new=int(kind == DONE))

    def end(self, worker, grace=0.0):
        self.ended.append(worker)


def run(folder, answers=None, seeds=range(1, 7), workers=2, **options):
    dataset, said = PairDataset(folder), []
    pool = Pool(dataset, answers, workers)
    tasks = Tasks(Plan(WORKFLOW, str(folder), seeds, limits=Limits(retries=2, crashes=3)))
    driver = Driver(tasks, dataset, pool, say=said.append, **options)
    return driver.run(), pool, said


def test_every_task_is_done_once(tmp_path):
    progress, pool, _ = run(tmp_path)
    assert sorted(seed for _, seed in pool.given) == [1, 2, 3, 4, 5, 6]
    assert (progress.done, progress.pairs, progress.over) == (6, 6, 6)
    assert {worker for worker, _ in pool.given} == {1, 2} == set(pool.ended)


def test_finished_tasks_are_not_redone(tmp_path):
    run(tmp_path, seeds=[2, 4])
    progress, pool, _ = run(tmp_path)
    assert sorted(seed for _, seed in pool.given) == [1, 3, 5, 6]
    assert (progress.found, progress.done, progress.over) == (2, 4, 6)
    again, pool, _ = run(tmp_path)
    assert pool.made == 0 and again.over == 6  # no worker is started for nothing


def test_a_task_that_fails_in_its_node_again_and_again_is_set_aside_with_its_error(tmp_path):
    progress, pool, _ = run(tmp_path, {3: FAULT})
    assert [seed for _, seed in pool.given].count(3) == 1 + 2
    assert (progress.done, progress.poison, progress.retries) == (5, 1, 2)
    (path,) = (tmp_path / "failed").iterdir()
    told = json.loads(path.read_text())
    assert told["error"] == "fault of 3" and told["seed"] == 3 and told["workflow"]["8"]["inputs"]["seed"] == 3
    progress, pool, _ = run(tmp_path)
    assert pool.given == [] and progress.aside == 1
    progress, pool, _ = run(tmp_path, retry_failed=True)
    assert [seed for _, seed in pool.given] == [3] and progress.done == 1


def test_a_lost_worker_is_replaced_and_its_task_done_by_another(tmp_path):
    progress, pool, said = run(tmp_path, {2: [LOST], 5: [LOST]})
    assert (progress.done, progress.lost, progress.poison, pool.made) == (6, 2, 0, 4)
    assert [seed for _, seed in pool.given].count(2) == 2
    assert any("was lost (it was killed); a new one takes its place" in line for line in said)


def test_a_task_that_kills_every_worker_is_set_aside_too(tmp_path):
    progress, pool, _ = run(tmp_path, {1: LOST})
    assert [seed for _, seed in pool.given].count(1) == 1 + 3
    assert (progress.done, progress.poison) == (5, 1)
    assert "lost again and again" in next((tmp_path / "failed").iterdir()).read_text()


def test_crashes_count_apart_from_a_tasks_own_faults(tmp_path):
    progress, _, _ = run(tmp_path, {4: [CRASH, FAULT, CRASH, FAULT, CRASH]})
    assert (progress.done, progress.poison, progress.retries) == (6, 0, 5)


def test_comfyui_that_never_starts_ends_the_run_and_sets_nothing_aside(tmp_path):
    with pytest.raises(RunFailed, match="No worker is left"):
        run(tmp_path, dict.fromkeys(range(1, 7), START))
    assert not (tmp_path / "failed").exists()


def test_a_worker_that_can_not_begin_is_let_go_and_the_others_go_on(tmp_path):
    answers = {seed: [START] for seed in (1, 3)}
    progress, _, _ = run(tmp_path, answers)
    assert (progress.done, progress.poison) == (6, 0)


def test_an_output_that_can_not_be_written_ends_the_run_at_once(tmp_path):
    with pytest.raises(RunFailed, match="can't be written. output of 2"):
        run(tmp_path, {2: OUTPUT}, workers=1)
    progress, pool, _ = run(tmp_path)
    assert (progress.found, progress.done) == (1, 5)


def test_workers_are_ended_when_the_run_is_interrupted(tmp_path):
    def interrupt(progress):
        if progress.done:
            raise KeyboardInterrupt

    dataset = PairDataset(tmp_path)
    pool = Pool(dataset)
    with pytest.raises(KeyboardInterrupt):
        Driver(Tasks(Plan(WORKFLOW, str(tmp_path), range(6))), dataset, pool, interrupt).run()
    assert set(pool.ended) == {1, 2}


def test_a_worker_stays_with_its_vector_and_workers_divide_the_vectors():
    ledger = Ledger([(index, index // 3) for index in range(9)], Limits())
    first, second = ledger.take(None), ledger.take(None)
    assert (first, second) == (0, 3)
    assert ledger.take(0) == 1 and ledger.take(1) == 4
    assert ledger.take(None) == 6  # nobody is at the third vector yet
    for index in (0, 1):
        ledger.settle(index, DONE)
    assert ledger.settle(3, FAULT) == AGAIN and not ledger.over
    assert [ledger.take(1), ledger.take(1)] == [5, 3]  # what failed comes after what has not been tried
    assert ledger.settle(3, FAULT) == AGAIN
    ledger.take(1)
    assert ledger.settle(3, FAULT) == POISON


def test_the_progress_line_and_the_cost_say_what_a_user_asks(tmp_path):
    progress, _, _ = run(tmp_path, {3: FAULT})
    line = progress_line(progress)
    assert line.startswith("6/6 tasks") and "pairs/min" in line and "retries 2  set aside 1" in line
    tasks = Tasks(Plan(WORKFLOW, str(tmp_path), range(1, 101), strengths=[0.5, 1.0, 2.0]))
    told = cost(tasks, PairDataset(tmp_path), 4, 2.0)
    assert "300\n" in told and "2.5 min with 4 workers at 2 s a pair" in told


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="needs POSIX")
def test_an_output_that_is_no_folder_is_told_before_anything_starts(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MedSteerError, match="file/pairs can't be written to"):
        probe(PairDataset(tmp_path / "file" / "pairs"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /proc")
def test_a_read_only_output_is_told(tmp_path):
    with pytest.raises(MedSteerError, match="/proc/self/pairs can't be written to"):
        probe(PairDataset("/proc/self/pairs"))


def test_the_command_tells_mistakes_in_one_line_and_makes_nothing(tmp_path, capsys):
    plan = tmp_path / "plan.yaml"
    (tmp_path / "workflow.json").write_text(json.dumps(WORKFLOW))
    plan.write_text(f"workflow: workflow.json\noutput: {tmp_path / 'pairs'}\nseeds: 1..4\nchunks: 2\n")
    assert main([str(plan)]) == 1
    assert "line 4: chunks: there is no key 'chunks' here; did you mean 'chunk'?" in capsys.readouterr().err
    plan.write_text(f"workflow: workflow.json\noutput: {tmp_path / 'pairs'}\nseeds: 1..4\n")
    assert main([str(plan), "--dry-run"]) == 0
    assert main([str(plan), "--output", "a/../b"]) == 1
    assert not (tmp_path / "pairs").exists()
