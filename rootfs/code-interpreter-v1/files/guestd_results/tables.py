"""A pandas DataFrame as `e2b/data`: a dictionary from each column's name to the list of its values."""

import datetime

from . import values


def columns(frame):
    """The data of the frame; None if it is too large to be worth repeating as JSON."""
    if frame.shape[0] * max(frame.shape[1], 1) > values.LIMIT:
        return None
    data = {}
    for position, label in enumerate(frame.columns):
        data[_free(_name(label), data)] = [_cell(value) for value in frame.iloc[:, position].tolist()]
    return data


def _name(label):
    if isinstance(label, (datetime.datetime, datetime.date)):
        return str(values.moment(label))
    return values.text(label if isinstance(label, str) else str(label))


def _free(name, taken):
    """The name, or with a number behind it if another column has it."""
    free, number = name, 0
    while free in taken:
        number += 1
        free = f"{name}.{number}"
    return free


def _cell(value):
    try:
        return values.plain(value)
    except values.NotPlain:
        pass
    # pandas' missing value, which is not even equal to itself.
    if type(value).__name__ == "NAType":
        return None
    if isinstance(value, datetime.timedelta):
        return str(value) if value == value else None
    return values.text(str(value))
