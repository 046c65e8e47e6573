"""What Python code may do in a cell: magics, await, every kind of end."""

import time

import pytest


@pytest.mark.parametrize("code", ["", " ", "\n\n", "# only a comment", "pass"])
def test_a_cell_without_code_ends(door, python, code):
    began = time.monotonic()
    cell = door.run(code, context_id=python)
    assert cell.results == [] and cell.stdout == "" and time.monotonic() - began < 5


def test_the_state_is_kept_between_cells(door, python):
    door.run("import math\nvalue = math.pi\ndef twice(x): return 2 * x", context_id=python)
    assert door.run("twice(value)", context_id=python).text == "6.283185307179586"


@pytest.mark.parametrize(
    "code, stdout",
    [
        ("!printf 'a b'", "a b"),
        ("%%bash\nprintf hello", "hello"),
        ("%cd -q /tmp\n!pwd", "/tmp"),
        ("for word in !echo x y: pass", None),
        ("lines = !printf 'x\\ny'\nprint(lines)", "['x', 'y']"),
        ("%env CELL=1\nimport os; print(os.environ['CELL'])", "1"),
        ("%%writefile /tmp/of-a-cell\ntext", "ting /tmp/of-a-cell"),
    ],
    ids=["bang", "bash", "cd", "no-magic", "capture", "env", "writefile"],
)
def test_magics_work(door, python, code, stdout):
    cell = door.execute(code, context_id=python)
    if stdout is None:
        assert cell.failed()["name"] == "SyntaxError"
    else:
        assert cell.ok().stdout.strip().endswith(stdout), cell.stdout


def test_timeit_is_a_magic_too(door, python):
    assert "loop" in door.run("%timeit -n1 -r1 pass", context_id=python).stdout


def test_a_failing_command_of_a_cell_is_no_error_of_the_cell(door, python):
    assert door.run("!exit 3\n_exit_code", context_id=python).text == "3"


def test_await_at_the_top(door, python):
    code = "import asyncio\nasync def answer():\n    await asyncio.sleep(0.1)\n    return 42\nawait answer()"
    assert door.run(code, context_id=python).text == "42"


def test_a_task_of_one_cell_goes_on_in_the_next(door, python):
    door.run(
        "import asyncio\ndone = []\nasync def work():\n    await asyncio.sleep(0.2)\n    done.append(1)\ntask = asyncio.ensure_future(work())",
        context_id=python,
    )
    assert door.run("await task\ndone", context_id=python).text == "[1]"


@pytest.mark.parametrize(
    "code, name, value",
    [
        ("1/0", "ZeroDivisionError", "division by zero"),
        ("x = undefined_thing", "NameError", "name 'undefined_thing' is not defined"),
        ("raise ValueError({'a': [1]})", "ValueError", "{'a': [1]}"),
        ("raise ValueError()", "ValueError", ""),
        ("raise KeyError(5)", "KeyError", "5"),
        ("raise ValueError(b'\\xff')", "ValueError", "b'\\xff'"),
        ("raise ValueError('a\\nb \"quoted\" ü')", "ValueError", 'a\nb "quoted" ü'),
        ("raise ValueError(1, 'two')", "ValueError", "(1, 'two')"),
        ("raise 5", "TypeError", "exceptions must derive from BaseException"),
        ("class Ünï(Exception): pass\nraise Ünï('x')", "Ünï", "x"),
        ("assert False", "AssertionError", ""),
        ("import nothing_like_this", "ModuleNotFoundError", "No module named 'nothing_like_this'"),
        ("raise KeyboardInterrupt('mine')", "KeyboardInterrupt", "mine"),
        ("import sys; sys.exit(3)", "SystemExit", "3"),
        ("raise SystemExit('text')", "SystemExit", "text"),
        ("raise StopIteration", "StopIteration", ""),
        ("raise GeneratorExit", "GeneratorExit", ""),
        ("raise ExceptionGroup('several', [ValueError(1)])", "ExceptionGroup", "several (1 sub-exception)"),
    ],
)
def test_every_exception_is_an_error_with_its_name_and_value(door, python, code, name, value):
    door.run("kept = 1", context_id=python)
    error = door.execute(code, context_id=python).failed()
    assert (error["name"], error["value"]) == (name, value)
    assert door.run("kept", context_id=python).text == "1", "the state is kept"


@pytest.mark.parametrize("code", ["def (", "if True:\nx", "'unclosed", "a b c", "\x00", "print('a'"])
def test_code_that_is_no_code_is_a_syntax_error(door, python, code):
    error = door.execute(code, context_id=python).failed()
    assert error["name"] in ("SyntaxError", "IndentationError", "_IncompleteInputError", "ValueError"), error


def test_an_exception_that_cannot_say_what_it_is_has_an_end(door, python):
    code = "class Mute(Exception):\n    def __str__(self): raise RuntimeError('no words')\nraise Mute()"
    error = door.execute(code, context_id=python).failed()
    assert error["name"] in ("Mute", "RuntimeError")
    assert door.run("1 + 1", context_id=python).text == "2"


def test_an_exception_with_a_cause_shows_both(door, python):
    error = door.execute(
        "try:\n    1/0\nexcept Exception as error:\n    raise ValueError('then') from error", context_id=python
    ).failed()
    assert error["name"] == "ValueError" and "ZeroDivisionError" in error["traceback"] and "then" in error["traceback"]


@pytest.mark.parametrize("code", ["input('name? ')", "import getpass\ngetpass.getpass()", "import sys\nsys.stdin.readline()"])
def test_a_question_to_nobody_is_an_answer_and_no_hang(door, python, code):
    began = time.monotonic()
    cell = door.execute(code, context_id=python)
    assert time.monotonic() - began < 8
    if "sys.stdin" not in code:
        assert cell.failed()["name"] == "StdinNotImplementedError"
    assert door.run("1 + 1", context_id=python).text == "2"


def test_a_child_that_reads_its_input_gets_its_end(door, python):
    assert door.run("import subprocess\nsubprocess.run(['cat'], timeout=5).returncode", context_id=python).text == "0"


def test_a_warning_goes_to_stderr(door, python):
    cell = door.run("import warnings\nwarnings.warn('careful')", context_id=python)
    assert "careful" in cell.stderr and cell.error is None


def test_the_last_results_are_remembered_as_ipython_does(door, python):
    door.run("40", context_id=python)
    assert door.run("_ + 2", context_id=python).text == "42"


def test_a_fork_that_ends_by_itself_harms_nobody(door, python):
    code = "import os\npid = os.fork()\nif pid == 0:\n    os._exit(0)\nos.waitpid(pid, 0)[1]"
    assert door.run(code, context_id=python).text == "0"


def test_a_fork_that_lives_on_does_not_keep_the_cell(door, python):
    began = time.monotonic()
    cell = door.run(
        "import os, time\npid = os.fork()\nif pid == 0:\n    time.sleep(20)\n    os._exit(0)\n'parent'", context_id=python
    )
    assert cell.text == "parent" and time.monotonic() - began < 5
    door.run("import signal\nos.kill(pid, signal.SIGKILL)\nos.waitpid(pid, 0)", context_id=python)


def test_threads_of_a_cell_speak_in_it(door, python):
    code = "import threading\nthreads = [threading.Thread(target=print, args=(n,)) for n in range(5)]\n[t.start() for t in threads]\n[t.join() for t in threads]\nNone"
    assert sorted(set(door.run(code, context_id=python).stdout) - {"\n"}) == list("01234")


def test_a_pool_of_processes_works(door, python):
    code = "from multiprocessing import get_context\nwith get_context('fork').Pool(2) as pool:\n    answer = pool.map(abs, range(-5, 0))\nanswer"
    assert door.run(code, context_id=python).text == "[5, 4, 3, 2, 1]"


def test_files_belong_to_the_user(door, python, home):
    door.run("open('/home/user/of-a-cell', 'w').write('x')", context_id=python)
    assert ((home / "of-a-cell").stat().st_uid, (home / "of-a-cell").read_text()) == (1000, "x")


def test_a_cell_is_not_root(door, python):
    assert door.run("import os; os.getuid(), os.geteuid()", context_id=python).text == "(1000, 1000)"


def test_code_with_other_line_ends_runs(door, python):
    assert door.run("a = 1\r\nb = 2\r\na + b", context_id=python).text == "3"


def test_pandas_shows_a_table(door, python):
    [result] = door.run("import pandas\npandas.DataFrame({'a': [1, 2], 'b': ['x', 'y']})", context_id=python).results
    assert "<table" in result["html"] and "x" in result["text"] and result["is_main_result"]


@pytest.mark.takes(5)
def test_a_figure_is_a_png(door, python):
    cell = door.run("import matplotlib.pyplot as plt\nplt.plot([1, 2, 3])\nplt.show()", context_id=python)
    pictures = [result["png"] for result in cell.results if "png" in result]
    assert len(pictures) == 1 and pictures[0].startswith("iVBORw0KGgo")
