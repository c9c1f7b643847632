"""Scales, curves, the timeline axis and templates."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.report_pages import parsed

from trainer.reporting import charts, curves, page, scales
from trainer.reporting.charts import Axis, Chart
from trainer.reporting.clock import Clock
from trainer.reporting.curves import Curve
from trainer.reporting.scales import Scale, fitting

ANY = st.floats(allow_nan=False, allow_infinity=False)
SANE = st.floats(-1e6, 1e6)


# --- scales ------------------------------------------------------------------------------------


@given(st.lists(ANY, min_size=1), st.booleans())
def test_scale_is_monotonic_and_total(values, may_log):
    scale = fitting(values, may_log=may_log)
    places = [scale(value) for value in sorted(values)]
    assert all(0 <= position <= 1 for position in places)
    assert places == sorted(places)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=90))
def test_fitting_is_logarithmic_only_if_values_span_decades(values):
    assert fitting(values, may_log=True).is_log == (max(values) / min(values) >= 30)
    assert not fitting(values).is_log


def test_log_scale_maps_equal_ratios_to_equal_steps():
    scale = Scale(0.001, 1000.0, is_log=True)
    assert [scale(10.0**power) for power in (-3, 0, 3)] == pytest.approx([0, 0.5, 1])


def test_fitting_with_a_single_tiny_value_keeps_the_others_spread():
    scale = fitting([*[1.0 + i / 100 for i in range(300)], 1e-30], may_log=True)
    assert scale.low > 0.1


@pytest.mark.parametrize(("value", "text"), [
    (12345, "12,345"), (0.98612, "0.9861"), (2660.6, "2,661"), (9.558e-9, "9.56e-9"),
    (0.003, "0.003"), (1.0, "1"), (-0.5, "-0.5"), (1e-4, "0.0001"), (0, "0"), (None, "–"),
    (3.0e20, "3e20"), (math.nan, "nan"), (9.99999, "10"),
])  # fmt: skip
def test_number_is_short_and_precise(value, text):
    assert scales.number(value) == text


@given(st.floats(1e-12, 1e14))
def test_number_keeps_four_digits(value):
    rounding = 6e-4 if value >= 1e-4 else 6e-3
    assert float(scales.number(value).replace(",", "")) == pytest.approx(value, rel=rounding)


@pytest.mark.parametrize(("seconds", "text"), [
    (0.00024, "0.24 ms"), (0.5, "0.5 s"), (0.15, "0.15 s"), (12.34, "12.3 s"), (245, "4 min 5 s"),
    (12000, "3 h 20 min"), (187200, "2 d 4 h"), (3600, "1 h"), (None, "–"),
])  # fmt: skip
def test_duration_uses_two_units(seconds, text):
    assert scales.duration(seconds) == text


@pytest.mark.parametrize(("name", "value", "text"), [
    ("samples_per_s", 1976.4, "1,976 samples/s"), ("flops_per_s", 2.97e12, "2.97T flops/s"),
    ("peak_memory_bytes", 3.2e9, "3.2 GB"), ("save_s", 0.0355, "35.5 ms"), ("loss", 0.25, "0.25"),
])  # fmt: skip
def test_quantity_uses_the_unit_of_its_name(name, value, text):
    assert scales.quantity(name, value) == text


# --- curves ------------------------------------------------------------------------------------


@given(st.lists(SANE, min_size=1, max_size=400))
def test_thinned_keeps_ends_and_extremes(values):
    result = list(enumerate(values))
    drawn = curves.thinned(result, 50)
    assert len(drawn) <= 52
    assert set(drawn) <= set(result)
    assert [step for step, _ in drawn] == sorted({step for step, _ in drawn})
    assert (drawn[0], drawn[-1]) == (result[0], result[-1])
    for choose in (min, max):
        assert choose(value for _, value in drawn) == choose(values)


@given(st.lists(SANE, min_size=1, max_size=400))
def test_smoothed_is_the_mean_of_neighbours(values):
    reach = len(values) // 50
    for index, (step, value) in enumerate(curves.smoothed(list(enumerate(values)))):
        near = values[max(index - reach, 0) : index + reach + 1]
        assert step == index
        assert value == pytest.approx(sum(near) / len(near), abs=1e-6)


@given(st.integers(1, 500), st.integers(1, 9), st.integers(1, 20))
def test_steps_per_epoch_is_derived_from_lines(length, epochs, every):
    lines = [
        {"step": step, "epoch": step // length}
        for step in range(1, length * epochs + 1)
        if step % every == 0 or step % length == 0  # training lines, and one at each epoch's end
    ]
    assert curves.steps_per_epoch(lines) in (length, None)
    assert curves.steps_per_epoch(lines[: max(every - 1, 1)]) in (length, None)


def test_points_skip_values_that_are_not_numbers():
    lines = [
        {"step": i, "split": "train", "loss": value}
        for i, value in enumerate([1.0, None, "1", math.nan, True, [1], math.inf, 3])
    ]
    assert curves.points(lines, "train", "loss") == [(0, 1.0), (7, 3.0)]


def test_chart_without_points_is_left_out():
    axis = Axis(0, 10, resumed=(4, 10**400))
    empty, dot = Chart("empty", [Curve("c", [], 1)]), Chart("t", [Curve("c", [(3, 1e308)], 1)])
    (drawn,) = charts.drawn([empty, dot], axis)
    assert (drawn["title"], drawn["data"]["curves"][0]["x"]) == ("t", [3])
    assert (drawn["data"]["x"], drawn["data"]["resumed"]) == ([0, 10], [4])
    assert all(map(math.isfinite, [*drawn["data"]["y"], *drawn["data"]["curves"][0]["y"]]))


# --- the clock of a time line ------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.1, 1e6), st.floats(0.1, 1e6)), min_size=1, max_size=10))
def test_clock_ascends_fills_the_width_and_shortens_idle_times(lengths):
    busy, at = [], 1.7e9
    for idle_s, work_s in lengths:
        busy.append((at + idle_s, at + idle_s + work_s))
        at = busy[-1][1]
    clock = Clock(busy)
    moments = [moment for span in busy for moment in span]
    places = [clock(moment) for moment in moments]
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == pytest.approx(100)
    assert all(clock(end) - clock(begin) <= 4.001 for begin, end in clock.gaps())


# --- templates ---------------------------------------------------------------------------------


@given(st.text(st.characters(blacklist_characters="\r\0", blacklist_categories=["Cs"])))
def test_text_never_becomes_markup(text):
    axis = Axis(0, 10)
    drawn = charts.drawn([Chart(text, [Curve(text, [(3, 1.0)], 1)], note=text)], axis)
    parts = page._templates().get_template("parts.html").module
    (element,) = parsed(str(parts.charts(drawn, axis))).all("figure")
    assert [one.text for one in element.all("h3")] == [text]
    assert element.all("div", "plot")[0].attributes["aria-label"] == f"{text} by step"
    assert curves_of(element) == [text]
    image = {"name": text, "base64": text, "is_small": False}
    (element,) = parsed(str(parts.image(image))).children
    assert element.attributes["alt"] == text


def curves_of(element):
    return [curve["name"] for curve in json.loads(element.all("script")[0].text)["curves"]]
