"""Texts of numbers, sizes and durations."""

import pytest

from trainer.core import formatting


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (0.0, "0"), (12345, "12,345"), (0.98612, "0.9861"), (9.6e-9, "9.6e-9"),
    (float("nan"), "nan"), (float("inf"), "inf"), (-0.5, "-0.5"), (1 << 2000, "…"),
])  # fmt: skip
def test_number_has_four_significant_digits(value, text):
    assert formatting.number(value) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "–"), (0.0002, "0.2 ms"), (12.34, "12.3 s"), (245, "4 min 5 s"), (12000, "3 h 20 min"),
    (187200, "2 d 4 h"), (float("inf"), "–"),
])  # fmt: skip
def test_duration_has_two_units(seconds, text):
    assert formatting.duration(seconds) == text


def test_pluralize_matches_the_noun_to_the_count():
    texts = [
        formatting.pluralize(count, noun)
        for count, noun in ((1, "step"), (2000, "step"), (2, "batch"))
    ]
    assert texts == ["1 step", "2,000 steps", "2 batches"]


def test_listing_counts_the_names_beyond_its_limit():
    assert formatting.listing([], 2) == "nothing"
    assert formatting.listing(["a", "b", "c"], 2) == "a, b and 1 more"


def test_size_uses_powers_of_1000():
    assert [formatting.size(value) for value in (0, 999, 12_345_678)] == ["0 B", "999 B", "12.3 MB"]
