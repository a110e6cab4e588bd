"""The quality benchmark's pure parts: domination, presets, seeds, the random direction, injection, what is kept."""

import argparse
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from benchmarks.evidence import _baselines, _choice, _controls, _curves, _method, _methods, _paired, _store, quality
from benchmarks.shared import presets as _presets
from benchmarks.shared import sheet as _sheet
from benchmarks.shared.presets import ALL_PAIRS, PAIRS, Pair, Preset, Presets
from medsteer_core.errors import MedSteerError
from medsteer_core.intervals import newcombe
from medsteer_core.scores.scorer import PairScore
from medsteer_core.vectors.pathology_vector import PathologyVector, SiteDirections

# Domination; points are (structure, flip rate)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [
        ([(0.9, 0.9)], [(0.8, 0.8)], True),
        ([(0.9, 0.8)], [(0.8, 0.8)], True),  # as good in one, better in the other
        ([(0.9, 0.8)], [(0.9, 0.8)], False),  # the same is not better
        ([(0.9, 0.7)], [(0.8, 0.8)], False),
        ([(1.0, 0.0), (0.8, 1.0)], [(0.85, 0.6)], True),  # by (0.9, 0.5)...(0.8, 1.0), between two points
        ([(1.0, 0.0), (0.8, 1.0)], [(0.95, 0.3)], False),  # just above the line
        ([(1.0, 0.0), (0.8, 1.0)], [(0.9, 0.5)], False),  # on the line
        ([(1.0, 0.0), (0.8, 1.0)], [(0.85, 0.6), (0.95, 0.3)], False),  # every point counts
        ([(1.0, 0.0), (0.9, 0.0)], [(0.95, 0.0)], True),
        ([(0.9, 0.5), (0.9, 0.5)], [(0.9, 0.5)], False),
        ([], [(0.9, 0.5)], None),
        ([(0.9, 0.5)], [], None),
    ],
)
def test_a_curve_dominates_when_it_beats_every_point_of_the_other(one, other, wanted):
    assert _curves.dominates(one, other) is wanted


def test_the_line_runs_through_neighbouring_points_only():
    # (1, 0) and (0.8, 1) are no neighbours here, so nothing between them counts
    assert _curves.dominates([(1.0, 0.0), (0.5, 0.0), (0.8, 1.0)], [(0.9, 0.45)]) is False


def test_a_diffuse_pairs_structure_is_less_drift_and_points_without_a_number_are_left_out():
    curve = [{"anatomy_drift": 0.4, "ssim_outside": None, "flip": 0.9}]
    assert _curves.points(curve, diffuse=True) == [(-0.4, 0.9)]
    assert _curves.points(curve, diffuse=False) == []


def test_the_recipes_point_is_held_against_every_point_of_a_baseline():
    point = {"flip": 0.9, "anatomy_drift": 0.4}
    worse, better, beside = ({"flip": f, "anatomy_drift": d} for f, d in ((0.9, 0.6), (0.9, 0.3), (1.0, 0.6)))
    rows = {
        "recipe": {**point, "curve": [point]},
        "sdedit": {"curve": [worse]},
        "pnp": {"curve": [worse, better]},
        "prompt_switch": {"curve": [worse, beside]},
    }
    found = quality.domination(rows, diffuse=True)
    assert found["dominates"] == {"sdedit": True, "pnp": False, "prompt_switch": False}
    assert found["dominated_by"] == {"sdedit": False, "pnp": True, "prompt_switch": False}


def test_the_front_is_what_no_other_point_beats():
    assert _curves.front([(0.9, 0.9), (0.8, 0.8), (0.95, 0.5), (0.95, 0.5)]) == [(0.9, 0.9), (0.95, 0.5)]


# The choice


def point(setting, flip, ssim, drift=1.0):
    return {"setting": setting, "flip": flip, "ssim_outside": ssim, "anatomy_drift": drift}


def test_of_settings_that_flip_enough_the_one_that_keeps_most_is_chosen():
    curve = [point("a", 1.0, 0.9, 0.5), point("b", 0.92, 0.95, 0.7), point("c", 0.89, 0.99, 0.1)]
    assert _choice.best(curve, diffuse=False)["setting"] == "b"
    assert _choice.best(curve, diffuse=True)["setting"] == "a"


def test_where_none_flips_enough_it_is_the_one_that_flips_most():
    curve = [point("a", 0.5, 0.99), point("b", 0.8, 0.7), point("c", 0.8, 0.75), point("d", None, None, None)]
    assert _choice.best(curve, diffuse=False)["setting"] == "c"


def way(name="sdedit", arm="", values=(0.3, 0.5)):
    return _method.Method(name, "denoise", values, {}, lambda *_: None, arm=arm)


def test_what_was_chosen_is_kept_beside_other_pairs_and_found_again(tmp_path):
    file = tmp_path / "chosen.json"
    _choice.keep({"a -> b": {"sdedit": "0.3"}, "c -> d": {"pnp": "0.5"}}, file)
    _choice.keep({"a -> b": {"pnp": "0.7"}}, file)
    known = _choice.read(file)
    assert known == {"a -> b": {"sdedit": "0.3", "pnp": "0.7"}, "c -> d": {"pnp": "0.5"}}
    arms = [way(), way(arm="lock: concept map")]
    assert _choice.chosen_of("a -> b", arms, known) == (arms[0], 0.3)
    with pytest.raises(MedSteerError, match="Choose on development seeds first"):
        _choice.chosen_of("c -> d", arms, known)
    only = way(values=(0.3,))
    assert _choice.chosen_of("c -> d", [only], {}) == (only, 0.3)


def test_everything_that_was_chosen_is_there():
    known = _choice.read()
    names = {pair.name for pair in ALL_PAIRS}
    assert set(known) <= names
    for pair in ALL_PAIRS:
        found = _methods.methods(SimpleNamespace(latent={}), None, pair, Presets())
        for name, setting in known.get(pair.name, {}).items():
            assert setting in {arm.setting(value) for arm in found[name] for value in arm.values}


@pytest.mark.parametrize("pair", ALL_PAIRS, ids=lambda pair: pair.slug)
def test_every_method_is_offered_the_same_windows_and_locks(pair):
    found = _methods.methods(SimpleNamespace(latent={}), None, pair, Presets())
    for name in ("vector", "both", "medsteer", "polypsteer"):
        starts = _presets.WINDOWS if "steer" in name else _presets.STARTS
        assert len(found[name]) == len(starts) * (1 if pair.diffuse else 2)
    for name in ("sdedit", "ddim_inversion", "pnp"):
        assert ["lock" in arm.arm for arm in found[name]] == ([False] if pair.diffuse else [False, True])
    assert ("prompt_switch_lock" in [arm.name for arm in found["prompt_switch_lock"]]) is not pair.diffuse
    settings = [(arm.name, arm.setting(value)) for arms in found.values() for arm in arms for value in arm.values]
    assert len(set(settings)) == len(settings)


# Pairs, presets, seeds


def test_the_pairs_kinds():
    assert [pair.kind for pair in PAIRS] == ["removing"] * 4 + ["adding"]
    assert [pair.diffuse for pair in PAIRS] == [False, True, False, False, False]
    assert [pair.kind for pair in ALL_PAIRS[5:]] == ["removing", "adding", "adding"]
    assert [pair.diffuse for pair in ALL_PAIRS[5:]] == [False, False, True]
    assert all(_presets.OTHER[pair] != pair for pair in ALL_PAIRS)


def test_a_range_of_blocks_is_scaled_to_the_models_depth():
    assert _presets.POLYPSTEER.sites_of(28) == "8-15"
    assert _presets.POLYPSTEER.sites_of(8) == "2-4"
    assert _presets.MEDSTEER.sites_of(8) == "all"


def test_a_preset_is_varied_by_json_for_both_kinds_or_for_one():
    both = Presets().varied('{"start": 0.25, "strengths": [1, 4, 9]}')
    assert all((preset.start, preset.strengths) == (0.25, (1.0, 4.0, 9.0)) for preset in both.ours.values())
    assert all(preset.headline in preset.strengths for preset in both.ours.values())
    one = Presets().varied('{"adding": {"rows": "positive"}}')
    assert one.ours["adding"].rows == "positive"
    assert one.ours["removing"] == Presets().ours["removing"]
    assert both.medsteer == _presets.MEDSTEER


@pytest.mark.parametrize(
    ("text", "said"), [("{", "not JSON"), ("[1]", "JSON object"), ('{"strnegths": [1]}', "no strnegths")]
)
def test_a_wrong_preset_is_refused(text, said):
    with pytest.raises(MedSteerError, match=said):
        Presets().varied(text)


def test_a_headline_that_is_not_swept_is_refused():
    with pytest.raises(MedSteerError, match="headline"):
        Preset("suppress", (1.0, 2.0), 3.0)


def test_the_splits_never_share_a_seed():
    starts = sorted([*_presets.SPLITS.values(), _presets.COVARIANCE_SEED, _presets.CEILING_SEED])
    assert min(b - a for a, b in zip(starts, starts[1:], strict=False)) >= _presets.MOST
    assert _presets.EXTRACTION_SEED not in range(min(starts), max(starts) + _presets.MOST)


def test_a_larger_run_has_a_smaller_ones_whole_batches():
    small, large = (quality.chunks(range(30000, 30000 + n)) for n in (40, 200))
    assert small == large[:2]
    assert [len(part) for part in quality.chunks(range(50))] == [20, 20, 10]


def test_only_the_whole_benchmark_on_test_seeds_is_called_quality():
    def name(split="test", pairs=None, methods=None):
        return quality.name_of(argparse.Namespace(split=split, pairs=pairs, methods=methods))

    names = [name(), name("development"), name(pairs=["x"]), name("development", methods=["ours"])]
    assert names == ["quality", "quality-development", "quality-part", "quality-development-part"]


def test_a_preset_on_test_seeds_is_refused(capsys):
    for words in (["--preset", '{"start": 0.2}'], ["--choose"]):
        with pytest.raises(SystemExit):
            quality.main(words)
        assert "nothing may be chosen on the test seeds" in capsys.readouterr().err


# The random direction


SITE, STEPS, WIDTH = "blocks.0.cross_attn.proj", 3, 6


def vector(seed=0):
    generator = torch.Generator().manual_seed(seed)
    directions = nn.functional.normalize(torch.randn(STEPS, 1, WIDTH, generator=generator), dim=-1)
    zeros = torch.zeros(STEPS, 2, 1)
    site = SiteDirections(directions, torch.ones(STEPS, 1), torch.zeros(STEPS, WIDTH), zeros, torch.ones(STEPS, 2))
    return PathologyVector({SITE: site}, torch.tensor([9.0, 3.0, 1.0]))


def deviations(images=5, seed=1):
    values = torch.randn(STEPS, images, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {SITE: values - values.mean(1, keepdim=True)}


def test_the_push_is_as_long_as_suppresss_and_lies_along_the_random_direction():
    plain = vector()
    step = _controls.with_random_direction(plain, deviations(), draw=0).at(SITE, 3.0)
    a = torch.randn(2, 4, WIDTH, generator=torch.Generator().manual_seed(2))
    push = _controls.PushElsewhere(2.0)(a, step) - a
    projections = (a @ plain.at(SITE, 3.0).directions[0]).clamp_min(0)
    torch.testing.assert_close(push.norm(dim=-1), 2 * projections)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.einsum("n,nc->c", torch.randn(5, generator=generator), deviations()[SITE][1])
    moved = push[projections > 0]
    along = nn.functional.cosine_similarity(moved, -drawn.expand_as(moved), dim=-1)
    torch.testing.assert_close(along, torch.ones_like(along))


def test_draws_differ_and_each_is_repeatable():
    first, again, other = (_controls.with_random_direction(vector(), deviations(), draw) for draw in (0, 0, 1))
    assert first.content_hash() == again.content_hash() != other.content_hash()


def test_random_directions_follow_the_within_class_covariance():
    lean = deviations()[SITE] * torch.tensor([10.0, 1, 1, 1, 1, 1])
    drawn = [_controls.with_random_direction(vector(), {SITE: lean}, draw).at(SITE, 9.0) for draw in range(200)]
    directions = torch.stack([step.projections[0] @ step.directions for step in drawn])
    shares = directions.square().mean(0)
    assert shares[0] > 0.8 and shares.sum() == pytest.approx(1.0, abs=1e-4)
    assert directions[:, 0].sign().mean().abs() < 0.25  # neither way is favoured


def test_token_means_are_kept_an_image_and_centred_at_each_level():
    means = _controls.TokenMeans()
    for value in (1.0, 3.0):
        means.observe(SITE, 2.0, torch.full((1, 4, WIDTH), value))
        means.observe(SITE, 1.0, torch.full((1, 4, WIDTH), 10 * value))
    centred = means.centred()[SITE]
    assert centred[:, :, 0].tolist() == [[-1.0, 1.0], [-10.0, 10.0]]


# Plug-and-Play's injection


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attn = nn.Linear(4, 4)

    def forward(self, x):
        return x + self.attn(x)


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, transformer_options):
        for block in self.blocks:
            x = block(x)
        return x


@torch.no_grad()
def test_injected_levels_give_what_was_recorded_and_others_their_own():
    torch.manual_seed(0)
    network = Network()
    source, target = torch.randn(2, 4), torch.randn(2, 4)

    def call(x, sigma, conds=(1, 0)):
        return network(x, transformer_options={"sigmas": torch.tensor([sigma]), "cond_or_uncond": list(conds)})

    with _baselines.recording(network) as tape:
        recorded = call(source, 5.0)
    own = call(target, 1.0)
    with _baselines.injecting(network, tape):
        torch.testing.assert_close(call(target, 5.0), recorded)
        torch.testing.assert_close(call(target, 5.0, conds=(0, 1)), recorded.flip(0))  # rows go by name, not by place
        assert torch.equal(call(target, 1.0), own)
    assert torch.equal(call(target, 1.0), own)


def test_no_hook_of_the_injection_outlives_an_error():
    network = Network()
    with pytest.raises(RuntimeError), _baselines.injecting(network, {}):
        raise RuntimeError
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_a_prompt_holds_between_two_shares_of_the_schedule():
    conditioning = [[torch.zeros(1), {"pooled_output": None}]]
    assert _baselines._during(conditioning, 0.0, 0.2)[0][1] == {
        "pooled_output": None,
        "start_percent": 0.0,
        "end_percent": 0.2,
    }
    assert "end_percent" not in conditioning[0][1]


# What is kept


def score(**changes):
    values = {
        "source": "polyps", "target": "normal cecum", "factual_label": "polyps", "counterfactual_label": "normal cecum",
        "source_probability": (0.9, 0.1), "target_probability": (0.1, 0.9), "distance": (0.5, 0.6),
        "finding_before": 0.1, "finding_after": 0.0, "finding_left": 0.0, "finding_gone": True, "finding_kept": None,
        "kept_overlap": None, "finding_added": None, "accepted": True, "flipped": True, "misses": (),
        "ssim_outside": 0.9, "psnr_outside": 30.0, "mask_fraction": 0.1, "outside_fraction": 0.8, "anatomy_drift": 0.5,
        "anatomy_drifts": (0.5,), "off_target_drift": 0.1, "ssim": 0.8, "changed_fraction": 0.2, "identical": False,
    }  # fmt: skip
    return PairScore(**{**values, **changes})


def test_methods_are_compared_seed_by_seed_with_ours():
    ours = [score(ssim_outside=0.9), score(flipped=False, ssim_outside=0.8), score(accepted=False, flipped=False)]
    other = [score(ssim_outside=0.92), score(ssim_outside=None), score(accepted=False)]
    found = _paired.differences({"ours": ours, "other": other}, "ours")
    assert list(found) == ["other"] and found["other"]["n"] == 2 and found["other"]["flip"] == 0.5
    assert (found["other"]["ssim_outside"], found["other"]["ssim_outside_n"]) == (0.02, 1)
    assert found["other"]["flip_ci"] == [round(v, 4) for v in newcombe([True, True], [True, False])]
    assert _paired.differences({"other": other}, "ours") == {}


def test_a_result_comes_back_from_its_file_as_it_was():
    result = _store.Result((30000, 30001), (score(), score(flipped=False, misses=("label",))), 1.5, 2)
    assert _store.Result.of_json(result.to_json()) == result


def test_chunks_are_summed_up_under_the_benchmarks_names():
    found = [_store.Result((1, 2), (score(), score(flipped=False)), 3.0), _store.Result((3,), (score(),), 3.0)]
    record = quality.summary(found)
    assert (record["n"], record["accepted"], record["seconds"]) == (3, 3, 2.0)
    assert record["flip"] == pytest.approx(2 / 3, abs=1e-4) and len(record["flip_ci"]) == 2
    assert "identical" not in record


@pytest.mark.parametrize(("same", "wanted"), [(2, True), (1, False)])
def test_strength_zero_is_identical_only_when_every_pair_is(same, wanted):
    assert quality.summary([_store.Result((1, 2), (score(), score()), 1.0, same)])["identical"] is wanted


def test_comments_layout_and_docstrings_do_not_count_as_code(tmp_path):
    def digest(text):
        (tmp_path / "a.py").write_text(text, encoding="utf-8")
        return _store.code_digest(["*.py"], tmp_path)

    first = digest('"""One."""\ndef f(x):\n    """Two."""\n    return x + 1\n')
    assert digest('"""Other."""\n# why\ndef f( x ):\n    """Words."""\n\n    return x + 1\n') == first
    assert digest('"""One."""\ndef f(x):\n    """Two."""\n    return x + 2\n') != first


def test_what_is_planned_costs_nothing_once_it_is_there():
    method = _method.Method("ours", "strength", (1.0, 2.0), {}, lambda *_: None, vectors=((PAIRS[0], "paired", 8),))
    seeds, there = quality.Seeds(range(30), range(30)), set()
    reported = {PAIRS[0]: {"ours": (method, 2.0)}}
    jobs = quality.settings_of({PAIRS[0]: {"ours": (method,)}}, reported, seeds)
    store = SimpleNamespace(
        is_scored=lambda _pair, _method, value, part: (value, part) in there,
        has_factual=lambda _pair, part: part in there,
        vector_path=lambda *_: SimpleNamespace(is_file=lambda: "vector" in there),
    )
    assert quality.cost_left(store, jobs) == 30 + 2 * 30 + 2 * 8
    there |= {"vector", *quality.chunks(range(30)), (1.0, range(0, 20))}
    assert quality.cost_left(store, jobs) == 10 + 30
    there |= {(value, part) for value in (1.0, 2.0) for part in quality.chunks(range(30))}
    assert quality.cost_left(store, jobs) == 0


# Pictures


def test_the_sheets_mosaic_holds_every_image_in_its_place():
    images = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 3, 8, 8) / 6
    picture = _sheet.mosaic(images)
    step = 8 + _sheet.GAP
    assert picture.shape == (3, 2 * step - _sheet.GAP, 3 * step - _sheet.GAP)
    assert picture[0, step, 2 * step] == pytest.approx(5 / 6) and picture[0, 8, 0] == 1.0


def test_the_plot_is_drawn_though_numbers_are_missing():
    row = {"flip": 0.5, "ssim_outside": 0.9, "anatomy_drift": 1.0}
    none = dict.fromkeys(row)
    methods = {"recipe": {**row, "curve": [row, none]}, "sdedit": {**none, "curve": [none]}}
    record = {"methods": methods, "ceiling": row, "diffuse": False, "split": "test"}
    picture = _curves.plot({Pair("polyps", "normal cecum").name: record})
    assert picture.shape[0] == 3 and picture.std() > 0.05
