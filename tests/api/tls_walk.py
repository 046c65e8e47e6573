"""One walk over TLS, by names alone: SDK=<package>, KIND=sync|async, SERVERS=<folder>."""

import asyncio
import importlib
import inspect
import os
import ssl
import time
from pathlib import Path

import httpx

sdk = importlib.import_module(os.environ["SDK"])
SERVERS = Path(os.environ["SERVERS"])
RUNS_CODE = os.environ["SDK"].endswith("code_interpreter")
# A kernel may have to start first.
PATIENCE = 120
Sandbox = sdk.AsyncSandbox if os.environ["KIND"] == "async" else sdk.Sandbox


async def of(answer):
    """Both kinds of SDK are walked by the same steps."""
    return await answer if inspect.isawaitable(answer) else answer


async def raises(call):
    try:
        await of(call())
    except Exception as error:
        return error
    raise AssertionError("it must fail")


async def serve(sandbox, name, port, path):
    await of(sandbox.files.write(f"/tmp/{name}", (SERVERS / name).read_text()))
    await of(sandbox.commands.run(f"python3 /tmp/{name} {port}", background=True, timeout=0))
    url = f"https://{sandbox.get_host(port)}{path}"
    with httpx.Client(verify=ssl.create_default_context(cafile=os.environ["SSL_CERT_FILE"])) as client:
        for _ in range(100):
            answer = client.get(url)
            if answer.status_code == 200:
                return answer.json()
            assert answer.status_code == 502, answer.text
            time.sleep(0.1)
    raise AssertionError(f"{url} never answered")


async def walk():
    sandbox = await of(Sandbox.create(template="code-interpreter-v1" if RUNS_CODE else "base", timeout=300))
    assert await of(sandbox.is_running()) is True
    assert (await of(sandbox.commands.run("echo out"))).stdout == "out\n"
    text = "grüße " * 100_000
    await of(sandbox.files.write("walk.txt", text))
    assert await of(sandbox.files.read("walk.txt")) == text
    joined = await of(Sandbox.connect(sandbox.sandbox_id))
    assert (await of(joined.commands.run("echo joined"))).stdout == "joined\n"

    told = await serve(sandbox, "guest_server.py", 8000, "/echo?a=b")
    assert (told["path"], told["headers"]["host"]) == ("/echo?a=b", sandbox.get_host(8000))
    if RUNS_CODE:
        said = []
        execution = await of(sandbox.run_code("x = 7; print(6 * x)", request_timeout=PATIENCE, timeout=PATIENCE, on_stdout=lambda message: said.append(message.line)))
        assert execution.logs.stdout == said == ["42\n"]
        assert (await of(joined.run_code("x"))).text == "7"
        assert (await of(joined.run_code("1 / 0"))).error.name == "ZeroDivisionError"
        context = await of(sandbox.create_code_context(cwd="/tmp"))
        told = await of(sandbox.run_code("import os; print(os.getcwd())", context=context, timeout=PATIENCE))
        assert (told.error, told.logs.stdout) == (None, ["/tmp\n"])

    assert await of(sandbox.kill()) is True
    assert await of(sandbox.is_running()) is False
    assert await of(joined.is_running()) is False
    await raises(lambda: sandbox.commands.run("true"))
    if RUNS_CODE:
        error = await raises(lambda: sandbox.run_code("1"))
        assert isinstance(error, (sdk.TimeoutException, sdk.NotFoundException)), repr(error)


asyncio.run(walk())
print("walked")
