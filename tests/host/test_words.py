"""Every node explains itself, in English and in Chinese: names, descriptions, tooltips and help pages."""

import json
import re
import sys
import urllib.request
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent))  # at the end, so that it hides nothing
import words  # noqa: E402

CHINESE = re.compile(r"[\u4e00-\u9fff]")
# Names that Chinese users write in Latin letters too.
SAME_IN_CHINESE = {"CFG", "CLIP", "Sigmas", "VAE", "a", "b"}
# What the front end shows through its message compiler, which reads these characters as syntax.
SYNTAX = re.compile(r"[@{}|$%]")
PICTURE = re.compile(r"!\[([^\]]*)\]\(([^)\s]+)\)")
MAX_PICTURE, MAX_PICTURES = 60_000, 600_000
# What a reader without the method's words meets only after the opening of a page.
INSIDE = re.compile(
    r"\b(cross-attention|activations?|rank|rows?|sites?|tokens?|residuals?)\b|交叉注意力|激活|秩|残差", re.I
)
REGENERATE = "run `python tests/host/words.py` (its first lines say how) and commit locales/en"
TRANSLATE = "bring locales/zh and web/docs/*/zh.md up to date, then run `python tests/host/words.py --reviewed`"


@pytest.fixture(scope="module")
def english(comfy) -> dict:
    """The words as the running server's schemas have them."""
    return words.node_words(comfy.object_info())


def pages() -> dict[str, str]:
    """Every help page by its path below web/docs."""
    return {p.relative_to(words.PAGES).as_posix(): p.read_text(encoding="utf-8") for p in words.PAGES.rglob("*.md")}


def test_every_node_input_and_output_has_a_name_and_a_text(english):
    assert len(english) >= 17
    assert [path for path, text in words.flat(english).items() if not text.strip()] == []


def test_descriptions_are_one_sentence_and_tooltips_end_as_sentences(english):
    for path, text in words.flat(english).items():
        if path.endswith("description"):
            assert text.endswith(".") and not re.search(r"\. [A-Z]", text), path
        elif path.endswith("tooltip"):
            assert text.rstrip().endswith("."), path


def test_every_node_can_be_found_by_other_words_below_a_category_of_the_pack(comfy):
    for name, info in comfy.object_info().items():
        if name.startswith("MedSteer_"):
            assert info["category"].startswith("MedSteer/"), name
            assert info["search_aliases"], name


def test_the_english_words_are_those_of_the_schemas(english):
    assert words.read_words("en") == english, REGENERATE


def test_every_english_word_has_a_chinese_one(english):
    assert set(words.flat(words.read_words("zh"))) == set(words.flat(english)), TRANSLATE


def test_the_chinese_words_are_chinese(english):
    sources = words.flat(english)
    for path, text in words.flat(words.read_words("zh")).items():
        if text not in SAME_IN_CHINESE:
            assert CHINESE.search(text), path
            assert text != sources[path], path


def test_the_chinese_is_not_older_than_the_english():
    assert words.stale() == [], TRANSLATE


def test_a_changed_english_word_or_page_is_noticed(monkeypatch):
    sources = words.sources()
    first, page = next(iter(sources)), "MedSteer_Steer.md"
    monkeypatch.setattr(words, "reviewed", lambda: sources | {first: "other", page: "other", "gone": "one"})
    assert words.stale() == sorted([first, page, "gone"])


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_the_front_end_compiles_holds_no_message_syntax(language):
    for path, text in words.flat(words.read_words(language)).items():
        if not path.endswith("tooltip"):
            assert not SYNTAX.search(text), path


def test_every_part_of_a_category_has_a_name_in_both_languages_unless_core_has_one(comfy):
    ours = {part for name, info in comfy.object_info().items() if name.startswith("MedSteer_")
            for part in info["category"].split("/")}  # fmt: skip
    in_core = {"loaders", "sampling"}
    for language in ("en", "zh"):
        assert set(words.read_words(language, "main")["nodeCategories"]) == ours - in_core


def test_every_node_has_a_help_page_in_both_languages_and_no_page_is_left_over(english):
    assert set(pages()) == {f"{name}.md" for name in english} | {f"{name}/zh.md" for name in english}


def test_a_help_page_begins_with_the_nodes_name_and_names_each_of_its_inputs(english):
    chinese = words.read_words("zh")
    for name in english:
        for page, said in ((f"{name}.md", english[name]), (f"{name}/zh.md", chinese[name])):
            text = pages()[page]
            assert text.startswith(f"# {said['display_name']}\n"), page
            for key in english[name]["inputs"]:
                assert re.search(rf"\b{re.escape(english[name]['inputs'][key]['name'])}\b", text), (page, key)
            if page.endswith("zh.md"):
                assert len(CHINESE.findall(text)) > 60, page


def test_descriptions_and_the_openings_of_help_pages_are_in_plain_words(english):
    for language in (english, words.read_words("zh")):
        assert {
            name: found[0] for name, said in language.items() if (found := INSIDE.search(said["description"]))
        } == {}
    for page, text in pages().items():
        opening = text.split("\n\n")[1]
        assert not (found := INSIDE.search(opening)), (page, found[0])


def test_both_languages_show_the_same_pictures_formulas_and_tables():
    texts = pages()
    for page in (name for name in texts if "/" not in name):
        both = [texts[page], texts[f"{page.removesuffix('.md')}/zh.md"]]
        one, other = ([source for _, source in PICTURE.findall(text)] for text in both)
        assert one == other, page
        assert both[0].count("\n|") == both[1].count("\n|"), page
        assert code(both[0]) <= code(both[1]), page


def code(text: str) -> set[str]:
    """What stands between backticks, blocks of code aside."""
    return set(re.findall(r"`[^`\n]+`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)))


def test_pictures_are_there_described_and_small():
    """The front end reads a picture's address from web/docs, in every language's page."""
    shown = {
        (page, words.PAGES / source, alt) for page, text in pages().items() for alt, source in PICTURE.findall(text)
    }
    assert shown
    for page, path, alt in shown:
        assert path.is_file(), (page, path.name)
        assert alt, page
        assert path.stat().st_size <= MAX_PICTURE, path.name
    kept = {path for path in words.PAGES.rglob("*") if path.is_file() and path.suffix != ".md"}
    assert kept == {path for _, path, _ in shown}
    assert sum(path.stat().st_size for path in kept) <= MAX_PICTURES


def test_the_server_hands_out_both_languages_words_and_pages(comfy_server):
    handed = json.loads(fetched(comfy_server, "/i18n"))
    for language in ("en", "zh"):
        for name, said in words.read_words(language).items():
            assert handed[language]["nodeDefs"][name] == said
    for page, text in pages().items():
        assert fetched(comfy_server, f"/extensions/{comfy_server.name}/docs/{page}").decode() == text


def fetched(server, path: str) -> bytes:
    without_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with without_proxy.open(server.address + path, timeout=60) as answer:
        return answer.read()
