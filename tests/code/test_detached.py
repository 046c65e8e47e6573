"""Cells that outlive their client: started, left, picked up by id (additive; no contract but ours)."""

import threading
import time

import pytest

from harness.code import SPIN, Cell
from harness.processes import wait_until

NOBODY = "00000000-0000-4000-8000-000000000000"
SLOW = "import time\nfor n in range(4):\n    print(n, flush=True)\n    time.sleep(0.4)\n'result'"


def shown(cell: Cell) -> list[dict]:
    return [event for event in cell.events if event["type"] != "keepalive"]


def test_a_cell_is_started_left_and_picked_up(door, python):
    started = door.detach(SLOW, context_id=python)
    assert started["context_id"] == python and started["state"] in ("queued", "running") and started["id"]
    done = door.wait_done(started["id"])
    assert (done["id"], done["context_id"], done["language"], done["state"]) == (started["id"], python, "python", "done")
    cell = door.events(started["id"]).ok()
    assert (cell.stdout, cell.text) == ("0\n1\n2\n3\n", "result")
    assert cell.order[0] == "number_of_executions" and done["events"] == len(cell.events)


def test_a_kept_execution_may_be_read_again_from_any_event(door, python):
    started = door.detach("for n in range(6):\n    display(n)", context_id=python)["id"]
    door.wait_done(started)
    whole = door.events(started).events
    assert len(whole) == 8 and door.events(started).events == whole
    for skip in range(len(whole) + 1):
        assert door.events(started, **{"from": skip}).events == whole[skip:]


def test_a_client_that_comes_late_sees_the_past_and_then_the_present(door, python):
    started = door.detach(SLOW, context_id=python)["id"]
    time.sleep(1)
    began = time.monotonic()
    with door.follow(started) as running:
        first = running.until("stdout")
        assert first["text"] == "0\n" and time.monotonic() - began < 0.5
        cell = running.rest().ok()
    assert cell.stdout == "0\n1\n2\n3\n" and time.monotonic() - began > 0.3


def test_two_clients_follow_the_same_cell(door, python):
    started = door.detach(SLOW, context_id=python)["id"]
    cells = []
    threads = [threading.Thread(target=lambda: cells.append(door.events(started))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [cell.stdout for cell in cells] == ["0\n1\n2\n3\n"] * 3
    assert all(cell.ended for cell in cells)


def test_a_reader_that_leaves_does_not_interrupt_the_cell(door, python):
    started = door.detach(SLOW, context_id=python)["id"]
    with door.follow(started) as running:
        running.until("stdout")
        running.leave()
    assert door.wait_done(started)["state"] == "done"
    assert door.events(started).ok().text == "result"


def test_whoever_does_not_follow_gets_what_there_is(door, python):
    started = door.detach("print('so far', flush=True)\nimport time\ntime.sleep(3)", context_id=python)["id"]
    wait_until(lambda: door.execution(started)["events"] >= 2, within=5, what="two events")
    began = time.monotonic()
    cell = door.events(started, follow="false")
    assert time.monotonic() - began < 1 and cell.stdout == "so far\n" and not cell.ended
    assert door.events(started, follow="false", **{"from": 2}).of("stdout") == []
    door.wait_done(started)


def test_events_that_cannot_be_are_refused_and_the_field_named(door, python):
    started = door.detach("1", context_id=python)["id"]
    door.wait_done(started)
    for nonsense in ("1000", "-1", "abc", "1e99", "99999999999999999999999"):
        answer = door.http.get(f"/executions/{started}/events?from={nonsense}")
        assert answer.status_code in (400, 422) and "from" in answer.text, answer.text
    answer = door.http.get(f"/executions/{started}/events?follow=perhaps")
    assert answer.status_code in (400, 422) and "follow" in answer.text, answer.text


def test_a_kept_execution_is_interrupted_by_its_id(door, python):
    started = door.detach(SPIN, context_id=python)["id"]
    wait_until(lambda: door.execution(started)["events"] >= 2, within=5, what="it runs")
    answer = door.http.post(f"/executions/{started}/interrupt")
    assert answer.status_code == 200, answer.text
    door.wait_done(started, within=8)
    assert door.events(started).failed()["name"] == "KeyboardInterrupt"
    assert door.run("1 + 1", context_id=python).text == "2"


def test_a_queued_execution_is_interrupted_before_it_runs(door, python):
    first = door.detach("import time; time.sleep(3)", context_id=python)["id"]
    second = door.detach("ran = True", context_id=python)["id"]
    assert door.execution(second)["state"] == "queued"
    door.http.post(f"/executions/{second}/interrupt")
    door.wait_done(second, within=8)
    door.wait_done(first, within=8)
    assert door.events(first).ok() and door.events(second).failed()
    assert door.run("'ran' in globals()", context_id=python).text == "False"


def test_a_forgotten_execution_is_gone_and_interrupted_if_it_runs(door, python):
    started = door.detach(SPIN, context_id=python)["id"]
    wait_until(lambda: door.execution(started)["events"] >= 2, within=5, what="it runs")
    assert door.http.delete(f"/executions/{started}").status_code in (200, 204)
    assert door.http.get(f"/executions/{started}").status_code == 404
    assert started not in [each["id"] for each in door.executions()]
    began = time.monotonic()
    assert door.run("'free'", context_id=python).text == "free"
    assert time.monotonic() - began < 6


def test_an_unknown_execution_is_not_found_on_every_route(door):
    attempts = [("GET", ""), ("DELETE", ""), ("GET", "/events"), ("POST", "/interrupt")]
    answers = [door.http.request(method, f"/executions/{NOBODY}{rest}") for method, rest in attempts]
    assert [answer.status_code for answer in answers] == [404] * 4
    assert all(NOBODY in answer.text for answer in answers)


def test_a_wrong_start_keeps_nothing(door):
    before = door.executions()
    for body, status in (
        ({}, 422),
        ({"code": "1", "context_id": NOBODY}, 404),
        ({"code": "1", "context_id": "a", "language": "b"}, 400),
    ):
        assert door.http.post("/executions", json=body).status_code == status
    assert door.executions() == before


def test_executions_are_listed_with_their_states(door, context):
    one, two = context(), context("bash")
    ended = door.detach("1", context_id=one)["id"]
    door.wait_done(ended)
    running = door.detach("sleep 3", context_id=two)["id"]
    queued = door.detach("true", context_id=two)["id"]
    wait_until(lambda: door.execution(running)["state"] == "running", within=5, what="it runs")
    states = {each["id"]: each["state"] for each in door.executions()}
    assert (states[ended], states[running], states[queued]) == ("done", "running", "queued")
    told = door.execution(running)
    assert "started_at" in told and told.get("ended_at") is None
    assert door.execution(ended)["ended_at"] >= door.execution(ended)["started_at"]
    for each in (running, queued):
        door.http.delete(f"/executions/{each}")


def test_cells_of_execute_are_not_kept(door, python):
    shown = door.run("1", context_id=python).headers["x-execution-id"]
    assert shown not in [each["id"] for each in door.executions()]


def test_variables_and_timeouts_work_here_too(door, python):
    started = door.detach("import os; os.environ['CELL_VALUE']", context_id=python, env_vars={"CELL_VALUE": "it's"})["id"]
    door.wait_done(started)
    assert door.events(started).text == "it's"
    limited = door.detach("import time; time.sleep(60)", context_id=python, timeout=1)["id"]
    door.wait_done(limited, within=10)
    assert door.events(limited).failed()["name"] == "TimeoutError"


def test_a_restart_ends_kept_executions_with_an_error(door, python):
    running = door.detach("import time; time.sleep(60)", context_id=python)["id"]
    queued = door.detach("1", context_id=python)["id"]
    time.sleep(0.5)
    door.restart(python)
    for each in (running, queued):
        door.wait_done(each)
        assert door.events(each).failed()["name"] == "ContextRestarting"


def test_a_kept_execution_outlives_its_context(door):
    made = door.create()["id"]
    started = door.detach("'kept'", context_id=made)["id"]
    door.wait_done(started)
    door.delete(made)
    assert door.events(started).ok().text == "kept"


@pytest.mark.takes(10)
def test_only_the_newest_are_kept(fresh):
    door = fresh().door
    ids = [door.detach(str(n))["id"] for n in range(80)]
    door.wait_done(ids[-1], within=60)
    kept = [each["id"] for each in door.executions()]
    assert 1 <= len(kept) <= 64
    assert ids[-1] in kept and ids[0] not in kept
    assert door.http.get(f"/executions/{ids[0]}").status_code == 404
    assert [door.events(each).text for each in ids[-20:]] == [str(n) for n in range(60, 80)]


@pytest.mark.takes(15)
def test_what_is_kept_is_bounded_by_its_size_too(fresh):
    agent = fresh()
    door = agent.door
    before = agent.memory()
    ids = []
    for _ in range(6):
        ids.append(door.detach("for n in range(20_000):\n    print('x' * 999)")["id"])
        door.wait_done(ids[-1], within=30)
    assert agent.memory() - before < 150_000_000, "64 MiB are kept, not 120 MB"
    kept = [each["id"] for each in door.executions()]
    assert ids[-1] in kept and ids[0] not in kept
    assert len(door.events(ids[-1]).ok().stdout) == 20_000_000


@pytest.mark.takes(15)
def test_one_execution_that_never_stops_talking_does_not_fill_the_memory(fresh):
    agent = fresh()
    before = agent.memory()
    started = agent.door.detach("while True: print('x' * 999)")["id"]
    peak = 0
    for _ in range(40):
        time.sleep(0.2)
        peak = max(peak, agent.memory())
    assert peak - before < 200_000_000, f"{before} -> {peak}"
    agent.door.http.delete(f"/executions/{started}")
    # What the kernel has said by then is on its way first.
    wait_until(lambda: agent.door.execute("1 + 1").text == "2", within=60, what="the context is free")


@pytest.mark.takes(6)
def test_a_kept_execution_that_says_nothing_keeps_its_reader_alive(door, python):
    started = door.detach("import time; time.sleep(6)", context_id=python)["id"]
    cell = door.events(started)
    assert len(cell.of("keepalive")) >= 1
    # They belong to the connection, not to the cell.
    assert door.events(started).of("keepalive") == []
