"""A sandbox's log on the host: what is in it, what never is, and how long it is there."""

import json
import os
import re
import subprocess
import time
from datetime import datetime

import httpx
import pytest

from harness import locations, processes
from harness.connect import Stream, call, open_stream, process, start
from harness.processes import wait_until


def lines(hostd, sandbox_id: str, **query) -> list[dict]:
    answer = hostd.request("GET", f"/v2/sandboxes/{sandbox_id}/logs", params=query)
    assert answer.status_code == 200, f"{answer.status_code}: {answer.text}"
    return answer.json()["logs"]


def said(hostd, sandbox_id: str, message: str, **fields) -> list[dict]:
    """The lines with this message and these fields."""
    wanted = {name: str(value) for name, value in fields.items()}
    return [
        line
        for line in lines(hostd, sandbox_id)
        if line["message"] == message and wanted.items() <= line["fields"].items()
    ]


def until_said(hostd, sandbox_id: str, message: str, **fields) -> dict:
    found = wait_until(lambda: said(hostd, sandbox_id, message, **fields), within=10, what=f"{message} {fields} is logged")
    return found[0]


def test_a_commands_start_and_end_are_told(containers, raw):
    created, client = raw
    began = time.time()
    ran = start(client, "/bin/bash", "-c", "exit 3", tag="job-7")
    assert ran.exit_code == 3
    sandbox_id = created["sandboxID"]
    started = until_said(containers, sandbox_id, "process started", tag="job-7")
    ended = until_said(containers, sandbox_id, "process ended", tag="job-7")
    assert started["level"] == "info"
    assert started["fields"]["command"] == "bash"
    assert started["fields"]["user"] == "user"
    assert ended["fields"]["how"] == "exit status 3"
    assert ended["fields"]["pid"] == started["fields"]["pid"]
    assert abs(datetime.fromisoformat(started["timestamp"]).timestamp() - began) < 5


def test_the_old_answer_has_each_line_as_text_too(containers, raw):
    created, client = raw
    start(client, "/bin/true")
    until_said(containers, created["sandboxID"], "process ended")
    told = containers.request("GET", f"/sandboxes/{created['sandboxID']}/logs", params={"start": 0, "limit": 1000}).json()
    assert len(told["logs"]) == len(told["logEntries"]) > 0
    assert any(re.search(r"^process started .*command=true", line["line"]) for line in told["logs"])
    assert told["logs"][0]["timestamp"] == told["logEntries"][0]["timestamp"]


def test_pages_continue_behind_a_lines_time(containers, raw):
    created, client = raw
    for _ in range(5):
        start(client, "/bin/true")
    sandbox_id = created["sandboxID"]
    wait_until(lambda: len(said(containers, sandbox_id, "process ended")) == 5, within=10, what="five ends are logged")
    whole = lines(containers, sandbox_id)
    pages, cursor = [], 0
    while page := lines(containers, sandbox_id, cursor=cursor, limit=2):
        pages += page
        cursor = round(datetime.fromisoformat(page[-1]["timestamp"]).timestamp() * 1000) + 1
    assert pages == whole
    assert lines(containers, sandbox_id, direction="backward") == whole[::-1]
    assert {line["message"] for line in lines(containers, sandbox_id, search="started")} == {"process started"}


def test_what_is_secret_is_in_no_log(hostd):
    supervisor = hostd("container", environment={"RUST_LOG": "debug"})
    created = supervisor.create(envVars={"API_TOKEN": "hush-in-the-sandbox"})
    with supervisor.plane(created) as client:
        config = {"envs": {"PASSWORD": "hush-in-the-command"}}
        with open_stream(
            client,
            "process.Process/Start",
            {"process": process("/bin/bash", "-c", "read line; echo hush-output; : hush-argument", **config), "stdin": True},
        ) as response:
            stream = Stream(response)
            pid = stream.until("start")["pid"]
            data = {"process": {"pid": pid}, "input": {"stdin": "aHVzaC1pbnB1dAo="}}
            assert call(client, "process.Process/SendInput", data).status_code == 200
            stream.rest()
        start(client, "/no/such/dir/../tool", "hush-argument")
        call(client, "process.Process/SendInput", {"process": {"pid": 999_999}, "input": {"stdin": "aHVzaC1pbnB1dAo="}})
        client.get("/files", params={"path": "/tmp/hush-file", "signature": "hush-signature"})
        client.post("/files", params={"path": "/tmp/x"}, files={"file": ("x", b"hush-content")})
        client.get("/files", params={"path": "/tmp/x"}, headers={"X-Access-Token": "hush-token"})
    sandbox_id = created["sandboxID"]
    until_said(supervisor, sandbox_id, "process ended", pid=pid)
    until_said(supervisor, sandbox_id, "a call was refused", path="/files", status=401)
    agent = json.dumps(lines(supervisor, sandbox_id))
    console = json.dumps(lines(supervisor, sandbox_id, source="console"))
    for text in (agent, console, supervisor.stderr()):
        assert "hush" not in text
        assert created["envdAccessToken"] not in text
    assert "envVars" in agent, "the names of what /init set are told"


def test_the_log_of_a_killed_sandbox_stays_readable(containers, raw):
    created, client = raw
    start(client, "/bin/true", tag="last")
    sandbox_id = created["sandboxID"]
    until_said(containers, sandbox_id, "process ended", tag="last")
    assert containers.request("DELETE", f"/sandboxes/{sandbox_id}").status_code == 204
    assert said(containers, sandbox_id, "process ended", tag="last")
    assert lines(containers, sandbox_id)[-1]["message"] == "sandbox ended"
    assert lines(containers, sandbox_id)[-1]["fields"]["reason"] == "killed"


def test_the_log_of_a_crashed_guest_shows_its_last_lines_and_its_console(hostd):
    supervisor = hostd("container")
    created = supervisor.create()
    sandbox_id = created["sandboxID"]
    with supervisor.plane(created) as client:
        start(client, "/bin/true", tag="before")
        until_said(supervisor, sandbox_id, "process ended", tag="before")
    first = [pid for pid, what in processes.belonging_to(supervisor.data).items() if "first process of container" in what]
    assert len(first) == 1
    with open(f"/proc/{first[0]}/fd/2", "w") as console:
        console.write("the machine is on fire\n")
    processes.end(first[0])
    _, tombstone = supervisor.wait_until_ended(sandbox_id, within=10)
    assert tombstone["reason"] == "crashed"
    assert said(supervisor, sandbox_id, "process ended", tag="before")
    assert said(supervisor, sandbox_id, "the machine is on fire", source="console")
    assert lines(supervisor, sandbox_id, level="error")[-1]["fields"] == {"reason": "crashed"}


@pytest.mark.vms(1)
def test_the_log_of_a_microvm_whose_kernel_panicked_shows_the_panic(machines):
    created = machines.create()
    sandbox_id = created["sandboxID"]
    with machines.plane(created) as client:
        start(client, "/bin/true", tag="before")
        until_said(machines, sandbox_id, "process ended", tag="before")
        root = {"Authorization": "Basic cm9vdDo="}
        panic = process("/bin/sh", "-c", "echo c > /proc/sysrq-trigger")
        with pytest.raises(httpx.TransportError), open_stream(client, "process.Process/Start", {"process": panic}, root) as response:
            response.read()
    _, tombstone = machines.wait_until_ended(sandbox_id, within=20)
    assert tombstone["reason"] == "crashed"
    assert said(machines, sandbox_id, "process ended", tag="before")
    assert any("panic" in line["message"] for line in lines(machines, sandbox_id) if line["fields"].get("source") == "console")


@pytest.mark.takes(20)
def test_being_followed_and_read_keeps_no_sandbox_alive(hostd):
    supervisor = hostd("container", idle_floor=5)
    created = supervisor.create(metadata={"idle_timeout": "5"}, timeout=300)
    sandbox_id = created["sandboxID"]
    with supervisor.plane(created) as client:
        start(client, "/bin/true", tag="only")
    idle_since = time.monotonic()
    while supervisor.explain(sandbox_id)["state"] != "ended":
        lines(supervisor, sandbox_id)
        assert time.monotonic() - idle_since < 8, supervisor.explain(sandbox_id)
        time.sleep(0.1)
    assert supervisor.tombstone(sandbox_id)["reason"] == "idle"
    assert said(supervisor, sandbox_id, "process ended", tag="only")
    assert lines(supervisor, sandbox_id)[-1]["fields"]["reason"] == "idle"


def test_a_restarted_hostd_reads_again_what_the_agent_keeps(hostd):
    supervisor = hostd("container")
    created = supervisor.create()
    sandbox_id = created["sandboxID"]
    with supervisor.plane(created) as client:
        start(client, "/bin/true", tag="before")
        until_said(supervisor, sandbox_id, "process ended", tag="before")
        supervisor.kill9()
        supervisor.restart()
        until_said(supervisor, sandbox_id, "process ended", tag="before")


def test_a_flood_of_lines_is_bounded_and_says_what_it_lost(containers, raw):
    created, client = raw
    for _ in range(1500):
        client.get("/files", params={"path": "/no/such/file"})
    start(client, "/bin/true", tag="after")
    sandbox_id = created["sandboxID"]
    until = time.monotonic() + 20
    while not said(containers, sandbox_id, "process ended", tag="after"):
        assert time.monotonic() < until
        time.sleep(0.2)
    told = lines(containers, sandbox_id)
    assert len(told) <= 1000
    assert re.fullmatch(r"\d+ earlier lines are not kept any more", told[0]["message"])


def test_a_wrong_question_is_named(containers, raw):
    created, _ = raw
    for query, name in (("limit=1001", "limit"), ("cursor=x", "cursor"), ("direction=up", "direction")):
        answer = containers.request("GET", f"/v2/sandboxes/{created['sandboxID']}/logs?{query}")
        assert (answer.status_code, answer.json()["code"]) == (400, 400)
        assert name in answer.json()["message"]
    assert containers.request("GET", "/v2/sandboxes/i0000000000000000000/logs").status_code == 404


def test_the_data_plane_does_not_lead_to_the_agents_log(raw):
    _, client = raw
    answer = client.post("/logs.v1.Logs/Follow", json={}, headers={"X-Guestd-Control": "guess"})
    assert answer.status_code == 404


def test_the_terminal_prints_a_log_and_follows_it_to_the_end(containers, raw):
    created, client = raw
    sandbox_id = created["sandboxID"]
    start(client, "/bin/true", tag="early")
    until_said(containers, sandbox_id, "process ended", tag="early")
    environment = {**os.environ, "HOSTD_API_URL": containers.api_url, "HOSTD_API_KEY": containers.api_key}
    command = [str(locations.hostd()), "logs", sandbox_id]
    printed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True).stdout
    assert re.search(r"INFO process ended .*tag=early", printed)
    follower = subprocess.Popen([*command, "--follow"], env=environment, stdout=subprocess.PIPE, text=True)
    start(client, "/bin/true", tag="late")
    until_said(containers, sandbox_id, "process ended", tag="late")
    containers.request("DELETE", f"/sandboxes/{sandbox_id}")
    followed, _ = follower.communicate(timeout=20)
    assert "tag=late" in followed
    assert followed.strip().splitlines()[-1].endswith("sandbox ended reason=killed")
