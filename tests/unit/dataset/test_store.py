"""Files of a dataset are seen whole or not at all, in a folder and behind fsspec."""

import errno
import multiprocessing
import os
import time

import pytest

from medsteer_core.dataset.store import WORK, LocalStore, RemoteStore, store_at
from medsteer_core.errors import MedSteerError

FORK = "fork" in multiprocessing.get_all_start_methods()


@pytest.fixture(params=["folder", "fsspec"])
def store(request, tmp_path):
    if request.param == "folder":
        return store_at(tmp_path / "pairs")
    return store_at(f"memory://{tmp_path.name}/pairs")


def test_what_was_written_is_read_listed_replaced_and_removed(store):
    assert store.list("train") == [] and not store.exists("train/b.txt")
    store.write_whole("train/b.txt", b"one")
    store.write_whole("train/aa/a.txt", iter([b"two", b" parts"]))
    store.write_whole("train/b.txt", b"again")
    store.write_whole("test/c.txt", b"")
    assert store.list("train") == ["train/aa/a.txt", "train/b.txt"]
    assert (store.read("train/b.txt"), store.read("train/aa/a.txt"), store.read("test/c.txt")) == (
        b"again", b"two parts", b"",
    )  # fmt: skip
    store.remove("train/b.txt")
    store.remove("train/b.txt")
    assert not store.exists("train/b.txt") and store.exists("train/aa/a.txt")
    with pytest.raises(FileNotFoundError):
        store.read("train/b.txt")


def test_addresses_choose_the_kind_of_store(tmp_path):
    assert isinstance(store_at(tmp_path), LocalStore)
    assert store_at(f"file://{tmp_path}").root == tmp_path
    assert isinstance(store_at("memory://x"), RemoteStore)
    with pytest.raises(MedSteerError, match="nonsense://bucket.*can't be opened"):
        store_at("nonsense://bucket")


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/x", "", "a\\..\\x", "a\0b"])
def test_a_name_that_leads_out_is_refused(store, name):
    with pytest.raises(MedSteerError, match="relative path without"):
        store.write_whole(name, b"x")


def test_a_write_that_fails_leaves_the_old_file_and_no_part_of_the_new(store, tmp_path):
    store.write_whole("a.txt", b"old")

    def chunks():
        yield b"new"
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        store.write_whole("a.txt", chunks())
    assert store.read("a.txt") == b"old"
    assert not list((tmp_path / "pairs" / WORK).glob("*.part"))


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs Linux")
def test_the_file_and_its_folder_are_synced_before_the_write_returns(tmp_path, monkeypatch):
    """What survives a power cut: the bytes before the rename, the folder's entry after it."""
    done = []
    monkeypatch.setattr(os, "fsync", lambda handle: done.append(os.readlink(f"/proc/self/fd/{handle}")))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    LocalStore(tmp_path).write_whole("train/a.txt", b"x")
    place = done.index("rename")
    assert done[place - 1].endswith(".part") and done[place + 1 :] == [str(tmp_path / "train")]
    assert str(tmp_path) in done[:place]  # the new folder's own entry


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_a_killed_writers_lock_is_free_and_what_it_left_goes(tmp_path):
    def hold(ready):
        store = LocalStore(tmp_path)
        with store.locked("pair-ab"):
            (tmp_path / WORK / "pair-ab-0.part").write_bytes(b"half")
            ready.set()
            time.sleep(60)

    context = multiprocessing.get_context("fork")
    ready = context.Event()
    writer = context.Process(target=hold, args=(ready,))
    writer.start()
    assert ready.wait(20)
    (tmp_path / WORK / "pair-cd-0.part").write_bytes(b"another's, who lives")
    writer.kill()
    writer.join()
    with LocalStore(tmp_path).locked("pair-ab"):
        assert [path.name for path in (tmp_path / WORK).glob("*.part")] == ["pair-cd-0.part"]


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_a_lock_lets_one_process_in_at_a_time(tmp_path):
    store, path = LocalStore(tmp_path), tmp_path / "count.txt"
    path.write_text("0")

    def count():
        for _ in range(50):
            with store.locked("x"):
                path.write_text(str(int(path.read_text()) + 1))

    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=count) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert path.read_text() == "150"
