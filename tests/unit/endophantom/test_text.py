"""EndoPhantom's text: words in any order, unknown ones harmless."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medsteer_core.endophantom import text
from medsteer_core.endophantom.phantom import CLASSES


def words(prompt: str) -> list[str]:
    return [text.VOCABULARY[i] for i in text.word_ids(prompt)]


@pytest.mark.parametrize("name", CLASSES)
def test_every_word_of_every_class_is_known(name):
    assert words(name) == name.split(" ")


def test_the_eight_classes_have_eight_different_word_sets():
    assert len({frozenset(text.word_ids(name)) for name in CLASSES}) == 8


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("An endoscopic image of polyps", ["endoscopic", "image", "polyps"]),
        ("POLYPS!! (very nice, 4k)", ["polyps"]),
        ("a polyp, normal caecum", ["polyps", "normal", "cecum"]),
        ("normal z line", ["normal", "z-line"]),
        ("normal z-line.", ["normal", "z-line"]),
        ("dyed-lifted-polyps", ["dyed", "lifted", "polyps"]),
        ("ein Bild ohne Befund \u753b\u50cf", []),
        ("", []),
    ],
)
def test_known_words_are_kept_in_order_and_unknown_ones_dropped(prompt, expected):
    assert words(prompt) == expected


def test_the_empty_prompt_is_the_start_token_alone():
    assert text.tokenize("") == [0]


@given(st.text())
def test_any_unicode_tokenizes_to_the_vocabulary(prompt):
    tokens = text.tokenize(prompt)
    assert tokens[0] == 0
    assert all(0 < token < len(text.VOCABULARY) for token in tokens[1:])


def test_word_order_only_permutes_the_context():
    torch.manual_seed(0)
    encoder = text.TextEncoder(width=32)
    forward = encoder(torch.tensor([text.tokenize("normal cecum image")]))[0]
    backward = encoder(torch.tensor([text.tokenize("image cecum normal")]))[0]
    assert torch.allclose(forward[[0, 3, 2, 1]], backward, atol=1e-6)


def test_padding_does_not_change_a_prompt():
    torch.manual_seed(0)
    encoder = text.TextEncoder(width=32)
    ids, mask = text.pad([text.tokenize("polyps"), text.tokenize("dyed lifted polyps image")])
    alone = encoder(torch.tensor([text.tokenize("polyps")]))[0]
    assert ids.shape == mask.shape == (2, 5)
    assert torch.allclose(encoder(ids, mask)[0, :2], alone, atol=1e-6)


def test_what_is_ignored_is_named_once_and_fillers_are_not():
    assert text.ignored("Barrett oesophagus, with BLEEDING and bleeding of the z line") == [
        "barrett",
        "oesophagus",
        "bleeding",
    ]
    assert text.ignored("An endoscopic image of a polyp on the normal caecum") == [] == text.ignored("")
    assert text.ignored("no polyps") == ["no"]  # it would turn the meaning round


def test_an_unknown_word_comes_with_the_nearest_known_one():
    assert (text.nearest("polips"), text.nearest("esophagtis"), text.nearest("xray")) == ("polyps", "esophagitis", None)
    assert text.about_ignored([]) == ""
    said = text.about_ignored(["polips", "xray"])
    assert said.startswith("EndoPhantom does not know 'polips' (did you mean 'polyps'?), 'xray' and ignores that.")
    assert said.endswith("ulcerative, colitis.")
