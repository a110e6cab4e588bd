"""A folder of pairs: whole pairs only, each once, splits that share no noise, and errors that say what to do."""

import errno
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))
from pairs import pair, png, square_mask, started

from medsteer_core.dataset.pair_dataset import PairDataset
from medsteer_core.dataset.records import files_of, finish, pair_id_of, record_file
from medsteer_core.dataset.splits import check_unseen, split_of
from medsteer_core.dataset.store import WORK, store_at
from medsteer_core.errors import MedSteerError

FORK = "fork" in multiprocessing.get_all_start_methods()
MASK = square_mask((3, 4, 10, 6))


def tree(root) -> dict[str, bytes]:
    """Every file under a folder but the store's own, by name."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file() and WORK not in path.parts
    }


@pytest.fixture
def dataset(tmp_path):
    return PairDataset(tmp_path / "pairs")


@pytest.mark.parametrize("where", ["folder", "fsspec"])
def test_a_pair_is_written_once_and_read_back(where, tmp_path):
    dataset = PairDataset(tmp_path / "pairs" if where == "folder" else f"memory://{tmp_path.name}/pairs")
    record, factual, counterfactual, mask = pair(1, mask=MASK)
    assert not dataset.has(record["pair_id"]) and dataset.ids() == []
    assert dataset.add(record, factual, counterfactual, mask)
    assert not dataset.add(record, png(9, 9, 9), counterfactual, mask)
    assert dataset.has(record["pair_id"]) and list(dataset.records()) == [record]
    assert [dataset.image(record, kind) for kind in ("factual", "counterfactual", "mask")] == [
        factual, counterfactual, mask,
    ]  # fmt: skip
    assert dataset.write_index() == {"train": 1, "validation": 0, "test": 0}


def test_the_folder_has_the_promised_files_and_the_index_the_promised_columns(dataset, tmp_path):
    dataset.add(*pair(1, mask=MASK))
    dataset.add(*pair(2, split="test"))
    dataset.write_index()
    one, two = pair(1, mask=MASK)[0], pair(2, split="test")[0]
    images = [f"{record['split']}/{record['pair_id'][:2]}/{record['pair_id']}" for record in (one, two)]
    expected = {f"{images[0]}_{kind}.png" for kind in ("factual", "counterfactual", "mask")}
    expected |= {f"{images[1]}_{kind}.png" for kind in ("factual", "counterfactual")} | {"test/no_mask.png"}
    expected |= {record_file(record["pair_id"]) for record in (one, two)}
    expected |= {f"groups/{record['group_id'][:2]}/{record['group_id']}.txt" for record in (one, two)}
    assert set(tree(dataset.root)) == expected | {"README.md", "train/metadata.jsonl", "test/metadata.jsonl"}
    (line,) = [json.loads(text) for text in (Path(dataset.root) / "train/metadata.jsonl").read_text().splitlines()]
    assert {name: line[name] for name in ("pair_id", "group_id", "split", "arm", "mask_source", "synthetic")} == {
        "pair_id": one["pair_id"], "group_id": one["group_id"], "split": "train", "arm": "counterfactual",
        "mask_source": "user", "synthetic": True,
    }  # fmt: skip
    assert line["intended_label"] == {"factual": "polyps", "counterfactual": "normal cecum"}
    assert line["digital_source_type"].endswith("/trainedAlgorithmicMedia")
    assert line["factual_file_name"] == f"{one['pair_id'][:2]}/{one['pair_id']}_factual.png"


def test_the_bytes_do_not_depend_on_the_order_or_on_how_often_the_index_was_written(tmp_path):
    trees = []
    for name, order in (("a", range(12)), ("b", reversed(range(12)))):
        dataset = PairDataset(tmp_path / name)
        for number in order:
            dataset.add(*pair(number, split_of(started(number)["group_id"], "auto", 0.3, 0.3), MASK))
            if name == "b":
                dataset.write_index("both")
        dataset.write_index("both")
        trees.append(tree(tmp_path / name))
    assert trees[0] == trees[1] and len(trees[0]) > 12 * 6
    text = b"".join(trees[0].values())
    assert str(tmp_path).encode() not in text and os.uname().nodename.encode() not in text


def test_a_pairs_id_is_of_how_it_was_made_and_for_what_but_not_of_versions():
    labels, made = {"factual": "polyps", "counterfactual": "normal"}, started(1)["made"]
    base = pair_id_of(made, labels, "counterfactual")
    assert len(base) == 16
    assert base == pair_id_of({**made, "versions": {"torch": "3"}}, dict(reversed(labels.items())), "counterfactual")
    others = [
        pair_id_of({**made, "multiple": 0.5}, labels, "counterfactual"),
        pair_id_of({**made, "seed": 2}, labels, "counterfactual"),
        pair_id_of(made, {**labels, "counterfactual": "ulcer"}, "counterfactual"),
        pair_id_of(made, labels, "random direction"),
    ]
    assert len({base, *others}) == 5


def test_pairs_of_one_noise_stay_in_one_split_and_the_shares_come_out():
    groups = [started(number)["group_id"] for number in range(2000)]
    splits = [split_of(group, "auto", 0.1, 0.2) for group in groups]
    assert splits == [split_of(group, "auto", 0.1, 0.2) for group in groups]
    assert splits.count("validation") / 2000 == pytest.approx(0.1, abs=0.02)
    assert splits.count("test") / 2000 == pytest.approx(0.2, abs=0.025)
    assert set(split_of(group, "auto", 0, 0) for group in groups) == {"train"}
    assert split_of(groups[0], "validation", 0, 0) == "validation"


@pytest.mark.parametrize("shares", [(-0.1, 0.2), (0.6, 0.5), (float("nan"), 0.1)])
def test_shares_that_are_none_are_refused(shares):
    with pytest.raises(MedSteerError, match="validation_fraction .*at most 1"):
        split_of("ab" * 8, "auto", *shares)


VECTOR = {
    "paired": {"seed": 5, "noise_indices": {"present": [0, 4], "absent": [0, 4]}, "latent_shape": [1, 4, 4, 4]},
    "unpaired": {"seed": 5, "noise_indices": {"present": [0, 8, 2], "absent": [1, 8, 2]}, "latent_shape": [1, 4, 4, 4]},
    "combined": {
        "combined": {"parts": [{"provenance": {"seed": 5, "noise_indices": {"present": [2, 4], "absent": [2, 4]}}}]}
    },
    "imported": {"seeds": [4, 5]},
}


@pytest.mark.parametrize(
    "made, index, seen",
    [
        ("paired", 3, True), ("paired", 4, False), ("unpaired", 7, True), ("unpaired", 8, False),
        ("combined", 3, True), ("combined", 1, False), ("imported", 0, True), ("imported", 1, False),
    ],
)  # fmt: skip
def test_noise_that_made_the_vector_is_no_evaluation(dataset, made, index, seen):
    steering = [{"vector": {"vector": "0123456789", "made": VECTOR[made]}}]
    facts = started(0, seed=5, index=index, steering=steering)
    for split in ("validation", "test"):
        record, *images = pair(0, split, started=facts)
        if not seen:
            check_unseen(facts["made"], split)
            continue
        with pytest.raises(MedSteerError, match=f"seed 5, image {index} made the vector.*'{split}'.*another seed"):
            dataset.add(record, *images)
    assert tree(dataset.root) == {}
    assert dataset.add(*pair(0, "train", started=facts))


def test_the_same_seed_at_another_size_is_other_noise():
    steering = [{"vector": {"made": VECTOR["paired"]}}]
    made = started(0, seed=5, steering=steering, latent_shape=[1, 4, 8, 8])["made"]
    check_unseen(made, "test")
    with pytest.raises(MedSteerError, match="seed 5, image 0"):
        check_unseen({**made, "latent_shape": [1, 4, 4, 4]}, "test")


def test_a_group_that_stands_in_another_split_is_refused_and_nothing_of_the_pair_stays(dataset):
    dataset.add(*pair(1, "train"))
    before = tree(dataset.root)
    other = {**started(1), "made": {**started(1)["made"], "multiple": 0.5}}
    with pytest.raises(MedSteerError, match="same noise.*'train'.*another seed"):
        dataset.add(*pair(1, "test", started=other))
    assert tree(dataset.root) == before
    assert dataset.add(*pair(1, "train", started=other))


def test_noise_shared_by_two_starting_images_keeps_them_in_one_split(dataset):
    first = {**started(1), "group_id": "11" * 8}
    second = {**started(1), "group_id": "22" * 8, "made": {**started(1)["made"], "starting_latent": "b"}}
    dataset.add(*pair(1, "train", started=first))
    with pytest.raises(MedSteerError, match="share|same noise or starting image"):
        dataset.add(*pair(1, "test", started=second))


def test_the_index_refuses_a_leak_that_two_writers_without_locks_made(tmp_path):
    dataset = PairDataset(f"memory://{tmp_path.name}/leak")
    dataset.add(*pair(1, "train"))
    for name in dataset.store.list("groups"):
        dataset.store.remove(name)
    dataset.add(*pair(1, "test", target="ulcer"))
    with pytest.raises(MedSteerError, match="share their noise and stand in"):
        dataset.write_index()


# --- writers that die, and writers that work at once


def _write_all(root, numbers, index=True):
    dataset = PairDataset(root)
    new = sum(dataset.add(*pair(n, "train" if n % 3 else "test", MASK if n % 2 else None)) for n in numbers)
    if index:
        dataset.write_index("both")
    return new


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_writers_killed_at_any_moment_lose_nothing_and_leave_nothing_half(tmp_path):
    numbers, context, chance = list(range(30)), multiprocessing.get_context("fork"), random.Random(0)
    begun = time.monotonic()
    _write_all(tmp_path / "undisturbed", numbers)
    whole_run = time.monotonic() - begun
    expected, root = tree(tmp_path / "undisturbed"), tmp_path / "disturbed"
    killed = 0
    for _ in range(16):
        chance.shuffle(numbers)
        writer = context.Process(target=_write_all, args=(root, numbers))
        writer.start()
        writer.join(chance.uniform(0, whole_run / 8))
        writer.kill()
        writer.join()
        killed += writer.exitcode == -signal.SIGKILL
        for record in PairDataset(root).records():  # whatever has a record is whole
            for name in (record_file(record["pair_id"]), *files_of(record).values()):
                assert (root / name).read_bytes() == expected[name]
        for index in root.glob("*/metadata.jsonl"):
            for line in index.read_text().splitlines():
                assert PairDataset(root).has(json.loads(line)["pair_id"])
    assert killed >= 8
    _write_all(root, numbers)
    assert tree(root) == expected
    assert not list((root / WORK).glob("pair-*.part")) and not list((root / WORK).glob("index-*.part"))


@pytest.mark.skipif(not FORK, reason="needs fork")
def test_four_processes_write_each_pair_once_into_one_folder(tmp_path):
    context, numbers = multiprocessing.get_context("fork"), list(range(30))
    _write_all(tmp_path / "alone", numbers)
    results = context.Queue()

    def work(seed):
        own = numbers.copy()
        random.Random(seed).shuffle(own)
        results.put(_write_all(tmp_path / "together", own))

    writers = [context.Process(target=work, args=(seed,)) for seed in range(4)]
    for writer in writers:
        writer.start()
    new = [results.get(timeout=60) for _ in writers]
    for writer in writers:
        writer.join()
    assert sum(new) == len(numbers)
    assert tree(tmp_path / "together") == tree(tmp_path / "alone")


def test_an_index_waits_for_another_and_then_holds_what_came_meanwhile(tmp_path):
    """Else the one that looked first and wrote last would lose the other's pair from the index."""
    dataset, other = PairDataset(tmp_path), PairDataset(tmp_path)
    dataset.add(*pair(1))
    with other.store.locked("index"):
        writer = threading.Thread(target=dataset.write_index)
        writer.start()
        writer.join(0.3)
        assert writer.is_alive()
        other.add(*pair(2))
    writer.join(20)
    assert len((tmp_path / "train/metadata.jsonl").read_text().splitlines()) == 2


# --- storage that does not work


@pytest.mark.parametrize("failing", range(6))
def test_a_full_disk_is_told_and_leaves_no_half_pair(tmp_path, monkeypatch, failing):
    """At the claim of the group, at each image, at the record: the write number ``failing`` finds no room."""
    dataset = PairDataset(tmp_path / "pairs")
    dataset.add(*pair(1, mask=MASK))
    before, calls, real = tree(dataset.root), [], os.replace

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    if failing == 0:
        assert dataset.add(*pair(2, mask=MASK)) and len(calls) == 5
        return
    with pytest.raises(MedSteerError, match="pairs: could not write pair .*the disk is full. Free space"):
        dataset.add(*pair(2, mask=MASK))
    left = {name: data for name, data in tree(dataset.root).items() if not name.startswith("groups/")}
    assert left == {name: data for name, data in before.items() if not name.startswith("groups/")}
    assert not list((Path(dataset.root) / WORK).glob("*.part"))
    monkeypatch.setattr(os, "replace", real)
    assert dataset.add(*pair(2, mask=MASK))


def test_a_full_disk_while_the_index_is_written_keeps_the_old_one(dataset, monkeypatch):
    dataset.add(*pair(1))
    dataset.write_index()
    before = tree(dataset.root)
    dataset.add(*pair(2))
    real = os.fsync

    def fsync(handle):
        if os.path.isfile(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(MedSteerError, match="could not write the index: the disk is full"):
        dataset.write_index()
    after = tree(dataset.root)
    assert all(after[name] == data for name, data in before.items())


@pytest.mark.skipif(not FORK, reason="needs fork and users")
def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    """As another user, since root may write everywhere."""
    with tempfile.TemporaryDirectory() as parent:  # not below pytest's own folder, which others can't enter
        os.chmod(parent, 0o755)
        root = Path(parent, "pairs")
        root.mkdir()
        dataset, told = PairDataset(root), multiprocessing.get_context("fork").Queue()

        def write():
            if os.geteuid() == 0:
                os.setuid(65534)
            try:
                dataset.add(*pair(1))
            except MedSteerError as error:
                told.put(str(error))
            else:
                told.put("written")

        root.chmod(0o555)
        writer = multiprocessing.get_context("fork").Process(target=write)
        writer.start()
        text = told.get(timeout=60)
        writer.join()
        root.chmod(0o755)
        assert text.startswith(f"{root}: could not write pair ") and "may not be written. Change its perm" in text
        assert tree(root) == {}


def test_a_file_that_is_no_record_is_named(dataset):
    dataset.add(*pair(1))
    pair_id = dataset.ids()[0]
    path = Path(dataset.root, record_file(pair_id))
    for text in ("{", "[]", "{}", path.read_text().replace(pair_id, "../../../../etc/x")):
        path.write_text(text)
        with pytest.raises(MedSteerError, match="records/.*|lacks"):
            list(dataset.records())


# --- what does not fit


def test_counts_of_images_that_do_not_fit_the_record_are_refused(dataset):
    record, factual, counterfactual, mask = pair(1, mask=MASK)
    with pytest.raises(MedSteerError, match="came with no mask; one was expected"):
        dataset.add(record, factual, counterfactual)
    with pytest.raises(MedSteerError, match="came with a mask; none was expected"):
        dataset.add(*pair(1)[:3], mask)
    with pytest.raises(MedSteerError, match="The counterfactual of pair .* is no PNG"):
        dataset.add(record, factual, b"GIF89a", mask)
    assert tree(dataset.root) == {}


@pytest.mark.parametrize("change", [
    {"pair_id": "../../evil"}, {"pair_id": "ab\n" + "c" * 13}, {"group_id": "/etc/passwd"}, {"split": "../train"},
    {"factual_file_name": "../x.png"}, {"mask_file_name": "/x.png"}, {"arm": "none"}, {"made": None},
])  # fmt: skip
def test_a_record_that_names_other_files_is_refused(dataset, change):
    record, *images = pair(1)
    with pytest.raises(MedSteerError):
        dataset.add({**record, **change}, *images)
    assert tree(dataset.root) == {}


@pytest.mark.parametrize("label", ["", "  ", "a\nb", "polyp\x00", "x" * 201, " polyp", "\u202eabc"])
def test_a_label_that_is_no_line_of_text_is_refused(label):
    with pytest.raises(MedSteerError, match="source_class"):
        finish(started(1), source=label, target="normal", split="train")


def test_labels_with_odd_characters_are_kept_as_they_are(dataset):
    label = 'a "b", c|d/é\\ \u606f\u8089 <i> {x}'
    dataset.add(*pair(1, source=label, mask=MASK))
    dataset.write_index("both")
    root = Path(dataset.root)
    assert json.loads((root / "train/metadata.jsonl").read_text())["intended_label"]["factual"] == label
    assert json.loads((root / "annotations/instances_train.json").read_text())["categories"][0]["name"] == label
    card = (root / "README.md").read_text()
    assert '| a "b", c\\|d/é\\\\ \u606f\u8089 &lt;i> {x} | normal cecum | counterfactual | 1 |' in card


def test_more_than_four_gigabytes_are_indexed_without_being_read(dataset):
    """Five pictures of a gigabyte each, on a file system that stores no zeros; and numbers beyond 32 and 63 bits."""
    for number in range(5):
        record, *images = pair(number, started=started(2**64 - 1 - number, index=2**33))
        dataset.add(record, *images)
        os.truncate(Path(dataset.root, files_of(record)["factual"]), 2**30)
    begun = time.monotonic()
    assert dataset.write_index("both") == {"train": 5, "validation": 0, "test": 0}
    assert time.monotonic() - begun < 2
    root = Path(dataset.root)
    assert sum(path.stat().st_size for path in root.rglob("*.png")) > 2**32
    lines = [json.loads(text) for text in (root / "train/metadata.jsonl").read_text().splitlines()]
    assert {line["seed"] for line in lines} == {str(2**64 - 1 - number) for number in range(5)}
    assert {line["batch_index"] for line in lines} == {2**33}


def test_the_index_is_written_in_parts_and_reads_only_new_records(dataset, monkeypatch):
    for number in range(4):
        dataset.add(*pair(number))
    dataset.write_index()
    read, store = [], dataset.store
    real = store.read
    monkeypatch.setattr(store, "read", lambda name: (read.append(name), real(name))[1])
    dataset.add(*pair(4))
    dataset.write_index()
    assert [name for name in read if name.startswith("records/")] == [record_file(pair(4)[0]["pair_id"])]
    (Path(dataset.root) / "train/metadata.jsonl").write_text("not an index\n")
    read.clear()
    assert dataset.write_index()["train"] == 5
    assert len([name for name in read if name.startswith("records/")]) == 5


def test_a_store_can_be_given_in_place_of_a_path(tmp_path):
    dataset = PairDataset(store_at(tmp_path))
    assert dataset.add(*pair(1)) and PairDataset(tmp_path).ids() == dataset.ids()


@pytest.mark.parametrize("numbers", [3, "0:8", [1], [0, 8, 0], [0, "8"], [0.0, 8.0], None, {}])
def test_a_record_of_noise_that_cannot_be_read_is_kept_out_of_evaluation(numbers):
    made = {"seed": 7, "batch_index": 0, "steering": [{"vector": {"seed": 7, "noise_indices": {"present": numbers}}}]}
    with pytest.raises(MedSteerError, match="says of its noise_indices"):
        check_unseen(made, "test")
    check_unseen(made, "train")


@pytest.mark.parametrize("shape", [5, "x", {}, None, []])
def test_noise_of_an_unknown_shape_counts_as_seen(shape):
    noise = {"seed": 7, "noise_indices": {"present": [0, 8]}, "latent_shape": shape}
    with pytest.raises(MedSteerError, match="made the vector"):
        check_unseen({"seed": 7, "batch_index": 0, "latent_shape": [1, 4, 8, 8], "steering": [noise]}, "test")
