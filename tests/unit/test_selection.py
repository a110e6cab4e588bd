import pytest

from medsteer_core.errors import MedSteerError
from medsteer_core.selection import select_sites

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
