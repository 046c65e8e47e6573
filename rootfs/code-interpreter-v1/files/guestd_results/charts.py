"""A matplotlib figure as `e2b/chart`: what was drawn, as data from which it can be drawn again.

| type             | what it has besides type, title and elements                       | an element                        |
|------------------|---------------------------------------------------------------------|-----------------------------------|
| line, scatter    | x_label, x_unit, x_ticks, x_tick_labels, x_scale, and the same for y | label, points: [[x, y], ...]      |
| bar              | x_label, y_label, x_unit, y_unit                                    | label, group, value               |
| box_and_whisker  | as bar                                                              | label, min, first_quartile, median, third_quartile, max, outliers |
| pie              |                                                                     | label, angle, radius              |
| superchart       | several axes                                                        | a chart for each                  |
| unknown          | something else was drawn                                            | none                              |

In charts whose bars or boxes lie, x is still what they are named by, and y their values.
"""

import functools

import numpy
from matplotlib.collections import PathCollection
from matplotlib.container import BarContainer, ErrorbarContainer
from matplotlib.image import AxesImage
from matplotlib.patches import Wedge

from . import values
from .axis import Axis

# A chart of more points than this is a picture, not data to draw it again from.
POINTS = 500_000
# The attribute of axes that says what `bxp` drew there: matplotlib forgets which lines make a box. It lives as long as
# the axes do.
BOXES = "_guestd_boxes"


def describe(figure):
    """The chart of the figure; `{}` if nothing was drawn."""
    charts = []
    for axes in figure.axes:
        # A colour bar explains another chart, and empty axes say nothing.
        if getattr(axes, "_colorbar", None) is None and axes.has_data():
            charts.append(_of_axes(axes))
    if not charts:
        return {}
    suptitle = getattr(figure, "_suptitle", None)
    suptitle = values.text(suptitle.get_text()) if suptitle is not None else None
    if len(charts) == 1:
        charts[0]["title"] = charts[0]["title"] or suptitle or None
        return charts[0]
    return {"type": "superchart", "title": suptitle or None, "elements": charts}


def _of_axes(axes):
    title = next(filter(None, (axes.get_title(loc=place) for place in ("center", "left", "right"))), None)
    kind, elements = "unknown", []
    found = _kinds(axes)
    # Two kinds over each other are no chart that could be named.
    if len(found) == 1:
        ((kind, artists),) = found.items()
        chart = {"type": kind, "title": title and values.text(title)}
        return chart | _DESCRIBERS[kind](axes, artists)
    return {"type": kind, "title": title and values.text(title), "elements": elements}


def _kinds(axes):
    """What was drawn, by the kind of chart it makes."""
    if axes.name == "3d" or any(isinstance(image, AxesImage) for image in axes.images):
        return {}
    containers = [container for container in axes.containers if isinstance(container, BarContainer)]
    boxes = _remembered(axes)
    # Lines and patches that are parts of something are not drawn for themselves.
    parts = {id(part) for box in boxes for part in box["parts"]}
    for container in axes.containers:
        if isinstance(container, ErrorbarContainer):
            _, caps, bars = container.lines
            parts.update(id(part) for part in (*caps, *bars))
        elif isinstance(container, BarContainer):
            parts.update(id(part) for part in container.patches)
            if container.errorbar is not None:
                parts.update(id(part) for part in (container.errorbar.lines[0],) if part is not None)
    lines = [line for line in axes.lines if id(line) not in parts]
    patches = [patch for patch in axes.patches if id(patch) not in parts]
    wedges = [patch for patch in patches if isinstance(patch, Wedge)]
    points = [c for c in axes.collections if isinstance(c, PathCollection) and _at_points(c, axes)]
    found = {"bar": containers, "box_and_whisker": boxes, "pie": wedges, "scatter": points}
    found = {kind: artists for kind, artists in found.items() if artists}
    # Grid-like lines mark something in a chart of another kind.
    if lines and not (found and all(map(_is_guide, lines))):
        found["line"] = lines
    return found


def _at_points(collection, axes):
    """Whether its paths lie at points of the axes, as a scatter's do and a contour's do not."""
    return collection.get_offset_transform().contains_branch(axes.transData)


def _is_guide(line):
    """Whether it is a straight line along an axis, as those of a grid are."""
    x, y = (numpy.asarray(data, dtype=object) for data in line.get_data(orig=False))
    return len(x) == len(y) == 2 and bool(x[0] == x[1] or y[0] == y[1])


# === What lies between two axes ===


def _lines(axes, lines):
    x, y = Axis(axes.xaxis), Axis(axes.yaxis)
    elements = []
    for number, line in enumerate(axes.lines):
        if line not in lines or _is_guide(line):
            continue
        label = line.get_label()
        for container in axes.containers:
            # The name is the whole's, not that of its line.
            if isinstance(container, ErrorbarContainer) and container.lines[0] is line:
                label = container.get_label()
        _check(len(line.get_xdata(orig=False)))
        points = zip(x.values(line.get_xdata(orig=True)), y.values(line.get_ydata(orig=True)))
        elements.append({"label": _name(label, f"Line {number}"), "points": [list(point) for point in points]})
    _check(sum(len(element["points"]) for element in elements))
    return _point_chart(x, y, elements)


def _scatter(axes, collections):
    x, y = Axis(axes.xaxis), Axis(axes.yaxis)
    _check(sum(len(collection.get_offsets()) for collection in collections))
    elements = []
    for collection in collections:
        # A point that is masked was not drawn.
        offsets = numpy.ma.filled(numpy.ma.asarray(collection.get_offsets(), dtype=float), numpy.nan)
        points = zip(x.values(offsets[:, 0]), y.values(offsets[:, 1]))
        label = values.text(str(collection.get_label()))
        elements.append({"label": label, "points": [list(point) for point in points]})
    return _point_chart(x, y, elements)


def _point_chart(x, y, elements):
    return {"elements": elements, **x.named("x"), **x.scaled("x"), **y.named("y"), **y.scaled("y")}


def _check(count):
    if count > POINTS:
        raise values.NotPlain("too many points")


# === What stands on an axis ===


def _bars(axes, containers):
    lying = all(container.orientation == "horizontal" for container in containers)
    names, measure = _swapped(axes, lying)
    _check(sum(len(container.patches) for container in containers))
    elements = []
    for number, container in enumerate(containers):
        group = _name(container.get_label(), f"Group {number}")
        for patch in container.patches:
            start, width = (patch.get_y(), patch.get_height()) if lying else (patch.get_x(), patch.get_width())
            value = patch.get_width() if lying else patch.get_height()
            label = names.label_at(start + width / 2, abs(width) / 2)
            elements.append({"label": label, "group": group, "value": values.number(float(value))})
    return {"elements": elements, **names.named("x"), **measure.named("y")}


def _box_plot(axes, boxes):
    lying = all(box["lying"] for box in boxes)
    names, measure = _swapped(axes, lying)
    elements = []
    for box in boxes:
        numbers = {name: _rounded(value) for name, value in box["numbers"].items()}
        outliers = [_rounded(value) for value in box["outliers"]]
        label = names.label_at(box["position"], box["width"] / 2)
        elements.append({"label": label, **numbers, "outliers": outliers})
    return {"elements": elements, **names.named("x"), **measure.named("y")}


def _swapped(axes, lying):
    """The axis of the names and the axis of the values."""
    x, y = Axis(axes.xaxis), Axis(axes.yaxis)
    return (y, x) if lying else (x, y)


def remember_boxes(axes_class):
    """Lets `Axes.bxp`, which draws all box plots, leave a note of what it drew."""
    draw = axes_class.bxp

    @functools.wraps(draw)
    def draw_and_remember(self, bxpstats, *arguments, **options):
        drawn = draw(self, bxpstats, *arguments, **options)
        try:
            setattr(self, BOXES, _remembered(self) + list(_drawn_boxes(list(bxpstats), drawn)))
        except Exception:
            pass  # The boxes are drawn, which is what was asked for.
        return drawn

    axes_class.bxp = draw_and_remember


def _remembered(axes):
    """The boxes that are still there."""
    drawn = {id(line) for line in axes.lines}
    return [box for box in getattr(axes, BOXES, ()) if id(box["median"]) in drawn]


def _drawn_boxes(statistics, drawn):
    parts = [part for kind in drawn.values() for part in kind]
    for each, median in zip(statistics, drawn["medians"]):
        x, y = (numpy.asarray(data, dtype=float) for data in median.get_data())
        lying = bool(x[0] == x[-1])
        across = y if lying else x
        yield {
            "parts": parts,
            "median": median,
            "lying": lying,
            "position": float(across[0] + across[-1]) / 2,
            "width": float(abs(across[-1] - across[0])),
            "numbers": {
                "min": each["whislo"],
                "first_quartile": each["q1"],
                "median": each["med"],
                "third_quartile": each["q3"],
                "max": each["whishi"],
            },
            "outliers": each.get("fliers", []),
        }


# === What stands for itself ===


def _pie(axes, wedges):
    elements = []
    for wedge in wedges:
        label = _name(wedge.get_label(), "")
        # matplotlib computes them in 32 bits.
        angle = round(float(wedge.theta2 - wedge.theta1), 4)
        elements.append({"label": label, "angle": angle, "radius": _rounded(wedge.r)})
    return {"elements": elements}


_DESCRIBERS = {"line": _lines, "scatter": _scatter, "bar": _bars, "box_and_whisker": _box_plot, "pie": _pie}


def _name(label, otherwise):
    """A label that the user gave: matplotlib's own begin with an underscore."""
    label = str(label)
    return otherwise if not label or label.startswith("_") else values.text(label)


def _rounded(value):
    """To eight significant digits."""
    return values.number(float(f"{float(value):.8g}"))
