"""What steering and capturing do inside a model call: nothing that waits, copies to the host, casts, or outlives it.

Traces compare a steered call with an unsteered one of the same model: what the model does by itself is no concern here.
"""

import dataclasses
from argparse import Namespace
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest
import tiny
import torch
from medsteer_pack.medsteer_core.extraction import sample_watch
from medsteer_pack.medsteer_core.extraction.capture import ActivationSums
from medsteer_pack.medsteer_core.extraction.sample_watch import SampleWatch
from medsteer_pack.medsteer_core.host.patching import hooks, patch
from medsteer_pack.medsteer_core.host.patching.sites import find_sites, fresh_layers, owns_its_output
from medsteer_pack.medsteer_core.steering import prepared as prepared_steering
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed import overhead

POSITIVE, NEGATIVE = tiny.cond(1), tiny.cond(2)
# Kernels that wait for the device, cast, or go to another device; on a GPU a mask of bools as an index waits as well.
KERNELS = {"aten::_local_scalar_dense", "aten::_to_copy", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}
# What Python asks for: on a CPU most of it needs no kernel, and on a GPU it waits or copies.
ASKED = {
    "cpu", "numpy", "__array__", "item", "tolist", "__bool__", "__float__", "__int__", "cuda", "to", "type", "tensor",
    "as_tensor", "from_numpy", "double", "half", "bfloat16", "nonzero",
}  # fmt: skip


class Kernels(TorchDispatchMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[func._schema.name] += 1
        return func(*args, **(kwargs or {}))


class Asked(TorchFunctionMode):
    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", str(func))
        # A token's weight may take the activation's dtype; a vector or an activation may not be taken anywhere.
        of_vector = name != "to" or tuple(args[0].shape[-1:]) == (tiny.WIDTH,)
        self.seen[name] += of_vector
        return func(*args, **(kwargs or {}))


@contextmanager
def traced(model):
    """Count what is done between the first block's beginning and the last block's end, in all calls of a run."""
    seen, modes = Counter(), []
    blocks = model.model.diffusion_model.blocks

    def begin(*_):
        modes.extend((Kernels(seen), Asked(seen)))
        for mode in modes:
            mode.__enter__()

    def end(*_):
        while modes:
            modes.pop().__exit__(None, None, None)

    handles = [blocks[0].register_forward_pre_hook(begin), blocks[-1].register_forward_hook(end)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
        end()


def added(pixart, model, run_of=None):
    """What a run of `model` does inside the blocks, beyond what an unsteered one does there: all, and the forbidden."""
    with traced(pixart) as plain:
        run(pixart)
    with traced(pixart) as own:
        (run_of or run)(model)
    more = own - plain
    return more, {name: count for name, count in more.items() if name in KERNELS | ASKED}


def run(model, **options):
    return tiny.run(model, POSITIVE, NEGATIVE, steps=3, **options)


def with_readers(vector):
    sites = {
        name: dataclasses.replace(site, readers=site.directions.clone(), offsets=torch.zeros_like(site.gaps))
        for name, site in vector.sites.items()
    }
    return dataclasses.replace(vector, sites=sites)


STEERINGS = {
    "suppress": {"operator": "suppress", "strength": 2.0, "keep_norm": True},
    "norm kept": {"operator": "suppress", "strength": 1.5, "keep_norm": True},
    "ablate": {"operator": "ablate"},
    "add": {"operator": "add", "strength": 0.5, "toward": "present"},
    "set": {"operator": "set", "strength": 0.5, "toward": "absent"},
    "affine": {"operator": "affine", "strength": 1.5, "focus": 1.0},
    "positive rows": {"operator": "affine", "strength": 1.5, "focus": 1.0, "rows": "positive"},
}


@pytest.fixture(scope="module")
def vector(pixart):
    return with_readers(tiny.vector(pixart))


@pytest.mark.parametrize("name", STEERINGS)
def test_a_steered_call_waits_copies_and_casts_nowhere_between_the_first_and_the_last_block(pixart, vector, name):
    more, forbidden = added(pixart, tiny.steered(pixart, vector, **STEERINGS[name]))
    assert (
        more["addcmul_"] + more["add_"] == tiny.DEPTH * 3
    )  # the trace did see the steering, in each block of each call
    assert forbidden == {}


def test_nor_does_a_steering_of_four_vectors(pixart, vector):
    model = pixart
    for _ in range(4):
        model = tiny.steered(model, vector, operator="suppress", strength=2.0, keep_norm=True)
    more, forbidden = added(pixart, model)
    assert more["addcmul_"] == 4 * tiny.DEPTH * 3
    assert forbidden == {}


def test_nor_does_a_capture(pixart):
    watch = SampleWatch(ActivationSums(), 4)

    def watched(model):
        with watch.run([0]):
            run(model)

    more, forbidden = added(pixart, patch.observed(pixart, watch), watched)
    assert more["mean"] == tiny.DEPTH * 3  # one mean over the tokens, for the sums and the record alike
    assert forbidden == {}
    assert len(watch.sums.statistics()) == tiny.DEPTH


SINS = {
    "cpu": lambda activation: activation.cpu(),
    "numpy": lambda activation: activation.detach().numpy(),
    "_local_scalar_dense": lambda activation: activation.sum().item(),
    "__bool__": lambda activation: bool(activation.sum() > 0),
    "nonzero": lambda activation: activation.nonzero(),
    "_to_copy": lambda activation: activation.double(),
    "tensor": lambda activation: torch.tensor(np.zeros(3)),
}


@pytest.mark.parametrize("name", SINS)
@pytest.mark.parametrize("kind", ["steered", "capturing"])
def test_the_trace_sees_a_copy_a_wait_and_a_cast(pixart, vector, monkeypatch, name, kind):
    """Without this the tests above would pass for a trace that sees nothing."""
    owner, method = {
        "steered": (prepared_steering.CallSteering, "apply"), "capturing": (sample_watch.SampleWatch, "observe")
    }[kind]  # fmt: skip
    original = getattr(owner, method)

    def sinful(self, *args, **options):
        SINS[name](next(arg for arg in args if isinstance(arg, torch.Tensor)))
        return original(self, *args, **options)

    monkeypatch.setattr(owner, method, sinful)
    watch = SampleWatch(ActivationSums(), 4)
    model = tiny.steered(pixart, vector) if kind == "steered" else patch.observed(pixart, watch)
    _, forbidden = added(pixart, model)
    assert name in {found.removeprefix("aten::") for found in forbidden}


# Writing into the site's own output


@pytest.mark.parametrize("name", STEERINGS)
def test_steering_in_place_gives_what_steering_a_copy_gives(pixart, vector, monkeypatch, name):
    steered = tiny.steered(pixart, vector, **STEERINGS[name])
    in_place = run(steered)
    monkeypatch.setattr(hooks, "owns_its_output", lambda fresh: False)
    torch.testing.assert_close(in_place, run(steered), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(in_place, run(pixart), atol=1e-3)


def test_what_another_hook_keeps_of_a_site_is_never_changed(pixart, vector):
    site = next(iter(find_sites(pixart.model.diffusion_model).values()))
    kept, copies = [], []

    def keep(_module, _args, output):
        kept.append(output)
        copies.append(output.clone())

    handle = site.register_forward_hook(keep)
    try:
        run(tiny.steered(pixart, vector))
    finally:
        handle.remove()
    assert len(kept) == 3
    assert all(torch.equal(one, copy) for one, copy in zip(kept, copies, strict=True))


def test_a_site_owns_its_output_unless_it_is_more_than_a_linear_layer_or_was_changed(pixart):
    site = next(iter(find_sites(pixart.model.diffusion_model).values()))
    assert owns_its_output(fresh_layers(site))
    linear = torch.nn.Linear(2, 2)
    assert owns_its_output(fresh_layers(torch.nn.Sequential(linear, torch.nn.Dropout(0.0))))
    handle = linear.register_forward_hook(lambda *_: None)
    assert not owns_its_output(fresh_layers(linear))
    assert not owns_its_output(fresh_layers(torch.nn.Sequential(linear, torch.nn.Dropout(0.0))))
    handle.remove()
    linear.forward = linear.forward
    assert not owns_its_output(fresh_layers(linear))

    class Other(torch.nn.Linear):
        def forward(self, x):
            return x

    for other in (Other(2, 2), torch.nn.Identity(), torch.nn.Sequential(), torch.nn.Sequential(torch.nn.ReLU())):
        assert not owns_its_output(fresh_layers(other))


# The benchmark


def test_the_benchmark_records_every_ratio_with_its_interval():
    record, picture = overhead.run(Namespace(cpu=True, rounds=2, steps=2, wide_rounds=1, blocks=1, side=4))
    assert picture is None and set(record["ratios"]) == {"endophantom", "pixart_xl_width"}
    for name, ratios in record["ratios"].items():
        wanted = {"steered_1", "steered_2", "steered_4", "capture", "reference_steered"}
        assert wanted | {"unsteered", "unsteered_again", "affine", "capture_pairs"} == set(ratios)
        assert ratios["unsteered"] == 1.0
        for way, row in record["stacks"][name]["calls"].items():
            assert row["ratio"] == ratios[way]
            assert 0 < row["ratio_ci"][0] <= row["ratio"] <= row["ratio_ci"][1] < np.inf
            assert 0 < row["cpu_ratio"] < np.inf and row["ms"] > 0
    own = record["stacks"]["pixart_xl_width"]["operator"]
    assert own["shape"] == [2, 4, 1152] and own["bytes_moved"] == 2 * 2 * 4 * 1152 * 4
    assert own["floor_microseconds"] == pytest.approx(own["bytes_moved"] / own["memory_gb_s"] / 1e3, rel=0.01)
    assert all(entry["met"] == (entry["found"] <= entry["most"]) for entry in record["targets"].values())
    assert "operator alone" in overhead.table(record)
