"""What the E2B Python SDK shows its users, synchronous: section 1.8 and the SDK's side of sections 2 to 5."""

import threading
import time
import urllib.request

import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    FileNotFoundException,
    FilesystemEventType,
    FileType,
    InvalidArgumentException,
    NotFoundException,
    PtySize,
    Sandbox,
    SandboxException,
    TimeoutException,
)

from harness.planes import HOME
from harness.processes import wait_until

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd


def connected(plane) -> Sandbox:
    if plane.hostd:
        return Sandbox.connect(plane.sandbox_id, **plane.sdk_options)
    return Sandbox.create(**plane.sdk_options)


@pytest.fixture
def sandbox(plane):
    found = getattr(plane, "python", None)
    if found is None:
        found = plane.python = connected(plane)
    return found


# --- commands ---


@hosted
@contract("8.3/debug", "1.4/python", "2.7/exit-0")
def test_a_command_answers(sandbox):
    done = sandbox.commands.run("echo out; echo err >&2; pwd; id -un")
    assert (done.stdout, done.stderr, done.exit_code, done.error) == (f"out\n{HOME}\nuser\n", "err\n", 0, None)


@hosted
@contract("2.7/exit-n", "2.7/signal", "1.8/others")
@pytest.mark.parametrize(
    "script, code, error",
    [("exit 5", 5, "exit status 5"), ("kill -TERM $$", -1, "signal: terminated"), ("no-such-tool", 127, "exit status 127")],
)
def test_a_failure_is_an_exit_exception(sandbox, script, code, error):
    with pytest.raises(CommandExitException) as failure:
        sandbox.commands.run(f"echo out; {script}")
    assert (failure.value.exit_code, failure.value.error, failure.value.stdout) == (code, error, "out\n")


@hosted
@contract("1.8/unauthenticated", "1.10/basic-unknown")
def test_an_unknown_user_is_an_authentication_exception(sandbox):
    for attempt in (lambda: sandbox.commands.run("true", user="ghost"), lambda: sandbox.files.list("/", user="ghost")):
        with pytest.raises(AuthenticationException, match="invalid username: 'ghost'"):
            attempt()


@hosted
@contract("1.8/invalid_argument", "2.4/missing", "2.4/denied")
@pytest.mark.parametrize("cwd", ["/no/such/folder", "/etc/hostname", "~root/x"])
def test_a_bad_folder_is_an_invalid_argument_exception(sandbox, cwd):
    with pytest.raises(InvalidArgumentException):
        sandbox.commands.run("true", cwd=cwd)


@hosted
@contract("1.8/kill-false", "1.8/connect", "1.8/not_found")
def test_nobody_is_killed_and_nobody_is_joined(sandbox):
    assert sandbox.commands.kill(4_000_000) is False
    with pytest.raises(NotFoundException, match="process with pid 4000000 not found"):
        sandbox.commands.connect(4_000_000)
    with pytest.raises(NotFoundException):
        sandbox.commands.send_stdin(4_000_000, "x")


@hosted
@pytest.mark.takes(1)
@contract("1.8/deadline_exceeded", "2.10/start")
def test_a_timeout_is_a_timeout_exception(sandbox):
    began = time.monotonic()
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 60", timeout=1)
    assert time.monotonic() - began < 8


@hosted
@contract("1.1/SendInput", "1.1/CloseStdin", "2.5/stdin-open", "8.1/gates")
def test_a_command_is_fed_and_closed(sandbox):
    command = sandbox.commands.run("cat; echo end", background=True, stdin=True)
    command.send_stdin("grüße ")
    sandbox.commands.send_stdin(command.pid, "x\n")
    sandbox.commands.close_stdin(command.pid)
    assert command.wait().stdout == "grüße x\nend\n"


@contract("1.1/StreamInput", "1.2/StreamInputRequest")
def test_input_is_streamed(sandbox):
    command = sandbox.commands.run("cat", background=True, stdin=True)
    sandbox.commands.stream_input(command.pid, iter(["one ", "two ", b"three"]))
    command.close_stdin()
    assert command.wait().stdout == "one two three"


@hosted
@contract("1.1/List", "1.1/Connect", "2.12/all", "2.11/kill")
def test_a_command_is_listed_joined_and_killed(sandbox):
    command = sandbox.commands.run("sleep 60", background=True, envs={"A": "b"}, cwd="/tmp")
    [found] = [each for each in sandbox.commands.list() if each.pid == command.pid]
    assert (found.cmd, found.args, found.envs, found.cwd) == ("/bin/bash", ["-l", "-c", "sleep 60"], {"A": "b"}, "/tmp")
    joined = sandbox.commands.connect(command.pid)
    assert sandbox.commands.kill(command.pid) is True
    for handle in (command, joined):
        with pytest.raises(CommandExitException) as failure:
            handle.wait()
        assert failure.value.error == "signal: killed"
    assert sandbox.commands.kill(command.pid) is False
    assert command.pid not in [each.pid for each in sandbox.commands.list()]


@hosted
@contract("1.6/flush", "2.6/order")
def test_output_arrives_while_the_command_runs(sandbox):
    arrived = []
    sandbox.commands.run(
        "echo a; sleep 0.6; echo b >&2",
        on_stdout=lambda text: arrived.append((text, time.monotonic())),
        on_stderr=lambda text: arrived.append((text, time.monotonic())),
    )
    assert [text for text, _ in arrived] == ["a\n", "b\n"]
    assert arrived[1][1] - arrived[0][1] > 0.4


@contract("2.6/bytes")
def test_a_broken_character_is_replaced_and_the_rest_is_whole(sandbox):
    done = sandbox.commands.run("head -c 8191 /dev/zero | tr '\\0' a; printf '\\303\\244\\377'")
    assert done.stdout == "a" * 8191 + "ä\ufffd"


# --- terminals ---


@hosted
@contract("2.5/pty", "2.5/resize", "1.1/Update")
def test_a_terminal_is_used_resized_and_ended(sandbox):
    out = []
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), envs={"MINE": "kept"})
    sandbox.pty.resize(terminal.pid, PtySize(rows=40, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"echo [$TERM $MINE $(stty size)]; exit 0\n")
    result = terminal.wait(on_pty=out.append)
    assert b"[xterm-256color kept 40 100]" in b"".join(out)
    assert result.exit_code == 0


@hosted
@contract("1.8/kill-false", "2.11/kill")
def test_a_terminal_is_killed_once(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80))
    assert sandbox.pty.kill(terminal.pid) is True
    assert sandbox.pty.kill(terminal.pid) is False


# --- files ---


@hosted
@contract("1.8/file-not-found", "1.8/exists-false", "1.8/not_found", "1.8/http-bodies")
def test_what_is_missing_is_file_not_found(sandbox):
    assert sandbox.files.exists("/no/such/file") is False
    attempts = [
        lambda: sandbox.files.read("/no/such/file"),
        lambda: sandbox.files.list("/no/such/folder"),
        lambda: sandbox.files.get_info("/no/such/file"),
        lambda: sandbox.files.rename("/no/such/file", "/tmp/x"),
    ]
    for attempt in attempts:
        with pytest.raises(FileNotFoundException):
            attempt()
    sandbox.files.remove("/no/such/file")


@hosted
@contract("1.8/already_exists", "3.2/mkdir")
def test_make_dir_is_true_once(sandbox, box):
    assert sandbox.files.make_dir(f"{box}/a/b") is True
    assert sandbox.files.make_dir(f"{box}/a/b") is False


@hosted
@contract("1.8/invalid_argument", "1.8/http-bodies", "4.5/directory", "4.6/400", "3.2/list-file")
def test_a_folder_is_no_file_and_a_file_no_folder(sandbox, box):
    sandbox.files.write(f"{box}/file", "x")
    for attempt in (
        lambda: sandbox.files.read(box),
        lambda: sandbox.files.write(box, "x"),
        lambda: sandbox.files.list(f"{box}/file"),
    ):
        with pytest.raises(InvalidArgumentException):
            attempt()


@hosted
@pytest.mark.parametrize("options", [{}, {"use_octet_stream": True}, {"gzip": True}], ids=["multipart", "octets", "gzip"])
@contract("4.6/multipart", "4.6/octets", "4.6/gzip", "4.5/gzip", "8.1/gates")
def test_a_file_makes_the_round_trip(sandbox, box, options):
    text = "grüße\n" * 20_000
    written = sandbox.files.write(f"{box}/new/file.txt", text, **options)
    assert (written.path, written.name, written.type) == (f"{box}/new/file.txt", "file.txt", FileType.FILE)
    assert sandbox.files.read(f"{box}/new/file.txt") == text
    assert bytes(sandbox.files.read(f"{box}/new/file.txt", format="bytes")) == text.encode()
    assert b"".join(sandbox.files.read(f"{box}/new/file.txt", format="stream")) == text.encode()


@hosted
@contract("4.6/multipart", "4.6/reply")
def test_several_files_go_up_at_once(sandbox, box):
    written = sandbox.files.write_files([{"path": f"{box}/{n}/file-{n}", "data": str(n)} for n in range(5)])
    assert [each.path for each in written] == [f"{box}/{n}/file-{n}" for n in range(5)]
    assert [sandbox.files.read(f"{box}/{n}/file-{n}") for n in range(5)] == list("01234")


@hosted
@contract("3.3/type", "3.3/permissions", "3.3/owner", "3.3/size", "3.3/modified", "3.3/symlink-target", "3.3/is-symlink")
def test_an_entry_is_told(sandbox, box):
    sandbox.files.write(f"{box}/file", "12345")
    sandbox.commands.run(f"ln -s file {box}/link")
    info = sandbox.files.get_info(f"{box}/file")
    assert (info.name, info.type, info.path, info.size, info.mode) == ("file", FileType.FILE, f"{box}/file", 5, 0o644)
    assert (info.permissions, info.owner, info.group, info.symlink_target) == ("-rw-r--r--", "user", "user", None)
    assert abs(info.modified_time.timestamp() - float(sandbox.commands.run("date +%s").stdout)) < 10
    link = sandbox.files.get_info(f"{box}/link")
    # By `isSymlink`, which this SDK knows and older ones do not.
    assert (link.type, link.symlink_target) == (FileType.SYMLINK, f"{box}/file")


@hosted
@contract("3.2/list-order", "3.2/list-depth", "3.2/move", "3.2/remove")
def test_a_tree_is_listed_renamed_and_removed(sandbox, box):
    for path in ("subdir1/subdir1_1", "subdir1/subdir1_2", "subdir2/subdir2_1"):
        sandbox.files.make_dir(f"{box}/{path}")
    found = [entry.path.removeprefix(f"{box}/") for entry in sandbox.files.list(box, depth=2)]
    assert found == ["subdir1", "subdir1/subdir1_1", "subdir1/subdir1_2", "subdir2", "subdir2/subdir2_1"]
    with pytest.raises(InvalidArgumentException):
        sandbox.files.list(box, depth=0)
    assert sandbox.files.rename(f"{box}/subdir2", f"{box}/other/place").path == f"{box}/other/place"
    sandbox.files.remove(f"{box}/subdir1")
    assert [entry.name for entry in sandbox.files.list(box)] == ["other"]


@contract("4.6/metadata", "3.3/metadata", "8.1/gates")
def test_metadata_goes_up_and_comes_back(sandbox, box):
    written = sandbox.files.write(f"{box}/file", "x", metadata={"kind": "report"})
    assert written.metadata == {"kind": "report"}
    assert sandbox.files.get_info(f"{box}/file").metadata == {"kind": "report"}
    sandbox.files.write(f"{box}/file", "x")
    assert sandbox.files.get_info(f"{box}/file").metadata is None


@contract("5/signature", "8.3/debug")
def test_a_download_url_opens(sandbox, plane, box):
    sandbox.files.write(f"{box}/file", "by url")
    with urllib.request.urlopen(sandbox.download_url(f"{box}/file"), timeout=10) as answer:
        assert answer.read() == b"by url"


# --- watching ---


@hosted
@contract("3.4/upload-3", "3.4/drain", "1.1/CreateWatcher", "1.1/GetWatcherEvents", "1.1/RemoveWatcher")
def test_a_new_file_is_three_events_at_once(sandbox, box):
    handle = sandbox.files.watch_dir(box)
    sandbox.files.write(f"{box}/new.txt", "x")
    events = handle.get_new_events()
    assert [(event.type, event.name) for event in events] == [
        (FilesystemEventType.CREATE, "new.txt"),
        (FilesystemEventType.CHMOD, "new.txt"),
        (FilesystemEventType.WRITE, "new.txt"),
    ]
    assert handle.get_new_events() == []
    handle.stop()
    with pytest.raises(SandboxException):
        handle.get_new_events()


@hosted
@contract("3.4/nested", "3.4/recursive")
def test_a_file_in_a_new_folder_is_seen_at_once(sandbox, box):
    handle = sandbox.files.watch_dir(box, recursive=True)
    sandbox.files.make_dir(f"{box}/nested")
    sandbox.files.write(f"{box}/nested/file", "x")
    told = [(event.type, event.name) for event in handle.get_new_events()]
    assert (FilesystemEventType.CREATE, "nested") in told
    assert (FilesystemEventType.WRITE, "nested/file") in told
    handle.stop()


@hosted
@contract("3.4/entry")
def test_events_come_with_entries_when_asked(sandbox, box):
    handle = sandbox.files.watch_dir(box, include_entry=True)
    sandbox.files.write(f"{box}/file", "123")
    event = next(each for each in handle.get_new_events() if each.type == FilesystemEventType.WRITE)
    assert (event.entry.path, event.entry.type) == (f"{box}/file", FileType.FILE)
    handle.stop()


@hosted
@contract("1.8/file-not-found", "1.8/invalid_argument", "1.10/watch-missing", "1.10/watch-file")
def test_what_cannot_be_watched_is_told(sandbox, box):
    sandbox.files.write(f"{box}/file", "x")
    with pytest.raises(FileNotFoundException):
        sandbox.files.watch_dir(f"{box}/none")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.watch_dir(f"{box}/file")


# --- the rest of 1.8 ---


@contract("1.8/others", "1.10/stdin-closed")
def test_any_other_code_is_a_sandbox_exception_with_its_words(sandbox):
    command = sandbox.commands.run("sleep 60", background=True, stdin=False)
    with pytest.raises(SandboxException, match="(?is)internal.*stdin not enabled or closed"):
        sandbox.commands.send_stdin(command.pid, "x")
    command.kill()


@contract("5/failure", "1.8/unauthenticated")
def test_a_wrong_token_is_an_authentication_exception(fresh):
    assert fresh.http.post("/init", json={"accessToken": "secret", "defaultUser": "user"}).status_code == 204
    sandbox = Sandbox.create(**fresh.sdk_options)
    with pytest.raises(AuthenticationException):
        sandbox.commands.run("true")
    with pytest.raises(AuthenticationException):
        sandbox.files.read("/etc/hostname")


@contract("1.8/probe", "4/health")
def test_a_stream_that_breaks_makes_the_sdk_ask_for_health(accounts):
    """The agent dies under a command: the SDK asks /health, finds nobody, and says so."""
    from harness.planes import alone

    agent, plane = alone(accounts)
    sandbox = Sandbox.create(**plane.sdk_options)
    assert sandbox.is_running() is True
    killer = threading.Timer(0.3, agent.process.kill)
    killer.start()
    with pytest.raises(Exception) as failure:
        sandbox.commands.run("sleep 5")
    assert not isinstance(failure.value, CommandExitException)
    killer.join()
    wait_until(lambda: agent.process.poll() is not None, within=5, what="the agent is gone")
    plane.close()
    agent.close()


@contract("1.8/resource_exhausted")
def test_a_rate_limit_is_told_as_one():
    """No agent needed: what the SDK makes of the code that guestd answers when a resource is exhausted."""
    from connectrpc.code import Code
    from connectrpc.errors import ConnectError
    from e2b import RateLimitException
    from e2b.envd.rpc import handle_rpc_exception

    assert isinstance(handle_rpc_exception(ConnectError(Code.RESOURCE_EXHAUSTED, "x")), RateLimitException)
