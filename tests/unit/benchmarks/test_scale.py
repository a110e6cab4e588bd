"""The short form of `python dev.py bench scale`: stub workers that only sleep, two at a time."""

from benchmarks.speed.scale import naps


def test_stub_workers_do_every_task_once_and_the_time_slept_is_counted():
    told = naps(workers=2, tasks=8)
    assert (told["workers"], told["tasks"]) == (2, 8)
    assert told["seconds"] >= 8 * told["nap"] / 2 * 0.99
    assert 0 < told["efficiency"] <= 1
