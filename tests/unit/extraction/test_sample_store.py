"""What an extraction has seen, kept on disk: whole files, bounded room, nothing replaced by less."""

import os

import pytest
import torch

from medsteer_core.extraction.sample_store import Checkpoint, SampleStore, prefixed, under

FACTS = {"prompt": "polyps", "seed": 3}
STATE = {"sums/a": torch.arange(6.0), "record/b": torch.ones(2, 3, dtype=torch.int64)}


class Clock:
    """Seconds that pass only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


def checkpoint(store, facts=FACTS, told=None, clock=None):
    return Checkpoint(store, facts, (told if told is not None else []).append, clock or Clock())


def fail_if_asked():
    raise AssertionError("the state was asked for although nothing was to be written")


def test_a_state_comes_back_bit_by_bit_with_its_images(tmp_path):
    store = SampleStore(tmp_path / "new" / "folder")
    assert store.read(FACTS) is None and store.images(FACTS) == ()
    assert store.write(FACTS, [0, 2, 4], STATE)
    stored = store.read(FACTS)
    assert stored.images == (0, 2, 4) == store.images(FACTS) and stored.state.keys() == STATE.keys()
    assert all(torch.equal(stored.state[name], value) for name, value in STATE.items())


@pytest.mark.parametrize("other", [{"prompt": "polyps", "seed": 4}, {"prompt": "polyp", "seed": 3}, {"seed": 3}])
def test_other_facts_are_another_state(tmp_path, other):
    store = SampleStore(tmp_path)
    store.write(FACTS, [0], STATE)
    assert store.read(other) is None


def test_a_file_of_other_facts_under_this_name_is_not_taken(tmp_path):
    store = SampleStore(tmp_path)
    store.write({"seed": 9}, [0], STATE)
    os.replace(store.path({"seed": 9}), store.path(FACTS))
    assert store.read(FACTS) is None


@pytest.mark.parametrize("damage", [b"", b"\x10", lambda data: data[:-9], lambda data: b"x" * 40 + data[40:]])
def test_a_damaged_file_counts_as_none_and_the_next_writing_replaces_it(tmp_path, damage):
    store = SampleStore(tmp_path)
    store.write(FACTS, [0, 1], STATE)
    path = store.path(FACTS)
    path.write_bytes(damage(path.read_bytes()) if callable(damage) else damage)
    assert store.read(FACTS) is None
    checkpoint(store).close([0, 1], lambda: STATE)
    assert store.read(FACTS).images == (0, 1)


def test_the_facts_themselves_are_not_written(tmp_path):
    store = SampleStore(tmp_path)
    store.write({"prompt": "a private matter"}, [0], STATE)
    assert b"private" not in store.path({"prompt": "a private matter"}).read_bytes()


def test_what_was_not_used_for_longest_makes_room(tmp_path):
    big = {"x": torch.zeros(1000)}
    store = SampleStore(tmp_path, most_bytes=3 * 4000 + 2000)
    for age, seed in ((300, 1), (200, 2), (100, 3)):
        store.write({"seed": seed}, [0], big)
        os.utime(store.path({"seed": seed}), (os.path.getmtime(store.path({"seed": seed})) - age,) * 2)
    assert store.read({"seed": 1}) is not None  # reading it makes it the newest
    store.write({"seed": 4}, [0], big)
    assert [seed for seed in (1, 2, 3, 4) if store.read({"seed": seed})] == [1, 3, 4]


def test_a_state_larger_than_the_folder_is_not_kept_and_said(tmp_path):
    told = []
    store = SampleStore(tmp_path / "store", most_bytes=10)
    checkpoint(store, told=told).close([0], lambda: STATE)
    assert not (tmp_path / "store").exists() and len(told) == 1 and "more than" in told[0]


def test_a_folder_that_can_not_be_written_is_said_and_stops_nothing(tmp_path):
    (tmp_path / "store").write_text("a file where the folder should be")
    told = []
    checkpoint(SampleStore(tmp_path / "store"), told=told).close([0], lambda: STATE)
    assert len(told) == 1 and "could not be kept" in told[0]


def test_nothing_half_written_remains(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    told = []
    checkpoint(SampleStore(tmp_path), told=told).close([0], lambda: STATE)
    assert list(tmp_path.iterdir()) == [] and "disk full" in told[0]


def test_only_what_is_wanted_is_read(tmp_path):
    store = SampleStore(tmp_path)
    store.write(FACTS, [0, 1, 2, 3], STATE)
    assert checkpoint(store).read(range(6)).images == (0, 1, 2, 3)
    assert checkpoint(store).read(range(4)).images == (0, 1, 2, 3)
    assert checkpoint(store).read(range(3)) is None


def test_more_is_never_replaced_by_less_nor_written_again_when_nothing_is_new(tmp_path):
    store = SampleStore(tmp_path)
    store.write(FACTS, [0, 1, 2, 3], STATE)
    fewer = checkpoint(store)
    assert fewer.read(range(2)) is None
    fewer.close([0, 1], fail_if_asked)
    same = checkpoint(store)
    same.read(range(4))
    same.close([0, 1, 2, 3], fail_if_asked)
    checkpoint(store).close([], fail_if_asked)
    more = checkpoint(store)
    more.read(range(6))
    more.close([0, 1, 2, 3, 4], lambda: STATE)
    assert store.images(FACTS) == (0, 1, 2, 3, 4)


def test_writing_while_sampling_takes_a_small_share_of_the_time(tmp_path):
    clock, store = Clock(), SampleStore(tmp_path)

    def slowly():
        clock.now += 2.0
        return STATE

    going = checkpoint(store, clock=clock)
    going.offer([0], fail_if_asked)  # nothing is old enough to be worth it
    clock.now = 31.0
    going.offer([0, 1], slowly)
    assert store.images(FACTS) == (0, 1)
    clock.now += 49.0
    going.offer([0, 1, 2], fail_if_asked)  # two seconds of writing, less than fifty of sampling
    clock.now += 1.0
    going.offer([0, 1, 2], slowly)
    assert store.images(FACTS) == (0, 1, 2)


def test_states_go_into_one_file_under_names_of_their_own():
    both = prefixed("one", {"x": 1, "a/y": 2}) | prefixed("onemore", {"x": 3})
    assert under("one", both) == {"x": 1, "a/y": 2} and under("onemore", both) == {"x": 3}
