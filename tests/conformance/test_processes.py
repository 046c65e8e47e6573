"""Sections 1.2, 2.1 to 2.7: who runs what where, with which environment, and what the end says."""

import os
import re
import resource
import time

import pytest

from harness.connect import Stream
from harness.planes import HOME, b64, basic

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
CODECS = pytest.mark.parametrize("codec", ["json", "proto"])


# --- what a start and its end look like, in both codecs ---


@hosted
@CODECS
@contract("1.1/Start", "1.2/StartEvent", "1.2/EndEvent", "2.7/exit-0", "1.5/defaults", "2.6/order")
def test_success_is_start_end_and_end_frame_without_default_values(plane, codec):
    ran = plane.start("/bin/true", codec=codec)
    assert ran.order == ["start", "end", "end frame"]
    assert ran.pid > 1
    assert {**ran.end, "record": None} == {"exited": True, "status": "exit status 0", "record": None}
    assert ran.error is None


@CODECS
@pytest.mark.parametrize("code", [1, 2, 127, 255])
@contract("2.7/exit-n", "1.2/EndEvent", "1.4/proto")
def test_a_failure_says_its_code_twice(plane, codec, code):
    end = plane.start("/bin/sh", "-c", f"exit {code}", codec=codec).end
    end.pop("record", None)
    assert end == {"exitCode": code, "exited": True, "status": f"exit status {code}", "error": f"exit status {code}"}


@CODECS
@pytest.mark.parametrize(
    "name, text",
    [
        ("HUP", "hangup"),
        ("INT", "interrupt"),
        ("QUIT", "quit"),
        ("ILL", "illegal instruction"),
        ("TRAP", "trace/breakpoint trap"),
        ("ABRT", "aborted"),
        ("BUS", "bus error"),
        ("FPE", "floating point exception"),
        ("KILL", "killed"),
        ("USR1", "user defined signal 1"),
        ("SEGV", "segmentation fault"),
        ("USR2", "user defined signal 2"),
        ("PIPE", "broken pipe"),
        ("ALRM", "alarm clock"),
        ("TERM", "terminated"),
    ],
)
@contract("2.7/signal", "1.2/EndEvent")
def test_a_signal_is_named_as_go_names_it(plane, codec, name, text):
    end = plane.start("/bin/sh", "-c", f"ulimit -c 0; kill -{name} $$", codec=codec).end
    end.pop("record", None)
    # Where cores go to a program, the kernel marks the end as dumped in spite of the limit of 0.
    said = f"signal: {text}"
    assert end["exitCode"] == -1
    assert "exited" not in end
    assert end["status"] in (said, f"{said} (core dumped)")
    assert end["error"] == end["status"]


@contract("2.7/core")
def test_a_dumped_core_is_told(plane, box):
    """Only where the kernel writes cores as files does this say more than `signal`."""
    pattern = plane.sh("cat /proc/sys/kernel/core_pattern").strip()
    if pattern.startswith(("|", "/")):
        pytest.skip(f"a dumped core was not tested: cores go to {pattern} here")
    end = plane.start("/bin/bash", "-c", "ulimit -c unlimited; kill -ABRT $$", cwd=box).end
    assert end["status"] == end["error"] == "signal: aborted (core dumped)"


@hosted
@contract("2.2/127", "1.10/missing-program")
@pytest.mark.parametrize("program", ["/no/such/program", "no-such-program"])
def test_a_missing_program_starts_and_exits_127_with_words_on_stderr(plane, program):
    ran = plane.start(program)
    assert ran.order[0] == "start" and ran.pid > 1
    assert ran.exit_code == 127
    assert program in ran.stderr.decode()


@hosted
@contract("2.2/126")
def test_a_file_that_is_not_executable_exits_126(plane, box):
    plane.put(f"{box}/script", "#!/bin/sh\n", mode="644")
    ran = plane.start(f"{box}/script")
    assert (ran.order[0], ran.exit_code) == ("start", 126)
    assert "script" in ran.stderr.decode()


@hosted
@contract("2.2/pid")
def test_the_pid_of_the_start_event_is_the_commands_own(plane):
    ran = plane.start("/bin/sh", "-c", "echo $$")
    assert int(ran.stdout) == ran.pid


@hosted
@contract("2.2/path")
def test_the_program_is_found_with_the_requests_path(plane, box):
    plane.put(f"{box}/conformance-tool", "#!/bin/sh\necho found\n", mode="755")
    assert plane.start("conformance-tool", envs={"PATH": f"{box}:/usr/bin:/bin"}).stdout == b"found\n"


@pytest.mark.parametrize("name", ["", "a=b", "="])
@contract("1.7/invalid_argument")
def test_a_variable_that_cannot_be_is_refused_by_name(plane, name):
    ran = plane.start("/usr/bin/env", envs={"GOOD": "1", name: "x"})
    assert (ran.order, ran.error["code"]) == (["end frame"], "invalid_argument")
    assert ran.error["message"] == f'process.envs: "{name}" cannot be the name of a variable'


@hosted
@contract("2.2/oom")
def test_a_command_is_killed_before_the_agent_when_memory_runs_out(plane):
    assert plane.start("/bin/cat", "/proc/self/oom_score_adj").stdout == b"100\n"


@contract("2.2/nice")
def test_a_command_is_not_nicer_than_others(plane):
    assert plane.start("/bin/sh", "-c", "nice").stdout == b"0\n"


@contract("2.2/ioprio")
def test_a_command_has_best_effort_io_at_level_4(plane):
    ran = plane.start("/bin/sh", "-c", "command -v ionice >/dev/null || exit 9; ionice")
    if ran.exit_code == 9:
        pytest.skip("the I/O priority was not tested: no ionice here")
    assert ran.stdout in (b"best-effort: prio 4\n", b"none: prio 4\n", b"none: prio 0\n")


@pytest.mark.through_hostd(only=True)
@pytest.mark.parametrize("pty, group", [(None, "user"), ({"size": {"cols": 80, "rows": 24}}, "ptys")])
@contract("2.2/cgroup")
def test_a_command_is_in_its_control_group_from_the_start(plane, pty, group):
    ran = plane.start("/bin/cat", "/proc/self/cgroup", pty=pty)
    [line] = [line for line in (ran.stdout + ran.pty).decode().split() if line.startswith("0::")]
    assert group in line.split("/")


@pytest.mark.parametrize("room", [0, 1, 2])
@contract("1.10/exhausted", "1.7/resource_exhausted")
def test_a_machine_that_has_no_more_room_says_so_and_recovers(fresh, room):
    """So many descriptors are left, too few for the pipes: an agent of the case's own, over a connection that is already there."""
    agent = fresh.guestd.process.pid
    assert fresh.start("/bin/true", cwd="/").exit_code == 0
    # A connection that stays, and time for the closed one to go.
    fresh.process("List").ok()
    time.sleep(0.2)
    soft, hard = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{agent}/fd")) + room, hard))
    try:
        error = fresh.start("/bin/true", cwd="/").error
    finally:
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (soft, hard))
    assert error["code"] == "resource_exhausted", "and nothing about who may do what: not reading /etc/passwd is no wrong name"
    assert fresh.start("/bin/true", cwd="/").exit_code == 0


@pytest.mark.parametrize("user", [None, "user"], ids=["default", "named"])
@contract("1.10/exhausted", "1.7/resource_exhausted")
def test_an_account_that_cannot_be_read_is_no_wrong_name(fresh, user):
    """With no descriptor left, each route tells so in its own form."""
    headers = basic(user) if user else {}
    query = {"path": "/etc/hostname", **({"username": user} if user else {})}
    fresh.process("List").ok()
    time.sleep(0.2)
    agent = fresh.guestd.process.pid
    soft, hard = resource.prlimit(agent, resource.RLIMIT_NOFILE)
    resource.prlimit(agent, resource.RLIMIT_NOFILE, (len(os.listdir(f"/proc/{agent}/fd")), hard))
    try:
        stat = fresh.fs("Stat", path="/", _headers=headers)
        with fresh.begin("/bin/true", cwd="/", headers=headers) as response:
            ran = Stream(response).rest()
        file = fresh.http.get("/files", params=query, headers=headers)
    finally:
        resource.prlimit(agent, resource.RLIMIT_NOFILE, (soft, hard))
    assert stat.error[:2] == (429, "resource_exhausted")
    assert (ran.order, ran.error["code"]) == (["end frame"], "resource_exhausted")
    assert (file.status_code, file.json()["code"]) == (503, 503)


# --- who ---


@hosted
@contract("2.1/default", "0/default-user", "2.2/ids")
def test_without_a_name_a_command_is_the_default_users(plane):
    ran = plane.start("/bin/sh", "-c", "id -un; id -gn; pwd; echo $HOME $USER $LOGNAME")
    assert ran.stdout.decode() == f"user\nuser\n{HOME}\n{HOME} user user\n"


@contract("0/default-user", "2.1/default")
def test_before_init_the_default_user_is_root(fresh):
    assert fresh.start("/bin/sh", "-c", "id -u; pwd").stdout == b"0\n/root\n"


@hosted
@pytest.mark.parametrize("name, password", [("root", ""), ("root", "any:thing"), ("nobody", ""), ("daemon", "x")])
@contract("2.1/basic", "5/basic")
def test_basic_auth_names_the_user_and_the_password_is_ignored(plane, name, password):
    header = {"Authorization": f"Basic {b64(f'{name}:{password}')}"}
    assert plane.start("/usr/bin/id", "-un", cwd="/", headers=header).stdout.decode() == f"{name}\n"


@hosted
@pytest.mark.parametrize(
    "method, path",
    [
        ("POST", "/process.Process/List"),
        ("POST", "/process.Process/Start"),
        ("POST", "/filesystem.Filesystem/Stat"),
        ("GET", "/envs"),
        ("GET", "/metrics"),
        ("GET", "/health"),
        ("GET", "/files?path=/etc/hostname"),
    ],
)
@contract("2.1/everywhere", "1.10/basic-unknown", "1.7/unauthenticated")
def test_a_name_that_is_not_in_passwd_is_refused_on_every_route(plane, method, path):
    answer = plane.http.request(method, path, headers=basic("nosuchuser"), json={} if method == "POST" else None)
    assert answer.status_code == 401
    told = answer.json()
    assert told["code"] in ("unauthenticated", 401)
    assert told["message"] == "invalid username: 'nosuchuser'"


@pytest.mark.parametrize("number", ["0", "1000", "65534"])
@contract("2.1/numeric")
def test_a_number_is_not_a_name(plane, number):
    status, code, message = plane.process("List", headers=basic(number)).error
    assert (status, code, message) == (401, "unauthenticated", f"invalid username: '{number}'")


@hosted
@contract("2.1/groups", "2.2/ids")
def test_supplementary_groups_come_from_the_group_file(plane):
    wanted = plane.sh("awk -F: '$4 ~ /(^|,)user(,|$)/ {print $1}' /etc/group").split()
    assert sorted(plane.start("/usr/bin/id", "-Gn").stdout.decode().split()) == sorted({"user", *wanted})


@contract("2.1/basic")
@pytest.mark.parametrize("header", ["", "Basic", "Basic !!!", "Bearer dXNlcjo=", "Basic OnBhc3M="])
def test_a_header_that_names_nobody_leaves_the_default_user(plane, header):
    assert plane.start("/usr/bin/id", "-un", headers={"Authorization": header}).stdout == b"user\n"


@contract("1.10/default-user")
@pytest.mark.parametrize("method", ["filesystem.Filesystem/Stat", "filesystem.Filesystem/ListDir"])
def test_a_default_user_that_does_not_exist_is_told_by_every_call_that_needs_one(fresh, method):
    assert fresh.http.post("/init", json={"defaultUser": "ghost"}).status_code == 204
    status, code, message = fresh.call(method, {"path": "/"}).error
    assert (status, code, message) == (401, "unauthenticated", "invalid default user: 'ghost'")
    assert fresh.start("/bin/true").error == {"code": "unauthenticated", "message": "invalid default user: 'ghost'"}


# --- environment ---


@hosted
@contract("2.3/base", "2.3/nothing-else")
def test_the_environment_is_the_users_and_nothing_else(plane):
    told = dict(line.split("=", 1) for line in plane.start("/usr/bin/env").stdout.decode().splitlines())
    assert {name: told[name] for name in ("HOME", "USER", "LOGNAME")} == {"HOME": HOME, "USER": "user", "LOGNAME": "user"}
    assert "/bin" in told["PATH"]
    assert not {"TERM", "SHELL", "LANG", "LC_ALL", "DISPLAY"} & set(told)


@hosted
@contract("2.3/sandbox")
def test_a_command_knows_whether_it_is_in_a_sandbox(plane):
    told = plane.start("/bin/sh", "-c", "echo $E2B_SANDBOX $E2B_SANDBOX_ID $E2B_TEMPLATE_ID").stdout.decode().split()
    if plane.sandbox_id:
        assert told[0] == "true"
        assert plane.sandbox_id.startswith(told[1])
        assert len(told) == 3
    else:
        assert told == ["false"]


@contract("2.3/init", "2.3/request", "2.3/base")
def test_the_request_wins_over_init_and_init_over_the_agent(fresh):
    assert fresh.http.post("/init", json={"envVars": {"A": "init", "B": "init", "HOME": "/init"}}).status_code == 204
    ran = fresh.start("/bin/sh", "-c", "echo $A $B $HOME $USER", envs={"B": "request", "USER": "request"})
    assert ran.stdout == b"init request /init request\n"


@pytest.mark.parametrize("value", ["", "with space", "quote\"'", "new\nline", "$HOME `id`", "ünï", "a=b"])
@contract("2.3/request", "1.2/ProcessConfig")
def test_a_value_reaches_the_command_as_it_is(plane, value):
    assert plane.start("/usr/bin/printenv", "VALUE", envs={"VALUE": value}).stdout.decode() == f"{value}\n"


@hosted
@contract("2.3/login")
def test_a_login_shell_keeps_the_requests_variables(plane):
    assert plane.start("/bin/bash", "-l", "-c", "echo $MINE", envs={"MINE": "kept"}).stdout == b"kept\n"


# --- arguments and folder ---


@hosted
@CODECS
@contract("1.2/ProcessConfig")
def test_arguments_arrive_as_they_were_sent(plane, codec):
    arguments = ["", "-c", "two words", "*", "$HOME", "\\", "ünï", "a\nb", "--"]
    told = plane.start("/usr/bin/printf", "[%s]", *arguments, codec=codec).stdout.decode()
    assert told == "".join(f"[{argument}]" for argument in arguments)


@pytest.mark.parametrize(
    "cwd, real",
    [("", HOME), ("~", HOME), ("~/work", f"{HOME}/work"), ("work", f"{HOME}/work"), ("/tmp", "/tmp"), ("/tmp/../usr", "/usr")],
)
@contract("2.4/empty", "2.4/tilde", "2.4/relative", "2.4/absolute")
def test_a_folder_is_absolute_below_home_or_home_itself(plane, cwd, real):
    plane.sh(f"install -d -o user -g user {HOME}/work")
    assert plane.start("/bin/pwd", "-P", cwd=cwd).stdout.decode() == f"{real}\n"


@contract("2.4/empty", "4.3/user")
def test_an_empty_folder_is_the_default_one_and_a_relative_one_is_below_home(fresh):
    assert fresh.http.post("/init", json={"defaultUser": "user", "defaultWorkdir": "/usr"}).status_code == 204
    assert fresh.start("/bin/pwd").stdout == b"/usr\n"
    assert fresh.start("/bin/pwd", cwd="~").stdout.decode() == f"{HOME}\n"


@hosted
@contract("2.4/link")
def test_a_link_to_a_folder_is_entered(plane, box):
    plane.sh(f"mkdir {box}/real && ln -s real {box}/link")
    assert plane.start("/bin/pwd", "-P", cwd=f"{box}/link").stdout.decode() == f"{box}/real\n"


@CODECS
@pytest.mark.parametrize(
    "cwd, said", [("/no/such/folder", "/no/such/folder"), ("~/none", f"{HOME}/none"), ("none", f"{HOME}/none")]
)
@contract("2.4/missing", "1.10/cwd-missing", "1.7/invalid_argument", "1.6/status")
def test_a_missing_folder_is_told_with_its_full_path(plane, codec, cwd, said):
    ran = plane.start("/bin/true", cwd=cwd, codec=codec)
    assert ran.order == ["end frame"]
    assert ran.error == {"code": "invalid_argument", "message": f"cwd '{said}' does not exist"}


@hosted
@contract("1.10/cwd-home")
def test_another_users_home_is_not_a_folder_to_start_in(plane):
    error = plane.start("/bin/true", cwd="~root/x").error
    assert error["code"] == "invalid_argument"
    assert "cannot expand user-specific home dir" in error["message"]


@hosted
@pytest.mark.parametrize("kind", ["file", "denied"])
@contract("2.4/denied", "1.10/spawn")
def test_a_folder_that_cannot_be_entered_is_an_invalid_argument(plane, box, kind):
    if kind == "file":
        plane.put(f"{box}/place")
    else:
        plane.sh(f"install -d -m 700 {box}/place")
    error = plane.start("/bin/echo", "hi", cwd=f"{box}/place").error
    assert error["code"] == "invalid_argument"
    reason = {"file": "(?i)not a directory", "denied": "(?i)permission denied"}[kind]
    assert re.search(reason, error["message"])
    assert error["message"].startswith("error starting process '/bin/echo hi': ")


# --- output ---


@hosted
@CODECS
@contract("1.2/DataEvent", "2.6/channels", "2.6/end-after-output", "1.5/bytes-out")
def test_each_channel_keeps_its_order_and_comes_before_the_end(plane, codec):
    ran = plane.start("/bin/bash", "-c", "for n in 1 2 3; do echo o$n; echo e$n >&2; done", codec=codec)
    assert (ran.stdout, ran.stderr) == (b"o1\no2\no3\n", b"e1\ne2\ne3\n")
    assert ran.order[0] == "start" and ran.order[-2:] == ["end", "end frame"]
    assert set(ran.order[1:-2]) == {"data"}


@hosted
@contract("2.6/bytes")
@pytest.mark.parametrize("script, out", [("printf '\\377\\376\\000x'", b"\xff\xfe\0x"), ("printf 'no newline'", b"no newline")])
def test_output_is_bytes_not_lines_or_text(plane, script, out):
    assert plane.start("/bin/bash", "-c", script).stdout == out


@contract("2.6/bytes")
def test_a_character_cut_between_chunks_arrives_whole(plane):
    script = "head -c 8191 /dev/zero | tr '\\0' a; printf '\\303'; sleep 0.2; printf '\\244'"
    assert plane.start("/bin/bash", "-c", script).stdout == b"a" * 8191 + "ä".encode()


@hosted
@contract("2.6/end-after-output")
def test_a_megabyte_written_just_before_the_exit_is_all_there(plane):
    ran = plane.start("/bin/bash", "-c", "head -c 1048576 /dev/zero; exit 4")
    assert (len(ran.stdout), ran.exit_code) == (1 << 20, 4)
