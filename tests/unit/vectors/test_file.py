import dataclasses
import io
import json
import os
import pickle
import stat

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from medsteer_core.errors import MedSteerError
from medsteer_core.vectors import file as vector_file
from medsteer_core.vectors.file import FORMAT, load, save
from medsteer_core.vectors.pathology_vector import SITE_FIELDS, PathologyVector, SiteDirections


def make_vector(widths=(4, 6), steps=3, rank=1, seed=0, flow=False):
    generator = torch.Generator().manual_seed(seed)

    def site(channels):
        directions = torch.linalg.qr(torch.randn(steps, channels, rank, generator=generator)).Q.mT
        gaps = torch.rand(steps, rank, generator=generator)
        centres = torch.randn(steps, channels, generator=generator)
        projections = torch.randn(steps, 2, rank, generator=generator)
        return SiteDirections(directions, gaps, centres, projections, torch.rand(steps, 2, generator=generator))

    # "10" before "2": a file that sorted its names would come back in another order
    names = [f"blocks.{10 - 8 * i}.cross_attn.proj" for i in range(len(widths))]
    sites = {name: site(channels) for name, channels in zip(names, widths, strict=True)}
    provenance = {"present": "polyps", "seeds": [1, 2**63], "cfg": 4.1, "note": "Koloskopie für zwei"}
    return PathologyVector(sites, torch.linspace(14.6, 0.03, steps), provenance, flow)


@pytest.fixture
def saved(tmp_path):
    return save(make_vector(), tmp_path / "polyps.safetensors")


def rewrite(path, tensors=None, **metadata):
    """Save the file again with other tensors or metadata; None removes a key."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    new = {key: value for key, value in {**old, **metadata}.items() if value is not None}
    save_file(tensors or load_file(path), path, metadata=new)
    return path


# Round trip


@pytest.mark.parametrize(
    "vector", [make_vector(), make_vector((8,), 1), make_vector((8, 8), 4, 3, flow=True)], ids=["two", "one", "rank 3"]
)
def test_a_vector_comes_back_bit_by_bit(tmp_path, vector):
    back = load(save(vector, tmp_path / "v.safetensors"))
    assert back.site_names == vector.site_names
    assert (back.flow, back.provenance) == (vector.flow, vector.provenance)
    assert torch.equal(back.sigmas, vector.sigmas)
    for name in vector.site_names:
        for entry in SITE_FIELDS:
            assert torch.equal(getattr(back.sites[name], entry), getattr(vector.sites[name], entry))
    assert back.content_hash() == vector.content_hash()


def with_readers(vector, seed=3):
    generator = torch.Generator().manual_seed(seed)

    def more(site):
        readers, offsets = (torch.randn(t.shape, generator=generator) for t in (site.directions, site.gaps))
        return dataclasses.replace(site, readers=readers, offsets=offsets)

    sites = {name: more(site) for name, site in vector.sites.items()}
    return PathologyVector(sites, vector.sigmas, vector.provenance, vector.flow)


def test_the_same_vector_is_the_same_file_each_time(tmp_path):
    vector = make_vector()
    assert len({save(vector, tmp_path / f"{i}.safetensors").read_bytes() for i in range(10)}) == 1


def test_readers_and_offsets_come_back_bit_by_bit(tmp_path):
    vector = with_readers(make_vector((8, 8), 4, 3))
    path = save(vector, tmp_path / "v.safetensors")
    back = load(path)
    for name in vector.site_names:
        for entry in (*SITE_FIELDS, "readers", "offsets"):
            assert torch.equal(getattr(back.sites[name], entry), getattr(vector.sites[name], entry))
    assert back.has_readers and back.content_hash() == vector.content_hash()
    with safe_open(path, "pt") as file:
        assert file.metadata()["version"] == "2"


def test_a_vector_without_readers_is_written_as_ever_and_hashes_as_ever(saved):
    """Old MedSteers read it, and old files' hashes hold; this hash is what the first version gave."""
    with safe_open(saved, "pt") as file:
        names = {name.split("/")[-1] for name in file.keys()}  # noqa: SIM118
        assert file.metadata()["version"] == "1"
    assert names == {"sigmas", *SITE_FIELDS} and not load(saved).has_readers
    known = PathologyVector(
        {"b": SiteDirections(torch.ones(1, 1, 1), *(torch.ones(s) for s in ((1, 1), (1, 1), (1, 2, 1), (1, 2))))},
        torch.ones(1),
    )
    assert known.short_hash() == "58f1a16e4f"


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_version_without_its_tensors_is_refused(tmp_path, version):
    """Readers in a file that says version 1, or none in one that says 2."""
    vector = make_vector() if version == "2" else with_readers(make_vector())
    with pytest.raises(MedSteerError, match="tensors missing .*(readers|offsets)|extra .*(readers|offsets)"):
        load(rewrite(save(vector, tmp_path / "v.safetensors"), version=version))


def test_views_of_one_tensor_can_be_saved(tmp_path):
    shared = torch.ones(1, 2)
    site = SiteDirections(torch.ones(1, 1, 1), shared[:, :1], shared[:, 1:], shared[..., None], shared)
    vector = PathologyVector({"b": site}, torch.ones(1), {})
    assert load(save(vector, tmp_path / "v.safetensors")).content_hash() == vector.content_hash()


def test_the_file_is_plain_safetensors_with_named_tensors_and_metadata(saved):
    with safe_open(saved, "pt") as file:
        assert "blocks.10.cross_attn.proj/directions" in file.keys()  # noqa: SIM118
        metadata = file.metadata()
    assert (metadata["format"], metadata["version"]) == (FORMAT, "1")
    assert json.loads(metadata["sites"]) == ["blocks.10.cross_attn.proj", "blocks.2.cross_attn.proj"]
    assert json.loads(metadata["provenance"])["present"] == "polyps"
    assert metadata["content_hash"] == make_vector().content_hash()


def test_the_loaded_values_do_not_live_in_the_file(saved):
    vector = load(saved)
    with open(saved, "r+b") as file:
        file.truncate(0)
    assert vector.content_hash() == make_vector().content_hash()


# Writing


def test_saving_replaces_the_old_file_and_leaves_nothing_else(saved):
    other = make_vector(seed=1)
    save(other, saved)
    assert load(saved).content_hash() == other.content_hash()
    assert os.listdir(saved.parent) == [saved.name]


def test_a_failed_save_keeps_the_old_file_and_leaves_nothing_else(saved, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(vector_file.os, "fsync", full)
    with pytest.raises(MedSteerError, match=r"can't be written .* No space left"):
        save(make_vector(seed=1), saved)
    assert load(saved).content_hash() == make_vector().content_hash()
    assert os.listdir(saved.parent) == [saved.name]


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(vector_file.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(make_vector(), tmp_path / "v.safetensors")
    assert os.listdir(tmp_path) == []


def test_missing_folders_are_made(tmp_path):
    assert load(save(make_vector(), tmp_path / "a" / "b" / "v.safetensors")).steps == 3


def test_a_saved_file_has_the_permissions_of_any_new_file(saved):
    (saved.parent / "other").touch()
    assert stat.S_IMODE(saved.stat().st_mode) == stat.S_IMODE((saved.parent / "other").stat().st_mode)


def test_another_suffix_is_refused(tmp_path):
    with pytest.raises(MedSteerError, match=r"ends in \.safetensors; got 'v\.pt'"):
        save(make_vector(), tmp_path / "v.pt")


# Damage


def test_any_flipped_byte_is_noticed(tmp_path):
    path = save(make_vector((2,), 2), tmp_path / "v.safetensors")
    good = path.read_bytes()
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 0xFF]) + good[position + 1 :])
        with pytest.raises(MedSteerError, match=r"v\.safetensors"):
            load(path)


def test_a_low_bit_flipped_in_the_numbers_is_noticed(saved):
    good = saved.read_bytes()
    start = 8 + int.from_bytes(good[:8], "little")
    for position in range(start, len(good), 4):
        saved.write_bytes(good[:position] + bytes([good[position] ^ 1]) + good[position + 1 :])
        with pytest.raises(MedSteerError, match="changed or damaged"):
            load(saved)


def test_a_file_cut_at_any_length_is_refused(saved):
    good = saved.read_bytes()
    for length in [*range(0, 64), *range(64, len(good), 37), len(good) - 1]:
        saved.write_bytes(good[:length])
        with pytest.raises(MedSteerError, match="not a readable safetensors"):
            load(saved)


def test_a_file_with_something_appended_is_refused(saved):
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(MedSteerError, match="not a readable safetensors"):
        load(saved)


# Foreign files


def archive():
    stream = io.BytesIO()
    np.savez(stream, values=np.zeros(3))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"", "an empty file"),
        (b"These are my notes on polyps.\n", "a text file"),
        (archive(), "a zip archive"),
        (pickle.dumps({0: {"blocks": [1.0]}}), "a Python pickle"),
        (b"GGUF\x03\0\0\0" + bytes(64), "a GGUF model"),
        (b"\x89PNG\r\n\x1a\n" + bytes(64), "a PNG picture"),
        (b"\xff" * 8 + b"{}", "a cut-off or damaged file"),
        ((2**62).to_bytes(8, "little") + b'{"a":1}', "a cut-off or damaged file"),
        (bytes(range(128, 256)) * 2, "pickle"),
        (b"\x10" + bytes(300), "a file of an unknown kind"),
    ],
    ids=["empty", "text", "zip", "pickle", "gguf", "png", "header of 2^64", "header of 2^62", "binary", "zeros"],
)
def test_a_foreign_file_is_refused_and_named_for_what_it_is(tmp_path, content, what):
    path = tmp_path / "foreign.safetensors"
    path.write_bytes(content)
    with pytest.raises(MedSteerError, match=f"{what}.*Choose a file"):
        load(path)


def test_no_code_in_a_pickle_runs(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    path = tmp_path / "bomb.safetensors"
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(MedSteerError):
        load(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_model_in_safetensors_is_refused(tmp_path, metadata):
    path = tmp_path / "model.safetensors"
    save_file({"blocks.0.weight": torch.zeros(2, 2)}, path, metadata=metadata)
    with pytest.raises(MedSteerError, match=r"1 tensors \('blocks.0.weight' ...\), but not a pathology vector"):
        load(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(MedSteerError, match="There is no file"):
        load(tmp_path / "nowhere.safetensors")
    with pytest.raises(MedSteerError, match="not a file that can be opened"):
        load(tmp_path)


# The right format, the wrong content


def test_a_newer_version_asks_for_an_update(saved):
    with pytest.raises(MedSteerError, match=r"format version '3'; this MedSteer reads versions 1 and 2. Update MedS"):
        load(rewrite(saved, version="3"))


@pytest.mark.parametrize("version", ["0", "one", "", None])
def test_a_version_that_never_was_is_refused(saved, version):
    with pytest.raises(MedSteerError, match=r"reads versions 1 and 2. Choose a file"):
        load(rewrite(saved, version=version))


@pytest.mark.parametrize(
    "metadata",
    [
        {"sites": None},
        {"content_hash": None},
        {"provenance": "{"},
        {"provenance": "[" * 100_000},
        {"provenance": "[]"},
        {"flow": "1"},
        {"sites": "{}"},
        {"sites": "[1]"},
        {"sites": '["blocks.2.cross_attn.proj", "blocks.2.cross_attn.proj"]'},
    ],
)
def test_a_damaged_header_is_refused(saved, metadata):
    with pytest.raises(MedSteerError, match="damaged header"):
        load(rewrite(saved, **metadata))


@pytest.mark.parametrize(
    "metadata", [{"flow": "true"}, {"provenance": '{"present":"normal cecum"}'}, {"content_hash": "0" * 64}]
)
def test_changed_metadata_is_noticed(saved, metadata):
    with pytest.raises(MedSteerError, match=r"its hash is [0-9a-f]{64}, and the file says"):
        load(rewrite(saved, **metadata))


def test_sites_in_another_order_are_noticed(saved):
    sites = json.dumps(make_vector().site_names[::-1])
    with pytest.raises(MedSteerError, match="its hash is"):
        load(rewrite(saved, sites=sites))


def test_missing_and_extra_tensors_are_named(saved):
    tensors = load_file(saved)
    gone = {name: tensor for name, tensor in tensors.items() if name != "sigmas"}
    with pytest.raises(MedSteerError, match=r"missing \['sigmas'\], extra \[\]"):
        load(rewrite(saved, gone))
    with pytest.raises(MedSteerError, match=r"missing \[\], extra \['more'\]"):
        load(rewrite(saved, {**tensors, "more": torch.zeros(1)}))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("sigmas", lambda t: t.half(), "Tensor 'sigmas' is torch.float16; torch.float32"),
        ("blocks.2.cross_attn.proj/gaps", lambda t: t.double(), "proj/gaps' is torch.float64"),
        ("blocks.2.cross_attn.proj/gaps", lambda t: t * float("nan"), "'blocks.2.cross_attn.proj': gaps .* not finite"),
        ("blocks.2.cross_attn.proj/gaps", lambda t: t[:2].clone(), r"gaps has shape \(2, 1\); \(3, 1\)"),
        ("blocks.2.cross_attn.proj/directions", lambda t: 2 * t, "unit length"),
        ("sigmas", lambda t: t.flip(0), "strictly descending"),
    ],
)
def test_values_that_do_not_fit_are_refused_by_name(saved, name, change, message):
    tensors = load_file(saved)
    with pytest.raises(MedSteerError, match=f"is a damaged pathology vector. .*{message}"):
        load(rewrite(saved, {**tensors, name: change(tensors[name])}))
