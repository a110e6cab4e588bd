import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.steering.selection import has_auto, select_sites

NAMES = tuple(f"blocks.{i}.cross_attn.proj" for i in range(12))


def indices(spec):
    return [NAMES.index(name) for name in select_sites(spec, NAMES)]


@pytest.mark.parametrize(
    ("spec", "wanted"),
    [
        ("all", list(range(12))),
        (" ALL ", list(range(12))),
        ("0-3,8", [0, 1, 2, 3, 8]),
        (" 0 - 3 , 8 ", [0, 1, 2, 3, 8]),
        ("5", [5]),
        ("11-11", [11]),
        ("blocks.1.cross_attn.proj", [1]),
        ("blocks.1*.cross_attn.proj", [1, 10, 11]),
        ("blocks.1?.*, 0", [0, 10, 11]),
        ("3,3,2-4", [2, 3, 4]),
        ("2,", [2]),
    ],
)
def test_a_spec_chooses_sites_in_execution_order_each_once(spec, wanted):
    assert indices(spec) == wanted


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "sites is empty"),
        (" , ", "sites is empty"),
        ("12", "only 12 sites: use indices 0 to 11"),
        ("0-99999999999", "only 12 sites"),
        ("-1", "can't be negative"),
        ("5-2", "write '2-5'"),
        ("layers.*", "blocks.0.cross_attn.proj, .* and 6 more"),
        ("0, nothing", "No site is named 'nothing'"),
    ],
)
def test_a_spec_that_chooses_nothing_says_what_there_is(spec, message):
    with pytest.raises(MedSteerError, match=message):
        select_sites(spec, NAMES)


def test_no_names_to_choose_from_is_an_error():
    with pytest.raises(MedSteerError, match="no cross-attention site"):
        select_sites("all", ())


AUROC = {name: [1.0, 0.9 if index in (2, 7) else 0.7] for index, name in enumerate(NAMES)}


@pytest.mark.parametrize(
    ("spec", "wanted"), [("auto", [2, 7]), (" Auto , 0", [0, 2, 7]), ("all, auto", list(range(12)))]
)
def test_auto_chooses_the_sites_that_separate_unseen_samples(spec, wanted):
    assert [NAMES.index(name) for name in select_sites(spec, NAMES, AUROC)] == wanted


@pytest.mark.parametrize("auroc", [None, {}])
def test_auto_without_a_report_says_to_extract_anew(auroc):
    with pytest.raises(MedSteerError, match="sites is 'auto', but .* Extract it anew with at least 4 samples"):
        select_sites("auto", NAMES, auroc)


def test_auto_that_no_site_passes_names_the_best():
    with pytest.raises(MedSteerError, match="AUROC of 0.9 or more on unseen samples; the best is 'a' with 0.70"):
        select_sites("auto", ["a", "b"], {"a": [0.7], "b": [0.6]})


def test_whether_a_spec_has_auto():
    assert has_auto(" AUTO,3") and not has_auto("automatic*, all")
