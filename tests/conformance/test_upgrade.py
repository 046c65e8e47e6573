"""Section 4.11: live self-replacement; 2.7: the ends of what was taken over; 5: who is served before the next /init."""

import httpx
import pytest

from harness.connect import Stream, call, open_stream, process
from harness.guestd import Guestd

contract = pytest.mark.contract

HOST = {"X-Guestd-Control": "host"}


@pytest.fixture
def replaced(tmp_path):
    """`replaced(scripts)`: an agent that was replaced while they ran, not initialised again, and their pids."""
    agent = Guestd("--root", str(tmp_path)).start()

    def replace(*scripts: str) -> tuple[httpx.Client, list[int]]:
        client, pids = agent.client(), []
        assert client.post("/init", headers=HOST).status_code == 204
        for script in scripts:
            with agent.client() as started:
                message = {"process": process("/bin/sh", "-c", script)}
                with open_stream(started, "process.Process/Start", message) as response:
                    pids.append(Stream(response).until("start")["pid"])
        with pytest.raises(httpx.RemoteProtocolError):
            client.post("/upgrade", headers=HOST)
        return client, pids

    yield replace
    agent.close()


@contract("4.11/upgrade")
def test_the_caller_loses_its_connection_and_the_commands_run_on(replaced):
    client, pids = replaced("sleep 30")
    assert client.post("/init", headers=HOST).status_code == 204
    assert [each["pid"] for each in call(client, "process.Process/List").json()["processes"]] == pids
    refused = client.post("/upgrade", headers={**HOST, "X-Envd-Upgrade-Bin": "/tmp/other"})
    assert refused.status_code == 400
    message = {"process": {"pid": pids[0]}, "signal": "SIGNAL_SIGKILL"}
    assert call(client, "process.Process/SendSignal", message).status_code == 200


@contract("4.11/upgrade")
def test_an_agent_without_a_host_is_not_replaced(guestd):
    with guestd.client() as client:
        answer = client.post("/upgrade", headers=HOST)
    assert (answer.status_code, answer.text) == (409, "envd not initialized")


@contract("2.7/readopted")
def test_the_ends_of_what_was_taken_over_are_those_of_any_command(replaced):
    """envd says `exited` and 128 plus the signal, which is weakness 14."""
    client, pids = replaced("sleep 1; exit 0", "sleep 1; exit 6", "sleep 1; kill -KILL $$")
    assert client.post("/init", headers=HOST).status_code == 204
    ends = []
    for pid in pids:
        with open_stream(client, "process.Process/Connect", {"process": {"pid": pid}}) as response:
            end = Stream(response).rest().end
            ends.append((end.get("exitCode", 0), end.get("exited", False), end["status"], end.get("error")))
    assert ends == [
        (0, True, "exit status 0", None),
        (6, True, "exit status 6", "exit status 6"),
        (-1, False, "signal: killed", "signal: killed"),
    ]


@contract("5/upgrade")
def test_nobody_but_the_host_is_served_before_the_next_init(replaced):
    client, _ = replaced()
    assert client.get("/health").status_code == 204
    for answer in (client.get("/envs"), client.get("/files"), call(client, "process.Process/List")):
        assert (answer.status_code, answer.json()["message"]) == (401, "envd not initialized")
    assert client.post("/init", headers=HOST).status_code == 204
    assert client.get("/envs").status_code == 200
