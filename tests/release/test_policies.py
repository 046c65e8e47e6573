"""What a sandbox chooses to count as use, in containers with an idle timeout of two seconds."""

import json
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import PtySize, Sandbox, TimeoutException

from harness import locations
from harness.processes import wait_until

IDLE = 2


@pytest.fixture
def eager(hostd, tmp_path):
    """hostd that releases after two seconds and writes down what happens."""
    supervisor = hostd(idle_floor=1, idle_trace=tmp_path / "traces", inhibitor_budget=30)
    supervisor.traces = tmp_path / "traces"
    return supervisor


def create(eager, **metadata) -> Sandbox:
    return Sandbox.create(metadata={"idle_timeout": str(IDLE), **metadata}, **eager.sdk())


def state(eager, sandbox: Sandbox) -> str:
    return eager.explain(sandbox.sandbox_id)["state"]


def assert_released_on_time(eager, sandbox: Sandbox, last: float, late: float = 1) -> dict:
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle", ended
    assert IDLE - 0.1 <= at - last <= IDLE + late, f"released after {at - last:.3f} s: {ended}"
    return ended


def detach(sandbox: Sandbox, command: str) -> None:
    sandbox.commands.run(command, background=True, timeout=0).disconnect()


# --- metadata ---


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"idle_detached": "sometimes"}, "metadata.idle_detached must be"),
        ({"idle_detached": "progress:9999"}, "metadata.idle_detached must be"),
        ({"idle_policy": "detached"}, "metadata.idle_policy must be a JSON object"),
        ({"idle_policy": '{"detachd":"alive"}'}, '"detachd" is not a class of use'),
        ({"idle_policy": '{"detached":"alive"}', "idle_detached": "ignore"}, "say it once"),
        ({"idle_notice": "0"}, "metadata.idle_notice must be"),
        ({"idle_notice": "61"}, "metadata.idle_notice must be"),
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_and_says_why(eager, metadata, said):
    answer = eager.request("POST", "/v2/sandboxes", json={"templateID": "base", "metadata": metadata})
    assert answer.status_code == 400
    assert said in answer.json()["message"]
    assert eager.sandboxes() == []


def test_a_misspelt_key_is_shown_to_whoever_asks(eager):
    sandbox = create(eager, idle_detachd="alive")
    history = [line["what"] for line in eager.explain(sandbox.sandbox_id)["transitions"]]
    assert any("idle_detachd" in what for what in history), history


# --- detached commands ---


def test_a_detached_command_holds_when_the_sandbox_says_alive(eager):
    sandbox = create(eager, idle_detached="alive")
    detach(sandbox, "sleep 6; true")
    began = time.monotonic()
    time.sleep(4.5)
    assert state(eager, sandbox) == "running"
    holds = eager.explain(sandbox.sandbox_id)["holds"]
    assert [(hold["class"], hold["counts"]) for hold in holds] == [("detached", True)]
    # Its end is use: the idle time begins there.
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 6 + IDLE - 0.3 <= at - began <= 6 + IDLE + 1.5, at - began


def test_under_progress_a_command_that_computes_holds_and_one_that_hangs_does_not(eager):
    working = create(eager, idle_policy='{"detached":"progress:5"}')
    detach(working, "timeout 9 sh -c 'while :; do :; done'; sleep 100")
    hanging = create(eager, idle_policy='{"detached":"progress:5"}')
    detach(hanging, "sleep 100")
    began = time.monotonic()
    eager.wait_until_ended(hanging.sandbox_id, within=15)
    assert state(eager, working) == "running", "it has computed all the time"
    at, ended = eager.wait_until_ended(working.sandbox_id, within=30)
    # 9 s of work, looked at every two seconds, then 5 s for which the last movement counts, then the idle timeout.
    assert ended["reason"] == "idle" and 9 + IDLE <= at - began <= 9 + 2 + 5 + IDLE + 1.5, at - began


def test_under_progress_output_that_nobody_reads_holds(eager):
    sandbox = create(eager, idle_detached="progress:1")
    detach(sandbox, "for i in 1 2 3 4 5 6; do echo $i; sleep 1; done; sleep 100")
    time.sleep(5)
    assert state(eager, sandbox) == "running"
    eager.wait_until_ended(sandbox.sandbox_id, within=8)


# --- inhibitors ---


def test_a_program_in_the_sandbox_says_that_it_is_busy(eager):
    sandbox = create(eager)
    detach(sandbox, "guestd busy --why training -- sleep 5")
    began = time.monotonic()
    time.sleep(3.5)
    told = eager.explain(sandbox.sandbox_id)
    assert told["state"] == "running"
    held = [hold for hold in told["holds"] if hold["class"] == "inhibitor"]
    assert [(hold["origin"], hold["counts"]) for hold in held] == [("training", True)]
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 5 + IDLE - 0.3 <= at - began <= 5 + IDLE + 1.5, at - began


def test_an_inhibitor_of_a_killed_program_ends_with_it(eager):
    sandbox = create(eager)
    detach(sandbox, "guestd busy -- sleep 1000")
    time.sleep(IDLE + 1)
    # In brackets: the shell that says it must not find itself.
    assert sandbox.commands.run("pkill -KILL -f '[g]uestd busy' && echo killed").stdout == "killed\n"
    assert_released_on_time(eager, sandbox, time.monotonic())


def test_a_hold_for_a_while_ends_after_it_and_an_ordinary_user_may_take_it(eager):
    sandbox = create(eager)
    said = sandbox.commands.run("id -un; guestd busy --ttl 5s --why 'a while'").stdout.splitlines()
    last = time.monotonic()
    assert said == ["user", "busy for 5 s (inhibitor 1)"]
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 5 + IDLE - 0.1 <= at - last <= 5 + IDLE + 1


def test_the_budget_ends_a_hold_and_refuses_the_next(hostd):
    eager = hostd(idle_floor=1, inhibitor_budget=4)
    sandbox = create(eager)
    assert sandbox.commands.run("guestd busy --ttl 10m").stdout.startswith("busy for 4 s")
    last = time.monotonic()
    time.sleep(4.5)
    refused = sandbox.commands.run("guestd busy --ttl 1s 2>&1 || true; guestd busy -- echo works anyway 2>&1").stdout
    assert "the budget of 4 s for inhibitors is spent" in refused
    assert refused.splitlines()[-1] == "works anyway", "the work matters more than its hold"
    assert time.monotonic() - last < 10
    assert_released_on_time(eager, sandbox, time.monotonic())


def test_any_language_speaks_to_the_socket(eager):
    sandbox = create(eager)
    program = (
        "import socket,time\n"
        "s=socket.socket(socket.AF_UNIX); s.connect('/run/guestd-activity.sock'); f=s.makefile('rw')\n"
        "f.write('BUSY 60 from python\\n'); f.flush(); print(f.readline().strip(), flush=True)\n"
        "time.sleep(4)\n"
    )
    sandbox.files.write("/tmp/busy.py", program)
    detach(sandbox, "python3 /tmp/busy.py")
    began = time.monotonic()
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 4 + IDLE - 0.3 <= at - began <= 4 + IDLE + 1.5, at - began


def test_inside_the_sandbox_one_can_ask_why_it_is_alive(eager):
    sandbox = create(eager)
    people = sandbox.commands.run("guestd idle").stdout
    assert "in use by" in people and "* command" in people, people
    programs = json.loads(sandbox.commands.run("guestd idle --json").stdout)
    assert programs["inhibitorBudgetMs"] == "30000"
    assert any(hold["class"] == "command" for hold in programs["report"]["holds"])


# --- notice ---


HOOK = "sudo mkdir -p /etc/guestd/before-end.d && printf '%s' '#!/bin/sh\n{}\n' | sudo tee /etc/guestd/before-end.d/10-test >/dev/null && sudo chmod 755 /etc/guestd/before-end.d/10-test"


def test_a_hook_runs_before_the_release_and_does_not_delay_it(hostd):
    eager = hostd(idle_floor=1)
    sandbox = Sandbox.create(metadata={"idle_timeout": "5", "idle_notice": "2"}, **eager.sdk())
    sandbox.commands.run(HOOK.format("echo $GUESTD_END_REASON $GUESTD_END_IN_SECONDS >>/tmp/told"))
    time.sleep(4)
    assert sandbox.files.read("/tmp/told") == "idle 2\n"
    last = time.monotonic()
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 4.9 <= at - last <= 6, at - last
    assert any(line["what"].startswith("notice: idle in 2.0 s") for line in eager.explain(sandbox.sandbox_id)["transitions"])


def test_an_attached_terminal_sees_a_line_before_the_end_and_the_line_is_no_use(hostd):
    eager = hostd(idle_floor=1)
    sandbox = Sandbox.create(metadata={"idle_timeout": "5", "idle_notice": "2"}, **eager.sdk())
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=0)
    seen = []

    def read() -> None:
        with pytest.raises(TimeoutException, match="sandbox"):
            seen.extend((time.monotonic(), chunk) for _, _, chunk in terminal)

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read)
        sandbox.pty.send_stdin(terminal.pid, b"echo $((6*7))\n")
        wait_until(lambda: b"42" in b"".join(chunk for _, chunk in seen), within=5, what="the terminal answers")
        at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
        reading.result(timeout=5)
    said = [(when, chunk) for when, chunk in seen if b"[guestd]" in chunk]
    assert [chunk for _, chunk in said] == [b"\r\n[guestd] this sandbox ends in 2 s: idle\r\n"]
    # In the notice, and the line itself began no new idle time.
    assert 1.5 <= at - said[0][0] <= 3, at - said[0][0]
    assert ended["reason"] == "idle" and 5 <= ended["idle_for_s"] <= 6, ended


def test_an_inhibitor_taken_in_the_notice_wins(hostd):
    eager = hostd(idle_floor=1, max_lifetime=30)
    sandbox = Sandbox.create(metadata={"idle_timeout": "3", "idle_notice": "2"}, **eager.sdk())
    sandbox.commands.run(HOOK.format("[ -e /tmp/once ] || guestd busy --ttl 4 --why saving; touch /tmp/once"))
    last = time.monotonic()
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=25)
    assert ended["reason"] == "idle"
    # The notice after one second, four seconds of saving, the idle timeout anew.
    assert 1 + 4 + 3 - 0.2 <= at - last <= 1 + 4 + 3 + 1.5, at - last


def test_the_hard_end_comes_though_a_hook_says_busy(hostd):
    eager = hostd(idle_floor=1, max_lifetime=8)
    sandbox = Sandbox.create(metadata={"idle_timeout": "5", "idle_notice": "4"}, **eager.sdk())
    began = time.monotonic()
    sandbox.commands.run(HOOK.format("echo $GUESTD_END_REASON >>/tmp/told; guestd busy --ttl 600"))
    detach(sandbox, "guestd busy -- sleep 1000")
    wait_until(lambda: sandbox.files.exists("/tmp/told"), within=8, what="the hook ran")
    assert sandbox.files.read("/tmp/told") == "lifetime\n"
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "lifetime" and at - began <= 9.2


# --- history ---


def test_another_policy_is_tried_on_what_happened(eager):
    sandbox = create(eager)
    detach(sandbox, "sleep 100")
    eager.wait_until_ended(sandbox.sandbox_id, within=15)
    trace = eager.traces / f"{sandbox.sandbox_id}.jsonl"
    wait_until(lambda: '"ended"' in trace.read_text(), within=5, what="the trace is written")

    def replay(*arguments) -> dict:
        command = [locations.hostd(), "idle", "replay", trace, "--json", *arguments]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout)

    same = replay()
    assert same["recorded_reason"] == "idle" and abs(same["saved_s"]) < 0.7 and same["reason"] == "idle", same
    kept = replay("--policy", '{"detached":"alive"}')
    assert kept["beyond_the_trace"] and kept["end_s"] > same["end_s"] and kept["cut"] == []
    short = replay("--idle-timeout", "1")
    assert 0.5 <= short["saved_s"] <= 1.5 and [cut["class"] for cut in short["cut"]] == ["detached"], short


def test_the_holds_of_all_sandboxes_are_counted_by_class(eager):
    sandbox = create(eager)
    running = sandbox.commands.run("sleep 30", background=True, timeout=0)
    wait_until(
        lambda: 'hostd_holds{class="command",side="guest"} 1' in eager.request("GET", "/metrics").text,
        within=5,
        what="the command is in the metrics",
    )
    assert 'hostd_holds{class="inhibitor",side="guest"} 0' in eager.request("GET", "/metrics").text
    running.kill()


def test_watching_the_explanation_ends_with_the_sandbox_and_never_keeps_it(eager):
    sandbox = create(eager)
    sandbox.commands.run("true")
    last = time.monotonic()
    command = [locations.hostd(), "explain", sandbox.sandbox_id, "--watch", "--api", eager.api_url, "--api-key", eager.api_key]
    seen = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    assert "releases in" in seen and "ended: idle" in seen
    assert time.monotonic() - last <= IDLE + 2.5
