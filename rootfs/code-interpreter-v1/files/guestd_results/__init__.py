"""Results of code cells that a program can read: tables as data, figures as charts, lists as JSON.

An IPython extension. Kernels of a sandbox load it at their start (`ipython_kernel_config.py`), so it imports nothing
that a cell may never need: what belongs to pandas, matplotlib and Pillow is set up when these are imported.

What is added to a result, by MIME type (an object's own method goes first, then the types named here):

    e2b/data           _repr_e2b_data_     pandas.DataFrame: a dictionary from each column to the list of its values
    e2b/chart          _repr_e2b_chart_    matplotlib Figure: its lines, points, bars, boxes or slices
    application/json   _repr_json_         list and dict

Nothing here may break a cell: what cannot be described is described as nothing.
"""

from IPython.core.formatters import BaseFormatter
from traitlets import ObjectName, Unicode

from . import images, imports, values


class DataFormatter(BaseFormatter):
    """The formatter of `e2b/data`."""

    format_type = Unicode("e2b/data")
    print_method = ObjectName("_repr_e2b_data_")
    _return_type = (dict, list, str)


class ChartFormatter(BaseFormatter):
    """The formatter of `e2b/chart`."""

    format_type = Unicode("e2b/chart")
    print_method = ObjectName("_repr_e2b_chart_")
    _return_type = dict


def describe_table(frame):
    """The data of a DataFrame, or nothing."""
    from . import tables

    return _or_else(None, tables.columns, frame)


def describe_figure(figure):
    """The chart of a figure; `{}` if there is nothing to say."""
    from . import charts

    return _or_else({}, charts.describe, figure)


def describe_value(value):
    """A list or dictionary as JSON knows them, or nothing."""
    return _or_else(None, values.plain, value)


def _or_else(nothing, describe, value):
    # Whatever a user's object raises while it is looked at, recursion included, is no concern of the user's cell.
    try:
        return describe(value)
    except Exception:
        return nothing


def load_ipython_extension(shell):
    """Called by IPython."""
    formatters = shell.display_formatter.formatters
    # A result's text is whole: who asked for a long list gets a long list.
    formatters["text/plain"].max_seq_length = 0

    data = DataFormatter(parent=shell.display_formatter)
    # The second name is that of pandas 3.
    for module in ("pandas.core.frame", "pandas"):
        data.for_type_by_name(module, "DataFrame", describe_table)
    formatters["e2b/data"] = data

    chart = ChartFormatter(parent=shell.display_formatter)
    # The base class: the inline backend throws away what it finds for Figure itself.
    chart.for_type_by_name("matplotlib.figure", "FigureBase", describe_figure)
    formatters["e2b/chart"] = chart

    for kind in (list, dict):
        formatters["application/json"].for_type(kind, describe_value)

    imports.when_imported("PIL.Image", images.show_what_is_saved)
    imports.when_imported("PIL.ImageShow", images.open_no_viewer)
    imports.when_imported("matplotlib.axes._axes", _remember_boxes)


def _remember_boxes(module):
    from . import charts

    charts.remember_boxes(module.Axes)
