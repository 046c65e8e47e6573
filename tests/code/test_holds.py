"""A cell is use of the sandbox, class `code`, until its result; nothing that only looks is (DESIGN.md section 4)."""

import threading
import time

import pytest

from harness.processes import wait_until


@pytest.fixture
def agent(fresh):
    """An agent that nobody else uses."""
    return fresh()


def held(agent, *classes: str, within: float = 5) -> None:
    wait_until(lambda: sorted(agent.holds()) == sorted(classes), within, f"holds {classes}, now {agent.holds()}")


def test_a_running_cell_is_a_hold_and_its_end_starts_the_clock(agent):
    with agent.door.begin("print('go', flush=True)\nimport time\ntime.sleep(1.5)") as running:
        running.until("stdout")
        assert agent.holds() == ["code"]
        assert agent.report().get("idleForMs", "0") == "0"
        running.rest().ok()
    held(agent, within=1)
    assert int(agent.report()["idleForMs"]) < 1500
    assert agent.report()["lastClass"] == "code"


def test_a_queued_cell_is_a_hold_too(agent):
    with agent.door.begin("print('go', flush=True)\nimport time\ntime.sleep(1.5)") as first:
        first.until("stdout")
        with agent.door.begin("2") as second:
            held(agent, "code", "code")
            first.rest()
            second.rest()
    held(agent)


def test_an_idle_context_is_no_hold(agent):
    agent.door.create()
    agent.door.run("1")
    held(agent)
    time.sleep(0.5)
    assert agent.holds() == [] and int(agent.report()["idleForMs"]) > 300


def test_a_detached_cell_holds_without_any_client(agent):
    started = agent.door.detach("import time; time.sleep(1.5)")["id"]
    held(agent, "code", within=1)
    agent.door.wait_done(started)
    held(agent, within=1)


def test_a_cell_whose_client_left_stops_holding(agent):
    with agent.door.begin("print('go', flush=True)\nwhile True: pass") as running:
        running.until("stdout")
        assert agent.holds() == ["code"]
        running.leave()
    held(agent, within=6)


def test_a_kernel_that_dies_stops_holding(agent):
    agent.door.execute("import os; os._exit(1)")
    held(agent, within=3)


def test_a_stalled_reader_is_no_reason_to_live(agent):
    """The cell is over; what is left is bytes that nobody takes."""
    with agent.door.begin("for n in range(3000): print('x' * 999)"):
        wait_until(lambda: "code" not in agent.holds(), within=15, what="the cell's hold has ended")


def test_whoever_looks_does_not_use(agent):
    agent.door.run("1")
    kept = agent.door.detach("1")["id"]
    agent.door.wait_done(kept)
    held(agent)
    began = time.monotonic()
    for _ in range(5):
        assert agent.door.http.get("/health").status_code == 200
        time.sleep(0.2)
    idle = int(agent.report()["idleForMs"]) / 1000
    assert idle >= time.monotonic() - began - 0.3, f"idle for {idle} s: /health counted"


def test_a_refused_call_is_no_use(fresh):
    agent = fresh(accessToken="right")
    time.sleep(1)
    before = int(agent.report()["idleForMs"])
    for _ in range(3):
        assert agent.door.ask(code="1").status_code == 401
        time.sleep(0.2)
    assert int(agent.report()["idleForMs"]) >= before + 400


def test_twenty_cells_are_twenty_holds_and_then_none(agent):
    threads = [threading.Thread(target=agent.door.run, args=("import time; time.sleep(0.2)",)) for _ in range(20)]
    for thread in threads:
        thread.start()
    wait_until(lambda: agent.holds().count("code") >= 10, within=5, what="many holds")
    for thread in threads:
        thread.join(60)
    held(agent)


def test_a_hold_says_what_it_is(agent):
    with agent.door.begin("print('go', flush=True)\nimport time\ntime.sleep(1)") as running:
        running.until("stdout")
        [hold] = [hold for hold in agent.report()["holds"] if hold["class"] == "code"]
        assert hold["counts"] is True and "print('go', flush=True)" in hold["origin"]
        running.rest()
