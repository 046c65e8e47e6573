"""The template `code-interpreter-v1` in a container and in a microVM, through hostd: what the issue of a code interpreter promises.

Each plane boots one sandbox for all its steps: a kernel takes most of a minute to start under emulation.
"""

import asyncio
import json
import threading
import time

import pytest
from e2b import NotFoundException, TimeoutException
from e2b_code_interpreter import AsyncSandbox, Sandbox
from e2b_code_interpreter.charts import ChartType

from harness import locations
from harness.processes import wait_until
from harness.programs import run_node

TEMPLATE = "code-interpreter-v1"
# The longest that a cell may take whose kernel has to start first.
PATIENCE = 240


@pytest.fixture(autouse=True)
def image():
    if not (locations.images() / TEMPLATE).exists():
        pytest.fail(
            f"{locations.images() / TEMPLATE} is missing: make it with `cargo xtask image --template {TEMPLATE} --tree`",
            pytrace=False,
        )


def create(hostd, timeout: int = 3000, **options) -> Sandbox:
    sandbox = Sandbox.create(timeout=timeout, **options, **hostd.sdk())
    sandbox.hostd = hostd
    return sandbox


def holds(sandbox) -> list[str]:
    return [hold["class"] for hold in sandbox.hostd.explain(sandbox.sandbox_id)["holds"] if hold["counts"]]


# --- steps, in order ---


def a_first_cell_answers(sandbox):
    assert sandbox.run_code("x = 1; x", request_timeout=PATIENCE).text == "1"


def callbacks_come_in_order_while_the_cell_runs(sandbox):
    told = []
    note = lambda text: told.append((text, time.monotonic()))  # noqa: E731
    code = "import sys, time\nprint('one', flush=True)\ntime.sleep(2)\nprint('two', file=sys.stderr, flush=True)\ndisplay('three')\n'four'"
    sandbox.run_code(code, on_stdout=lambda m: note(m.line), on_stderr=lambda m: note(m.line), on_result=lambda r: note(r.text))
    assert [text for text, _ in told] == ["one\n", "two\n", "three", "four"]
    assert told[1][1] - told[0][1] > 1.5


def an_error_has_name_value_and_traceback(sandbox):
    error = sandbox.run_code("def deep():\n    return missing\ndeep()").error
    assert (error.name, error.value) == ("NameError", "name 'missing' is not defined")
    assert "deep()" in error.traceback and "\x1b[" not in error.traceback


def a_figure_is_a_png_and_a_chart(sandbox):
    code = "import matplotlib.pyplot as plt\nplt.plot([1, 2, 3], [4, 5, 6], label='ours')\nplt.xlabel('time (s)')\nplt.title('A title')\nplt.show()"
    [result] = sandbox.run_code(code, timeout=PATIENCE).results
    assert result.png.startswith("iVBOR")
    assert (result.chart.type, result.chart.title, result.chart.x_unit) == (ChartType.LINE, "A title", "s")
    assert [(line.label, [tuple(point) for point in line.points]) for line in result.chart.elements] == [
        ("ours", [(1, 4), (2, 5), (3, 6)])
    ]


def a_table_is_html_and_data(sandbox):
    [result] = sandbox.run_code("import pandas\npandas.DataFrame({'a': [1, 2], 'b': ['x', 'y']})", timeout=PATIENCE).results
    assert "<table" in result.html and result.data == {"a": [1, 2], "b": ["x", "y"]}


def contexts_have_their_folder_and_language(sandbox):
    made = sandbox.create_code_context(cwd="/tmp", language="python", request_timeout=PATIENCE)
    assert sandbox.run_code("import os; os.getcwd()", context=made, timeout=PATIENCE).text == "/tmp"
    assert [each.id for each in sandbox.list_code_contexts()][-1] == made.id
    sandbox.remove_code_context(made)
    with pytest.raises(NotFoundException):
        sandbox.run_code("1", context=made)


def the_state_is_kept_and_lost_on_restart(sandbox):
    sandbox.run_code("value = 40")
    assert sandbox.run_code("value + 2").text == "42"
    python = sandbox.list_code_contexts()[0]
    assert (python.language, python.cwd) == ("python", "/home/user")
    sandbox._request_timeout_was = sandbox.connection_config.request_timeout
    sandbox.connection_config.request_timeout = PATIENCE
    sandbox.restart_code_context(python)
    sandbox.connection_config.request_timeout = sandbox._request_timeout_was
    assert sandbox.run_code("value", timeout=PATIENCE).error.name == "NameError"


def javascript_typescript_and_bash_run(sandbox):
    assert sandbox.run_code("console.log('Hello, World!')", language="js", timeout=PATIENCE).logs.stdout == ["Hello, World!\n"]
    assert sandbox.run_code("const n: number = 42; console.log(n)", language="ts", timeout=PATIENCE).logs.stdout == ["42\n"]
    assert sandbox.run_code("pwd", language="bash", timeout=PATIENCE).logs.stdout == ["/home/user\n"]


def a_client_that_gives_up_frees_the_kernel(sandbox):
    sandbox.run_code("kept = 'kept'")
    with pytest.raises(TimeoutException):
        sandbox.run_code("while True: pass", timeout=3)
    began = time.monotonic()
    assert sandbox.run_code("kept").text == "kept"
    assert time.monotonic() - began < 8


def variables_of_sandbox_and_call_are_there(sandbox):
    code = "import os; print(os.environ.get('OF_SANDBOX'), os.environ.get('OF_CALL'))"
    assert sandbox.run_code(code, envs={"OF_CALL": "it's"}).logs.stdout == ["of sandbox it's\n"]
    assert sandbox.run_code(code).logs.stdout == ["of sandbox None\n"]


def commands_and_cells_share_the_files(sandbox):
    sandbox.files.write("/home/user/shared.txt", "from a call")
    assert sandbox.run_code("open('/home/user/shared.txt').read()").text == "from a call"
    sandbox.run_code("open('/home/user/back.txt', 'w').write('from a cell')")
    assert sandbox.commands.run("cat back.txt; stat -c %U back.txt").stdout == "from a celluser\n"


def code_needs_the_sandboxs_token(sandbox):
    created = {"sandboxID": sandbox.sandbox_id, "envdAccessToken": "wrong"}
    with sandbox.hostd.plane(created, port=49999) as client:
        assert client.post("/execute", json={"code": "1"}).status_code == 401
        del client.headers["X-Access-Token"]
        assert client.post("/execute", json={"code": "1"}).status_code == 401
        assert client.get("/contexts").status_code == 200


def a_cell_is_a_hold_until_it_ends(sandbox):
    thread = threading.Thread(target=sandbox.run_code, args=("import time; time.sleep(3)",))
    thread.start()
    wait_until(lambda: "code" in holds(sandbox), within=2.5, what="the hold of the cell")
    thread.join()
    wait_until(lambda: holds(sandbox) == [], within=3, what="no hold")


def a_detached_cell_is_picked_up_later(sandbox):
    created = {"sandboxID": sandbox.sandbox_id, "envdAccessToken": sandbox._envd_access_token}
    with sandbox.hostd.plane(created, port=49999) as client:
        started = client.post(
            "/executions", json={"code": "import time\nfor n in range(3):\n    print(n, flush=True)\n    time.sleep(0.5)"}
        )
        assert started.status_code == 201, started.text
    time.sleep(1)
    with sandbox.hostd.plane(created, port=49999) as client:
        lines = [json.loads(line) for line in client.get(f"/executions/{started.json()['id']}/events").text.splitlines()]
    assert "".join(line["text"] for line in lines if line["type"] == "stdout") == "0\n1\n2\n"
    assert lines[-1]["type"] == "end_of_execution"


def ten_megabytes_arrive_whole(sandbox):
    assert sum(map(len, sandbox.run_code("print('x' * 10_000_000)").logs.stdout)) == 10_000_001


def the_asynchronous_sdk_runs_code(sandbox):
    async def body():
        other = await AsyncSandbox.connect(sandbox.sandbox_id, **sandbox.hostd.sdk())
        told = []
        execution = await other.run_code("print('async', flush=True)\n6 * 7", on_stdout=lambda m: told.append(m.line))
        return told, execution.text

    assert asyncio.run(body()) == (["async\n"], "42")


def the_javascript_sdk_runs_code(sandbox):
    program = f"""
        import {{ Sandbox }} from '@e2b/code-interpreter'
        const sandbox = await Sandbox.connect('{sandbox.sandbox_id}')
        const told = []
        const {{ text, error }} = await sandbox.runCode("print('js', flush=True)\\n1/0", {{ onStdout: (m) => {{ told.push(m.line) }} }})
        console.log(JSON.stringify([told, error.name, error.value, (await sandbox.runCode('6 * 7')).text]))
        process.exit(0)
    """
    assert json.loads(run_node(program, sandbox.hostd.environment(), within=60)) == [
        ["js\n"],
        "ZeroDivisionError",
        "division by zero",
        "42",
    ]


def what_a_cell_started_ends_with_its_context(sandbox):
    made = sandbox.create_code_context(request_timeout=PATIENCE)
    sandbox.run_code(
        "import subprocess\nsubprocess.Popen(['sleep', '54321'], start_new_session=True)", context=made, timeout=PATIENCE
    )
    look = lambda: int(sandbox.commands.run("cat /proc/[0-9]*/comm | grep -xc sleep; true").stdout)  # noqa: E731
    assert look() == 1
    sandbox.remove_code_context(made)
    wait_until(lambda: look() == 0, within=10, what="what the kernel started is gone")


def a_kernel_that_dies_is_reported_and_replaced(sandbox):
    assert sandbox.run_code("import os; os._exit(3)").error.name == "KernelDied"
    assert sandbox.run_code("40 + 2", timeout=PATIENCE).text == "42"


def a_kill_in_the_middle_of_a_cell_is_told(sandbox):
    raised = []

    def run():
        try:
            sandbox.run_code("print('go', flush=True)\nwhile True: pass", on_stdout=lambda _: begun.set(), timeout=0)
        except Exception as error:
            raised.append(error)

    begun = threading.Event()
    thread = threading.Thread(target=run)
    thread.start()
    assert begun.wait(PATIENCE)
    began = time.monotonic()
    assert sandbox.kill() is True
    thread.join(20)
    assert not thread.is_alive() and time.monotonic() - began < 15
    assert isinstance(raised[0], TimeoutException) and "killed" in str(raised[0]), raised
    with pytest.raises(TimeoutException):
        sandbox.run_code("1")
    assert sandbox.is_running() is False


STEPS = [
    a_first_cell_answers,
    callbacks_come_in_order_while_the_cell_runs,
    an_error_has_name_value_and_traceback,
    a_figure_is_a_png_and_a_chart,
    a_table_is_html_and_data,
    contexts_have_their_folder_and_language,
    the_state_is_kept_and_lost_on_restart,
    javascript_typescript_and_bash_run,
    a_client_that_gives_up_frees_the_kernel,
    variables_of_sandbox_and_call_are_there,
    a_cell_is_a_hold_until_it_ends,
    a_detached_cell_is_picked_up_later,
    the_asynchronous_sdk_runs_code,
    the_javascript_sdk_runs_code,
]
# What is the same code in every sandbox, and slow under emulation.
MORE = [
    commands_and_cells_share_the_files,
    code_needs_the_sandboxs_token,
    ten_megabytes_arrive_whole,
    a_kernel_that_dies_is_reported_and_replaced,
]
# What a container without control groups cannot promise.
MACHINE = [what_a_cell_started_ends_with_its_context]


def take(steps: list, hostd, subtests) -> None:
    sandbox = create(hostd, envs={"OF_SANDBOX": "of sandbox"})
    for step in [*steps, a_kill_in_the_middle_of_a_cell_is_told]:
        with subtests.test(step.__name__):
            step(sandbox)


@pytest.mark.takes(60)
def test_the_template_keeps_its_promises_in_a_container(containers, subtests):
    take(STEPS + MORE, containers, subtests)


@pytest.mark.vms(1)
@pytest.mark.takes(300)
@pytest.mark.timeout(900)
def test_the_template_keeps_its_promises_in_a_microvm(machines, subtests):
    take(STEPS + MACHINE, machines, subtests)


# --- lifetime ---


@pytest.mark.takes(12)
def test_a_cell_keeps_its_sandbox_and_its_end_starts_the_clock(hostd):
    eager = hostd(idle_floor=1)
    sandbox = create(eager, metadata={"idle_timeout": "2"})
    assert sandbox.run_code("import time; time.sleep(6); 'held'").text == "held"
    ended_at = time.monotonic()
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=15)
    assert ended["reason"] == "idle" and 1.9 <= at - ended_at <= 3.5, (at - ended_at, ended)


@pytest.mark.takes(10)
def test_a_detached_cell_keeps_its_sandbox_without_any_client(hostd):
    eager = hostd(idle_floor=1)
    sandbox = create(eager, metadata={"idle_timeout": "2"})
    sandbox.run_code("1")
    created = {"sandboxID": sandbox.sandbox_id, "envdAccessToken": sandbox._envd_access_token}
    with eager.plane(created, port=49999) as client:
        assert client.post("/executions", json={"code": "import time; time.sleep(5)"}).status_code == 201
    began = time.monotonic()
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=20)
    assert ended["reason"] == "idle" and 6.5 <= at - began <= 9, (at - began, ended)


@pytest.mark.takes(6)
def test_health_and_idle_kernels_do_not_keep_a_sandbox(hostd):
    eager = hostd(idle_floor=1)
    sandbox = create(eager, metadata={"idle_timeout": "2"})
    sandbox.run_code("x = 1")
    last = time.monotonic()
    created = {"sandboxID": sandbox.sandbox_id, "envdAccessToken": sandbox._envd_access_token}
    with eager.plane(created, port=49999) as client:
        while eager.explain(sandbox.sandbox_id)["state"] == "running" and time.monotonic() - last < 10:
            client.get("/health")
            time.sleep(0.2)
    at, ended = eager.wait_until_ended(sandbox.sandbox_id, within=10)
    assert ended["reason"] == "idle" and 1.9 <= at - last <= 4, (at - last, ended)


@pytest.mark.takes(5)
def test_a_cell_does_not_outlive_the_hard_end(hostd):
    eager = hostd(max_lifetime=8)
    sandbox = create(eager, timeout=8)
    began = time.monotonic()
    with pytest.raises(TimeoutException):
        sandbox.run_code("while True: pass", timeout=60)
    assert time.monotonic() - began < 12


@pytest.mark.takes(250)
@pytest.mark.timeout(420)
def test_a_cell_of_three_minutes_outlives_an_idle_timeout_of_one(hostd):
    """The failure family that the project began with: 60 s of idle timeout, 180 s of silent work in one call."""
    shipped = hostd()
    sandbox = create(shipped, metadata={"idle_timeout": "60"})
    assert sandbox.run_code("import time; time.sleep(180); 'held'", timeout=0).text == "held"
    ended_at = time.monotonic()
    at, ended = shipped.wait_until_ended(sandbox.sandbox_id, within=80)
    assert ended["reason"] == "idle" and 59.8 <= at - ended_at <= 63, (at - ended_at, ended)


@pytest.mark.takes(5)
def test_base_says_that_it_carries_no_kernel(containers):
    created = containers.create()
    with containers.plane(created, port=49999) as client:
        assert client.get("/health").status_code == 200
        answer = client.post("/execute", json={"code": "1"})
        assert answer.status_code == 500 and "python" in answer.text and TEMPLATE in answer.text, answer.text
