"""The committed pictures show what the library does now, and can be read on light and on dark pages."""

import re
from pathlib import Path

import pytest

from docs import pictures

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BACKGROUNDS = ("#ffffff", "#1e2129")


def svg(name):
    return (pictures.FOLDER / f"{name}.svg").read_text()


@pytest.mark.parametrize("name", [name for name in pictures.PICTURES if name != "waste"])
def test_a_picture_shows_what_a_run_gives_now(name):
    collect, _ = pictures.PICTURES[name]
    assert f"data {pictures.digest(collect())} " in svg(name), "`make pictures` draws it anew"


@pytest.mark.slow
def test_the_picture_of_waste_shows_what_a_run_gives_now():
    assert f"data {pictures.digest(pictures.waste_data())} " in svg("waste"), "`make pictures` draws it anew"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_small_and_says_nothing_of_where_it_was_made(name):
    text = svg(name)
    assert len(text) < 100_000
    assert not re.search(r"\b20\d\d-\d\d-\d\d|matplotlib\.org|/home/|/tmp/|<image|<metadata", text)


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_every_colour_of_a_picture_contrasts_with_light_and_dark(name):
    colours = set(re.findall(r"#[0-9a-f]{6}", svg(name)))
    assert pictures.TEXT in colours
    for colour in colours:
        for background in BACKGROUNDS:
            low, high = sorted((luminance(colour), luminance(background)))
            assert (high + 0.05) / (low + 0.05) > 3, (colour, background)


def test_every_picture_has_words_for_those_who_do_not_see_it():
    shown = [(page, found) for page in PAGES for found in re.findall(r"!\[(.*?)\]\((.*?)\)", page.read_text())]
    assert {Path(target).stem for _, (_, target) in shown} == set(pictures.PICTURES)
    for page, (words, target) in shown:
        assert len(words) > 40, page
        assert (page.parent / target).is_file(), page
