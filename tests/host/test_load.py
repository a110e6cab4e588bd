"""Several clients, their prompts queued at once, some cancelled: the load benchmark's small form."""

import argparse
import time

from benchmarks.speed import load
from benchmarks.speed._load_clients import FINISHED, REMOVED, STOPPED, with_cancels
from medsteer_core.run.client import ComfyClient
from medsteer_core.run.demo import WORKFLOW
from medsteer_core.run.overrides import read_workflow, with_seed


def test_every_prompt_ends_with_its_own_result_while_the_server_answers(comfy):
    example = load.small(read_workflow(WORKFLOW), 3)
    workflows = [with_seed(example, 7000 + number) for number in range(8)]
    jobs = with_cancels(workflows, 0.4, spread=0.0, seed=1)
    chosen = argparse.Namespace(clients=3, time_limit=300.0)
    clients, latency = load.watched(comfy.address, lambda: load.loaded(comfy.address, jobs, chosen))
    client = ComfyClient(comfy.address)
    found = {job.number: load.images_of(client, job) for job in jobs if job.fate == FINISHED}
    alone = {number: load.pixels_of(client.run(workflows[number])) for number in reversed(found)}
    differences = [change for number in found for change in load.changes(number, found[number], alone[number])]
    record = {
        **load.fates(jobs), "latency": latency, "differing": differences,
        "foreign_messages": sum(one.foreign for one in clients),
    }  # fmt: skip
    assert load.problems(record, [one.problem for one in clients]) == []
    kept = {job.number for job in jobs if job.cancel is None}
    assert len(kept) == 5 and kept <= set(found)
    assert {job.fate for job in jobs if job.number not in kept} <= {STOPPED, REMOVED, FINISHED}
    assert all(job.heard_end for job in jobs if job.number in kept)
    assert latency["/queue"]["requests"] > 0 and latency["failed"] == 0


def test_the_watch_tells_a_server_that_does_not_answer():
    _, latency = load.watched("http://127.0.0.1:9", lambda: time.sleep(0.3))
    assert latency["failed"] > 0
