"""The stream of /execute, event by event (contract: envd.md section 7.2)."""

import json
import re
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest

from harness.processes import wait_until

# What each type carries besides its name.
FIELDS = {
    "number_of_executions": {"execution_count"},
    "stdout": {"text", "timestamp"},
    "stderr": {"text", "timestamp"},
    "error": {"name", "value", "traceback"},
    "keepalive": set(),
    "end_of_execution": set(),
}


def test_every_event_has_exactly_its_fields(door, python):
    cell = door.execute("import sys\nprint('o', flush=True)\nprint('e', file=sys.stderr, flush=True)\n1/0", context_id=python)
    for event in cell.events:
        assert event.keys() - {"type"} == FIELDS[event["type"]], event
    assert cell.order == ["number_of_executions", "stdout", "stderr", "error", "end_of_execution"]


def test_a_cell_with_nothing_to_say_has_a_number_and_an_end(door, python):
    assert door.run("x = 1", context_id=python).order == ["number_of_executions", "end_of_execution"]


def test_output_display_and_result_keep_their_order(door, python):
    cell = door.run(
        "import sys\nprint('1', flush=True)\ndisplay('2')\nprint('3', file=sys.stderr, flush=True)\ndisplay('4')\nprint('5', flush=True)\n6",
        context_id=python,
    )
    assert cell.order == ["number_of_executions", "stdout", "result", "stderr", "result", "stdout", "result", "end_of_execution"]
    assert [(result["text"], result["is_main_result"]) for result in cell.results] == [("2", False), ("4", False), ("6", True)]


def test_a_flushed_line_is_one_event_and_a_pause_makes_two(door, python):
    assert [event["text"] for event in door.run("print(1)", context_id=python).of("stdout")] == ["1\n"]
    apart = door.run("import time\nprint(1)\ntime.sleep(1)\nprint(2)", context_id=python)
    assert [event["text"] for event in apart.of("stdout")] == ["1\n", "2\n"]


def test_output_arrives_while_the_cell_runs(door, python):
    code = "import time\nprint('early', flush=True)\ntime.sleep(1.5)\nprint('late')"
    cell = door.run(code, context_id=python)
    first, last = (at for event, at in zip(cell.events, cell.at) if event["type"] == "stdout")
    assert last - first > 1.2


def test_the_number_arrives_when_the_cell_begins(door, python):
    with door.begin("import time; time.sleep(1.5)", context_id=python) as running:
        began = time.monotonic()
        running.until("number_of_executions")
        assert time.monotonic() - began < 1
        running.rest()


def test_timestamps_are_iso_8601_of_now_and_do_not_go_back(door, python):
    door.run("1", context_id=python)
    began = datetime.now(UTC)
    cell = door.run(
        "import sys\nfor n in range(5):\n    print(n, flush=True)\n    print(n, file=sys.stderr, flush=True)", context_id=python
    )
    stamps = [event["timestamp"] for event in cell.events if "timestamp" in event]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", stamp) for stamp in stamps), stamps
    read = [datetime.fromisoformat(stamp) for stamp in stamps]
    assert read == sorted(read) and len(read) == 10
    assert began - timedelta(seconds=2) <= read[0] <= read[-1] <= datetime.now(UTC) + timedelta(seconds=2)


def test_the_number_counts_the_visible_cells_of_one_context(door, context):
    first, second = context("python"), context("python")
    assert [door.run("1", context_id=first).count for _ in range(3)] == [1, 2, 3]
    assert door.run("1", context_id=second).count == 1
    # What the agent does around a cell with variables is not a cell.
    assert door.run("1", context_id=first, env_vars={"A": "b"}).count == 4
    assert door.run("1", context_id=first).count == 5


def test_only_the_first_error_of_a_cell_is_kept(door, python):
    code = "try:\n    1/0\nexcept Exception:\n    get_ipython().showtraceback()\nraise ValueError('second')"
    cell = door.execute(code, context_id=python)
    assert [event["name"] for event in cell.of("error")] == ["ZeroDivisionError"]
    assert cell.order[-1] == "end_of_execution"


def test_an_error_is_name_value_and_one_string_of_traceback(door, python):
    error = door.execute("def deep():\n    return missing_name\ndeep()", context_id=python).failed()
    assert (error["name"], error["value"]) == ("NameError", "name 'missing_name' is not defined")
    assert "deep()" in error["traceback"] and "NameError" in error["traceback"]
    assert isinstance(error["traceback"], str)


def test_output_before_an_error_is_not_lost(door, python):
    cell = door.execute("print('before')\nraise RuntimeError('then')", context_id=python)
    assert (cell.stdout, cell.failed()["value"]) == ("before\n", "then")


@pytest.mark.takes(12)
def test_silence_is_broken_every_five_seconds(door, python):
    with door.begin("import time; time.sleep(11)", context_id=python) as running:
        running.until("number_of_executions")
        cell = running.rest().checked()
    at = [at for event, at in zip(cell.events, cell.at) if event["type"] in ("number_of_executions", "keepalive")]
    gaps = [after - before for before, after in zip(at, at[1:])]
    assert len(gaps) == 2 and all(4 <= gap <= 6.5 for gap in gaps), gaps


@pytest.mark.takes(8)
def test_a_cell_that_talks_gets_no_keepalive(door, python):
    cell = door.run("import time\nfor n in range(7):\n    time.sleep(1)\n    print(n, flush=True)", context_id=python)
    assert cell.of("keepalive") == []


@pytest.mark.takes(8)
def test_a_cell_that_waits_for_another_is_kept_alive_too(door, python):
    """Otherwise nobody would learn that the client of a queued cell has gone."""
    with door.begin("import time; time.sleep(7)", context_id=python) as first:
        first.until("number_of_executions")
        second = door.run("2", context_id=python)
        first.rest()
    assert second.text == "2" and len(second.of("keepalive")) >= 1


def test_the_body_is_lines_of_json_sent_in_chunks(interpreter, python):
    with interpreter.door.http.stream("POST", "/execute", json={"code": "print('a\\nb')", "context_id": python}) as response:
        assert response.status_code == 200
        assert response.headers.get("transfer-encoding") == "chunked"
        body = response.read()
    assert body.endswith(b"\n") and all(json.loads(line)["type"] for line in body.splitlines())


def test_line_ends_that_only_unicode_knows_do_not_cut_a_line(door, python):
    """The Python SDK splits the stream at every one of them, so inside JSON they are escaped."""
    ends = "".join(map(chr, (0x0B, 0x0C, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029)))
    answer = door.ask(code=f"print('a' + ''.join(map(chr, {[ord(end) for end in ends]})) + 'b')\n'x\\x85y'", context_id=python)
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert "".join(line["text"] for line in lines if line["type"] == "stdout") == f"a{ends}b\n"


def test_every_character_arrives_as_it_was(door, python):
    said = 'grüße 漢字 🎉 \u0000 \x1b[31m \\ " \t \U0010ffff'
    assert door.run(f"print({said!r}, end='')", context_id=python).stdout == said


def test_the_answer_names_the_execution(door, python):
    one, two = (door.run("1", context_id=python).headers.get("x-execution-id") for _ in range(2))
    assert one and two and one != two


def test_a_late_thread_does_not_speak_in_the_next_cell(door, python):
    door.run(
        "import threading, time\ndef late():\n    time.sleep(0.5)\n    print('LATE', flush=True)\nthreading.Thread(target=late).start()",
        context_id=python,
    )
    time.sleep(1.2)
    cell = door.run("print('mine')", context_id=python)
    assert (cell.stdout, cell.stderr) == ("mine\n", "")


def test_a_child_that_keeps_stdout_open_does_not_keep_the_cell(door, python):
    began = time.monotonic()
    cell = door.run("import subprocess\nchild = subprocess.Popen(['sleep', '30'])\nprint('started')", context_id=python)
    assert cell.stdout == "started\n" and time.monotonic() - began < 5
    door.run("child.kill(); child.wait()", context_id=python)


def test_the_output_of_a_child_is_the_cells(door, python):
    code = "import subprocess\nsubprocess.run('echo out; echo err >&2', shell=True)\nimport time; time.sleep(0.5)"
    cell = door.run(code, context_id=python)
    assert (cell.stdout, cell.stderr) == ("out\n", "err\n")


def test_two_clients_of_two_contexts_do_not_see_each_other(door, context):
    ids = [context("python") for _ in range(2)]
    cells = {}

    def client(n: int):
        code = f"import time\nfor i in range(20):\n    print('{n}', flush=True)\n    time.sleep(0.02)"
        cells[n] = door.run(code, context_id=ids[n])

    threads = [threading.Thread(target=client, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [cells[n].stdout for n in range(2)] == ["0\n" * 20, "1\n" * 20]


def test_the_end_follows_the_result_at_once(door, python):
    cell = door.run("'done'", context_id=python)
    [result] = [at for event, at in zip(cell.events, cell.at) if event["type"] == "result"]
    assert cell.at[-1] - result < 1


def test_an_idle_kernel_is_free_before_its_answer_is_read(door, python):
    """A client that reads slowly does not hold the next cell up."""
    with door.begin("'unread'", context_id=python) as unread:
        assert wait_until(lambda: door.run("2", context_id=python).text, within=10, what="the next cell") == "2"
        assert unread.rest().text == "unread"


@pytest.mark.takes(5)
def test_a_thread_that_never_stops_printing_spoils_no_cell(door, python):
    code = "import threading, time\nstop = False\ndef talk():\n    while not stop: print('t' * 100, flush=True)\nthread = threading.Thread(target=talk)\nthread.start()"
    door.run(code, context_id=python)
    for n in range(5):
        cell = door.run(f"'cell {n}'", context_id=python)
        assert cell.text == f"cell {n}"
    assert door.run("stop = True\nthread.join()\n'over'", context_id=python).text == "over"
    assert door.run("print('quiet')", context_id=python).stdout == "quiet\n"
