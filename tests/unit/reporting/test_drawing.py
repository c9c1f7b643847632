"""Scales, curves, the timeline axis and texts."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.reporting import charts, curves, scales
from trainer.reporting.charts import Axis, Chart
from trainer.reporting.clock import Clock
from trainer.reporting.curves import Curve
from trainer.reporting.markup import Html, data, escaped, tag
from trainer.reporting.scales import SIZE, Scale, fitting

ANY = st.floats(allow_nan=False, allow_infinity=False)
SANE = st.floats(-1e6, 1e6)


# --- scales ------------------------------------------------------------------------------------


@given(st.lists(ANY, min_size=1), st.booleans())
def test_scale_is_monotonic_and_total(values, may_log):
    scale = fitting(values, may_log=may_log)
    places = [scale(value) for value in sorted(values)]
    assert all(0 <= position <= SIZE for position in places)
    assert places == sorted(places)


@given(st.lists(ANY, min_size=1), st.booleans())
def test_ticks_are_few_ascending_and_within_the_scale(values, may_log):
    scale = fitting(values, may_log=may_log)
    ticks = scale.ticks(5)
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(ticks)
    assert all(scale.low <= tick <= scale.high for tick in ticks)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=90))
def test_fitting_is_logarithmic_only_if_values_span_decades(values):
    assert fitting(values, may_log=True).is_log == (max(values) / min(values) >= 30)
    assert not fitting(values).is_log


def test_log_scale_maps_equal_ratios_to_equal_steps():
    scale = Scale(0.001, 1000.0, is_log=True)
    assert [scale(10.0**power) for power in (-3, 0, 3)] == pytest.approx([0, SIZE / 2, SIZE])


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

POINTS = st.dictionaries(st.integers(0, 10**6), SANE, min_size=1, max_size=60).map(
    lambda result: sorted(result.items())
)


@given(POINTS)
def test_path_contains_the_points(result):
    x = Scale(0.0, 1e6)
    y = fitting([value for _, value in result])
    numbers = [float(text) for text in re.split(r"[ ML]", curves.path(result, x, y)) if text]
    for (step, value), start, top in zip(result, numbers[::2], numbers[1::2], strict=True):
        assert start / SIZE * 1e6 == pytest.approx(step, abs=0.051 / SIZE * 1e6)
        back = y.low + (SIZE - top) / SIZE * (y.high - y.low)
        assert back == pytest.approx(value, abs=0.052 / SIZE * (y.high - y.low))


@given(POINTS)
def test_dots_match_the_path(result):
    x, y = Scale(0.0, 1e6), fitting([value for _, value in result])
    assert curves.dots(result, x, y).replace("h0", "").strip("M").split("M") == (
        curves.path(result, x, y).strip("M").split("L")
    )


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


def test_chart_is_empty_without_points_and_a_dot_for_one():
    axis = Axis(0, 10)
    assert charts.draw(Chart("t", [Curve("c", [], 1)]), axis) == ""
    assert 'class="points c1"' in charts.draw(Chart("t", [Curve("c", [(3, 1.0)], 1)]), axis)


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


# --- markup ------------------------------------------------------------------------------------


@given(st.text())
def test_text_never_becomes_markup(text):
    assert "<" not in escaped(text)
    assert ">" not in escaped(text)
    assert tag("p", text, title=text).count("<") == 2
    assert data({"name": text}).count("<") == 2


def test_only_html_instances_are_markup():
    assert tag("p", tag("b", "<i>")) == "<p><b>&lt;i&gt;</b></p>"
    assert tag("p", None, False, 0) == "<p>0</p>"
    assert tag("input", data_key='"x"', hidden=True) == '<input data-key="&quot;x&quot;" hidden>'
    assert isinstance(escaped("a"), Html)
