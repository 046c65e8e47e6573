"""JavaScript, TypeScript and Bash cells."""

import pytest


@pytest.fixture
def shared(door):
    """The default context of a language: these cases do not disturb each other."""
    return door


@pytest.mark.parametrize("language", ["javascript", "js", "typescript", "ts"])
def test_console_log_is_one_line_of_stdout(shared, language):
    cell = shared.run("console.log('Hello, World!')", language=language)
    assert [event["text"] for event in cell.of("stdout")] == ["Hello, World!\n"]


def test_console_error_is_stderr(shared):
    cell = shared.run("console.error('careful')", language="js")
    assert (cell.stdout, cell.stderr) == ("", "careful\n")


def test_the_last_expression_is_the_result_in_javascript(shared):
    assert shared.run("40 + 2", language="js").text == "42"


def test_the_state_is_kept_between_javascript_cells(shared):
    shared.run("const kept = 40; let more = 1; function twice(x) { return 2 * x }", language="js")
    assert shared.run("twice(kept + more)", language="js").text == "82"


def test_javascript_awaits_at_the_top_and_imports_modules(shared):
    code = "import { basename } from 'node:path'\nconst late = await new Promise((wake) => setTimeout(() => wake('late'), 50))\nconsole.log(late, basename('/a/b'))"
    assert shared.run(code, language="js").stdout == "late b\n"


@pytest.mark.parametrize(
    "code, name, value",
    [
        ("throw new TypeError('wrong')", "TypeError", "wrong"),
        ("missing + 1", "ReferenceError", "missing is not defined"),
        ("await Promise.reject(new RangeError('far'))", "RangeError", "far"),
    ],
    ids=["throw", "missing", "reject"],
)
def test_an_error_of_javascript_has_name_and_value(shared, code, name, value):
    error = shared.execute(code, language="js").failed()
    assert error["name"] == name or name in error["traceback"], error
    assert value in error["value"], error
    assert shared.run("1 + 1", language="js").text == "2"


@pytest.mark.parametrize("code", ["throw 'just text'", "throw null", "throw { code: 5 }"])
def test_javascript_may_throw_anything(shared, code):
    shared.execute(code, language="js").failed()
    assert shared.run("1 + 1", language="js").text == "2"


def test_a_syntax_error_of_javascript_is_an_error(shared):
    shared.execute("let = = 5 (", language="js").failed()
    assert shared.run("1 + 1", language="js").text == "2"


def test_types_are_accepted_in_typescript(shared):
    code = "interface Point { x: number; y: number }\nenum Kind { One = 1 }\nconst p: Point = { x: 40, y: 2 }\nconst sum = <T extends number>(a: T, b: T): number => a + b\nconsole.log(sum(p.x, p.y), Kind.One)"
    assert shared.run(code, language="ts").stdout == "42 1\n"


def test_every_javascript_cell_has_its_number(door, context):
    chosen = context("javascript")
    assert [door.run("1", context_id=chosen).count for _ in range(2)] == [1, 2]


def test_rich_results_of_javascript_have_their_fields(shared):
    cell = shared.run(
        "await Deno.jupyter.broadcast('display_data', { data: { 'text/html': '<b>x</b>', 'text/plain': 'x' }, metadata: {}, transient: {} })",
        language="js",
    )
    assert [(result["html"], result["text"], result["is_main_result"]) for result in cell.results][0] == ("<b>x</b>", "x", False)


def test_a_process_that_javascript_ends_is_reported_and_replaced(door, context):
    chosen = context("javascript")
    door.execute("Deno.exit(3)", context_id=chosen)
    assert door.execute("1 + 1", context_id=chosen).text == "2" or door.run("1 + 1", context_id=chosen).text == "2"


def test_bash_speaks_on_stdout(shared):
    assert shared.run("echo one; echo two", language="bash").stdout == "one\ntwo\n"


def test_bash_keeps_its_state(shared):
    shared.run("cd /tmp; VALUE='it is kept'; twice() { echo $((2 * $1)); }", language="bash")
    assert shared.run('pwd; echo "$VALUE"; twice 21', language="bash").stdout == "/tmp\nit is kept\n42\n"
    shared.run("cd", language="bash")


def test_pipes_and_loops_of_bash(shared):
    code = "for n in 1 2 3; do\n  echo $n\ndone | sort -r | tr '\\n' ' '"
    assert shared.run(code, language="bash").stdout.split() == ["3", "2", "1"]


def test_a_here_document_of_bash(shared):
    assert shared.run("cat <<'END'\n$not 'changed'\nEND", language="bash").stdout == "$not 'changed'\n"


def test_a_failing_line_of_bash_does_not_end_the_shell(shared):
    shared.execute("false; no-such-command", language="bash")
    assert shared.run("echo here", language="bash").stdout == "here\n"


def test_a_shell_that_leaves_is_replaced(door, context):
    chosen = context("bash")
    door.execute("exit 3", context_id=chosen)
    first = door.execute("echo here", context_id=chosen)
    assert "here" in first.stdout or door.run("echo here", context_id=chosen).stdout == "here\n"


def test_unfinished_bash_does_not_hang(door, context):
    chosen = context("bash")
    door.execute("echo 'unclosed", context_id=chosen, timeout=3)
    door.restart(chosen)
    assert door.run("echo here", context_id=chosen).stdout == "here\n"
