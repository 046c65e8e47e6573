"""Section 10: the Novita and PPIO SDKs, whose vendored client is older and stricter than E2B's."""

import importlib

import pytest

from harness.hostd import API_KEY
from harness.planes import HOME

contract = pytest.mark.contract
VENDORS = pytest.mark.parametrize("package", ["novita_sandbox.core", "ppio_sandbox.core"])


@pytest.fixture
def sandbox(plane, package, monkeypatch):
    prefix = package.split("_")[0].upper()
    for name, value in (("API_KEY", API_KEY), ("DEBUG", "true"), ("SANDBOX_URL", plane.url)):
        monkeypatch.setenv(f"{prefix}_{name}", value)
    return importlib.import_module(package).Sandbox.create(debug=True)


@VENDORS
@contract("10/old-proto", "10/headers", "10/parser", "1.4/older-python", "8.3/debug")
def test_commands_run(sandbox, package):
    done = sandbox.commands.run("for n in 1 2 3; do echo $n; done; echo err >&2; pwd")
    assert (done.stdout, done.stderr, done.exit_code) == (f"1\n2\n3\n{HOME}\n", "err\n", 0)
    with pytest.raises(Exception) as failure:
        sandbox.commands.run("exit 4")
    assert failure.value.exit_code == 4


@VENDORS
@contract("10/parser", "2.6/end-after-output")
def test_a_megabyte_is_parsed_whole(sandbox, package):
    assert len(sandbox.commands.run("head -c 3000000 /dev/zero | tr '\\0' x").stdout) == 3_000_000


@VENDORS
@contract("10/retries", "1.1/SendInput")
def test_input_arrives_once(sandbox, package):
    """Its client repeats a unary call when the connection drops without an answer: each of these is answered."""
    command = sandbox.commands.run("read a; read b; read c; echo $a$b$c", background=True, stdin=True)
    for word in ("one\n", "two\n", "three\n"):
        sandbox.commands.send_stdin(command.pid, word)
    assert command.wait().stdout == "onetwothree\n"


@VENDORS
@contract("10/old-proto", "3.3/type", "3.3/symlink-target", "1.3/FileType")
def test_a_link_is_a_file(sandbox, package, plane, box):
    plane.sh(f"cd {box}; touch file; ln -s file link")
    info = sandbox.files.get_info(f"{box}/link")
    assert (info.type.value, info.symlink_target) == ("file", f"{box}/file")
    assert [entry.type.value for entry in sandbox.files.list(box)] == ["file", "file"]


@VENDORS
@contract("10/old-proto", "4.6/multipart", "1.8/exists-false", "1.8/already_exists")
def test_files_go_up_and_down(sandbox, package, box):
    sandbox.files.write(f"{box}/file", "grüße")
    assert sandbox.files.read(f"{box}/file") == "grüße"
    assert sandbox.files.exists(f"{box}/none") is False
    assert sandbox.files.make_dir(f"{box}/dir") is True
    assert sandbox.files.make_dir(f"{box}/dir") is False
    assert sandbox.files.rename(f"{box}/file", f"{box}/dir/moved").path == f"{box}/dir/moved"


@VENDORS
@contract("10/old-proto", "3.4/upload-3")
def test_a_watcher_tells_three_events(sandbox, package, box):
    handle = sandbox.files.watch_dir(box)
    sandbox.files.write(f"{box}/new", "x")
    assert [(event.type.value, event.name) for event in handle.get_new_events()] == [
        ("create", "new"),
        ("chmod", "new"),
        ("write", "new"),
    ]
    handle.stop()


@VENDORS
@contract("10/old-proto", "2.5/pty", "2.5/resize")
def test_a_terminal_is_used(sandbox, package):
    size = importlib.import_module(package).PtySize if hasattr(importlib.import_module(package), "PtySize") else None
    if size is None:
        size = importlib.import_module(f"{package}.sandbox.commands.command_handle").PtySize
    terminal = sandbox.pty.create(size(rows=24, cols=80))
    sandbox.pty.resize(terminal.pid, size(rows=40, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"echo [$(stty size)]; exit 0\n")
    out = []
    terminal.wait(on_pty=out.append)
    assert b"[40 100]" in b"".join(out)


@VENDORS
@contract("10/headers", "2.11/kill", "1.8/kill-false")
def test_a_command_is_killed_once(sandbox, package):
    command = sandbox.commands.run("sleep 60", background=True)
    assert sandbox.commands.kill(command.pid) is True
    assert sandbox.commands.kill(command.pid) is False
