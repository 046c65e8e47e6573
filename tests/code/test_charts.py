"""The startup module of the Python kernel: figures as charts, judged by the SDKs' own classes."""

import datetime
import gc
import json
import re
import sys
import uuid
import weakref

import pytest
from e2b_code_interpreter import charts as sdk
from e2b_code_interpreter.charts import _deserialize_chart

from harness import kernels, locations

# Agg is what a machine without a screen has; the kernel's own backend draws with it as well.
import matplotlib

matplotlib.use("Agg")
import matplotlib.axes
import matplotlib.dates
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

sys.path.insert(0, str(kernels.FILES))
import guestd_results
from guestd_results import charts

charts.remember_boxes(matplotlib.axes.Axes)


@pytest.fixture(autouse=True)
def closed_figures():
    yield
    plt.close("all")


def as_sent(figure) -> dict:
    """The chart as it arrives: JSON has neither infinity nor numpy's numbers."""
    return json.loads(json.dumps(guestd_results.describe_figure(figure), allow_nan=False))


def chart_of(figure):
    """The chart as the Python SDK reads it."""
    return _deserialize_chart(as_sent(figure))


def axes(**options):
    return plt.subplots(**options)


# === Lines and points ===


def test_a_line_chart_has_labels_units_ticks_and_points():
    figure, ax = axes()
    ax.plot([0, 1, 2], [1.5, 4, 9], label="fall")
    ax.set(title="Fall", xlabel="Time (s)", ylabel="Speed [m/s]")
    chart = chart_of(figure)
    assert type(chart) is sdk.LineChart and chart.type is sdk.ChartType.LINE and chart.title == "Fall"
    assert (chart.x_label, chart.x_unit, chart.y_label, chart.y_unit) == ("Time (s)", "s", "Speed [m/s]", "m/s")
    assert (chart.x_scale, chart.y_scale) == (sdk.ScaleType.LINEAR, sdk.ScaleType.LINEAR)
    assert [(line.label, line.points) for line in chart.elements] == [("fall", [(0, 1.5), (1, 4), (2, 9)])]
    assert len(chart.x_ticks) == len(chart.x_tick_labels) > 2 and 1.0 in chart.x_ticks
    assert len(chart.y_ticks) == len(chart.y_tick_labels) > 2 and all(isinstance(tick, float) for tick in chart.y_ticks)


@pytest.mark.parametrize(
    "label, unit",
    [
        ("Foo (a)", "a"), ("Foo [a]", "a"), ("Foo[a]", "a"), ("Foo (a) more", "a"), ("Foo (a) (b)", "a"),
        ("Foo(a)", None), ("(only)", None), ("Foo in a", None), ("Foo ()", None), ("", None),
    ],
)  # fmt: skip
def test_a_unit_is_what_stands_in_brackets(label, unit):
    figure, ax = axes()
    ax.plot([0, 1], [0, 1])
    ax.set_xlabel(label)
    chart = chart_of(figure)
    assert (chart.x_label, chart.x_unit) == (label or None, unit)


def test_lines_without_a_label_are_numbered_and_grid_lines_are_left_out():
    figure, ax = axes()
    ax.plot([0, 1, 2], [1, 2, 3])
    ax.axhline(2)
    ax.axvline(1, label="a mark")
    ax.plot([0, 1, 2], [3, 2, 1])
    ax.grid(True)
    assert [line.label for line in chart_of(figure).elements] == ["Line 0", "Line 3"]


@pytest.mark.parametrize(
    "days, expected",
    [
        ([datetime.date(2023, 9, 1), datetime.date(2023, 9, 2)], ["2023-09-01", "2023-09-02"]),
        (
            [datetime.datetime(2023, 9, 1, 12, 30, 0, 5), datetime.datetime(2023, 9, 2)],
            ["2023-09-01T12:30:00.000005", "2023-09-02T00:00:00"],
        ),
        (
            np.array(["2023-09-01", "2023-09-02"], dtype="datetime64[D]"),
            ["2023-09-01T00:00:00", "2023-09-02T00:00:00"],
        ),
        (pd.to_datetime(["2023-09-01", "2023-09-02"]), ["2023-09-01T00:00:00", "2023-09-02T00:00:00"]),
    ],
)
@pytest.mark.parametrize("axis", ["x", "y"])
def test_dates_are_written_as_iso_8601_whatever_they_came_as(days, expected, axis):
    figure, ax = axes()
    ax.plot(*((days, [1, 2]) if axis == "x" else ([1, 2], days)))
    getattr(ax, f"{axis}axis").set_major_formatter(matplotlib.dates.DateFormatter("%d.%m."))
    chart = chart_of(figure)
    position = "xy".index(axis)
    assert getattr(chart, f"{axis}_scale") is sdk.ScaleType.DATETIME
    assert [point[position] for point in chart.elements[0].points] == expected
    ticks, labels = getattr(chart, f"{axis}_ticks"), getattr(chart, f"{axis}_tick_labels")
    assert all(datetime.datetime.fromisoformat(tick).year == 2023 for tick in ticks)
    assert "01.09." in labels


def test_the_dates_of_a_pandas_plot_are_dates_whatever_pandas_makes_of_them():
    frame = pd.DataFrame({"a": [1, 2, 3]}, index=pd.date_range("2023-01-01", periods=3))
    for options in ({}, {"x_compat": True}):
        chart = chart_of(frame.plot(**options).get_figure())
        assert chart.x_scale is sdk.ScaleType.DATETIME
        assert chart.elements[0].points[0] == ("2023-01-01T00:00:00", 1.0)
        assert all(datetime.datetime.fromisoformat(tick) for tick in chart.x_ticks)


@pytest.mark.parametrize("scale", ["log", "symlog", "logit", "asinh", "function", "functionlog"])
def test_every_scale_of_matplotlib_has_the_name_that_the_sdks_know(scale):
    figure, ax = axes()
    ax.plot([0.1, 0.5], [0.2, 0.9])
    functions = {"functions": (lambda x: x * 2, lambda x: x / 2)} if scale.startswith("function") else {}
    ax.set_yscale(scale, **functions)
    chart = chart_of(figure)
    assert chart.y_scale is sdk.ScaleType(scale) and chart.x_scale is sdk.ScaleType.LINEAR


def test_categories_are_named_in_the_points_of_lines_and_scatters():
    for draw in ("plot", "scatter"):
        figure, ax = axes()
        getattr(ax, draw)(["a", "b"], [1, 2])
        chart = chart_of(figure)
        assert chart.x_scale is sdk.ScaleType.CATEGORICAL and chart.y_scale is sdk.ScaleType.LINEAR
        assert chart.elements[0].points == [("a", 1.0), ("b", 2.0)] and chart.x_tick_labels == ["a", "b"]


def test_ticks_numbered_from_0_with_names_are_categories_and_with_their_numbers_are_not():
    for labels, scale in ((["x", "y", "z"], "categorical"), (["0", "1.0", "2"], "linear"), (["", "", ""], "linear")):
        figure, ax = axes()
        ax.plot([0, 1, 2], [1, 2, 3])
        ax.set_xticks([0, 1, 2], labels)
        assert chart_of(figure).x_scale is sdk.ScaleType(scale)


def test_what_json_cannot_write_is_null():
    figure, ax = axes()
    ax.plot([0, 1, 2], [1, float("nan"), float("inf")])
    assert chart_of(figure).elements[0].points == [(0, 1), (1, None), (2, None)]


def test_a_scatter_chart_has_points_dates_included():
    figure, ax = axes()
    ax.scatter([datetime.date(2023, 1, 1), datetime.date(2023, 1, 3)], [4, 5], label="seen")
    ax.set_ylabel("Height (cm)")
    chart = chart_of(figure)
    assert type(chart) is sdk.ScatterChart and chart.y_unit == "cm"
    assert chart.elements[0].label == "seen"
    assert chart.elements[0].points[1] == ("2023-01-03T00:00:00+00:00", 5.0)


def test_error_bars_leave_a_line_a_line_and_bars_bars():
    figure, (left, right) = axes(ncols=2)
    left.errorbar([0, 1, 2], [1, 2, 3], yerr=[0.1, 0.1, 0.1], label="measured", capsize=3)
    right.bar(["a", "b"], [1, 2], yerr=[0.1, 0.2], capsize=3)
    line, bars = chart_of(figure).elements
    assert [element.label for element in line.elements] == ["measured"]
    assert [(bar.label, bar.value) for bar in bars.elements] == [("a", 1.0), ("b", 2.0)]


# === Bars ===


def test_a_bar_chart_has_a_label_and_a_value_for_each_bar():
    figure, ax = axes()
    ax.bar(["A", "B"], [1, -2.5], label="sold")
    ax.set(xlabel="Shop", ylabel="Sales (EUR)", title="Sales")
    chart = chart_of(figure)
    assert type(chart) is sdk.BarChart and chart.title == "Sales"
    assert (chart.x_label, chart.x_unit, chart.y_label, chart.y_unit) == ("Shop", None, "Sales (EUR)", "EUR")
    assert [(bar.label, bar.group, bar.value) for bar in chart.elements] == [("A", "sold", 1.0), ("B", "sold", -2.5)]


def test_lying_bars_swap_the_axes():
    figure, ax = axes()
    ax.barh(["A", "B"], [1, 2.5])
    ax.set(ylabel="Shop", xlabel="Sales (EUR)")
    chart = chart_of(figure)
    assert (chart.x_label, chart.y_label, chart.x_unit, chart.y_unit) == ("Shop", "Sales (EUR)", None, "EUR")
    assert [(bar.label, bar.group, bar.value) for bar in chart.elements] == [("A", "Group 0", 1.0), ("B", "Group 0", 2.5)]


def test_bars_beside_a_tick_have_its_name_and_stacked_ones_their_own_height():
    places = np.arange(3)
    figure, (beside, stacked) = axes(ncols=2)
    beside.bar(places - 0.2, [1, 2, 3], 0.4, label="m")
    beside.bar(places + 0.2, [4, 5, 6], 0.4, label="w")
    beside.set_xticks(places, ["a", "b", "c"])
    stacked.bar(["p", "q"], [1, 2])
    stacked.bar(["p", "q"], [3, 4], bottom=[1, 2])
    first, second = chart_of(figure).elements
    assert [(bar.label, bar.group, bar.value) for bar in first.elements] == [
        ("a", "m", 1), ("b", "m", 2), ("c", "m", 3), ("a", "w", 4), ("b", "w", 5), ("c", "w", 6),
    ]  # fmt: skip
    assert [(bar.group, bar.value) for bar in second.elements] == [
        ("Group 0", 1), ("Group 0", 2), ("Group 1", 3), ("Group 1", 4),
    ]  # fmt: skip


def test_bars_without_names_are_called_by_where_they_stand():
    figure, (numbers, days, counts) = axes(ncols=3)
    numbers.bar([10, 20, 30], [1, 2, 3])
    days.bar([datetime.date(2023, 1, 1), datetime.date(2023, 1, 2)], [1, 2])
    counts.hist([1, 1, 2, 3, 3, 3], bins=2)
    first, second, third = chart_of(figure).elements
    assert [bar.label for bar in first.elements] == ["10", "20", "30"]
    assert [bar.label[:10] for bar in second.elements] == ["2023-01-01", "2023-01-02"]
    assert [(bar.label, bar.value) for bar in third.elements] == [("1.5", 2.0), ("2.5", 4.0)]


def test_a_pandas_bar_plot_is_grouped_by_its_columns():
    frame = pd.DataFrame({"a": [1, 2], "b": [4, 5]}, index=["x", "y"])
    for plot in (frame.plot.bar, frame.plot.barh):
        bars = chart_of(plot().get_figure()).elements
        assert [(bar.label, bar.group, bar.value) for bar in bars] == [
            ("x", "a", 1), ("y", "a", 2), ("x", "b", 4), ("y", "b", 5),
        ]  # fmt: skip


# === Boxes ===

SAMPLES = [[1, 2, 3, 4, 20.123456789], [2, 3, 4, 5, 6]]


@pytest.mark.parametrize("options", [{}, {"patch_artist": True}, {"notch": True, "showmeans": True}])
@pytest.mark.parametrize("lying", [False, True])
def test_a_box_plot_has_five_numbers_and_the_outliers_of_each_box(options, lying):
    figure, ax = axes()
    # The name of this option has changed, its old name goes away.
    way = {"orientation": "horizontal"} if lying else {}
    try:
        ax.boxplot(SAMPLES, **options, **way)
    except TypeError:
        ax.boxplot(SAMPLES, **options, vert=not lying)
    names, measure = ("y", "x") if lying else ("x", "y")
    getattr(ax, f"set_{names}ticklabels")(["p", "q"])
    getattr(ax, f"set_{names}label")("Group")
    getattr(ax, f"set_{measure}label")("Size (cm)")
    chart = chart_of(figure)
    assert type(chart) is sdk.BoxAndWhiskerChart
    assert (chart.x_label, chart.x_unit, chart.y_label, chart.y_unit) == ("Group", None, "Size (cm)", "cm")
    first, second = chart.elements
    numbers = (first.min, first.first_quartile, first.median, first.third_quartile, first.max, first.outliers)
    # To eight digits.
    assert (first.label, numbers) == ("p", (1, 2, 3, 4, 4, [20.123457]))
    assert (second.label, second.min, second.max, second.outliers) == ("q", 2, 6, [])


def test_a_pandas_box_plot_is_named_by_its_columns():
    frame = pd.DataFrame({"a": [1, 2, 3, 9], "b": [4, 5, 6, 7]})
    chart = chart_of(frame.plot.box().get_figure())
    assert type(chart) is sdk.BoxAndWhiskerChart and [box.label for box in chart.elements] == ["a", "b"]


def test_boxes_that_were_cleared_away_are_forgotten():
    figure, ax = axes()
    ax.boxplot(SAMPLES)
    ax.clear()
    ax.plot([1, 2], [3, 4])
    assert type(chart_of(figure)) is sdk.LineChart


def test_a_box_plot_that_is_closed_is_not_kept_in_memory():
    figure, ax = axes()
    ax.boxplot(SAMPLES)
    as_sent(figure)
    gone = weakref.ref(figure)
    plt.close(figure)
    del figure, ax
    gc.collect()
    assert gone() is None


# === Slices ===


def test_a_pie_has_angles_that_make_a_circle():
    figure, ax = axes()
    ax.pie([15, 30, 45, 10], labels=["a", "b", "c", "d"], autopct="%1.1f%%", radius=2)
    ax.set_title("Cake")
    chart = chart_of(figure)
    assert type(chart) is sdk.PieChart and chart.title == "Cake"
    slices = [(slice.label, slice.angle, slice.radius) for slice in chart.elements]
    assert slices == [("a", 54.0, 2.0), ("b", 108.0, 2.0), ("c", 162.0, 2.0), ("d", 36.0, 2.0)]
    figure, ax = axes()
    ax.pie([1] * 7)
    chart = chart_of(figure)
    assert [slice.label for slice in chart.elements] == [""] * 7
    assert sum(slice.angle for slice in chart.elements) == pytest.approx(360, abs=1e-3)


# === Figures ===


def test_several_axes_make_a_superchart_whose_title_is_that_of_the_figure():
    figure, ((a, b), (c, _)) = axes(nrows=2, ncols=2)
    a.plot([1, 2], [3, 5])
    a.set_title("one")
    b.bar(["x"], [2])
    c.pie([1, 2])
    figure.suptitle("All")
    chart = chart_of(figure)
    assert type(chart) is sdk.SuperChart and chart.title == "All"
    # Empty axes say nothing.
    assert [type(element) for element in chart.elements] == [sdk.LineChart, sdk.BarChart, sdk.PieChart]
    assert chart.elements[0].title == "one" and chart.elements[1].elements[0].label == "x"


def test_a_colour_bar_is_part_of_its_chart():
    figure, ax = axes()
    figure.colorbar(ax.scatter([1, 2], [3, 4], c=[0.1, 0.9]))
    assert type(chart_of(figure)) is sdk.ScatterChart


def test_a_figure_with_nothing_on_it_has_no_chart():
    assert as_sent(plt.figure()) == {}
    assert as_sent(axes()[0]) == {}


def test_what_no_chart_can_say_is_unknown():
    def picture(ax):
        ax.imshow([[1, 2], [3, 4]])

    def area(ax):
        ax.fill_between([0, 1], [1, 2])

    def mixed(ax):
        ax.bar(["a", "b"], [1, 2])
        ax.plot(["a", "b"], [3, 4])

    for draw in (picture, area, mixed, lambda ax: ax.contourf([[1, 2], [3, 4]])):
        figure, ax = axes()
        draw(ax)
        ax.set_title("T")
        chart = chart_of(figure)
        assert (chart.type, chart.title, chart.elements) == (sdk.ChartType.UNKNOWN, "T", [])
    figure = plt.figure()
    figure.add_subplot(projection="3d").plot([1, 2], [3, 4], [5, 6])
    assert chart_of(figure).type is sdk.ChartType.UNKNOWN


def test_a_figure_that_fails_while_it_is_looked_at_has_no_chart():
    figure, ax = axes()
    ax.plot([1, 2], [3, 4])
    ax.get_title = lambda loc=None: 1 / 0
    assert as_sent(figure) == {}


def test_a_figure_of_too_many_points_has_no_chart():
    figure, ax = axes()
    ax.plot(np.zeros(charts.POINTS + 1), np.arange(charts.POINTS + 1))
    assert as_sent(figure) == {}


# === What JavaScript expects ===


def declared_fields() -> dict:
    """The fields of each type in the declarations of the JavaScript SDK, those that it builds on included."""
    path = locations.node_modules() / "@e2b/code-interpreter/dist/index.d.ts"
    types = {}
    for name, base, body in re.findall(r"^type (\w+) = (?:(\w+) & )?\{(.*?)^\};", path.read_text(), re.S | re.M):
        types[name] = (base, set(re.findall(r"^\s*(\w+)\??:", body, re.M)))

    def whole(name):
        base, fields = types[name]
        return fields | (whole(base) if base else set())

    return {name: whole(name) for name in types if name.endswith(("Chart", "Data"))}


def test_every_chart_has_exactly_the_fields_that_the_javascript_sdk_declares():
    figures = {}
    for name in ("Line", "Scatter", "Bar", "Pie", "BoxAndWhisker"):
        figures[name], ax = axes()
        draw = {
            "Line": lambda: ax.plot([1, 2], [3, 4]),
            "Scatter": lambda: ax.scatter([1, 2], [3, 4]),
            "Bar": lambda: ax.bar([1, 2], [3, 4]),
            "Pie": lambda: ax.pie([1, 2]),
            "BoxAndWhisker": lambda: ax.boxplot([1, 2, 9]),
        }
        draw[name]()
    declared = declared_fields()
    for name, figure in figures.items():
        chart = as_sent(figure)
        assert set(chart) == declared[f"{name}Chart"], name
        element = "Point" if name in ("Line", "Scatter") else name
        assert set(chart["elements"][0]) == declared[f"{element}Data"], name
    figure, (left, right) = axes(ncols=2)
    left.plot([1, 2], [3, 4])
    right.plot([1, 2], [3, 4])
    assert set(as_sent(figure)) == declared["SuperChart"]


# === Tables and plain values ===


class Unprintable:
    def __str__(self):
        raise RuntimeError("no")


def test_a_table_is_a_list_for_each_column():
    frame = pd.DataFrame(
        {
            "n": [1, 2, 3],
            "x": [1.5, float("nan"), float("inf")],
            "s": ["a", None, "\ud800"],
            "t": pd.to_datetime(["2024-01-02 03:04:05", None, "2024-01-03 00:00:00"]),
            "z": pd.to_datetime(["2024-01-02", "2024-01-02", "2024-01-02"]).tz_localize("Europe/Berlin"),
            "b": pd.array([True, None, False], dtype="boolean"),
            "c": pd.Categorical(["u", "v", "u"]),
            "d": pd.to_timedelta(["1 day", None, "2 days"]),
            "o": [{"k": np.int64(1)}, [1, (2, 3)], uuid.UUID(int=0)],
        }
    )
    data = json.loads(json.dumps(guestd_results.describe_table(frame), allow_nan=False))
    assert data["n"] == [1, 2, 3]
    assert data["x"] == [1.5, None, None]
    assert data["s"] == ["a", None, "?"]
    assert data["t"] == ["2024-01-02T03:04:05", None, "2024-01-03T00:00:00"]
    assert data["z"][0] == "2024-01-02T00:00:00+01:00"
    assert data["b"] == [True, None, False]
    assert data["c"] == ["u", "v", "u"]
    assert data["d"][1] is None and data["d"][0].startswith("1 day")
    assert data["o"] == [{"k": 1}, [1, [2, 3]], "00000000-0000-0000-0000-000000000000"]


def test_columns_that_are_no_strings_or_have_one_name_are_all_there():
    frame = pd.DataFrame([[1, 2, 3, 4]], columns=["a", "a", 7, pd.Timestamp("2024-01-01")])
    assert guestd_results.describe_table(frame) == {"a": [1], "a.1": [2], "7": [3], "2024-01-01T00:00:00": [4]}
    assert guestd_results.describe_table(pd.DataFrame()) == {}
    levels = pd.DataFrame([[1]], columns=pd.MultiIndex.from_tuples([("a", "b")]))
    assert guestd_results.describe_table(levels) == {"('a', 'b')": [1]}


def test_a_table_that_cannot_be_described_has_no_data():
    assert guestd_results.describe_table(pd.DataFrame({"a": [Unprintable()]})) is None
    assert guestd_results.describe_table(pd.DataFrame(np.zeros((1001, 1000)))) is None


def test_lists_and_dictionaries_are_json_numpy_included():
    value = {
        1: np.arange(3),
        None: np.float32(0.5),
        False: float("nan"),
        "d": [datetime.date(2024, 1, 2), np.datetime64("2024-01-02T03:04:05.123456789")],
        "big": 2**80,
        "bool": np.bool_(True),
    }
    sent = json.loads(json.dumps(guestd_results.describe_value(value), allow_nan=False))
    assert sent == {
        "1": [0, 1, 2], "null": 0.5, "false": None, "d": ["2024-01-02", "2024-01-02T03:04:05.123456"],
        "big": 2**80, "bool": True,
    }  # fmt: skip


def test_what_is_no_json_is_left_out():
    itself = []
    itself.append(itself)
    deep = []
    for _ in range(100_000):
        deep = [deep]
    for value in ([object()], {"a": {1, 2}}, {(1, 2): 3}, itself, deep, [1j], [0] * 1_000_001):
        assert guestd_results.describe_value(value) is None
