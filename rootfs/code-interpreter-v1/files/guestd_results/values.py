"""Python values as JSON knows them."""

import dataclasses
import datetime
import enum
import math
import sys
import uuid

# How many values are looked at before a result counts as too large to be worth repeating as JSON. Its text is complete.
LIMIT = 1_000_000


class NotPlain(Exception):
    """There is no JSON for the value."""


def plain(value):
    """The value as dictionaries, lists, strings, numbers, booleans and None.

    What JSON has no word for becomes null (not a number, infinity) or a string (dates, keys). Raises `NotPlain` for
    everything else, `RecursionError` for what contains itself.
    """
    return _Walk().plain(value)


class _Walk:
    def __init__(self):
        self.left = LIMIT

    def plain(self, value):
        self.left -= 1
        if self.left < 0:
            raise NotPlain("too large")
        if value is None or value is True or value is False:
            return value
        if isinstance(value, enum.Enum):
            return self.plain(value.value)
        if isinstance(value, str):
            return text(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return number(value)
        if isinstance(value, dict):
            return {self.key(key): self.plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(item) for item in value]
        if isinstance(value, (datetime.datetime, datetime.date, datetime.time)):
            return moment(value)
        if isinstance(value, uuid.UUID):
            return str(value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = dataclasses.fields(value)
            return {field.name: self.plain(getattr(value, field.name)) for field in fields}
        return self.of_numpy(value)

    def key(self, key):
        if isinstance(key, str):
            return text(key)
        key = self.plain(key)
        if isinstance(key, (dict, list)):
            raise NotPlain("a key that is no scalar")
        # As JSON writes them.
        if key is None:
            return "null"
        return str(key).lower() if isinstance(key, bool) else str(key)

    def of_numpy(self, value):
        # A value of numpy's is only possible once numpy is imported.
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.ndarray):
            if value.size > self.left:
                raise NotPlain("too large")
            if value.dtype.kind == "M":
                value = value.astype("datetime64[us]")
            return self.plain(value.tolist())
        if numpy is not None and isinstance(value, numpy.generic):
            if isinstance(value, numpy.datetime64):
                value = value.astype("datetime64[us]")
            item = value.item()
            if not isinstance(item, numpy.generic):
                return self.plain(item)
        raise NotPlain(type(value).__name__)


def number(value):
    """A float; None if JSON cannot write it."""
    return float(value) if math.isfinite(value) else None


def text(value):
    """A string that UTF-8 can carry."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-8", "replace").decode()
    return str(value)


def moment(value):
    """A date or time in ISO 8601; None for the moments that are none (pandas' NaT)."""
    return value.isoformat() if value == value else None
