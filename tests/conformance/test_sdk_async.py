"""What the asynchronous E2B Python SDK shows its users; what is the same code as in the synchronous one is not asked twice."""

import asyncio
import time

import pytest
from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    TimeoutException,
)

from harness.planes import HOME

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd


@pytest.fixture
def go(plane):
    """Runs a coroutine that takes a sandbox."""

    def run(body, *args):
        async def whole():
            if plane.hostd:
                sandbox = await AsyncSandbox.connect(plane.sandbox_id, **plane.sdk_options)
            else:
                sandbox = await AsyncSandbox.create(**plane.sdk_options)
            return await asyncio.wait_for(body(sandbox, *args), 60)

        return asyncio.run(whole())

    return run


@hosted
@contract("1.4/python", "2.7/exit-0", "8.3/debug")
def test_a_command_answers(go):
    async def body(sandbox):
        done = await sandbox.commands.run("echo out; echo err >&2; pwd")
        return done.stdout, done.stderr, done.exit_code, done.error

    assert go(body) == (f"out\n{HOME}\n", "err\n", 0, None)


@hosted
@contract("2.7/exit-n", "2.7/signal")
@pytest.mark.parametrize("script, code, error", [("exit 3", 3, "exit status 3"), ("kill -KILL $$", -1, "signal: killed")])
def test_a_failure_is_raised(go, script, code, error):
    async def body(sandbox):
        with pytest.raises(CommandExitException) as failure:
            await sandbox.commands.run(script)
        return failure.value.exit_code, failure.value.error

    assert go(body) == (code, error)


@hosted
@contract("2.8/fan-out", "0/port")
def test_thirty_commands_at_once_do_not_mix(go):
    async def body(sandbox):
        answers = await asyncio.gather(*(sandbox.commands.run(f"echo {n}; sleep 0.1; echo {n}") for n in range(30)))
        return [answer.stdout for answer in answers]

    assert go(body) == [f"{n}\n{n}\n" for n in range(30)]


@hosted
@contract("1.1/SendInput", "1.1/CloseStdin", "1.1/Connect", "2.11/kill", "1.8/kill-false", "1.8/connect")
def test_a_command_is_fed_joined_and_killed(go):
    async def body(sandbox):
        command = await sandbox.commands.run("cat", background=True, stdin=True)
        joined = await sandbox.commands.connect(command.pid)
        await sandbox.commands.send_stdin(command.pid, "both")
        await sandbox.commands.close_stdin(command.pid)
        assert (await command.wait()).stdout == (await joined.wait()).stdout == "both"
        sleeper = await sandbox.commands.run("sleep 60", background=True)
        assert sleeper.pid in [each.pid for each in await sandbox.commands.list()]
        assert await sandbox.commands.kill(sleeper.pid) is True
        assert await sandbox.commands.kill(sleeper.pid) is False
        with pytest.raises(NotFoundException):
            await sandbox.commands.connect(4_000_000)

    go(body)


@contract("1.1/StreamInput")
def test_input_is_streamed_piece_by_piece(go):
    async def body(sandbox):
        command = await sandbox.commands.run("cat", background=True, stdin=True)
        async with sandbox.commands.stream_input(command.pid) as stream:
            for word in ("one ", "two ", b"three"):
                await stream.send(word)
        await command.close_stdin()
        return (await command.wait()).stdout

    assert go(body) == "one two three"


@hosted
@pytest.mark.takes(1)
@contract("1.8/deadline_exceeded", "2.10/start")
def test_a_timeout_is_raised(go):
    async def body(sandbox):
        with pytest.raises(TimeoutException):
            await sandbox.commands.run("sleep 60", timeout=1)

    go(body)


@contract("2.8/disconnect")
def test_a_command_outlives_its_handle(go):
    async def body(sandbox):
        command = await sandbox.commands.run("sleep 60", background=True)
        await command.disconnect()
        await asyncio.sleep(0.2)
        assert command.pid in [each.pid for each in await sandbox.commands.list()]
        assert await sandbox.commands.kill(command.pid) is True

    go(body)


@hosted
@contract("2.5/pty", "2.5/resize", "1.1/Update")
def test_a_terminal_is_used(go):
    async def body(sandbox):
        out = bytearray()
        terminal = await sandbox.pty.create(PtySize(rows=24, cols=80), on_data=out.extend)
        await sandbox.pty.resize(terminal.pid, PtySize(rows=40, cols=100))
        await sandbox.pty.send_stdin(terminal.pid, b"echo [$(stty size)]; exit 4\n")
        with pytest.raises(CommandExitException) as failure:
            await terminal.wait()
        return failure.value.exit_code, bytes(out)

    code, out = go(body)
    assert code == 4
    assert b"[40 100]" in out


@hosted
@contract("4.6/multipart", "4.6/octets", "4.5/gzip", "1.8/file-not-found", "1.8/invalid_argument", "1.8/already_exists")
def test_files_go_up_and_down(go, box):
    async def body(sandbox):
        await sandbox.files.write(f"{box}/a", "one")
        await sandbox.files.write(f"{box}/b", b"two", use_octet_stream=True)
        assert await sandbox.files.read(f"{box}/a") == "one"
        assert b"".join([piece async for piece in await sandbox.files.read(f"{box}/b", format="stream")]) == b"two"
        with pytest.raises(FileNotFoundException):
            await sandbox.files.read(f"{box}/none")
        with pytest.raises(InvalidArgumentException):
            await sandbox.files.read(box)
        assert await sandbox.files.make_dir(f"{box}/d") is True
        assert await sandbox.files.make_dir(f"{box}/d") is False
        return [entry.name for entry in await sandbox.files.list(box)]

    assert go(body) == ["a", "b", "d"]


@hosted
@contract("1.1/WatchDir", "3.4/stream", "3.4/mapping", "3.4/entry", "3.4/recursive")
def test_a_watch_calls_back(go, box):
    async def body(sandbox):
        events, seen = [], asyncio.Event()

        def told(event):
            events.append(event)
            if event.type == FilesystemEventType.WRITE:
                seen.set()

        handle = await sandbox.files.watch_dir(box, told, recursive=True, include_entry=True)
        await sandbox.files.make_dir(f"{box}/nested")
        await sandbox.files.write(f"{box}/nested/file", "x")
        await asyncio.wait_for(seen.wait(), 10)
        await handle.stop()
        return [(event.type, event.name) for event in events], events[0].entry.path

    told, first = go(body)
    assert told[0] == (FilesystemEventType.CREATE, "nested")
    assert (FilesystemEventType.WRITE, "nested/file") in told
    assert first == f"{box}/nested"


@pytest.mark.takes(2)
@contract("3.4/stream", "2.10/connect")
def test_a_watch_ends_at_its_timeout(go, box):
    async def body(sandbox):
        ended = asyncio.get_running_loop().create_future()
        await sandbox.files.watch_dir(
            box, lambda _: None, timeout=1, on_exit=lambda error: ended.done() or ended.set_result(error)
        )
        began = time.monotonic()
        error = await asyncio.wait_for(ended, 10)
        return time.monotonic() - began, error

    took, error = go(body)
    assert took < 5
    assert error is None or isinstance(error, TimeoutException)


@hosted
@contract("1.8/file-not-found", "1.10/watch-missing")
def test_watching_nothing_is_file_not_found(go, box):
    async def body(sandbox):
        with pytest.raises(FileNotFoundException):
            await sandbox.files.watch_dir(f"{box}/none", lambda _: None)

    go(body)
