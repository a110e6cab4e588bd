"""The samples benchmark's pure parts: stability, pooled rates, the recommendation, seeds, what is kept, the plot."""

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

from benchmarks.evidence import _samples_plot, _stability, samples
from benchmarks.evidence._stability import NOISES
from benchmarks.evidence.samples import COUNTS, DEFAULT_PAIRS, Bench, Extraction
from benchmarks.shared import presets as _presets
from benchmarks.shared.presets import PAIRS, Presets
from medsteer_core.errors import MedSteerError
from medsteer_core.scores.scorer import PairScore
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections


def vector(angles: dict[str, list[float]], gap: float = 1.0) -> PathologyVector:
    """Two channels; at each site and step a direction at this many degrees."""

    def site(degrees: list[float]) -> SiteDirections:
        turned = torch.tensor(degrees).deg2rad()
        n = len(degrees)
        directions = torch.stack([turned.cos(), turned.sin()], -1)[:, None]
        gaps = torch.full((n, 1), gap)
        return SiteDirections(directions, gaps, torch.zeros(n, 2), torch.zeros(n, 2, 1), torch.ones(n, 2))

    steps = len(next(iter(angles.values())))
    return PathologyVector({name: site(d) for name, d in angles.items()}, torch.arange(steps, 0, -1).float())


def score(flipped: bool, accepted: bool = True, ssim: float = 0.9) -> PairScore:
    return PairScore(
        "polyps", "normal cecum", "polyps", "normal cecum", (0.9, 0.1), (0.1, 0.9), (0.5, 0.5), 0.1, 0.0, 0.0, flipped,
        None, None, None, accepted, flipped, () if flipped else ("label",), ssim, 30.0, 0.1, 0.8, 0.2, (0.2,), 0.01,
        ssim, 0.1, False,
    )  # fmt: skip


def affine(directions, readers, offsets) -> PathologyVector:
    """One site ``a`` and one step, of directions (R, C), readers (R, C) and offsets (R,)."""
    rows, read, offset = (torch.tensor(values, dtype=torch.float32)[None] for values in (directions, readers, offsets))
    _, rank, width = rows.shape
    shapes = ((1, rank), (1, width), (1, 2, rank), (1, 2))
    return PathologyVector({"a": SiteDirections(rows, *map(torch.ones, shapes), read, offset)}, torch.ones(1))


def cell(stability: float, flip: float | None = 1.0, preset: str = "medsteer") -> dict:
    rates = {"flip": flip, "flip_ci": [0.0, 1.0], "ssim_outside": 0.9, "anatomy_drift": 0.7}
    return {
        "stability": stability, "stability_range": [stability - 0.01, stability], "preset": preset, "seconds": 1.0,
        "least_stable_site": {"name": "blocks.0", "stability": 0.5}, **rates,
        "ours": rates if preset == "ours" else None,
    }  # fmt: skip


def grown(*modes, counts=(4, 8, 16)) -> dict:
    """One pair's cells; each mode's are stabilities, or (stability, flip rate). Modes left out agree from the start."""
    modes = (*modes, *[[1.0] * len(counts)] * (len(NOISES) - len(modes)))
    return {
        noise: {
            str(n): cell(*(row if isinstance(row, tuple) else (row, 1.0)), _stability.PRESET_OF[noise])
            for n, row in zip(counts, rows, strict=True)
        }
        for noise, rows in zip(NOISES, modes, strict=True)
    }


# Stability


def test_vectors_that_agree_have_stability_one():
    one = vector({"a": [0, 30], "b": [45, 90]})
    found = _stability.stability([one, one, one], _stability.mean_weights([one]))
    assert found["stability"] == 1 and found["stability_range"] == [1, 1]


def test_stability_is_the_mean_cosine_of_any_two():
    three = [vector({"a": [degrees]}) for degrees in (0, 60, 90)]
    found = _stability.stability(three, {"a": torch.ones(1, 1)})
    cosines = [0.5, 0.0, math.cos(math.radians(30))]
    assert found["stability"] == pytest.approx(sum(cosines) / 3, abs=1e-4)
    assert found["stability_range"] == pytest.approx([0.0, cosines[2]], abs=1e-4)


def test_opposite_directions_count_against_stability():
    found = _stability.stability([vector({"a": [0]}), vector({"a": [180]})], {"a": torch.ones(1, 1)})
    assert found["stability"] == -1


def test_sites_and_steps_weigh_as_their_gaps():
    pair = [vector({"a": [0, 0], "b": [0, 0]}), vector({"a": [0, 90], "b": [60, 60]})]
    weights = {"a": torch.tensor([[3.0], [1.0]]), "b": torch.tensor([[1.0], [1.0]])}
    found = _stability.stability(pair, weights)
    assert found["stability"] == pytest.approx((3 * 1 + 1 * 0 + 2 * 0.5) / 6, abs=1e-4)
    assert found["least_stable_site"] == {"name": "b", "stability": pytest.approx(0.5, abs=1e-4)}


def test_a_site_without_any_gap_is_not_the_least_stable():
    pair = [vector({"a": [0], "b": [0]}), vector({"a": [180], "b": [60]})]
    found = _stability.stability(pair, {"a": torch.zeros(1, 1), "b": torch.ones(1, 1)})
    assert found["least_stable_site"]["name"] == "b" and found["stability"] == pytest.approx(0.5, abs=1e-4)


def test_vectors_of_other_sites_are_refused():
    with pytest.raises(MedSteerError, match="differ in their sites .b."):
        _stability.stability([vector({"a": [0]}), vector({"a": [0], "b": [0]})], {"a": torch.ones(1, 1)})


def test_gaps_are_averaged_over_vectors():
    gaps = _stability.mean_weights([vector({"a": [0, 0]}, gap=1.0), vector({"a": [0, 0]}, gap=3.0)])
    assert gaps["a"].tolist() == [[2.0], [2.0]]


# Stability of vectors with readers


def agreement(one: PathologyVector, other: PathologyVector) -> float:
    return _stability.stability([one, other], _stability.mean_weights([one, other]))["stability"]


PLAIN = vector({"a": [10.0]})
ONE = affine([[1, 0, 0], [0, 1, 0]], [[3, 1, 0], [0, 2, 5]], [1, -2])


def test_another_basis_of_the_same_map_agrees_wholly():
    turn = torch.linalg.qr(torch.tensor([[1.0, 2.0], [-3.0, 4.0]])).Q
    site = ONE.sites["a"]
    turned = affine((turn @ site.directions[0]).tolist(), (turn @ site.readers[0]).tolist(),
                    (turn @ site.offsets[0]).tolist())  # fmt: skip
    assert _stability.cosines(site, turned.sites["a"])[0] == pytest.approx(1)
    assert agreement(ONE, turned) == 1


def test_maps_are_compared_by_frobenius_cosine_with_offsets_as_a_column():
    other = affine([[0, 0, 1], [0, 1, 0]], [[1, 0, 2], [1, 1, 1]], [4, -3])
    maps = []
    for one in (ONE.sites["a"], other.sites["a"]):
        maps.append(one.directions[0].mT @ torch.cat([one.readers[0], one.offsets[0][:, None]], dim=1))
    wanted = float((maps[0] * maps[1]).sum() / (maps[0].norm() * maps[1].norm()))
    assert abs(wanted) > 0.05 and agreement(ONE, other) == pytest.approx(wanted, abs=1e-4)


def test_the_opposite_map_counts_against_stability():
    site = ONE.sites["a"]
    opposite = affine(site.directions[0].tolist(), (-site.readers[0]).tolist(), (-site.offsets[0]).tolist())
    assert agreement(ONE, opposite) == -1


def test_maps_differ_where_only_offsets_do():
    plain, moved = affine([[1, 0]], [[1, 0]], [0]), affine([[1, 0]], [[1, 0]], [1])
    assert agreement(plain, moved) == pytest.approx(math.sqrt(0.5), abs=1e-4)


def test_a_map_that_does_nothing_agrees_with_none():
    nothing = affine([[1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0]], [0, 0])
    assert agreement(ONE, nothing) == 0


def test_sites_with_readers_weigh_as_the_norms_of_their_maps():
    weights = _stability.mean_weights([affine([[1, 0]], [[3, 0]], [4]), affine([[1, 0]], [[0, 0]], [7])])
    assert weights["a"].tolist() == [[6.0]]


# Flip rates


def test_flips_are_pooled_over_the_extractions_with_wilsons_interval():
    repeats = [[score(True), score(True)], [score(True), score(False)], [score(True), score(True, accepted=False)]]
    found = _stability.pooled(repeats)
    assert (found["n"], found["accepted"], found["flips"], found["flip"]) == (6, 5, 4, 0.8)
    assert found["flip_ci"] == pytest.approx([0.3755, 0.9638], abs=1e-4)
    assert found["flip_each"] == [1.0, 0.5, 1.0] and found["ssim_outside"] == pytest.approx(0.9)


def test_a_rate_without_accepted_factuals_is_unknown():
    assert _stability.pooled([[score(True, accepted=False)]])["flip"] is None


# The recommendation


def test_a_modes_smallest_number_within_the_tolerance_of_its_largest_is_recommended():
    cells = {"p": grown([0.93, 0.95, 0.97], [0.80, 0.90, 0.96], [0.2, 0.56, 0.6])}
    choice = _stability.recommended(cells, "paired")
    assert (choice["noise"], choice["samples"], choice["rule_met"]) == ("paired", 4, True)
    assert choice["enough"] == {"paired": 4, "unpaired": 16, "same state": 8}
    assert _stability.recommended(cells, "same state")["samples"] == 8


def test_a_mode_is_held_to_no_other_modes_numbers():
    choice = _stability.recommended({"p": grown([(0.70, 0.5)] * 3)}, "paired")
    assert (choice["samples"], choice["rule_met"]) == (4, True)


def test_every_pair_has_to_be_within_the_tolerance():
    cells = {"p": grown([0.96, 0.97, 0.98]), "q": grown([0.80, 0.94, 0.98])}
    assert _stability.recommended(cells, "paired")["samples"] == 8


@pytest.mark.parametrize("flip", [0.8, None])
def test_the_flip_rate_counts_and_an_unknown_one_is_not_enough(flip):
    assert _stability.recommended({"p": grown([(0.97, flip), 0.97, 0.97])}, "paired")["samples"] == 8


def test_a_number_is_not_enough_when_a_larger_one_falls_back():
    choice = _stability.recommended({"p": grown([(0.97, 1.0), (0.97, 0.8), (0.97, 1.0)])}, "paired")
    assert choice["samples"] == 16 and _stability.said(choice).endswith("16 samples, the largest measured")


def test_where_no_number_is_enough_the_largest_stands_and_is_said_to():
    choice = _stability.recommended({"p": grown([(0.9, None)] * 3)}, "paired")
    assert (choice["samples"], choice["rule_met"], choice["enough"]["paired"]) == (16, False, None)
    assert "no number was enough" in _stability.said(choice)


def test_the_tolerance_itself_is_still_within():
    assert _stability.recommended({"p": grown([0.92, (0.97, 0.95), 0.97])}, "paired")["samples"] == 4


# Seeds, names, files


def test_no_two_extractions_of_a_mode_share_noise_and_no_image_does():
    extractions = [Extraction(PAIRS[0], "paired", n, r) for n in (*COUNTS, 999) for r in range(samples.REPEATS)]
    seeds = {extraction.seed for extraction in extractions}
    assert len(seeds) == len(extractions)
    images = {seed for first in _presets.SPLITS.values() for seed in range(first, first + _presets.MOST)}
    images |= {_presets.EXTRACTION_SEED, _presets.CEILING_SEED, _presets.COVARIANCE_SEED}
    assert not seeds & images


def test_all_noise_modes_take_the_same_seed():
    assert len({Extraction(PAIRS[0], noise, 8, 1).seed for noise in NOISES}) == 1


@pytest.mark.parametrize(
    ("pairs", "counts", "name"),
    [
        (list(DEFAULT_PAIRS[::-1]), list(COUNTS), "samples"),
        (list(DEFAULT_PAIRS[:1]), list(COUNTS), "samples-part"),
        (list(DEFAULT_PAIRS), [1, 2], "samples-part"),
    ],
)
def test_a_part_never_replaces_the_whole_benchmarks_results(pairs, counts, name):
    assert samples.name_of(argparse.Namespace(pairs=pairs, counts=counts)) == name


@pytest.mark.parametrize("words", [["--n", "0"], ["--counts", "0"], ["--counts", "1000"], ["--pairs", "polyps"]])
def test_what_cannot_be_measured_is_refused(words, capsys):
    with pytest.raises(SystemExit):
        samples.main(words)
    assert "error:" in capsys.readouterr().err


class FakeLab:
    """Extracts vectors at an angle that is the seed's, and counts."""

    def __init__(self):
        self.asked = []

    def extract(self, present, absent, count, seed, noise):
        self.asked.append((present, absent, count, seed, noise))
        return vector({"a": [float(seed % 360)]})


def bench(tmp_path, seeds=range(20000, 20002)) -> Bench:
    return Bench(SimpleNamespace(lab=FakeLab(), folder=tmp_path), Presets(), seeds)


def test_a_vector_is_extracted_once_and_then_read(tmp_path):
    extraction = Extraction(PAIRS[0], "unpaired", 4, 2)
    first, again = bench(tmp_path), bench(tmp_path)
    made, seconds = first.vector(extraction)
    read, kept = again.vector(extraction)
    assert first.store.lab.asked == [("polyps", "normal cecum", 4, extraction.seed, "unpaired")]
    assert again.store.lab.asked == [] and (read.content_hash(), kept) == (made.content_hash(), seconds)


def test_a_vector_without_its_record_is_extracted_again(tmp_path):
    extraction = Extraction(PAIRS[0], "paired", 1, 0)
    stopped = bench(tmp_path)
    stopped.vector(extraction)
    next(tmp_path.rglob("*.json")).unlink()
    stopped.vector(extraction)
    assert len(stopped.store.lab.asked) == 2


@pytest.mark.parametrize(("noise", "runs"), [("paired", 2 * 8), ("unpaired", 2 * 8), ("same state", 1.5 * 8)])
def test_the_runs_that_are_left_are_counted(tmp_path, noise, runs):
    some, extraction = bench(tmp_path), Extraction(PAIRS[0], noise, 8, 0)
    assert some.cost(extraction) == runs + 2  # one preset on two seeds
    some.vector(extraction)
    assert some.cost(extraction) == 2


def test_only_the_operator_that_takes_a_modes_vectors_steers_with_them():
    presets = samples.presets_of(Presets(), PAIRS[0])
    needing = {noise: presets[name].operator == "affine" for noise, name in _stability.PRESET_OF.items()}
    assert needing == {"paired": False, "unpaired": False, "same state": True}


def test_the_noise_modes_are_those_of_the_node():
    assert {preset.noise for preset in samples.presets_of(Presets(), PAIRS[0]).values()} <= set(NOISES)


def test_cells_hold_each_modes_own_preset(tmp_path, monkeypatch):
    monkeypatch.setattr(Bench, "scores", lambda self, one: [score(one.noise != "unpaired")])
    monkeypatch.setattr(Bench, "vector", lambda self, one: (ONE if one.noise == "same state" else PLAIN, 2.0))
    found = bench(tmp_path).cells(PAIRS[0], [1, 2])
    assert {noise: (rows["1"]["preset"], rows["2"]["flip"]) for noise, rows in found.items()} == {
        "paired": ("medsteer", 1.0), "unpaired": ("medsteer", 0.0), "same state": ("ours", 1.0),
    }  # fmt: skip
    assert found["paired"]["1"]["ours"] is None and found["same state"]["1"]["ours"]["flip"] == 1.0
    assert all(rows["1"]["stability"] == 1 for rows in found.values())


# What is shown


def shown(counts=(1, 2)) -> dict:
    pairs = {"polyps -> normal cecum": grown([0.5, 0.9], [(0.4, None), 0.8], [0.3, 0.7], counts=counts)}
    return {
        "pairs": pairs, "recommended": _stability.recommended(pairs, "paired"),
        "recommended_same_state": _stability.recommended(pairs, "same state"),
        "seeds": {"development": [20000, 20011], "extraction": {"1": [60001, 61001, 62001]}},
        "settings": {"n": 12, "steps": 20, "cfg": 4.0},
    }  # fmt: skip


def test_the_table_shows_every_cell_and_what_follows():
    text = samples.table(shown())
    rows = [line.replace("same state", "same").split()[:2] for line in text.splitlines() if line.startswith(NOISES)]
    assert rows == [[noise.split()[0], n] for noise in NOISES for n in ("1", "2")]
    assert "0.900 [0.890, 0.900]" in text and "enough are: paired: 2; unpaired: 2; same state: 2" in text
    assert "recommended, paired noise: 2 samples" in text and "recommended, same state noise: 2 samples" in text


def test_the_plot_has_all_modes_colours_and_bears_unknown_rates():
    pytest.importorskip("matplotlib")
    picture = _samples_plot.plot(shown())
    assert picture.shape[0] == 3 and float(picture.min()) >= 0 and float(picture.max()) <= 1
    for colour, *_ in _samples_plot.STYLES.values():
        wanted = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        assert int(((picture - wanted[:, None, None]).abs().amax(0) < 0.02).sum()) > 100, colour
