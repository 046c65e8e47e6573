"""Variables of a cell and of the sandbox (contract: envd.md section 7.5; row 33 of section 11: the reference pastes values into code)."""

import json
import re

import httpx
import pytest

from harness.code import CONTROL

VALUES = {
    "quotes": 'it\'s "quoted" `so`',
    "newlines": "one\ntwo\r\nthree\n",
    "dollar": "$HOME ${PATH} $(id) \\$x",
    "backslash": "C:\\new\\table\\u0041 \\",
    "unicode": "grüße 漢字 🎉",
    "code": "'; import os; os._exit(1); '",
    "empty": "",
    "spaces": "  two  words  ",
    "long": "x" * 100_000,
}
READ = {
    "python": "import os; print(os.environ.get('CELL_VALUE', '(unset)'), end='')",
    "bash": 'printf %s "${CELL_VALUE-(unset)}"',
    "javascript": "console.log(process.env.CELL_VALUE ?? '(unset)')",
}


def unset(door, language: str, context_id: str) -> bool:
    return door.run(READ[language], context_id=context_id).stdout.strip() == "(unset)"


@pytest.mark.parametrize("kind", VALUES)
def test_python_sees_the_value_as_it_was_sent(door, kind):
    assert door.run(READ["python"], env_vars={"CELL_VALUE": VALUES[kind]}).stdout == VALUES[kind]


@pytest.mark.parametrize("kind", VALUES)
def test_bash_sees_the_value_as_it_was_sent(door, kind):
    assert door.run(READ["bash"], language="bash", env_vars={"CELL_VALUE": VALUES[kind]}).stdout.rstrip("\n") == VALUES[
        kind
    ].rstrip("\n")


@pytest.mark.parametrize("kind", VALUES)
def test_javascript_sees_the_value_as_it_was_sent(door, kind):
    code = "console.log(JSON.stringify(process.env.CELL_VALUE))"
    assert json.loads(door.run(code, language="javascript", env_vars={"CELL_VALUE": VALUES[kind]}).stdout) == VALUES[kind]


@pytest.mark.parametrize("language", READ)
def test_a_variable_of_a_cell_is_gone_after_it(door, context, language):
    chosen = context(language)
    code = {"python": "1", "bash": "true", "javascript": "1"}[language]
    door.run(code, context_id=chosen, env_vars={"CELL_VALUE": "here"})
    assert unset(door, language, chosen)


def test_a_variable_is_gone_after_a_cell_that_failed_or_was_interrupted(door, python):
    door.execute("1/0", context_id=python, env_vars={"CELL_VALUE": "here"})
    assert unset(door, "python", python)
    door.execute("import time; time.sleep(60)", context_id=python, env_vars={"CELL_VALUE": "here"}, timeout=1)
    assert unset(door, "python", python)


def test_queued_cells_do_not_see_each_others_variables(door, python):
    with door.begin(
        "import time, os; time.sleep(1); os.environ['CELL_VALUE']", context_id=python, env_vars={"CELL_VALUE": "first"}
    ) as first:
        first.until("number_of_executions")
        second = door.run(READ["python"], context_id=python)
        assert first.rest().text == "first"
    assert second.stdout == "(unset)"


def test_children_of_a_cell_inherit_its_variables(door, python):
    assert door.run("!printf '<%s>' \"$CELL_VALUE\"", context_id=python, env_vars={"CELL_VALUE": "it's"}).stdout == "<it's>"


def test_line_numbers_and_the_source_are_the_cells_own(door, python):
    """Nothing is pasted in front of the code."""
    error = door.execute(
        "one = 1\ntwo = 2\nraise ValueError('third line')", context_id=python, env_vars={"CELL_VALUE": "x\ny\nz"}
    ).failed()
    assert "line 3" in re.sub("\x1b\\[[0-9;]*m", "", error["traceback"]), error["traceback"]
    assert "CELL_VALUE" not in error["traceback"]


def test_a_cell_magic_stays_first(door, python):
    assert (
        door.run('%%bash\nprintf %s "$CELL_VALUE"', context_id=python, env_vars={"CELL_VALUE": "in bash"}).stdout.strip()
        == "in bash"
    )


def test_what_a_cell_sets_itself_stays(door, python):
    door.run("import os; os.environ['OWN'] = 'kept'", context_id=python, env_vars={"CELL_VALUE": "x"})
    assert door.run("os.environ['OWN']", context_id=python).text == "kept"


@pytest.mark.parametrize("name", ["", "A=B", "A\0B"])
def test_a_name_that_is_none_is_refused(door, name):
    answer = door.ask(code="1", env_vars={name: "x"})
    assert answer.status_code in (400, 422) and "env_vars" in answer.text, f"{answer.status_code}: {answer.text}"


def test_a_value_that_no_environment_can_hold_is_refused(door):
    answer = door.ask(code="1", env_vars={"A": "x\0y"})
    assert answer.status_code in (400, 422) and "env_vars" in answer.text, f"{answer.status_code}: {answer.text}"


def test_a_name_that_no_shell_takes_is_refused_where_there_is_a_shell(door):
    assert door.run("import os; os.environ['a.b-c']", env_vars={"a.b-c": "fine"}).text == "fine"
    answer = door.ask(code="echo here", language="bash", env_vars={"a.b-c": "fine"})
    assert answer.status_code in (400, 422) and "a.b-c" in answer.text, f"{answer.status_code}: {answer.text}"


# --- the sandbox's own ---


@pytest.fixture
def with_globals(fresh):
    return fresh(envVars={"CELL_VALUE": "global 'one'", "OTHER": "stays"})


def change(agent, **variables) -> None:
    answer = httpx.post(f"{agent.url}/init", json={"envVars": variables, "defaultUser": "user"}, headers=CONTROL, trust_env=False)
    assert answer.status_code == 204, answer.text


@pytest.mark.parametrize("language", READ)
def test_the_sandboxs_variables_are_in_every_language(with_globals, language):
    assert with_globals.door.run(READ[language], language=language).stdout.strip() == "global 'one'"


@pytest.mark.parametrize("language", READ)
def test_a_variable_of_a_cell_hides_the_sandboxs_for_that_cell(with_globals, language):
    code = READ[language]
    seen = [
        with_globals.door.run(code, language=language, **body).stdout.strip()
        for body in ({}, {"env_vars": {"CELL_VALUE": "cell's"}}, {})
    ]
    assert seen == ["global 'one'", "cell's", "global 'one'"]


@pytest.mark.parametrize("language", READ)
def test_a_later_change_reaches_a_context_that_is_there(with_globals, language):
    """The reference asks once for each context (row 33)."""
    code = READ[language]
    door = with_globals.door
    door.run(code, language=language)
    change(with_globals, CELL_VALUE="two")
    assert door.run(code, language=language).stdout.strip() == "two"
    change(with_globals, OTHER="only")
    assert door.run(code, language=language).stdout.strip() == "(unset)"


def test_the_home_and_the_user_are_the_default_users(door, python):
    cell = door.run(
        "import os, pwd; print(os.environ['HOME'], os.environ['USER'], pwd.getpwuid(os.getuid()).pw_name, os.getcwd())",
        context_id=python,
    )
    assert cell.stdout.split() == ["/home/user", "user", "user", "/home/user"]
