"""Cells that do not end by themselves: clients that go, timeouts, kernels that die (contract: envd.md section 7.6)."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from harness.code import SPIN
from harness.processes import alive, wait_until

# SIGINT is blocked and the interpreter's lock is held: no interrupt can ever get through.
DEAF = """
import ctypes, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
print('go', flush=True)
ctypes.PyDLL(None).sleep(300)
"""
# The handler runs, but only asks for something that the loop in C never looks at.
IGNORANT = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print('go', flush=True)
while True: time.sleep(1)
"""


def children(pid: int) -> list[str]:
    return [child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]


def leave(door, code: str, meanwhile=lambda: None, **body) -> float:
    """Starts a cell, does something when it has said something, and vanishes; when that was."""
    with door.begin(code, **body) as running:
        running.until("stdout")
        meanwhile()
        # What is not to be interrupted has begun by then.
        time.sleep(0.4)
        running.leave()
    return time.monotonic()


@pytest.mark.takes(4)
@pytest.mark.parametrize(
    "code",
    [
        SPIN,
        "print('go', flush=True)\nimport time\ntime.sleep(300)",
        "print('go', flush=True)\nimport subprocess\nsubprocess.run(['sleep', '300'])",
    ],
    ids=["spin", "sleep", "child"],
)
def test_a_client_that_vanishes_frees_the_kernel_and_leaves_the_state(door, python, code):
    door.run("kept = 'kept'", context_id=python)
    left = leave(door, code, context_id=python)
    cell = door.run("kept", context_id=python)
    assert time.monotonic() - left < 5
    assert cell.text == "kept" and cell.stderr == ""


@pytest.mark.takes(12)
def test_an_await_that_nothing_interrupts_frees_its_context_by_a_new_kernel(door, python):
    """ipykernel 7 does not hear an interrupt while it awaits, whoever sends it."""
    left = leave(door, "print('go', flush=True)\nimport asyncio\nawait asyncio.sleep(300)", context_id=python)
    wait_until(lambda: door.execute("1 + 1", context_id=python).text == "2", within=20, what="the context is free")
    assert time.monotonic() - left < 25


@pytest.mark.takes(6)
def test_a_vanished_client_is_noticed_though_its_cell_says_nothing(door, python):
    with door.begin("import time\ntime.sleep(300)", context_id=python) as running:
        running.until("number_of_executions")
        running.leave()
    began = time.monotonic()
    assert door.run("'free'", context_id=python).text == "free"
    assert time.monotonic() - began < 7


@pytest.mark.takes(10)
@pytest.mark.parametrize("code", [DEAF, IGNORANT], ids=["deaf", "ignorant"])
def test_a_kernel_that_ignores_interrupts_is_replaced_and_the_next_cell_is_told(door, python, code):
    door.run("lost = 1", context_id=python)
    left = leave(door, code, context_id=python)
    cell = door.execute("print('answers')", context_id=python)
    assert time.monotonic() - left < 20
    if cell.error:
        # It was queued when the kernel was given up.
        assert cell.failed()["name"] == "ContextRestarting"
        cell = door.run("print('answers')", context_id=python)
    else:
        assert cell.stderr != "", "nobody was told that the state is lost"
    assert cell.stdout == "answers\n"
    assert door.execute("lost", context_id=python).failed()["name"] == "NameError"
    assert door.run("1", context_id=python).stderr == "", "it is told once"


@pytest.mark.takes(10)
def test_an_endless_loop_in_javascript_frees_its_context(door, context):
    chosen = context("javascript")
    door.run("1", context_id=chosen)
    left = leave(
        door, "console.log('go'); await new Promise((wake) => setTimeout(wake, 200)); while (true) {}", context_id=chosen
    )
    wait_until(
        lambda: door.execute("console.log(40 + 2)", context_id=chosen).stdout.strip() == "42",
        within=15,
        what="the context is free",
    )
    assert time.monotonic() - left < 20


@pytest.mark.takes(10)
def test_an_endless_loop_in_bash_frees_its_context(door, context):
    chosen = context("bash")
    door.run("true", context_id=chosen)
    left = leave(door, "echo go; while :; do sleep 0.1; done", context_id=chosen)
    wait_until(
        lambda: door.execute("echo $((40 + 2))", context_id=chosen).stdout.strip().endswith("42"),
        within=15,
        what="the context is free",
    )
    assert time.monotonic() - left < 20


def test_a_queued_cell_whose_client_left_never_runs(door, python, home):
    mark = "ran although nobody waited"
    with door.begin("import time\nprint('go', flush=True)\ntime.sleep(3)", context_id=python) as first:
        first.until("stdout")
        with door.begin(f"open('/home/user/{mark}', 'w')", context_id=python) as second:
            time.sleep(0.3)
            second.leave()
        first.rest().ok()
    assert door.run("1 + 1", context_id=python).text == "2"
    assert not (home / mark).exists()


def test_a_client_that_leaves_the_queue_interrupts_nobody(door, python):
    with door.begin("import time\nprint('go', flush=True)\ntime.sleep(3)\n'whole'", context_id=python) as first:
        first.until("stdout")
        with door.begin("1", context_id=python) as second:
            time.sleep(0.3)
            second.leave()
        assert first.rest().ok().text == "whole"


def test_the_interrupt_route_ends_the_cell_with_the_kernels_own_error(door, python):
    door.run("kept = 1", context_id=python)
    with door.begin("print('go', flush=True)\nimport time\ntime.sleep(300)", context_id=python) as running:
        running.until("stdout")
        began = time.monotonic()
        answer = door.interrupt(python)
        assert (answer.status_code, answer.json()) == (200, None)
        assert running.rest().failed()["name"] == "KeyboardInterrupt"
        assert time.monotonic() - began < 5
    assert door.run("kept", context_id=python).text == "1"


def test_an_interrupt_of_an_idle_context_harms_nothing(door, python):
    door.run("kept = 1", context_id=python)
    assert door.interrupt(python).status_code == 200
    assert door.run("kept", context_id=python).text == "1"


@pytest.mark.takes(2)
def test_a_timeout_ends_the_cell_and_keeps_the_state(door, python):
    door.run("kept = 1", context_id=python)
    began = time.monotonic()
    cell = door.execute("print('begun', flush=True)\nwhile True: pass", context_id=python, timeout=1)
    assert 0.9 < time.monotonic() - began < 5
    assert (cell.failed()["name"], cell.stdout) == ("TimeoutError", "begun\n")
    assert door.run("kept", context_id=python).text == "1"


@pytest.mark.takes(10)
def test_a_timeout_of_a_deaf_kernel_ends_too(door, python):
    began = time.monotonic()
    assert door.execute(DEAF, context_id=python, timeout=1).failed()["name"] == "TimeoutError"
    assert time.monotonic() - began < 15
    assert door.execute("1 + 1", context_id=python).text == "2"


def test_a_timeout_that_is_not_reached_changes_nothing(door, python):
    assert door.run("'in time'", context_id=python, timeout=30).text == "in time"


def test_a_timeout_of_a_fraction_is_one(door, python):
    began = time.monotonic()
    assert door.execute("import time; time.sleep(60)", context_id=python, timeout=0.5).failed()["name"] == "TimeoutError"
    assert time.monotonic() - began < 5


# --- kernels that die ---


@pytest.mark.parametrize(
    "code, said",
    [
        ("import os\nos._exit(3)", "3"),
        ("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)", "9|SIGKILL|killed"),
        ("import ctypes\nctypes.string_at(1)", "11|SIGSEGV|segmentation"),
    ],
    ids=["exit", "kill", "fault"],
)
def test_a_kernel_that_dies_in_a_cell_is_reported_and_replaced(door, python, code, said):
    door.run("lost = 1", context_id=python)
    began = time.monotonic()
    cell = door.execute(f"print('last words', flush=True)\nimport time; time.sleep(0.2)\n{code}", context_id=python)
    error = cell.failed()
    assert error["name"] == "KernelDied" and any(word.lower() in error["value"].lower() for word in said.split("|")), error
    assert cell.stdout == "last words\n"
    assert time.monotonic() - began < 8
    following = door.execute("lost", context_id=python)
    assert following.failed()["name"] == "NameError"
    # Its client was told already.
    assert following.stderr == ""
    assert door.run("1 + 1", context_id=python).count == 2


def test_a_kernel_that_dies_takes_the_queued_cells_along_and_says_so(door, python):
    told = {}
    with door.begin("import os, time\nprint('go', flush=True)\ntime.sleep(1.5)\nos._exit(1)", context_id=python) as running:
        running.until("stdout")
        queued = threading.Thread(target=lambda: told.update(cell=door.execute("'queued'", context_id=python)))
        queued.start()
        assert running.rest().failed()["name"] == "KernelDied"
        queued.join(30)
    # Either it was told of the loss, or it ran on the new kernel.
    cell = told["cell"].checked()
    assert (cell.error or {}).get("name") in (None, "ContextRestarting", "KernelDied")
    assert cell.error or cell.text == "queued"
    assert door.run("1 + 1", context_id=python).text == "2"


def test_a_kernel_that_is_killed_between_two_cells_is_replaced_and_the_next_cell_is_told(door, python):
    pid = int(door.run("lost = 1\nimport os; os.getpid()", context_id=python).text)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not alive(pid), within=5, what="the kernel is dead and reaped")
    time.sleep(0.3)
    cell = door.run("print('answers')", context_id=python)
    assert cell.stdout == "answers\n" and cell.stderr != "", "nobody was told that the state is lost"
    assert door.run("'lost' in globals()", context_id=python).text == "False"
    assert door.run("1", context_id=python).stderr == ""


def test_a_kernel_that_is_killed_just_before_a_cell_loses_no_answer(door, python):
    """The death and the cell meet: whichever is seen first, the client gets an end."""
    for _ in range(3):
        pid = int(door.run("import os; os.getpid()", context_id=python).text)
        os.kill(pid, signal.SIGKILL)
        cell = door.execute("40 + 2", context_id=python)
        assert cell.text == "42" or cell.error["name"] in ("KernelDied", "ContextRestarting"), str(cell)


def test_a_kernel_that_is_stopped_is_replaced_when_its_client_leaves(door, python):
    pid = int(door.run("import os; os.getpid()", context_id=python).text)
    # Stopped from outside: a kernel that stops itself may do so before its own thread has sent what it said.
    leave(door, SPIN, meanwhile=lambda: os.kill(pid, signal.SIGSTOP), context_id=python)
    began = time.monotonic()
    # Ten seconds until it is given up, and the start of another.
    wait_until(lambda: door.execute("1 + 1", context_id=python).text == "2", within=30, what="the context answers")
    assert time.monotonic() - began < 30
    wait_until(lambda: not alive(pid), within=5, what="the stopped kernel is gone")


@pytest.mark.parametrize("code", ["exit()", "quit()"])
def test_a_cell_that_leaves_the_kernel_gets_its_end_and_the_next_one_a_kernel(door, python, code):
    door.execute(code, context_id=python)
    time.sleep(0.5)
    wait_until(lambda: door.execute("1 + 1", context_id=python).text == "2", within=15, what="the context answers")


def test_a_kernel_out_of_descriptors_gets_an_error_and_not_a_hang(door, python):
    code = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (120, 120))\nkept = []\nwhile True: kept.append(open('/dev/null'))"
    began = time.monotonic()
    assert door.execute(code, context_id=python).failed()["name"] in ("OSError", "KernelDied")
    door.execute("kept.clear()", context_id=python)
    assert door.run("1 + 1", context_id=python).text == "2"
    assert time.monotonic() - began < 20


def test_a_default_kernel_that_dies_does_not_stay_dead(fresh):
    door = fresh().door
    for _ in range(3):
        assert door.execute("import os; os._exit(1)").failed()["name"] == "KernelDied"
        assert door.run("1 + 1").text == "2"


def test_the_kernel_made_ahead_may_die_before_anybody_uses_it(fresh):
    """Whoever gets it must get a living one."""
    agent = fresh()
    time.sleep(2.5)
    for pid in children(agent.process.pid):
        os.kill(int(pid), signal.SIGKILL)
    time.sleep(0.5)
    assert agent.door.run("40 + 2").text == "42"
