"""Commands through the E2B SDK, as its users run them."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    Sandbox,
    TimeoutException,
)

from harness.processes import wait_until


def test_output_and_exit_code_come_back(sandbox):
    done = sandbox.commands.run("echo out; echo err >&2")
    assert (done.stdout, done.stderr, done.exit_code, done.error) == ("out\n", "err\n", 0, None)


@pytest.mark.parametrize("code", [1, 3, 127, 255])
def test_a_failure_is_raised_with_its_code_and_output(sandbox, code):
    with pytest.raises(CommandExitException) as failure:
        sandbox.commands.run(f"echo out; echo err >&2; exit {code}")
    assert (failure.value.exit_code, failure.value.stdout, failure.value.stderr) == (code, "out\n", "err\n")
    assert failure.value.error == f"exit status {code}"


def test_a_signalled_command_says_so(sandbox):
    with pytest.raises(CommandExitException) as failure:
        sandbox.commands.run("kill -TERM $$")
    assert (failure.value.exit_code, failure.value.error) == (-1, "signal: terminated")


def test_commands_run_as_user_in_its_home(sandbox):
    assert sandbox.commands.run("id -un; pwd; echo $HOME $USER $LOGNAME").stdout == "user\n/home/user\n/home/user user user\n"


def test_root_is_there_by_name_and_by_sudo(sandbox):
    assert sandbox.commands.run("id -un; pwd", user="root").stdout == "root\n/root\n"
    assert sandbox.commands.run("sudo -n id -un").stdout == "root\n"


def test_an_unknown_user_is_an_authentication_error(sandbox):
    with pytest.raises(AuthenticationException):
        sandbox.commands.run("true", user="nosuchuser")


@pytest.mark.parametrize("cwd", ["/no/such/folder", "/etc/hostname", "/root"])
def test_a_folder_that_cannot_be_entered_is_an_invalid_argument(sandbox, cwd):
    with pytest.raises(InvalidArgumentException):
        sandbox.commands.run("true", cwd=cwd)


@pytest.mark.parametrize("cwd, real", [("/tmp", "/tmp"), ("~", "/home/user"), ("work", "/home/user/work")])
def test_a_folder_is_absolute_or_below_home(sandbox, cwd, real):
    sandbox.files.make_dir("work")
    assert sandbox.commands.run("pwd", cwd=cwd).stdout == f"{real}\n"


def test_environments_of_create_and_run_meet(containers):
    sandbox = Sandbox.create(envs={"A": "create", "B": "create"}, **containers.sdk())
    odd = "quote ' \" $HOME \n newline"
    assert sandbox.commands.run('printf "%s|%s|%s" "$A" "$B" "$C"', envs={"B": "run", "C": odd}).stdout == f"create|run|{odd}"


def test_output_arrives_while_the_command_runs(sandbox):
    arrived = []
    sandbox.commands.run("echo a; sleep 1; echo b", on_stdout=lambda text: arrived.append((text, time.monotonic())))
    assert [text for text, _ in arrived] == ["a\n", "b\n"]
    assert arrived[1][1] - arrived[0][1] > 0.7


def test_50_mebibytes_of_output_arrive_whole(sandbox):
    done = sandbox.commands.run("head -c 52428800 /dev/zero | tr '\\0' x; echo end >&2", timeout=120)
    assert len(done.stdout) == 50 << 20
    assert done.stdout.count("x") == 50 << 20
    assert done.stderr == "end\n"


def test_many_commands_at_once_do_not_mix(sandbox):
    def run(n: int) -> str:
        return sandbox.commands.run(f"for i in 1 2 3; do echo {n}; sleep 0.1; done").stdout

    with ThreadPoolExecutor(30) as pool:
        answers = list(pool.map(run, range(90)))
    assert answers == [f"{n}\n" * 3 for n in range(90)]


def test_input_is_fed_to_a_command_and_closed(sandbox):
    command = sandbox.commands.run("while read line; do echo got $line; done; echo end", background=True, stdin=True)
    command.send_stdin("one\n")
    sandbox.commands.send_stdin(command.pid, "two\n")
    command.close_stdin()
    assert command.wait().stdout == "got one\ngot two\nend\n"


def test_a_large_input_is_not_lost(sandbox):
    command = sandbox.commands.run("sha256sum", background=True, stdin=True)
    for n in range(16):
        command.send_stdin(str(n) * 65_536)
    command.close_stdin()
    sent = "".join(str(n) * 65_536 for n in range(16)).encode()
    assert command.wait().stdout.split()[0] == hashlib.sha256(sent).hexdigest()


def test_kill_is_true_once_and_false_after(sandbox):
    command = sandbox.commands.run("sleep 100", background=True)
    assert command.kill() is True
    with pytest.raises(CommandExitException):
        command.wait()
    with pytest.raises(CommandExitException):
        sandbox.commands.run(f"kill -0 {command.pid}")
    assert sandbox.commands.kill(command.pid) is False


def test_a_running_command_is_listed_and_can_be_joined(sandbox):
    command = sandbox.commands.run("sleep 1; echo joined", background=True)
    assert command.pid in [found.pid for found in sandbox.commands.list()]
    joined = sandbox.commands.connect(command.pid)
    assert joined.wait().stdout == "joined\n"
    assert command.wait().stdout == "joined\n"
    wait_until(lambda: command.pid not in [p.pid for p in sandbox.commands.list()], within=3, what="it is off the list")


def test_joining_nobody_is_not_found(sandbox):
    with pytest.raises(NotFoundException):
        sandbox.commands.connect(4_000_000)


def test_a_timeout_ends_the_wait_and_the_command(sandbox):
    with pytest.raises(TimeoutException):
        sandbox.commands.run("sleep 77", timeout=1)
    gone = "! pgrep -f 'sleep 7[7]'"
    wait_until(lambda: not _fails(sandbox, gone), within=5, what="the command is dead")


def test_a_command_survives_its_client(sandbox):
    command = sandbox.commands.run("sleep 88", background=True, timeout=0)
    command.disconnect()
    time.sleep(1)
    assert command.pid in [found.pid for found in sandbox.commands.list()]


def test_a_daemon_does_not_hold_the_command_that_started_it(sandbox):
    began = time.monotonic()
    assert sandbox.commands.run("sleep 30 & echo started").stdout == "started\n"
    assert time.monotonic() - began < 10


def test_what_the_guest_image_promises_is_there(sandbox):
    tools = "bash python3 git ps ip curl sudo sha256sum"
    sandbox.commands.run(f"for tool in {tools}; do command -v $tool || exit 1; done; test -s /etc/ssl/certs/ca-certificates.crt")


def _fails(sandbox, command: str) -> bool:
    try:
        sandbox.commands.run(command)
    except CommandExitException:
        return True
    return False
