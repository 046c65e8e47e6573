"""Kernels that break the protocol: each wait of the agent ends, it never falls, and the next context works."""

import json
import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest

from harness import hostile_kernel
from harness.code import CodeAgent
from harness.processes import alive, wait_until

# How long a kernel may take to start is long, for kernels in machines under emulation.
START = 150


@pytest.fixture(scope="session")
def hostile_specs(kernel_specs):
    """The usual specs, and one for each way to misbehave."""
    folder = Path(tempfile.mkdtemp(prefix="kernels-", dir="/tmp"))
    shutil.copytree(kernel_specs, folder, dirs_exist_ok=True)
    program = folder / "hostile_kernel.py"
    shutil.copy(hostile_kernel.__file__, program)
    python = json.loads((kernel_specs / "python3/kernel.json").read_text())["argv"][0]
    for mode in hostile_kernel.MODES:
        add(folder, mode, {"argv": [python, str(program), mode, "{connection_file}"], "display_name": mode, "language": mode})
    add(folder, "no-program", {"argv": ["/no/such/program", "{connection_file}"], "display_name": "x", "language": "no-program"})
    add(folder, "no-argv", {"argv": [], "display_name": "x", "language": "no-argv"})
    add(folder, "no-fields", {})
    (folder / "no-json").mkdir()
    (folder / "no-json/kernel.json").write_text("{ this is no JSON")
    (folder / "no-file").mkdir()
    (folder / "a-folder/kernel.json").mkdir(parents=True)
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def add(folder: Path, name: str, spec: dict) -> None:
    (folder / name).mkdir()
    (folder / name / "kernel.json").write_text(json.dumps(spec))


@pytest.fixture(scope="session")
def _hostile(accounts, hostile_specs, running):
    agent = CodeAgent(hostile_specs, wrapper=accounts.wrapper)
    running.append(agent)
    yield agent.start()
    running.remove(agent)
    agent.close()


@pytest.fixture
def hostile(_hostile):
    """An agent that has hostile kernels beside the usual ones; each case leaves it working."""
    assert _hostile.process.poll() is None, f"an earlier case ended the agent:\n{_hostile.stderr()[-4000:]}"
    known = {each["id"] for each in _hostile.door.contexts()}
    yield _hostile
    assert _hostile.process.poll() is None, f"the agent ended:\n{_hostile.stderr()[-4000:]}"
    for each in _hostile.door.contexts():
        if each["id"] not in known:
            _hostile.door.delete(each["id"])
    began = time.monotonic()
    assert _hostile.door.run("40 + 2").text == "42"
    assert time.monotonic() - began < 10


def test_a_spec_that_behaves_is_a_language(hostile):
    made = hostile.door.create(language="good")
    assert made["language"] == "good"
    cells = [hostile.door.run("x", context_id=made["id"]) for _ in range(2)]
    assert [(cell.stdout, cell.count) for cell in cells] == [("said x", 1), ("said x", 2)]


@pytest.mark.parametrize("language", ["exits-at-once", "no-program", "no-argv", "no-fields", "no-json", "no-file", "a-folder"])
def test_a_kernel_that_cannot_start_is_an_error_at_once(hostile, language):
    before = len(hostile.door.contexts())
    began = time.monotonic()
    answer = hostile.door.http.post("/contexts", json={"language": language})
    assert answer.status_code == 500 and language in answer.text, f"{answer.status_code}: {answer.text}"
    assert time.monotonic() - began < 15
    assert len(hostile.door.contexts()) == before


@pytest.mark.takes(90)
@pytest.mark.parametrize("language", ["never-binds", "silent", "wrong-key", "not-zmtp", "closes-after-start"])
def test_a_kernel_that_never_gets_ready_is_given_up(hostile, language):
    before = len(hostile.door.contexts())
    began = time.monotonic()
    answer = hostile.door.http.post("/contexts", json={"language": language}, timeout=START)
    took = time.monotonic() - began
    if answer.status_code == 200:
        # It answered before it closed its sockets; then its cells must end.
        assert language == "closes-after-start"
        hostile.door.execute("x", context_id=answer.json()["id"], timeout=3)
        return
    assert answer.status_code == 500 and took < START, f"{answer.status_code}: {answer.text}"
    assert len(hostile.door.contexts()) == before
    wait_until(lambda: not running_in(language), within=10, what="the kernel that was given up is gone")


def running_in(mode: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if mode.encode() in words and any(word.endswith(b"hostile_kernel.py") for word in words) and alive(int(entry.name)):
                found.append(int(entry.name))
    return found


@pytest.mark.takes(60)
def test_a_client_need_not_wait_for_a_kernel_that_never_starts(hostile):
    """Other contexts are made meanwhile, and whoever leaves frees what it asked for."""

    def impatient():
        try:
            hostile.door.http.post("/contexts", json={"language": "never-binds"}, timeout=3)
        except Exception:
            pass

    thread = threading.Thread(target=impatient)
    thread.start()
    time.sleep(0.5)
    began = time.monotonic()
    made = hostile.door.create(language="good")["id"]
    assert hostile.door.run("x", context_id=made).stdout == "said x"
    assert time.monotonic() - began < 10
    thread.join()
    wait_until(lambda: not running_in("never-binds"), within=START, what="the kernel that nobody waits for is gone")


@pytest.mark.parametrize(
    "mode", ["foreign", "forged", "garbage", "bad-fields", "early-idle", "twice", "no-reply", "many-frames", "liar"]
)
def test_what_is_no_message_of_the_cell_is_not_in_the_cell(hostile, mode):
    made = hostile.door.create(language=mode)["id"]
    for n in range(2):
        began = time.monotonic()
        cell = hostile.door.execute(f"cell {n}", context_id=made)
        assert time.monotonic() - began < 20
        assert cell.stdout.replace("with buffers ", "").replace("nowhere", "").replace("7", "") == f"said cell {n}", str(cell)
        if mode in ("foreign", "forged", "early-idle", "twice", "garbage"):
            assert cell.error is None, cell.error


def test_json_that_no_parser_could_follow_ends_nobody(hostile):
    made = hostile.door.create(language="deep")["id"]
    # Not read as JSON here either.
    lines = hostile.door.ask(code="x", context_id=made).content.splitlines()
    assert any(b'"said x"' in line for line in lines) and b"end_of_execution" in lines[-1]


@pytest.mark.takes(20)
@pytest.mark.parametrize("mode", ["no-idle", "neither"])
def test_a_cell_whose_end_is_never_told_can_be_left(hostile, mode):
    made = hostile.door.create(language=mode)["id"]
    began = time.monotonic()
    cell = hostile.door.execute("x", context_id=made, timeout=2)
    assert time.monotonic() - began < 25
    assert cell.stdout == "said x"
    assert mode == "no-idle" or cell.failed()["name"] == "TimeoutError"


def test_a_reply_without_idle_ends_the_cell_some_time(hostile):
    made = hostile.door.create(language="no-idle")["id"]
    began = time.monotonic()
    assert hostile.door.execute("x", context_id=made).stdout == "said x"
    assert time.monotonic() - began < 30


@pytest.mark.takes(15)
def test_a_kernel_that_hangs_up_in_a_cell_does_not_keep_its_client(hostile):
    made = hostile.door.create(language="hangs-up")["id"]
    began = time.monotonic()
    with hostile.door.begin("x", context_id=made) as running:
        next(iter(running))
        running.leave()
    cell = hostile.door.execute("y", context_id=made, timeout=5)
    assert cell.ended and time.monotonic() - began < 25


@pytest.mark.parametrize("mode", ["dies-after-idle", "replies-then-dies"])
def test_a_kernel_that_dies_around_its_answer_gives_every_cell_an_end(hostile, mode):
    made = hostile.door.create(language=mode)["id"]
    for n in range(4):
        cell = hostile.door.execute(f"{n}", context_id=made)
        assert cell.stdout == f"said {n}" or (cell.error or {}).get("name") in ("KernelDied", "ContextRestarting"), str(cell)


@pytest.mark.takes(10)
def test_a_frame_of_300_megabytes_does_not_end_the_agent(hostile):
    made = hostile.door.create(language="huge")["id"]
    with hostile.door.begin("x", context_id=made, timeout=60) as running:
        for piece in running.response.iter_raw():
            pass
    assert hostile.process.poll() is None
    hostile.door.delete(made)
    assert hostile.memory() < 1_500_000_000


@pytest.mark.takes(10)
def test_a_kernel_that_talks_while_nothing_runs_does_not_fill_the_memory(hostile):
    made = hostile.door.create(language="flood")["id"]
    hostile.door.run("x", context_id=made)
    time.sleep(1)
    before = hostile.memory()
    time.sleep(5)
    assert hostile.memory() - before < 16_000_000
    assert hostile.door.run("1 + 1").text == "2"
    hostile.door.delete(made)
    wait_until(lambda: not running_in("flood"), within=10, what="the kernel is gone")


def test_a_kernel_that_will_not_go_is_made_to(hostile):
    made = hostile.door.create(language="immortal")["id"]
    hostile.door.run("x", context_id=made)
    [pid] = running_in("immortal")
    began = time.monotonic()
    assert hostile.door.restart(made).status_code == 200
    assert not alive(pid) or wait_until(lambda: not alive(pid), within=10, what="the old kernel is gone")
    assert hostile.door.run("y", context_id=made).stdout == "said y"
    assert hostile.door.delete(made).status_code == 200
    wait_until(lambda: not running_in("immortal"), within=10, what="the kernel is gone")
    assert time.monotonic() - began < 30


def test_without_any_kernel_the_door_says_what_is_missing(fresh, tmp_path):
    tmp_path.chmod(0o755)
    door = fresh(tmp_path).door
    assert door.contexts() == []
    for answer in (
        door.ask(code="1"),
        door.http.post("/contexts", json={}),
        door.ask(code="1", language="js"),
        door.http.post("/executions", json={"code": "1"}),
    ):
        assert answer.status_code == 500 and "kernel" in answer.text.lower(), answer.text
    assert "python" in door.ask(code="1").text and "code-interpreter-v1" in door.ask(code="1").text
    assert door.http.get("/health").status_code == 200


def test_a_folder_of_specs_that_is_not_there_is_like_an_empty_one(fresh):
    door = fresh(Path("/no/such/folder")).door
    assert door.ask(code="1").status_code == 500 and door.http.get("/health").status_code == 200


def test_kernels_end_with_the_agent(fresh, hostile_specs):
    agent = fresh(hostile_specs)
    pid = int(agent.door.run("import os; os.getpid()").text)
    agent.process.terminate()
    agent.process.wait(15)
    wait_until(lambda: not alive(pid), within=10, what="the kernel is gone")
