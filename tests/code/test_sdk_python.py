"""What the E2B code interpreter's Python SDK, synchronous, shows its users."""

import threading
import time
from datetime import datetime

import pytest
from e2b import InvalidArgumentException, NotFoundException, SandboxException, TimeoutException
from e2b_code_interpreter import Sandbox

NOBODY = "00000000-0000-4000-8000-000000000000"


@pytest.fixture
def sandbox(interpreter) -> Sandbox:
    return Sandbox.create(**interpreter.sdk_options)


@pytest.fixture
def own(sandbox):
    """A context of the case's own."""
    made = sandbox.create_code_context()
    yield made
    try:
        sandbox.remove_code_context(made)
    except NotFoundException:
        pass


def test_a_result_is_text(sandbox):
    execution = sandbox.run_code("x = 1; x")
    assert (execution.text, execution.error) == ("1", None)
    assert execution.results[0].is_main_result is True


def test_the_callbacks_come_in_order_and_while_the_cell_runs(sandbox, own):
    told = []
    code = "import sys, time\nprint('one', flush=True)\ntime.sleep(0.6)\nprint('two', file=sys.stderr, flush=True)\ndisplay('three')\nprint('four', flush=True)\n'five'"
    execution = sandbox.run_code(
        code,
        context=own,
        on_stdout=lambda message: told.append((message.line, time.monotonic())),
        on_stderr=lambda message: told.append((message.line, time.monotonic())),
        on_result=lambda result: told.append((result.text, time.monotonic())),
        on_error=lambda error: told.append((error.name, time.monotonic())),
    )
    assert [line for line, _ in told] == ["one\n", "two\n", "three", "four\n", "five"]
    assert told[1][1] - told[0][1] > 0.4
    assert (execution.logs.stdout, execution.logs.stderr) == (["one\n", "four\n"], ["two\n"])
    assert [result.text for result in execution.results] == ["three", "five"]


def test_a_message_has_its_line_its_time_and_its_kind(sandbox):
    told = []
    sandbox.run_code("import sys\nprint('a')\nprint('b', file=sys.stderr)", on_stdout=told.append, on_stderr=told.append)
    assert [(message.line, message.error) for message in told] == [("a\n", False), ("b\n", True)]
    assert all(datetime.fromisoformat(message.timestamp) for message in told)


def test_an_error_has_name_value_and_traceback(sandbox, own):
    told = []
    execution = sandbox.run_code("print('before')\nx", context=own, on_error=told.append)
    assert (execution.error.name, execution.error.value) == ("NameError", "name 'x' is not defined")
    assert "NameError" in execution.error.traceback and execution.logs.stdout == ["before\n"]
    assert [error.name for error in told] == ["NameError"] and execution.results == []


def test_the_number_of_executions_is_counted(sandbox, own):
    assert [sandbox.run_code("1", context=own).execution_count for _ in range(2)] == [1, 2]


def test_the_state_is_kept_and_lost_on_restart(sandbox, own):
    sandbox.run_code("value = 40", context=own)
    assert sandbox.run_code("value + 2", context=own).text == "42"
    sandbox.restart_code_context(own)
    assert sandbox.run_code("value", context=own).error.name == "NameError"
    assert [each.id for each in sandbox.list_code_contexts()].count(own.id) == 1


def test_contexts_are_made_listed_and_removed(sandbox):
    made = sandbox.create_code_context(cwd="/tmp", language="bash")
    assert (made.language, made.cwd) == ("bash", "/tmp")
    assert sandbox.run_code("pwd", context=made).logs.stdout == ["/tmp\n"]
    newest = sandbox.list_code_contexts()[-1]
    assert (newest.id, newest.language, newest.cwd) == (made.id, "bash", "/tmp")
    sandbox.remove_code_context(made.id)
    assert made.id not in [each.id for each in sandbox.list_code_contexts()]
    with pytest.raises(NotFoundException, match=f"Context {made.id} not found"):
        sandbox.run_code("pwd", context=made)


def test_an_unknown_context_is_not_found(sandbox):
    for attempt in (sandbox.remove_code_context, sandbox.restart_code_context):
        with pytest.raises(NotFoundException, match=f"Context {NOBODY} not found"):
            attempt(NOBODY)


def test_an_unknown_language_is_a_sandbox_exception_that_names_it(sandbox):
    with pytest.raises(SandboxException, match="500 .*cobol"):
        sandbox.run_code("1", language="cobol")
    with pytest.raises(SandboxException, match="500 .*cobol"):
        sandbox.create_code_context(language="cobol")


def test_context_and_language_together_are_an_invalid_argument(sandbox, own):
    with pytest.raises(InvalidArgumentException):
        sandbox.run_code("1", language="python", context=own)


@pytest.mark.parametrize(
    "language, code",
    [
        ("python", "print('Hello, World!')"),
        ("javascript", "console.log('Hello, World!')"),
        ("js", "console.log('Hello, World!')"),
        ("typescript", "const s: string = 'Hello, World!'; console.log(s)"),
        ("ts", "console.log('Hello, World!')"),
        ("bash", "echo 'Hello, World!'"),
    ],
)
def test_every_language_says_hello(sandbox, language, code):
    assert sandbox.run_code(code, language=language).logs.stdout == ["Hello, World!\n"]


def test_variables_of_a_call_are_there_once(sandbox, own):
    code = "import os; os.environ.get('CALL')"
    assert sandbox.run_code(code, context=own, envs={"CALL": 'it\'s "$5"\nü'}).text == 'it\\\'s "$5"\\nü'
    assert sandbox.run_code(code, context=own).results == []


@pytest.mark.takes(5)
def test_a_timeout_is_raised_and_the_kernel_is_free_again(sandbox, own):
    sandbox.run_code("kept = 'kept'", context=own)
    with pytest.raises(TimeoutException, match="Execution timed out"):
        sandbox.run_code("while True: pass", context=own, timeout=2)
    began = time.monotonic()
    assert sandbox.run_code("kept", context=own).text == "kept"
    assert time.monotonic() - began < 5


@pytest.mark.takes(8)
def test_a_sleep_of_five_minutes_is_interrupted_when_the_client_gives_up(sandbox, own):
    """As upstream's own test has it: 3 s, a pause of 5 s, then an answer within 10 s."""
    with pytest.raises(TimeoutException):
        sandbox.run_code("import time; time.sleep(300)", context=own, timeout=3)
    time.sleep(2)
    assert sandbox.run_code("1 + 1", context=own, timeout=10).text == "2"


def test_no_timeout_is_no_timeout(sandbox, own):
    assert sandbox.run_code("import time; time.sleep(1); 'done'", context=own, timeout=0).text == "done"


def test_strange_line_ends_do_not_break_the_stream(sandbox, own):
    """The SDK splits the answer at every line end that Unicode knows."""
    execution = sandbox.run_code("print('a\\u2028b\\x85c\\x0bd\\x1ce\\u2029f')\n'x\\u2028y'", context=own)
    assert "".join(execution.logs.stdout) == "a\u2028b\x85c\x0bd\x1ce\u2029f\n"


def test_megabytes_arrive(sandbox, own):
    execution = sandbox.run_code("print('x' * 3_000_000)", context=own)
    assert sum(map(len, execution.logs.stdout)) == 3_000_001


def test_a_table_is_html(sandbox, own):
    execution = sandbox.run_code("import pandas\npandas.DataFrame({'a': [1, 2]})", context=own)
    assert "<table" in execution.results[0].html and "html" in execution.results[0].formats()


@pytest.mark.takes(5)
def test_a_figure_is_a_png(sandbox, own):
    execution = sandbox.run_code("import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()", context=own)
    assert execution.results[0].png.startswith("iVBOR")


def test_unknown_formats_are_extra(sandbox, own):
    [result] = sandbox.run_code("display({'application/x-ours': {'a': 1}, 'text/plain': 't'}, raw=True)", context=own).results
    assert result.extra == {"application/x-ours": {"a": 1}} and "application/x-ours" in result.formats()


def test_a_kernel_that_dies_is_an_error_and_the_next_call_works(sandbox, own):
    assert sandbox.run_code("import os; os._exit(1)", context=own).error.name == "KernelDied"
    assert sandbox.run_code("1 + 1", context=own).text == "2"


def test_ten_calls_at_once_do_not_mix(sandbox, own):
    answers = {}
    threads = [
        threading.Thread(target=lambda n=n: answers.update({n: sandbox.run_code(f"'answer {n}'", context=own).text}))
        for n in range(10)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert answers == {n: f"answer {n}" for n in range(10)}
