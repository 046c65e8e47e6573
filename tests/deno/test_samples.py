"""The cloud's own samples, run as written with its SDKs against microVMs: whoever has such code sets three variables and nothing else.

A sample that leaves out its imports or starts from an existing sandbox gets those lines around it; its own stay as they are.
"""

import re
import shlex
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from harness import door, locations
from harness.programs import deno, deno_binary, deno_environment, run_deno, run_python

SAMPLES = Path(__file__).parent / "samples"
# create under emulation, with others at it
WITHIN = 120

IMPORT = 'import { Sandbox } from "@deno/sandbox";\n'
PYTHON_IMPORT = "from deno_sandbox import AsyncDenoDeploy, DenoDeploy\n"
SEEDS = pytest.mark.parametrize("seed", ["003", "004"])
PYTHONS = pytest.mark.parametrize("kind", ["py", "async"])

THE_ID = r"sbx_ord_[0-9a-hjkmnp-z]{20}"


def sample(name: str) -> str:
    return (SAMPLES / name).read_text()


def python_sample(seed: str, name: str, kind: str, after: str = "") -> str:
    """`after` is indented as the body of the sample's last block."""
    if kind == "py":
        return PYTHON_IMPORT + sample(f"{seed}_{name}.py") + after
    body = sample(f"{seed}_{name}_async.py") + after
    inside = "".join(f"  {line}\n" for line in body.splitlines())
    return f"import asyncio\n{PYTHON_IMPORT}async def main():\n{inside}asyncio.run(main())\n"


def is_over(machines, sandbox_id: str, reason: str) -> None:
    deadline = time.monotonic() + 2
    while sandbox_id in machines.guards():
        assert time.monotonic() < deadline, "its machine is still there after 2 s"
        time.sleep(0.05)
    assert machines.tombstone(sandbox_id)["reason"] == reason


@pytest.mark.vms(1)
@pytest.mark.takes(10)
@SEEDS
@PYTHONS
def test_session_sample_prints_its_id_and_its_machine_is_gone_after_it(machines, seed, kind):
    printed = run_python(python_sample(seed, "session", kind), door.environment(machines), WITHIN)

    is_over(machines, re.search(rf"^Sandbox ({THE_ID}) is ready\.$", printed, re.M)[1], "session")


@pytest.mark.vms(1)
@pytest.mark.takes(10)
@SEEDS
def test_session_sample_in_javascript_is_gone_after_it(machines, seed):
    source = IMPORT + sample(f"{seed}_session.ts") + "console.log(sandbox.id);\n"
    printed = run_deno(source, door.environment(machines), WITHIN)

    is_over(machines, re.fullmatch(rf"({THE_ID})\n", printed)[1], "session")


# Alone among the microVMs: the Python SDK waits for 10 s at most, and several boots at once take longer under emulation.
@pytest.mark.vms(6)
@pytest.mark.takes(10)
@SEEDS
@PYTHONS
def test_duration_sample_finds_its_sandbox_again_and_so_does_another_process(machines, seed, kind):
    printed = run_python(python_sample(seed, "duration", kind), door.environment(machines), WITHIN)
    sandbox_id = re.search(rf"^Reconnected to ({THE_ID})$", printed, re.M)[1]
    assert machines.explain(sandbox_id)["ends_in_s"] == pytest.approx(300, abs=60)

    found_by_another_process(machines, sandbox_id)


@pytest.mark.vms(4)
@pytest.mark.takes(10)
@SEEDS
def test_duration_sample_in_javascript_finds_its_sandbox_again_and_so_does_another_process(machines, seed):
    source = IMPORT + sample(f"{seed}_duration.ts") + "console.log(reconnected.id);\nawait reconnected.close();\n"
    sandbox_id = run_deno(source, door.environment(machines), WITHIN).strip()
    assert machines.explain(sandbox_id)["ends_in_s"] == pytest.approx(300, abs=60)

    found_by_another_process(machines, sandbox_id)


def found_by_another_process(machines, sandbox_id: str) -> None:
    """In both SDKs; the last one kills it, after which neither finds it."""
    again = f"{IMPORT}const found = await Sandbox.connect({{ id: '{sandbox_id}' }});\nconsole.log(found.id);\n"
    assert run_deno(again + "await found.close();\n", door.environment(machines), WITHIN).strip() == sandbox_id
    kill = f"""
from deno_sandbox import DenoDeploy
from websockets.exceptions import InvalidStatus
sdk = DenoDeploy()
with sdk.sandbox.connect("{sandbox_id}") as found:
  found.kill()
try:
  with sdk.sandbox.connect("{sandbox_id}") as found:
    pass
except InvalidStatus as refused:
  print(refused.response.status_code)
"""
    assert run_python(kill, door.environment(machines), WITHIN).strip() == "404"
    is_over(machines, sandbox_id, "killed")
    gone = IMPORT + (
        f"try {{ await Sandbox.connect({{ id: '{sandbox_id}' }}); }}\n"
        "catch (error) { console.log(error.name, error.status, error.code); }\nDeno.exit();\n"
    )
    assert "404 SANDBOX_NOT_FOUND" in run_deno(gone, door.environment(machines), WITHIN)


@pytest.mark.vms(4)
@pytest.mark.takes(25)
@SEEDS
def test_extend_sample_prints_the_new_end_and_the_sandbox_outlives_the_old_one(machines, seed):
    source = (
        IMPORT
        + 'const sandbox = await Sandbox.create({ timeout: "12s" });\n'
        + sample(f"{seed}_extend.ts")
        + "console.log(sandbox.id, newTimeout.getTime() - Date.now());\n"
        + "await sandbox.close();\n"
    )
    printed = run_deno(source, door.environment(machines), WITHIN)

    assert "Sandbox now expires at " in printed
    sandbox_id, left = re.search(rf"^({THE_ID}) (\d+)$", printed, re.M).groups()
    assert int(left) == pytest.approx(30 * 60 * 1000, abs=2000)
    time.sleep(15)
    told = machines.explain(sandbox_id)
    assert told["ended"] is None
    assert told["ends_in_s"] == pytest.approx(1800, abs=60)


@pytest.mark.vms(4)
@pytest.mark.takes(10)
@SEEDS
def test_extend_line_of_the_command_line_moves_the_end(machines, seed):
    """`deno sandbox` loads its program from a registry of its own, which serves nobody here: a stand-in over the same SDK takes its place.
    The line is the sample's, but for the id, which is one that no SDK takes."""
    with door.create(machines, timeout="5m") as connection:
        sandbox_id = door.id_of(connection)
        line = sample(f"{seed}_extend.sh").replace("sbx_ord_abc123def456", sandbox_id)
        with tempfile.TemporaryDirectory(prefix="program-", dir="/tmp") as folder:
            (Path(folder) / "node_modules").symlink_to(locations.node_modules())
            stand_in = Path(folder) / "cli.ts"
            stand_in.write_text(
                IMPORT + "const [, id, timeout] = Deno.args.slice(-3);\n"
                "const sandbox = await Sandbox.connect({ id });\n"
                "console.log(`${await sandbox.extendTimeout(timeout)}`);\nawait sandbox.close();\n"
            )
            command, *words = shlex.split(line)
            assert command == "deno"
            environment = {**door.environment(machines), **deno_environment(folder)}
            done = subprocess.run(
                [*deno(), str(stand_in), *words[1:]], env=environment, capture_output=True, text=True, timeout=WITHIN
            )
            assert done.returncode == 0, done.stderr
        assert machines.explain(sandbox_id)["ends_in_s"] == pytest.approx(1800, abs=60)


@pytest.mark.vms(4)
@pytest.mark.takes(10)
def test_kill_extend_and_a_call_into_the_guest_through_the_sdk(machines):
    """What the seeds name in prose, and a call that comes later: a clean error each, and no hanging program."""
    source = IMPORT + (
        "const sandbox = await Sandbox.create();\n"
        'try { await sandbox.spawn("ls"); } catch (error) { console.log(error.name, error.code, error.message); }\n'
        'try { await sandbox.exposeHttp({ port: 80 }); } catch (error) { console.log(error.message); }\n'
        'try { await sandbox.extendTimeout("5h"); } catch (error) { console.log(error.name); }\n'
        "await sandbox.kill();\nawait sandbox.closed;\n"
        "try { await sandbox.kill(); } catch (error) { console.log(error.name, error.status); }\n"
        "console.log(sandbox.id);\n"
    )
    printed = run_deno(source, door.environment(machines), WITHIN)

    assert "-32601 Method not found" in printed
    assert "501" in printed and "NOT_IMPLEMENTED" in printed
    assert re.search(r"\b404$", printed, re.M)
    is_over(machines, re.search(THE_ID, printed)[0], "killed")

    source = """
from deno_sandbox import DenoDeploy
sdk = DenoDeploy()
with sdk.sandbox.create(labels={"who": "me"}) as sandbox:
  try:
    sandbox.spawn("ls")
  except Exception as error:
    print(type(error).__name__)
  print(sandbox.extend_timeout(10).isoformat())
  print([each["status"] for each in sdk.sandbox.list().items if each["id"] == sandbox.id])
  sandbox.kill()
print([each["status"] for each in sdk.sandbox.list().items if each["id"] == sandbox.id])
"""
    printed = run_python(source, door.environment(machines), WITHIN)
    assert printed.splitlines()[0] == "UnknownRpcMethod"
    assert printed.splitlines()[2:] == ["['running']", "['stopped']"]


@pytest.mark.parametrize("kind", ["js", "py"])
def test_a_wrong_token_is_the_sdks_own_error(hostd, kind):
    supervisor = hostd("container", api_key="ddo_right")
    environment = {**door.environment(supervisor), "DENO_DEPLOY_TOKEN": "ddo_wrong"}
    if kind == "js":
        source = "try { await Sandbox.create(); } catch (error) { console.log(error.name); }\nDeno.exit();\n"
        assert "InvalidToken" in run_deno(IMPORT + source, environment, WITHIN)
    else:
        source = (
            "from deno_sandbox import DenoDeploy\n"
            "try:\n  with DenoDeploy().sandbox.create(): pass\n"
            "except Exception as error: print(type(error).__name__)\n"
        )
        assert run_python(source, environment, WITHIN).strip() == "AuthenticationError"
