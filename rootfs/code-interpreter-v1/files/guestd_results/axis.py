"""One axis of a chart: its name and unit, its scale, its ticks, and values along it as JSON knows them."""

import re

import numpy
from matplotlib import dates

from . import values

UNIT = re.compile(r"\s\(([^()]*)\)|\[([^\[\]]*)\]")


class Axis:
    def __init__(self, axis):
        self.axis = axis
        convert = getattr(axis, "get_converter", lambda: axis.converter)()
        self.converter = type(convert).__name__
        self.ticks = [float(tick) for tick in numpy.asarray(axis.get_majorticklocs(), dtype=float)]
        self.labels = [values.text(label.get_text()) for label in axis.get_majorticklabels()]

    def named(self, name):
        """Its label and the unit in it."""
        label = values.text(self.axis.get_label().get_text())
        unit = UNIT.search(label)
        unit = (unit[1] or unit[2] or None) if unit else None
        return {f"{name}_label": label or None, f"{name}_unit": unit}

    def scaled(self, name):
        """Its scale and ticks."""
        return {
            f"{name}_ticks": [self.value(tick) for tick in self.ticks] if self.is_date else self._plain_ticks(),
            f"{name}_tick_labels": self.labels,
            f"{name}_scale": self.scale,
        }

    def _plain_ticks(self):
        return [values.number(tick) for tick in self.ticks]

    @property
    def is_date(self):
        # matplotlib's converters of dates, and those that pandas puts in their place.
        return self.is_period or self.converter.endswith(("DateConverter", "DatetimeConverter"))

    @property
    def is_period(self):
        return self.converter == "PeriodConverter"

    @property
    def scale(self):
        if self.is_date:
            return "datetime"
        scale = self.axis.get_scale()
        if scale != "linear":
            return scale
        return "categorical" if self.is_categorical else "linear"

    @property
    def is_categorical(self):
        """Whether its ticks are numbered from 0 and named by something else than their number."""
        if not self.labels or self.ticks != list(range(len(self.ticks))):
            return False
        return any(label and not _says(label, tick) for label, tick in zip(self.labels, self.ticks))

    def values(self, data):
        """What was drawn along the axis, in whatever form it was given."""
        if self.is_date or self.converter == "StrCategoryConverter":
            return [self.value(item) for item in _items(data)]
        try:
            data = numpy.ma.filled(numpy.ma.asarray(data, dtype=float), numpy.nan)
        except (TypeError, ValueError):
            # Units of somebody else's, such as durations: as they lie on the axis.
            data = numpy.asarray([self.axis.convert_units(item) for item in _items(data)], dtype=float)
        return [values.number(item) for item in data.tolist()]

    def value(self, item):
        """One of them."""
        if isinstance(item, str):
            return values.text(item)
        if hasattr(item, "isoformat"):
            return values.moment(item)
        if isinstance(item, numpy.datetime64):
            return values.plain(item)
        if hasattr(item, "start_time"):  # a period of pandas'
            return values.moment(item.start_time)
        number = values.number(float(item))
        if number is None:
            return None
        if self.is_period:
            return self._period(number)
        if self.is_date:
            return dates.num2date(number).isoformat()
        if self.converter == "StrCategoryConverter" and number in self.ticks:
            return self.labels[self.ticks.index(number)]
        return number

    def _period(self, ordinal):
        from pandas import Period

        frequency = getattr(self.axis, "freq", None) or self.axis.axes.freq
        return Period(ordinal=round(ordinal), freq=frequency).start_time.isoformat()

    def label_at(self, position, reach):
        """What a bar or box is called: by the nearest tick that has a name and is near enough, else by where it is."""
        best = None
        if self._are_names():
            near = [(abs(tick - position), label) for tick, label in zip(self.ticks, self.labels) if label]
            best = min(near, default=None)
            # Bars of several groups stand beside the tick of all of them.
            step = min(numpy.diff(sorted(self.ticks)), default=0) / 2
            if best is not None and best[0] <= max(reach, step) * (1 + 1e-9):
                return best[1]
        return str(self.value(position)) if self.is_date else f"{position:g}"

    def _are_names(self):
        """Whether the ticks are named by something else than where they are."""
        if self.is_date:
            return False
        pairs = [(label, tick) for label, tick in zip(self.labels, self.ticks) if label]
        return any(not _says(label, tick) for label, tick in pairs)


def _items(data):
    if hasattr(data, "tolist") and getattr(getattr(data, "dtype", None), "kind", "") == "M":
        return list(numpy.asarray(data))
    return list(numpy.ravel(numpy.asarray(data, dtype=object)))


def _says(label, tick):
    """Whether the label is the number of the tick, in matplotlib's writing."""
    try:
        return float(label.replace("\N{MINUS SIGN}", "-")) == float(f"{tick:.12g}")
    except ValueError:
        return "\\mathdefault" in label
