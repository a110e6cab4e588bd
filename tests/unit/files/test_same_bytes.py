"""A safetensors file is a function of its content, down to the last byte."""

import torch
from safetensors import safe_open
from safetensors.torch import load, save

from medsteer_core.files.same_bytes import to_bytes

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b/c": torch.tensor([1, 2], dtype=torch.int64)}
METADATA = {name: name * 3 for name in ("format", "version", "sites", "flow", "été", 'quo"te')}


def test_the_same_content_is_the_same_file_each_time_in_any_order():
    backwards = dict(reversed(METADATA.items()))
    assert len({to_bytes(TENSORS, METADATA) for _ in range(10)} | {to_bytes(TENSORS, backwards)}) == 1
    assert len({save(TENSORS, metadata=METADATA) for _ in range(30)}) > 1  # why the library's own order won't do


def test_the_library_reads_what_was_put_in(tmp_path):
    data = to_bytes(TENSORS, METADATA)
    assert all(torch.equal(value, TENSORS[name]) for name, value in load(data).items())
    (tmp_path / "file.safetensors").write_bytes(data)
    with safe_open(tmp_path / "file.safetensors", "pt") as file:
        assert file.metadata() == METADATA and set(file.keys()) == set(TENSORS)


def test_the_tensors_begin_at_a_multiple_of_eight_whatever_the_header():
    for length in range(8):
        data = to_bytes(TENSORS, {"x": "y" * length})
        assert int.from_bytes(data[:8], "little") % 8 == 0


def test_a_file_without_metadata_is_written_too():
    assert torch.equal(load(to_bytes(TENSORS, {}))["a"], TENSORS["a"])
