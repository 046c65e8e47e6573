"""Contexts and languages (contract: envd.md sections 7.1, 7.4 and 7.6)."""

import threading
import time
import uuid

import pytest

from harness.processes import alive, wait_until


def test_two_default_contexts_are_there_from_the_start(fresh):
    contexts = fresh().door.contexts()
    assert [(each["language"], each["cwd"]) for each in contexts] == [("python", "/home/user"), ("javascript", "/home/user")]
    assert all(each.keys() == {"id", "language", "cwd"} and uuid.UUID(each["id"]) for each in contexts)


def test_a_cell_without_a_context_runs_in_the_default_one(fresh):
    door = fresh().door
    default = door.contexts()[0]["id"]
    door.run("kept = 1")
    assert door.run("kept + 1", context_id=default).text == "2"
    assert door.run("kept + 2", language="python").text == "3"
    assert door.run("kept + 3").count == 4
    assert len(door.contexts()) == 2


def test_a_language_gets_one_default_context_at_its_first_use(fresh):
    door = fresh().door
    assert door.run("echo one; A=kept", language="bash").stdout.strip() == "one"
    assert door.run("echo $A", language="bash").stdout.strip() == "kept"
    assert [each["language"] for each in door.contexts()] == ["python", "javascript", "bash"]


def test_two_first_uses_of_a_language_make_one_context(fresh):
    door = fresh().door
    cells = []
    threads = [threading.Thread(target=lambda: cells.append(door.run("echo x", language="bash"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [cell.stdout.strip() for cell in cells] == ["x"] * 4
    assert [each["language"] for each in door.contexts()].count("bash") == 1


@pytest.mark.parametrize(
    "said, meant",
    [
        ("python", "python"),
        (" Python ", "python"),
        ("PYTHON", "python"),
        ("js", "javascript"),
        ("JavaScript", "javascript"),
        ("TS", "typescript"),
        ("bash", "bash"),
        (None, "python"),
    ],
)
def test_a_language_has_several_spellings(door, said, meant):
    made = door.create(language=said)
    assert made["language"] == meant
    assert door.delete(made["id"]).status_code == 200


def test_a_spec_is_found_by_its_folder_too(door):
    made = door.create(language="python3")
    assert door.run("1 + 1", context_id=made["id"]).text == "2"
    door.delete(made["id"])


def test_typescript_has_a_context_of_its_own(fresh):
    door = fresh().door
    door.run("globalThis.shared = 'js'", language="js")
    cell = door.run("const n: number = 40; console.log(String((globalThis as any).shared), n + 2)", language="ts")
    assert cell.stdout.strip() == "undefined 42"
    assert [each["language"] for each in door.contexts()] == ["python", "javascript", "typescript"]


def test_contexts_are_listed_in_the_order_of_their_making(door):
    made = [door.create(language=language)["id"] for language in ("bash", "python", "bash")]
    listed = [each["id"] for each in door.contexts()]
    assert listed[-3:] == made
    for context_id in made:
        door.delete(context_id)
    assert not set(made) & {each["id"] for each in door.contexts()}


def test_contexts_share_nothing(door, context):
    one, two = context(), context()
    door.run("value = 'one'", context_id=one)
    door.run("value = 'two'", context_id=two)
    assert (door.run("value", context_id=one).text, door.run("value", context_id=two).text) == ("one", "two")


@pytest.mark.parametrize(
    "language, where",
    [
        ("python", "import os; print(os.getcwd())"),
        ("bash", "pwd"),
        ("javascript", "console.log(process.cwd())"),
        ("typescript", "console.log(process.cwd())"),
    ],
)
def test_a_context_begins_in_its_folder(door, context, home, language, where):
    folder = home / "a folder of ours"
    folder.mkdir(exist_ok=True)
    folder.chmod(0o755)
    chosen = context(language, cwd="/home/user/a folder of ours")
    assert door.run(where, context_id=chosen).stdout.strip() == "/home/user/a folder of ours"
    assert door.run(where, context_id=context(language)).stdout.strip() == "/home/user"
    told = {each["id"]: each["cwd"] for each in door.contexts()}
    assert told[chosen] == "/home/user/a folder of ours"


@pytest.mark.parametrize("cwd", ["/no/such/folder", "/etc/passwd", ""])
def test_a_folder_that_is_none_is_refused_and_named(door, cwd):
    answer = door.http.post("/contexts", json={"cwd": cwd})
    if answer.status_code == 200 and cwd == "":
        # Nothing said is the default.
        assert answer.json()["cwd"] == "/home/user"
        door.delete(answer.json()["id"])
        return
    assert answer.status_code in (400, 422, 500) and (
        cwd in answer.text or "cwd" in answer.text
    ), f"{answer.status_code}: {answer.text}"


def test_a_cell_that_changes_the_folder_changes_it_for_the_next(door, python):
    door.run("%cd /tmp", context_id=python)
    assert door.run("import os; os.getcwd()", context_id=python).text == "/tmp"


# --- order ---


@pytest.mark.takes(3)
def test_cells_of_one_context_run_one_after_the_other(door, python):
    spans = []

    def client():
        cell = door.run("import time\nbegan = time.time()\ntime.sleep(0.3)\nprint(began, time.time())", context_id=python)
        spans.append(tuple(map(float, cell.stdout.split())))

    threads = [threading.Thread(target=client) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    spans.sort()
    assert len(spans) == 6 and all(before[1] <= after[0] for before, after in zip(spans, spans[1:])), spans


@pytest.mark.takes(3)
def test_queued_cells_run_in_the_order_in_which_they_came(door, python):
    door.run("import time; seen = []", context_id=python)
    threads = []
    with door.begin("time.sleep(2)", context_id=python) as first:
        first.until("number_of_executions")
        for n in range(8):
            threads.append(threading.Thread(target=door.run, args=(f"seen.append({n})",), kwargs={"context_id": python}))
            threads[-1].start()
            time.sleep(0.1)
        first.rest()
    for thread in threads:
        thread.join(30)
    assert door.run("seen", context_id=python).text == str(list(range(8)))


@pytest.mark.takes(3)
def test_contexts_run_side_by_side(door, context):
    ids = [context() for _ in range(4)]
    for each in ids:
        door.run("import time", context_id=each)
    began = time.monotonic()
    threads = [threading.Thread(target=door.run, args=("time.sleep(2)",), kwargs={"context_id": each}) for each in ids]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert time.monotonic() - began < 5


def test_a_busy_context_does_not_hold_up_lists_and_new_contexts(door, python):
    with door.begin("import time; time.sleep(4)", context_id=python) as running:
        running.until("number_of_executions")
        began = time.monotonic()
        door.contexts()
        door.delete(door.create()["id"])
        assert time.monotonic() - began < 3.5
        running.rest()


# --- restart ---


def test_a_restart_loses_the_state_and_keeps_the_context(door, context):
    chosen = context("python", cwd="/tmp")
    before = next(each for each in door.contexts() if each["id"] == chosen)
    door.run("lost = 1", context_id=chosen)
    door.run("%cd /", context_id=chosen)
    answer = door.restart(chosen)
    assert (answer.status_code, answer.json()) == (200, None)
    assert next(each for each in door.contexts() if each["id"] == chosen) == before
    assert door.execute("lost", context_id=chosen).failed()["name"] == "NameError"
    # Better than the reference, which starts over in the home folder.
    assert door.run("import os; os.getcwd()", context_id=chosen).text == "/tmp"


def test_a_restart_starts_the_numbers_again(door, python):
    assert [door.run("1", context_id=python).count for _ in range(2)] == [1, 2]
    door.restart(python)
    assert door.run("1", context_id=python).count == 1


@pytest.mark.parametrize(
    "language, code, answer", [("bash", "echo $((40 + 2))", "42"), ("javascript", "console.log(40 + 2)", "42")]
)
def test_other_languages_restart_too(door, context, language, code, answer):
    chosen = context(language)
    door.run(code, context_id=chosen)
    assert door.restart(chosen).status_code == 200
    assert door.run(code, context_id=chosen).stdout.strip() == answer


def test_a_restart_tells_the_running_cell_and_the_queued_one(door, python):
    told = {}
    with door.begin("print('go', flush=True)\nimport time\ntime.sleep(300)", context_id=python) as running:
        running.until("stdout")
        queued = threading.Thread(target=lambda: told.update(queued=door.execute("'queued'", context_id=python)))
        queued.start()
        time.sleep(0.5)
        began = time.monotonic()
        assert door.restart(python).status_code == 200
        cell = running.rest()
        queued.join(20)
    for each in (cell, told["queued"]):
        error = each.failed()
        assert (error["name"], error["value"]) == ("ContextRestarting", "Context was restarted")
    assert time.monotonic() - began < 10
    assert door.run("1 + 1", context_id=python).text == "2"


def test_two_restarts_at_once_leave_a_context_that_works(door, python):
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(door.restart(python).status_code)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 200 in answers and all(status < 600 for status in answers)
    assert door.run("1 + 1", context_id=python).text == "2"


# --- delete ---


def test_a_deleted_context_is_gone_and_its_kernel_with_it(door):
    made = door.create()["id"]
    pid = int(door.run("import os; os.getpid()", context_id=made).text)
    answer = door.delete(made)
    assert (answer.status_code, answer.json()) == (200, None)
    assert door.delete(made).status_code == 404
    assert door.ask(code="1", context_id=made).status_code == 404
    wait_until(lambda: not alive(pid), within=10, what="the kernel is gone")


def test_a_delete_tells_the_running_cell_and_the_queued_one(door):
    made = door.create()["id"]
    told = {}
    with door.begin("print('go', flush=True)\nimport time\ntime.sleep(300)", context_id=made) as running:
        running.until("stdout")
        queued = threading.Thread(target=lambda: told.update(queued=door.execute("1", context_id=made)))
        queued.start()
        time.sleep(0.5)
        assert door.delete(made).status_code == 200
        assert running.rest().failed()["name"] == "ExecutionAborted"
        queued.join(20)
    assert told["queued"].failed()["name"] == "ExecutionAborted"


def test_a_deleted_default_context_is_made_anew_when_it_is_asked_for(fresh):
    door = fresh().door
    door.run("lost = 1")
    default = door.contexts()[0]["id"]
    assert door.delete(default).status_code == 200
    assert door.execute("lost").failed()["name"] == "NameError"
    assert door.run("1 + 1").text == "2"


def test_what_a_kernel_started_ends_with_its_context(door):
    made = door.create()["id"]
    code = "import subprocess\nchild = subprocess.Popen(['sleep', '1000'])\nchild.pid"
    pid = int(door.run(code, context_id=made).text)
    door.delete(made)
    wait_until(lambda: not alive(pid), within=10, what="the child of the kernel is gone")


@pytest.mark.takes(20)
def test_contexts_that_come_and_go_leave_nothing_behind(interpreter):
    door = interpreter.door

    def turn():
        made = door.create(language="bash")["id"]
        door.run("echo x", context_id=made)
        door.delete(made)

    turn()
    time.sleep(1)
    before = interpreter.descriptors()
    for _ in range(8):
        turn()
    wait_until(lambda: interpreter.descriptors() <= before + 3, within=10, what="the descriptors are closed")
