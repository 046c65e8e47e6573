"""Watching through the SDKs, unmodified."""

import asyncio
import time

import pytest
from e2b import AsyncSandbox, FilesystemEventType, NotFoundException, Sandbox, SandboxException

from harness.hostd import API_KEY
from harness.programs import run_node


@pytest.fixture
def sandbox(guestd):
    return Sandbox.create(debug=True, sandbox_url=guestd.url, api_key=API_KEY)


def told(handle) -> list[tuple[str, str]]:
    return [(event.type.value, event.name) for event in handle.get_new_events()]


def test_the_sync_sdk_sees_an_upload_as_three_events(sandbox, tmp_path):
    handle = sandbox.files.watch_dir(str(tmp_path))
    sandbox.files.write(f"{tmp_path}/test_watch.txt", "This file will be watched.")
    events = handle.get_new_events()
    assert len(events) == 3
    assert (events[0].type, events[0].name) == (FilesystemEventType.CREATE, "test_watch.txt")
    sandbox.files.write(f"{tmp_path}/test_watch.txt", "again")
    assert ("write", "test_watch.txt") in told(handle)
    handle.stop()
    with pytest.raises(SandboxException):
        handle.get_new_events()


def test_the_sync_sdk_sees_into_a_directory_that_was_just_made(sandbox, tmp_path):
    handle = sandbox.files.watch_dir(str(tmp_path), recursive=True)
    sandbox.files.make_dir(f"{tmp_path}/nested")
    sandbox.files.write(f"{tmp_path}/nested/f.txt", "x")
    events = told(handle)
    assert ("create", "nested") in events
    assert ("write", "nested/f.txt") in events
    handle.stop()


def test_the_sync_sdk_gets_entries_and_errors(sandbox, tmp_path):
    handle = sandbox.files.watch_dir(str(tmp_path), include_entry=True)
    sandbox.files.write(f"{tmp_path}/f", "12345")
    created = handle.get_new_events()[0]
    assert (created.entry.path, created.entry.name) == (f"{tmp_path}/f", "f")
    with pytest.raises(NotFoundException):
        sandbox.files.watch_dir(f"{tmp_path}/missing")
    with pytest.raises(SandboxException):
        sandbox.files.watch_dir(f"{tmp_path}/f")


def test_the_sync_sdk_hears_of_a_loss_and_goes_on(sandbox, tmp_path):
    handle = sandbox.files.watch_dir(str(tmp_path))
    for number in range(20_000):
        (tmp_path / f"f{number}").touch()
    with pytest.raises(SandboxException, match="events were lost"):
        handle.get_new_events()
    handle.get_new_events()
    sandbox.files.write(f"{tmp_path}/after", "x")
    assert ("create", "after") in told(handle)


def test_the_async_sdk_gets_events_and_outlives_a_loss(guestd, tmp_path):
    async def program():
        sandbox = await AsyncSandbox.create(debug=True, sandbox_url=guestd.url, api_key=API_KEY)
        events, ends = [], []

        async def until(expected):
            begun = time.monotonic()
            while expected not in events:
                assert time.monotonic() - begun < 20, (expected, events[-5:], ends)
                await asyncio.sleep(0.02)

        handle = await sandbox.files.watch_dir(
            str(tmp_path),
            on_event=lambda event: events.append((event.type.value, event.name)),
            on_exit=ends.append,
            recursive=True,
        )
        await sandbox.files.make_dir(f"{tmp_path}/d")
        await sandbox.files.write(f"{tmp_path}/d/f", "x")
        await until(("write", "d/f"))
        # This client reads nothing meanwhile.
        for number in range(60_000):
            (tmp_path / f"{'long' * 20}{number}").touch()
        await asyncio.sleep(1)
        await sandbox.files.write(f"{tmp_path}/d/after", "x")
        await until(("write", "d/after"))
        assert ends == []
        await handle.stop()
        assert ends == [None]

    asyncio.run(program())


def test_the_javascript_sdk_gets_events_and_entries(guestd, tmp_path):
    program = f"""
        import {{ Sandbox }} from 'e2b'
        const sandbox = await Sandbox.create()
        const seen = []
        const handle = await sandbox.files.watchDir('{tmp_path}', (event) => {{ seen.push(event) }},
            {{ recursive: true, includeEntry: true }})
        const until = async (type, name) => {{
            for (let i = 0; i < 500; i++) {{
                const found = seen.find((event) => event.type === type && event.name === name)
                if (found) return found
                await new Promise((resolve) => setTimeout(resolve, 10))
            }}
            throw new Error(`no ${{type}} ${{name}}: ${{JSON.stringify(seen)}}`)
        }}
        await sandbox.files.makeDir('{tmp_path}/nested')
        await sandbox.files.write('{tmp_path}/nested/f.txt', 'x')
        const created = await until('create', 'nested')
        await until('write', 'nested/f.txt')
        console.log(created.entry.path, created.entry.type)
        await handle.stop()
        process.exit(0)
    """
    environment = {"E2B_DEBUG": "true", "E2B_SANDBOX_URL": guestd.url, "E2B_API_KEY": API_KEY}
    assert run_node(program, environment, within=40) == f"{tmp_path}/nested dir\n"


def test_the_javascript_sdk_outlives_a_loss(guestd, tmp_path):
    program = f"""
        import fs from 'node:fs'
        import {{ Sandbox }} from 'e2b'
        const sandbox = await Sandbox.create()
        const names = new Set()
        let ended = false
        const handle = await sandbox.files.watchDir('{tmp_path}', (event) => {{ names.add(event.name) }},
            {{ onExit: () => {{ ended = true }} }})
        // The event loop stands still, so this client reads nothing meanwhile.
        for (let i = 0; i < 60000; i++) fs.closeSync(fs.openSync(`{tmp_path}/${{'long'.repeat(20)}}${{i}}`, 'w'))
        await new Promise((resolve) => setTimeout(resolve, 1000))
        await sandbox.files.write('{tmp_path}/after', 'x')
        for (let i = 0; i < 1000 && !names.has('after'); i++) await new Promise((resolve) => setTimeout(resolve, 10))
        console.log(names.has('after'), ended, names.size < 60001)
        await handle.stop()
        process.exit(0)
    """
    environment = {"E2B_DEBUG": "true", "E2B_SANDBOX_URL": guestd.url, "E2B_API_KEY": API_KEY}
    assert run_node(program, environment, within=60) == "true false true\n"
