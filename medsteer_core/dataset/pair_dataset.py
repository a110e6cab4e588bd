"""A folder of counterfactual pairs that grows pair by pair, from several processes at once, and is never half written.

A pair is there when its record is: its images are written before it, and a pair that is there is not written again.
Everything else (the lines of metadata.jsonl, the card, the boxes) follows from the records and can be made anew.

    pairs = PairDataset("output/medsteer/pairs")
    pairs.add(record, factual_png, counterfactual_png, mask_png)  # False: it was there already
    pairs.write_index(boxes="COCO")
"""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from ..errors import MedSteerError
from ..files.same_bytes import canonical_json
from .boxes import coco_of, yolo_files
from .card import card
from .png import mask_png
from .records import METADATA, NO_MASK, SIDES, SPLITS, check, files_of, metadata_of, record_file, to_bytes
from .splits import check_unseen, group_file
from .store import PairStore, store_at

NO_BOXES, COCO, YOLO, BOTH = "none", "COCO", "YOLO", "both"
BOXES = (NO_BOXES, COCO, YOLO, BOTH)
_PNG = b"\x89PNG\r\n\x1a\n"
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}


class PairDataset:
    """The dataset at ``root``: a folder, a URL for fsspec, or a store. Nothing is written before the first pair."""

    def __init__(self, root: str | Path | PairStore) -> None:
        self.root = str(root) if isinstance(root, str | Path) else type(root).__name__
        self.store = store_at(root) if isinstance(root, str | Path) else root

    def has(self, pair_id: str) -> bool:
        """Whether the whole pair is there."""
        with self._told("read"):
            return self.store.exists(record_file(pair_id))

    def add(
        self, record: Mapping[str, Any], factual_png: bytes, counterfactual_png: bytes, mask_png: bytes | None = None
    ) -> bool:
        """Write a pair; False, and nothing written, when it is there already.

        Raises MedSteerError, with nothing of the pair left, for a record that does not fit its files, noise that may
        not be evaluated on, a group that stands in another split, a full disk and a folder that can't be written.
        """
        check(record)
        check_unseen(record["made"], record["split"])
        images = dict(zip((*SIDES, "mask"), (factual_png, counterfactual_png, mask_png), strict=True))
        _check_images(record, images)
        names, pair_id = files_of(record), record["pair_id"]
        lock = f"pair-{pair_id[:2]}"
        with self._told(f"write pair {pair_id}"), self.store.locked(lock):
            if self.store.exists(record_file(pair_id)):
                return False
            self._claim(record)
            try:
                for kind, name in names.items():
                    self.store.write_whole(name, images[kind], lock)
                self.store.write_whole(record_file(pair_id), to_bytes(record), lock)
            except BaseException:
                if not self.store.exists(record_file(pair_id)):
                    for name in names.values():
                        self.store.remove(name)
                raise
            return True

    def _claim(self, record: Mapping[str, Any]) -> None:
        """Note the split of the pair's groups. Raises MedSteerError where one stands in another split."""
        for key in sorted({record["group_id"], record.get("noise_id", record["group_id"])}):
            lock = f"group-{key[:2]}"
            with self.store.locked(lock):
                if not self.store.exists(group_file(key)):
                    self.store.write_whole(group_file(key), record["split"].encode(), lock)
                elif (split := self.store.read(group_file(key)).decode()) != record["split"]:
                    raise MedSteerError(
                        f"Pair {record['pair_id']} is for the split '{record['split']}', and pairs of the same noise "
                        f"or starting image stand in '{split}' ({group_file(key)}). Take another seed, the split and "
                        "fractions that the folder was begun with, or another folder."
                    )

    def ids(self) -> list[str]:
        """The ids of all whole pairs, sorted."""
        with self._told("read"):
            names = self.store.list("records")
        return sorted(PurePosixPath(name).stem for name in names if name.endswith(".json"))

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all whole pairs, by pair_id. One is held at a time."""
        for pair_id in self.ids():
            yield self.record(pair_id)

    def record(self, pair_id: str) -> dict[str, Any]:
        """One pair's record. Raises MedSteerError where there is none that can be read."""
        name = record_file(pair_id)
        with self._told(f"read {name}"):
            data = self.store.read(name)
        try:
            record = json.loads(data)
            check(record)
        except (ValueError, AttributeError, TypeError) as error:
            raise MedSteerError(
                f"{self.root}: {name} is no pair's record: {error} Delete it, and run again what made the pair."
            ) from error
        return record

    def image(self, record: Mapping[str, Any], kind: str) -> bytes:
        """The PNG of a record's factual, counterfactual or mask."""
        name = files_of(record)[kind]
        with self._told(f"read {name}"):
            return self.store.read(name)

    def write_index(self, boxes: str = NO_BOXES) -> dict[str, int]:
        """Write metadata.jsonl of every split, the card, and the boxes' files; returns how many pairs a split has.

        Lines that are there already are kept; only new records are read. What boxes' files there are is kept up too.
        """
        check_boxes(boxes)
        with self._told("write the index"), self.store.locked("index"):
            lines = self._lines()
            counts = Counter(line["split"] for line in lines)
            bare = {line["split"] for line in lines if line["mask_file_name"] == NO_MASK}
            for split in SPLITS:
                if split in bare:
                    self._write(f"{split}/{NO_MASK}", [mask_png(torch.zeros(1, 1))])
                if counts[split] or self.store.exists(f"{split}/metadata.jsonl"):
                    self._write(f"{split}/metadata.jsonl", (_line(line) for line in lines if line["split"] == split))
            self._write_boxes(lines, boxes)
            self._write("README.md", [card(lines).encode()])
        return {split: counts[split] for split in SPLITS}

    def labels(self) -> list[dict[str, str]]:
        """What the pairs of the index were meant to show, each of it once."""
        with self._told("read the index"):
            lines = [line for split in SPLITS if self.store.exists(name := f"{split}/metadata.jsonl")
                     for line in _read_lines(self.store.read(name)).values()]  # fmt: skip
        every = {canonical_json(label): label for line in map(json.loads, lines) if (label := line["intended_label"])}
        return [every[key] for key in sorted(every)]

    def _lines(self) -> _Lines:
        """The metadata of every pair, sorted by id."""
        known: dict[str, bytes] = {}
        for split in SPLITS:
            if self.store.exists(name := f"{split}/metadata.jsonl"):
                known |= _read_lines(self.store.read(name))
        lines = _Lines([known.get(pair_id) or _line(metadata_of(self.record(pair_id))) for pair_id in self.ids()])
        _check_groups(lines)
        return lines

    def _write_boxes(self, lines: _Lines, boxes: str) -> None:
        if boxes in (COCO, BOTH) or self.store.list("annotations"):
            for split in SPLITS:
                if any(line["split"] == split for line in lines):
                    self._write(f"annotations/instances_{split}.json", coco_of(lines, split))
        if boxes in (YOLO, BOTH) or self.store.exists("yolo.yaml"):
            for name, text in yolo_files(lines):
                if not (self.store.exists(name) and self.store.read(name) == text.encode()):
                    self._write(name, [text.encode()])

    def _write(self, name: str, chunks: Any) -> None:
        self.store.write_whole(name, chunks, "index")

    @contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Storage that does not work, as an error that says what to do."""
        try:
            yield
        except FileNotFoundError as error:
            raise MedSteerError(
                f"{self.root}: could not {what}: a file that was there is gone ({error}). Let nothing else delete in "
                "the folder."
            ) from error
        except OSError as error:
            why, cure = error.strerror or str(error), "Check the folder or the address"
            if error.errno in _FULL:
                why, cure = "the disk is full", "Free space or take a folder on another disk"
            elif error.errno in _CLOSED:
                why, cure = "it may not be written", "Change its permissions or take another folder"
            raise MedSteerError(
                f"{self.root}: could not {what}: {why}. {cure}, and run again; the pairs that are there are whole and "
                "stay."
            ) from error


def check_boxes(boxes: str) -> None:
    """Raise MedSteerError for a kind of boxes that there is not."""
    if boxes not in BOXES:
        raise MedSteerError(f"boxes is '{boxes}'; one of {', '.join(BOXES)} was expected.")


def _check_images(record: Mapping[str, Any], images: Mapping[str, bytes | None]) -> None:
    for kind, data in images.items():
        wanted = bool(record.get(f"{kind}_file_name"))
        if wanted != (data is not None):
            has, was = ("no", "one") if wanted else ("a", "none")
            raise MedSteerError(f"Pair {record['pair_id']} came with {has} {kind}; {was} was expected by its record.")
        if data is not None and not data.startswith(_PNG):
            raise MedSteerError(f"The {kind} of pair {record['pair_id']} is no PNG; the bytes of one were expected.")


class _Lines:
    """Lines of metadata, parsed each time they are gone through: as text a million of them fit into memory."""

    def __init__(self, texts: list[bytes]) -> None:
        self._texts = texts

    def __len__(self) -> int:
        return len(self._texts)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(json.loads, self._texts)


def _check_groups(lines: _Lines) -> None:
    """The last look at splits: a store without locks lets two writers in at once."""
    stands: dict[str, tuple[str, str]] = {}
    for line in lines:
        split, pair_id = stands.setdefault(line["group_id"], (line["split"], line["pair_id"]))
        if split != line["split"]:
            raise MedSteerError(
                f"Pairs {pair_id} and {line['pair_id']} share their noise and stand in '{split}' and "
                f"'{line['split']}'. Delete the record of one ({record_file(line['pair_id'])}) and write the index "
                "again."
            )


def _read_lines(data: bytes) -> dict[str, bytes]:
    """An index's lines by their pairs; of another kind they are left out, and their records are read instead."""
    found = {}
    for text in data.split(b"\n"):
        with suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and tuple(line) == METADATA:
                found[line["pair_id"]] = text + b"\n"
    return found


def _line(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False) + "\n").encode()
