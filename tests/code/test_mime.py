"""Results: which field each MIME type becomes (contract: envd.md section 7.3)."""

import base64
import hashlib
import json

import pytest

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"\0" * 16).decode()
FIELDS = [
    ("text/plain", "text", "plain"),
    ("text/html", "html", "<b>bold</b>"),
    ("text/markdown", "markdown", "**bold**"),
    ("image/svg+xml", "svg", "<svg xmlns='http://www.w3.org/2000/svg'/>"),
    ("image/png", "png", PNG),
    ("image/jpeg", "jpeg", "/9j/4AAQSkZJRg=="),
    ("application/pdf", "pdf", "JVBERi0xLjQK"),
    ("text/latex", "latex", "$x^2$"),
    ("application/json", "json", {"a": [1, None, True, 1.5, "ü"]}),
    ("application/javascript", "javascript", "alert('x')"),
    ("e2b/data", "data", {"column": [1, 2]}),
    ("e2b/chart", "chart", {"type": "pie", "title": None, "elements": []}),
]


def display(bundle: dict, metadata: dict | None = None) -> str:
    return f"import json\ndisplay(json.loads({json.dumps(json.dumps(bundle))}), raw=True, metadata={metadata!r})"


@pytest.mark.parametrize("mime, name, value", FIELDS, ids=[field[1] for field in FIELDS])
def test_a_mime_type_becomes_its_field(door, mime, name, value):
    [result] = door.run(display({mime: value})).results
    assert result == {"type": "result", name: value, "is_main_result": False}


def test_a_bundle_becomes_one_result_with_all_its_fields(door):
    bundle = {mime: value for mime, _, value in FIELDS}
    [result] = door.run(display(bundle)).results
    assert result == {"type": "result", "is_main_result": False, **{name: value for _, name, value in FIELDS}}


def test_what_has_no_field_is_extra_under_its_own_name(door):
    bundle = {"text/plain": "t", "application/vnd.plotly.v1+json": {"data": [1]}, "text/x-unknown": "raw", "image/gif": "R0lGOD"}
    [result] = door.run(display(bundle)).results
    assert result.pop("extra") == {name: value for name, value in bundle.items() if name != "text/plain"}
    assert result == {"type": "result", "text": "t", "is_main_result": False}


def test_metadata_is_no_field_of_a_result(door):
    """The Python SDK's Result takes the listed fields only."""
    [result] = door.run(display({"text/plain": "t"}, {"image/png": {"width": 3}})).results
    assert result.keys() == {"type", "text", "is_main_result"}


@pytest.mark.parametrize(
    "expression, text",
    [
        ("'word'", "word"),
        ('"it\'s"', "it's"),
        ("\"'inner'\"", "'inner'"),
        ("''", ""),
        ("'a\\nb'", "a\\nb"),
        ("1", "1"),
        ("['a']", "['a']"),
        ("b'x'", "b'x'"),
        ("type('Quoted', (), {'__repr__': lambda self: '\"mixed' + chr(39)})()", "\"mixed'"),
        ("type('Double', (), {'__repr__': lambda self: chr(39) * 2 + 'x' + chr(39) * 2})()", "'x'"),
    ],
    ids=["word", "apostrophe", "inner", "empty", "newline", "number", "list", "bytes", "mixed", "double"],
)
def test_one_pair_of_surrounding_quotes_is_stripped(door, expression, text):
    assert door.run(expression).text == text


@pytest.mark.parametrize("quote", ["'", '"'])
def test_a_lone_quote_is_no_pair_and_breaks_nothing(door, quote):
    [result] = door.run(display({"text/plain": quote})).results
    assert result["text"] in (quote, "")


def test_the_last_expression_is_the_main_result_and_displays_are_not(door):
    cell = door.run("display(1)\ndisplay(2)\n3")
    assert [(result["text"], result["is_main_result"]) for result in cell.results] == [("1", False), ("2", False), ("3", True)]


def test_nothing_is_shown_for_none_an_assignment_or_a_semicolon(door):
    for code in ("None", "value = 5", "5;"):
        assert door.run(code).results == []


def test_an_update_of_a_display_is_not_a_result(door):
    cell = door.run(
        "shown = display('first', display_id=True)\nshown.update('second')\nfrom IPython.display import clear_output\nclear_output()"
    )
    assert [result["text"] for result in cell.results] == ["first"]


def test_many_displays_arrive_in_order(door):
    cell = door.run("for n in range(200):\n    display(n)")
    assert [result["text"] for result in cell.results] == [str(n) for n in range(200)]


def test_html_of_an_object_comes_with_its_text(door):
    cell = door.run(
        "class Table:\n    def __repr__(self): return 'a table'\n    def _repr_html_(self): return '<table/>'\nTable()"
    )
    [result] = cell.results
    assert (result["text"], result["html"], result["is_main_result"]) == ("a table", "<table/>", True)


def test_an_object_whose_own_display_fails_fails_no_cell(door):
    code = "class Broken:\n    def __repr__(self): return 'still here'\n    def _repr_html_(self): raise ValueError('broken')\nBroken()"
    cell = door.execute(code)
    assert cell.ended and cell.text == "still here"


def test_an_image_of_eight_megabytes_arrives_whole(door):
    code = (
        "import base64, hashlib, os\n"
        "image = base64.b64encode(os.urandom(8_000_000)).decode()\n"
        "display({'image/png': image}, raw=True)\n"
        "hashlib.sha256(image.encode()).hexdigest()"
    )
    cell = door.run(code)
    assert hashlib.sha256(cell.results[0]["png"].encode()).hexdigest() == cell.text


def test_json_that_is_no_number_does_not_break_the_stream(door):
    cell = door.execute(
        "display({'application/json': {'n': float('nan'), 'i': float('inf')}, 'text/plain': 'shown'}, raw=True)\n'after'"
    )
    assert cell.ended, "every line was JSON, or reading would have failed"
    assert door.run("1 + 1").text == "2"


def test_json_that_is_nested_very_deeply_does_not_end_the_agent(door, interpreter):
    door.execute("deep = []\nfor _ in range(400):\n    deep = [deep]\ndisplay({'application/json': deep}, raw=True)")
    assert interpreter.process.poll() is None
    assert door.run("1 + 1").text == "2"
