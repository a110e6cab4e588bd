"""The two published formats: read as they are, refused when they are anything else, and never run."""

import dataclasses
import io
import os
import pickle
import pickletools
import struct
import time
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

from medsteer_core.errors import MedSteerError
from medsteer_core.files import restricted_pickle
from medsteer_core.files.restricted_pickle import PickledArray, loads
from medsteer_core.steering.operators import make_operator
from medsteer_core.steering.plan import check_statistics
from medsteer_core.vectors import reference_files
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections
from medsteer_core.vectors.reference_files import NPZ_FORMAT, ReferenceField, read, read_npz, read_pickle, write_npz
from medsteer_core.vectors.reference_vectors import describe_imported, from_vector, is_imported, to_vector

STEPS, LAYERS, WIDTH = 4, 3, 8
SITES = {f"blocks.{index}.cross_attn.proj": WIDTH for index in range(LAYERS)}
SIGMAS = torch.tensor([16.0, 4.0, 1.0, 0.25])
PROTOCOLS = range(2, 6)


def unit(*shape, seed=0, dtype=np.float32):
    values = np.random.default_rng(seed).normal(size=shape)
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(dtype)


def steps_of(values):
    """What the reference code pickles."""
    return {step: {"blocks": list(blocks)} for step, blocks in enumerate(values)}


def archive(**changes):
    """The bytes of PolypSteer's archive; None leaves a member out."""
    members = {
        "format": NPZ_FORMAT, "values": unit(STEPS, LAYERS, WIDTH), "layer_ids": np.arange(LAYERS),
        "positive_prompts": ["polyps", "polyps"], "negative_prompts": ["cecum"], "seeds": [3, 5], **changes,
    }  # fmt: skip
    stream = io.BytesIO()
    np.savez(stream, **{key: value for key, value in members.items() if value is not None})
    return stream.getvalue()


def field(values=None, **changes):
    values = torch.from_numpy(unit(STEPS, LAYERS, WIDTH)) if values is None else torch.as_tensor(values)
    made = ReferenceField(values, tuple(range(values.shape[1])), NPZ_FORMAT, False, "v.npz", "ab" * 32, ("polyps",) * 2)
    return dataclasses.replace(made, **changes)


class Call:
    """Pickles as a call of a global with arguments."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


# Reading


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_a_pickle_of_any_protocol_and_float_gives_its_numbers(protocol, dtype):
    values = unit(STEPS, LAYERS, WIDTH, dtype=dtype)
    made = read_pickle(pickle.dumps(steps_of(values), protocol=protocol), "v.pickle")
    assert np.array_equal(made.values.numpy(), values.astype(np.float32)) and made.values.dtype == torch.float32
    assert (made.layers, made.all_layers, made.format) == ((0, 1, 2), True, "medsteer-pickle")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_numpy_keys_views_and_other_entries_do_not_hurt(protocol):
    values = unit(2, 1, 2 * WIDTH)
    steps = {np.int64(s): {"blocks": (values[s, 0, ::2],), "t": np.float32(s), "none": [None, True]} for s in (1, 0)}
    made = read_pickle(pickle.dumps(steps, protocol=protocol), "v.pickle")
    assert np.array_equal(made.values.numpy(), values[:, :, ::2])


@pytest.mark.parametrize("core", ["numpy.core", "numpy._core"])
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_pickles_of_numpy_1_and_2_are_read(core, protocol):
    data = pickle.dumps(steps_of(unit(1, 1, 4)), protocol=protocol)
    for written in (b"numpy._core", b"numpy.core"):
        if written in data:  # protocols 4 and 5 say how long the name is, and how long the frame
            ends = {b"numpy._core.multiarray": core, b"numpy._core.numeric": core, b"numpy.core.multiarray": core}
            for name, to in ends.items():
                new = f"{to}.{name.decode().rsplit('.', 1)[1]}".encode()
                data = data.replace(struct.pack("<B", len(name)) + name, struct.pack("<B", len(new)) + new)
                data = data.replace(b"c" + name, b"c" + new)
            break
    assert core.encode() + b"." in data
    assert np.array_equal(read_pickle(data, "v.pickle").values.numpy(), unit(1, 1, 4))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_any_array_of_numbers_comes_back(protocol):
    made = {
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "i": np.arange(3, dtype=np.int16),
        "b": np.ones(2, bool),
    }
    back = loads(pickle.dumps(made, protocol=protocol), "v.pickle")
    for name, array in made.items():
        assert isinstance(back[name], PickledArray)
        assert np.array_equal(back[name].values, array) and back[name].values.dtype == array.dtype


def test_an_archive_gives_everything_that_it_holds():
    made = read_npz(archive(layer_ids=np.array([2, 0, 5])), "v.npz")
    assert np.array_equal(made.values.numpy(), unit(STEPS, LAYERS, WIDTH))
    assert (made.layers, made.seeds, made.all_layers) == ((2, 0, 5), (3, 5), False)
    assert (made.positive_prompts, made.negative_prompts) == (("polyps", "polyps"), ("cecum",))


def test_an_archive_may_be_compressed_and_of_the_other_byte_order():
    stream = io.BytesIO()
    source = np.load(io.BytesIO(archive()))
    np.savez_compressed(stream, **{**source, "values": np.asfortranarray(source["values"].astype(">f4"))})
    assert np.array_equal(read_npz(stream.getvalue(), "v.npz").values.numpy(), source["values"])


def test_the_suffix_says_which_format_it_is(tmp_path):
    data = pickle.dumps(steps_of(unit(STEPS, LAYERS, WIDTH)))
    for name, content in (("a.pickle", data), ("a.pkl", data), ("a.npz", archive())):
        (tmp_path / name).write_bytes(content)
        assert (read(tmp_path / name).name, len(read(tmp_path / name).sha256)) == (name, 64)
    with pytest.raises(MedSteerError, match=r"'a.pt' ends in '.pt'; .pickle, .pkl or .npz was expected"):
        read(tmp_path / "a.pt")
    with pytest.raises(MedSteerError, match=r"'gone.npz' can't be read"):
        read(tmp_path / "gone.npz")


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "large.pickle"
    with open(path, "wb") as file:
        file.truncate(reference_files.LARGEST + 1)  # takes no room on most disks
    with pytest.raises(MedSteerError, match="'large.pickle' has 256 MiB"):
        read(path)


# Pickles that ask for more


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("asks", "named"),
    [
        (Call(os.system, "touch ran"), "(posix|nt).system"),
        (Call(eval, "open('ran', 'w')"), "(builtins|__builtin__).eval"),
        (Call(getattr, "a", "upper"), "(builtins|__builtin__).getattr"),
        (Call(np.frombuffer, b"abcd"), "numpy.*frombuffer"),
        (Call(np.load, "ran.npy"), "numpy.load"),
        (np.random.default_rng, "numpy.random.*default_rng"),
        (dataclasses.dataclass, "dataclasses.dataclass"),
    ],
)
def test_a_pickle_that_asks_for_a_global_is_refused_by_its_name(tmp_path, monkeypatch, asks, named, protocol):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({0: {"blocks": [np.ones(4), asks]}}, protocol=protocol)
    with pytest.raises(
        MedSteerError, match=f"'v.pickle' is a pickle that asks for the global '{named}'.*Nothing was run"
    ):
        read_pickle(data, "v.pickle")
    assert os.listdir(tmp_path) == []


def test_torch_tensors_are_refused_with_advice():
    with pytest.raises(MedSteerError, match=r"the global 'torch\..*Save its tensors as numpy arrays"):
        read_pickle(pickle.dumps({0: {"blocks": [torch.ones(4)]}}), "v.pickle")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_arrays_of_objects_are_refused(protocol):
    with pytest.raises(MedSteerError, match="a numpy array of Python objects"):
        read_pickle(pickle.dumps({0: {"blocks": [np.array([{}, "x"], object)]}}, protocol=protocol), "v.pickle")


@pytest.mark.parametrize("protocol", [0, 1])
def test_old_protocols_are_refused(protocol):
    with pytest.raises(MedSteerError, match="does not begin as pickles of protocol 2 to 5 do"):
        read_pickle(pickle.dumps({0: 1}, protocol=protocol), "v.pickle")


@pytest.mark.parametrize(
    ("code", "opcode"),
    [
        (b"\x80\x02Pid\n.", "PERSID"),
        (b"\x80\x02(i__main__\nX\n.", "INST"),
        (b"\x80\x02}\x81.", "NEWOBJ"),
        (b"\x80\x04\x97.", "NEXT_BUFFER"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02L" + b"9" * 5000 + b"L\n.", "LONG"),
        (b"\x80\x02\x8b\xff\xff\xff\x7f.", "LONG4"),
    ],
)
def test_an_opcode_that_arrays_do_not_need_is_refused_by_name(code, opcode):
    with pytest.raises(MedSteerError, match=f"with the opcode {opcode};"):
        loads(code, "v.pickle")


def global_name(module, name):
    return f"c{module}\n{name}\n".encode()


DTYPE = global_name("numpy", "dtype") + b"X\x02\x00\x00\x00f8\x85R"


@pytest.mark.parametrize(
    "code",
    [
        # an array whose shape asks for 2**60 numbers
        b"\x80\x02" + global_name("numpy._core.numeric", "_frombuffer") + b"(C\x01a" + DTYPE
        + b"\x8a\x08" + struct.pack("<q", 2**60) + b"\x85X\x01\x00\x00\x00CtR.",
        # memo entry 2**32 - 1
        b"\x80\x02}r\xff\xff\xff\xff",
        # text and bytes that say they are larger than the file
        b"\x80\x04B\xff\xff\xff\xffabc.",
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"abc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63) + b"abc.",
        b"\x80\x05\x96" + struct.pack("<Q", 2**62) + b"abc.",
        # a frame that says so
        b"\x80\x04\x95" + struct.pack("<Q", 2**62),
        # a state given to, and a call of, what must not have them
        b"\x80\x02" + global_name("numpy", "dtype") + b"}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02]}X\x01\x00\x00\x00aK\x01sb.",
        b"\x80\x02" + DTYPE + b")R.",
        # a function's shape as a tuple of tuples, a dtype from one
        b"\x80\x02" + global_name("numpy", "dtype") + b")" + b"\x85" * 50_000 + b"\x85R.",
        # a key that is a tower of tuples: hashing it would overflow the stack
        b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",
        b"\x80\x02" + b"(" * 200_000,
        b"\x80\x02" + b"]" * 200_000 + b".",
    ],
)  # fmt: skip
def test_a_pickle_cannot_take_more_than_it_brings(code):
    tracemalloc.start()
    with pytest.raises(MedSteerError, match="'v.pickle' is no readable pickle"):
        loads(code, "v.pickle")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_an_array_that_declares_more_than_it_holds_is_named():
    data = pickle.dumps({0: {"blocks": [np.ones(4)]}}, protocol=4)
    longer = data.replace(b"K\x04\x85", b"K\x05\x85")  # its shape, (4,) and then (5,)
    with pytest.raises(MedSteerError, match="an array that declares 40 bytes and holds 32"):
        read_pickle(longer, "v.pickle")


def test_a_pickle_of_too_many_parts_is_refused(monkeypatch):
    monkeypatch.setattr(restricted_pickle, "OPCODES", 100)
    assert loads(b"\x80\x02](" + b"N" * 95 + b"e.", "v.pickle") == [None] * 95
    with pytest.raises(MedSteerError, match="of more than 100 parts"):
        loads(b"\x80\x02](" + b"N" * 96 + b"e.", "v.pickle")


def test_deep_and_circular_values_are_harmless():
    loads(b"\x80\x02" + b"]" * 200_000 + b"a" * 199_999 + b".", "v.pickle")
    value = []
    value.append(value)
    with pytest.raises(MedSteerError, match="a list; a dict from the steps"):
        read_pickle(pickle.dumps(value), "v.pickle")


def test_one_array_named_a_million_times_is_not_copied_a_million_times():
    row, blocks = np.ones(2000, np.float32), []
    blocks.extend([row] * 300_000)
    data = pickle.dumps({0: {"blocks": blocks}})
    assert len(data) < 2e6
    with pytest.raises(MedSteerError, match="1 steps of 300000 blocks, more than its bytes can hold"):
        read_pickle(data, "v.pickle")


def test_a_pickle_cut_at_any_length_or_with_something_appended_is_refused():
    for protocol in PROTOCOLS:
        data = pickle.dumps(steps_of(unit(2, 2, 4)), protocol=protocol)
        for length in range(len(data)):
            with pytest.raises(MedSteerError, match=r"'v\.pickle'"):
                read_pickle(data[:length], "v.pickle")
        with pytest.raises(MedSteerError, match="1 bytes after its end"):
            read_pickle(data + b"x", "v.pickle")


def test_any_flipped_byte_of_a_pickle_gives_an_error_or_numbers():
    """Never another exception: Python's own unpickler would run some of these."""
    data = bytearray(pickle.dumps(steps_of(unit(1, 2, 4)), protocol=2))
    for position in range(len(data)):
        for change in (0x01, 0x10, 0xFF):
            flipped = bytes(data[:position]) + bytes([data[position] ^ change]) + bytes(data[position + 1 :])
            try:
                assert isinstance(read_pickle(flipped, "v.pickle"), ReferenceField)
            except MedSteerError as error:
                assert "v.pickle" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("opcode", sorted(entry.name for entry in pickletools.opcodes))
def test_every_opcode_on_an_empty_stack_gives_an_error(opcode):
    code = next(entry.code for entry in pickletools.opcodes if entry.name == opcode).encode("latin-1")
    for arguments in (b"", b"\0", b"\0" * 8, b"a\na\n", b"\x05"):
        with pytest.raises(MedSteerError):
            read_pickle(b"\x80\x02" + code + arguments + b".", "v.pickle")


# Pickles of something else


@pytest.mark.parametrize(
    ("value", "found"),
    [
        ([np.ones(4)], "a list"),
        ({}, "a dict with the keys none;"),
        ({1: {"blocks": [np.ones(4)]}}, "a dict with the keys 1;"),
        ({0: {"blocks": [np.ones(4)]}, 2: {"blocks": [np.ones(4)]}}, "a dict with the keys 0, 2;"),
        ({"0": {"blocks": [np.ones(4)]}}, "a dict with the keys 0;"),
        ({0: [np.ones(4)]}, "a list at step 0"),
        ({0: {"layers": [np.ones(4)]}}, "the keys layers at step 0"),
        ({0: {"blocks": []}}, "an empty list as blocks at step 0"),
        ({0: {"blocks": np.ones((2, 4))}}, r"a float64 array \(2, 4\) as blocks at step 0"),
        ({0: {"blocks": [[1.0, 2.0]]}}, "a list at step 0, block 0"),
        ({0: {"blocks": [np.ones((1, 4))]}}, r"a float64 array \(1, 4\) at step 0, block 0"),
        ({0: {"blocks": [np.arange(4)]}}, r"a int64 array \(4,\) at step 0, block 0"),
        ({0: {"blocks": [np.ones(4), np.ones(5)]}}, r"a float64 array \(5,\) at step 0, block 1; a float array \(4,\)"),
        (
            {0: {"blocks": [np.ones(4)] * 2}, 1: {"blocks": [np.ones(4)]}},
            "1 blocks at step 1 and 2 at step 0",
        ),
    ],
)  # fmt: skip
def test_a_pickle_of_something_else_is_refused_for_what_it_is(value, found):
    with pytest.raises(MedSteerError, match=f"'v.pickle' is no pathology vector.*it has {found}"):
        read_pickle(pickle.dumps(value), "v.pickle")


# Archives of something else


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"format": "polypsteer-pathology-field-v2"}, "of the format 'polypsteer-pathology-field-v2'"),
        ({"format": np.float32(3)}, "whose format are float32"),
        ({"seeds": None, "layer_ids": None}, "without layer_ids, seeds"),
        ({"values": np.array([{}, 1], object)}, "whose values are Python objects, which are never read"),
        ({"positive_prompts": np.array(["a", None], object)}, "whose positive_prompts are Python objects"),
        ({"values": unit(3, 3, 8, dtype=np.float64)}, "whose values are float64"),
        ({"values": unit(3, 8)}, r"whose values are float32 \(3, 8\)"),
        ({"values": np.zeros((0, 3, 8), np.float32)}, "whose values are float32"),
        ({"values": np.zeros(3, [("a", "f4")])}, "whose values are no plain array"),
        ({"layer_ids": np.arange(2)}, r"with 2 layer_ids \(0, 1\) for 3 layers"),
        ({"layer_ids": np.array([0, 1, 1])}, r"with 3 layer_ids \(0, 1, 1\) for 3 layers"),
        ({"layer_ids": np.array([0, -1, 2])}, r"with 3 layer_ids \(0, -1, 2\) for 3 layers"),
        ({"layer_ids": np.array([0.0, 1.0, 2.0])}, "whose layer_ids are float64"),
        ({"seeds": np.zeros(2**18, np.int64)}, "whose seeds unpack to 2097280 bytes; 1048576 at most"),
    ],
)
def test_an_archive_of_something_else_is_refused_for_what_it_is(changes, found):
    with pytest.raises(MedSteerError, match=f"'v.npz' is no pathology vector.*a NumPy archive {found}.*{NPZ_FORMAT}"):
        read_npz(archive(**changes), "v.npz")


def member(shape, data=b"", descr="<f4"):
    """An .npy file with a header of its own."""
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def repacked(compression=zipfile.ZIP_STORED, times=1, **members):
    """The archive with some members replaced by bytes."""
    stream = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive())) as old, zipfile.ZipFile(stream, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, members.get(name.removesuffix(".npy"), old.read(name)))
        for number in range(times - 1):
            new.writestr(f"more{number}", b"")
    return stream.getvalue()


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (repacked(values=member((2**20, 2**20, 2**20))), "declare the shape"),
        (repacked(values=member((10**17,), descr="<U0")), "declare the shape"),
        (repacked(positive_prompts=member((2**40,), descr="<U0")), "declare the shape"),
        (repacked(values=member((1, 2, 3), bytes(23))), "declare the shape"),
        (repacked(values=b"no array at all"), "no array"),
        (repacked(values=member("(" * 5000)), "no plain array"),
        (repacked(values=b"\x93NUMPY\x02\x00\xff\xff\xff\xff{}"), "no plain array"),
        (repacked(times=100), "more than 64 members"),
        (repacked(compression=zipfile.ZIP_BZIP2), "packed in another way"),
        (repacked(zipfile.ZIP_DEFLATED, values=member((reference_files.LARGEST,), bytes(300 * 2**20))), "unpack to"),
    ],
    ids=["huge shape", "no bytes each", "texts of none", "one byte less", "foreign", "nested", "header of 4 GB",
         "100 members", "bzip2", "zip bomb"],
)  # fmt: skip
def test_an_archive_that_declares_what_it_does_not_hold_is_refused(data, found):
    tracemalloc.start()
    with pytest.raises(MedSteerError, match=f"'v.npz' is no pathology vector.*{found}"):
        read_npz(data, "v.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_a_bomb_that_lies_about_its_size_is_not_unpacked():
    data = repacked(zipfile.ZIP_DEFLATED, values=member((1, 1, 25 * 2**20), bytes(100 * 2**20)))
    true, lie = (struct.pack("<L", size) for size in (100 * 2**20 + len(member((1, 1, 25 * 2**20))), 4096))
    assert data.count(true) == 2 and len(data) < 1e6  # in the member's own header and in the list of contents
    tracemalloc.start()
    with pytest.raises(MedSteerError, match="'v.npz'"):
        read_npz(data.replace(true, lie), "v.npz")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10e6


def test_an_archive_cut_at_any_length_is_refused():
    data = archive()
    for length in [*range(0, len(data), 41), len(data) - 1]:
        with pytest.raises(MedSteerError, match="'v.npz' is no pathology vector"):
            read_npz(data[:length], "v.npz")


def test_any_flipped_byte_of_an_archive_gives_an_error_or_numbers():
    data = archive(values=unit(1, 3, 2))
    for position in range(len(data)):
        try:
            made = read_npz(data[:position] + bytes([data[position] ^ 0x11]) + data[position + 1 :], "v.npz")
        except MedSteerError as error:
            assert "\n" not in str(error)
        else:
            assert np.array_equal(made.values.numpy(), unit(1, 3, 2))  # zip's checksums cover the content


# From a file to a vector


def test_a_file_becomes_a_vector_of_its_directions():
    made = to_vector(field(), SITES, SIGMAS, "normal, 4 steps")
    assert made.site_names == tuple(SITES) and made.rank == 1 and torch.equal(made.sigmas, SIGMAS)
    for place, name in enumerate(SITES):
        assert torch.equal(made.sites[name].directions[:, 0], field().values[:, place])
    assert made.provenance["source"] == {"format": NPZ_FORMAT, "file": "v.npz", "sha256": "ab" * 32}
    assert made.provenance["prompts"]["present"] == {"text": "polyps", "texts": ["polyps", "polyps"]}
    assert made.provenance["prompts"]["absent"] == {"text": None, "texts": []}
    assert (made.provenance["scheduler"], made.provenance["steps"]) == ("normal, 4 steps", 4)
    assert made.provenance["unknown"] == ["gaps", "centres", "projections", "spreads"]
    assert (made.provenance["degenerate"], made.provenance["normalised"]) == (0, 0)
    assert "dropped_sites" not in made.provenance and "model" not in made.provenance


def test_layers_may_stand_in_any_order_and_be_only_some():
    values = field().values
    made = to_vector(field(values[:, :2], layers=(2, 0)), SITES, SIGMAS, "")
    names = list(SITES)
    assert made.site_names == (names[0], names[2]) and made.provenance["dropped_sites"] == [names[1]]
    assert torch.equal(made.sites[names[2]].directions[:, 0], values[:, 0])
    assert torch.equal(made.sites[names[0]].directions[:, 0], values[:, 1])


def test_directions_of_another_length_are_normalised_and_counted():
    values = field().values.clone()
    values[1, 2] *= 3.0
    made = to_vector(field(values), SITES, SIGMAS, "")
    got = made.sites["blocks.2.cross_attn.proj"].directions[1, 0]
    torch.testing.assert_close(got, field().values[1, 2], rtol=1e-6, atol=1e-7)
    assert made.provenance["normalised"] == 1 and "1 directions did not have length 1" in describe_imported(made)


@pytest.mark.parametrize("off", [1 - 2.4e-4, 1 + 2.4e-4, 1 + 2.6e-4, 1.01, 1e-5])
def test_any_length_above_zero_gives_a_valid_vector(off):
    made = to_vector(field(field().values * off), SITES, SIGMAS, "")
    assert made.sites["blocks.0.cross_attn.proj"].directions.norm(dim=-1).sub(1).abs().max() < 3e-4


def test_a_step_without_a_direction_borrows_the_nearest_and_a_site_without_any_is_left_out():
    values = field().values.clone()
    values[0, 0] = values[:, 1] = 0
    made = to_vector(field(values), SITES, SIGMAS, "")
    names = list(SITES)
    assert made.site_names == (names[0], names[2]) and made.provenance["dropped_sites"] == [names[1]]
    assert torch.equal(made.sites[names[0]].directions[0], made.sites[names[0]].directions[1])
    assert made.provenance["degenerate"] == 1 and "1 directions were zero" in describe_imported(made)


def test_a_file_of_zeros_is_refused():
    with pytest.raises(MedSteerError, match="'v.npz' holds only zeros"):
        to_vector(field(torch.zeros(STEPS, LAYERS, WIDTH)), SITES, SIGMAS, "")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused_by_their_place(value):
    values = field().values.clone()
    values[2, 1, 3] = value
    with pytest.raises(MedSteerError, match="not finite .* at step 2, block 1"):
        to_vector(field(values), SITES, SIGMAS, "")


def test_a_pickles_number_beyond_float32_is_refused_as_not_finite():
    made = read_pickle(pickle.dumps({0: {"blocks": [np.full(WIDTH, 1e300)] * 3}}), "v.pickle")
    with pytest.raises(MedSteerError, match="'v.pickle' has values that are not finite"):
        to_vector(made, SITES, SIGMAS[:1], "")


def test_another_number_of_steps_is_refused_naming_both():
    with pytest.raises(MedSteerError, match=r"'v.npz' has 4 steps, and normal, 3 steps gives 3: .*at 4 steps"):
        to_vector(field(), SITES, SIGMAS[:3], "normal, 3 steps")


def test_another_depth_is_refused_naming_both():
    two = dict(list(SITES.items())[:2])
    with pytest.raises(MedSteerError, match=r"'v.npz' was made for another model: it has block 2 .*model has 2 blocks"):
        to_vector(field(), two, SIGMAS, "")
    whole = field(all_layers=True)
    for sites in (two, {**SITES, "blocks.3.cross_attn.proj": WIDTH}):
        with pytest.raises(MedSteerError, match=f"it has 3 blocks, and this model has {len(sites)} blocks"):
            to_vector(whole, sites, SIGMAS, "")


def test_another_width_is_refused_naming_both():
    wide = dict.fromkeys(SITES, 16)
    with pytest.raises(
        MedSteerError, match=r"have 8 channels, and site 'blocks.0.cross_attn.proj' of this model has 16"
    ):
        to_vector(field(), wide, SIGMAS, "")
    assert to_vector(field(), dict.fromkeys(SITES), SIGMAS, "").rank == 1


# What is unknown


@pytest.mark.parametrize(("name", "works"), [("suppress", True), ("ablate", True), ("add", False), ("set", False)])
def test_only_operators_that_need_directions_alone_take_an_imported_vector(name, works):
    imported = to_vector(field(), SITES, SIGMAS, "")
    own = dataclasses.replace(imported, provenance={})
    check_statistics(own, make_operator(name))
    if works:
        check_statistics(imported, make_operator(name))
    else:
        check_statistics(imported, make_operator(name, strength=0.0))
        with pytest.raises(MedSteerError, match=rf"operator '{name}'.*imported.*suppress or ablate, or extract"):
            check_statistics(imported, make_operator(name))


def test_the_summary_says_what_was_assumed_and_what_is_unknown():
    made = to_vector(field(seeds=(1, 2, 3)), SITES, SIGMAS, "normal, 4 steps")
    text = describe_imported(made)
    assert is_imported(made)
    for part in ("polyps - absent, text unknown", "v.npz", NPZ_FORMAT, "3 seeds", "from sigma 16 to 0.25",
                 "normal, 4 steps", "3 of 3 sites, 8 channels", "suppress and ablate"):  # fmt: skip
        assert part in text


# And back


def vector(widths=(WIDTH, WIDTH), rank=1, names=None, provenance=None):
    generator = torch.Generator().manual_seed(1)

    def site(channels):
        directions = torch.linalg.qr(torch.randn(STEPS, channels, rank, generator=generator)).Q.mT.contiguous()
        zeros = torch.zeros(STEPS, rank)
        return SiteDirections(
            directions, zeros, torch.zeros(STEPS, channels), torch.zeros(STEPS, 2, rank), torch.zeros(STEPS, 2)
        )

    names = names or [f"blocks.{index}.cross_attn.proj" for index in range(len(widths))]
    facts = {"prompts": {"present": {"text": "polyps"}, "absent": {"text": None}}, "seed": 2**63 + 5}
    return PathologyVector({n: site(w) for n, w in zip(names, widths, strict=True)}, SIGMAS, provenance or facts)


def test_a_vector_comes_back_from_an_archive_bit_by_bit(tmp_path):
    names = ["blocks.0.cross_attn.proj", "blocks.2.cross_attn.proj"]
    own = vector(names=names)
    back = to_vector(read(write_npz(from_vector(own), tmp_path / "a" / "v.npz")), SITES, SIGMAS, "")
    assert back.site_names == tuple(names) and torch.equal(back.sigmas, own.sigmas)
    for name in names:
        assert torch.equal(back.sites[name].directions, own.sites[name].directions)
    assert back.provenance["prompts"]["present"]["text"] == "polyps" and back.provenance["seeds"] == [2**63 + 5]
    again = from_vector(back)
    assert (again.positive_prompts, again.negative_prompts, again.seeds) == (("polyps",), (), (2**63 + 5,))
    assert torch.equal(again.values, from_vector(own).values)
    assert os.listdir(tmp_path / "a") == ["v.npz"]


def test_the_archive_is_what_polypsteer_writes(tmp_path):
    made = from_vector(to_vector(field(seeds=(3, 4), negative_prompts=("cecum",)), SITES, SIGMAS, ""))
    with np.load(write_npz(made, tmp_path / "v.npz"), allow_pickle=False) as file:
        assert set(file) == {"format", "values", "layer_ids", "positive_prompts", "negative_prompts", "seeds"}
        assert str(file["format"]) == "polypsteer-pathology-field-v3"
        assert file["values"].dtype == np.float32 and np.array_equal(file["values"], unit(STEPS, LAYERS, WIDTH))
        assert file["layer_ids"].tolist() == [0, 1, 2] and file["layer_ids"].dtype == np.int64
        assert file["positive_prompts"].tolist() == ["polyps", "polyps"]
        assert file["negative_prompts"].tolist() == ["cecum"] and file["seeds"].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("own", "why"),
    [
        (vector(rank=2), "has rank 2, and PolypSteer's .npz holds one direction"),
        (vector(widths=(8, 16)), "blocks have 8, 16 channels"),
        (vector(names=["blocks.0.cross_attn.proj", "middle_block.1.attn2.to_out"]), "the site 'middle_block.1"),
    ],
)
def test_what_the_archive_cannot_hold_is_refused(own, why):
    with pytest.raises(MedSteerError, match=f"{why}.*Save Pathology Vector"):
        from_vector(own)


def test_an_interrupted_export_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reference_files.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_npz(from_vector(vector()), tmp_path / "v.npz")
    assert os.listdir(tmp_path) == []


# What a review found: small files that took memory or time without end


def _read_in_time(data):
    begun = time.monotonic()
    with pytest.raises(MedSteerError) as caught:
        reference_files.read_pickle(data, "small.pickle")
    assert time.monotonic() - begun < 5.0
    return str(caught.value)


def test_one_text_is_not_made_into_bytes_again_and_again():
    text = b"a" * (1 << 18)
    head = (
        b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<I", len(text)) + text + b"X\x06\x00\x00\x00latin1\x86q\x01"
    )
    assert "again and again" in _read_in_time(head + b"h\x00h\x01R" * 3000 + b".")


def test_a_globals_name_of_nested_tuples_is_not_spelt_out():
    shared = b"\x80\x04)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(40)) + b"\x8c\x01a\x93."
    deep = b"\x80\x04)" + b"\x85" * 100000 + b"\x8c\x01a\x93."
    for data in (shared, deep):
        assert "asks for the global 'a tuple.a'" in _read_in_time(data)


def test_keys_that_share_one_hash_are_refused():
    modulus = (1 << 61) - 1
    items = b"".join(b"\x8a\x0c" + ((i + 1) * modulus).to_bytes(12, "little") + b"N" for i in range(20000))
    assert "whole numbers of a step's size" in _read_in_time(b"\x80\x02}(" + items + b"u.")


@pytest.mark.parametrize(
    ("member", "descr", "shape", "body"),
    [("values", "<f3", "(1,)", b"abc"), ("values", "<U999999999", "(0,)", b""),
     ("positive_prompts", "<U1", "(1,)", b"\xff\xff\xff\x7f")],
)  # fmt: skip
def test_dtypes_and_letters_that_numpy_does_not_know_are_refused_in_our_words(member, descr, shape, body):
    arrays = {
        "format": np.array(reference_files.NPZ_FORMAT), "values": np.ones((2, 1, 4), np.float32),
        "layer_ids": np.array([0]), "positive_prompts": np.array(["a"]), "negative_prompts": np.array(["b"]),
        "seeds": np.array([1]),
    }  # fmt: skip
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, array in arrays.items():
            plain = io.BytesIO()
            np.save(plain, array)
            data = plain.getvalue()
            if name == member:
                header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
                data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + body
            archive.writestr(f"{name}.npy", data)
    with pytest.raises(MedSteerError, match="odd.npz"):
        reference_files.read_npz(stream.getvalue(), "odd.npz")
