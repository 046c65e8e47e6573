"""The rows of the wire contract (envd.md sections 1 to 5) that a client can meet, and which cases cover each.

A row's id is its section and a word: `1.10/sendsignal-finished`. A case names its rows with `@pytest.mark.contract(...)`; rows without a
case are in `WITHOUT`, each with its reason. `python -m pytest tests/conformance --contract-map` prints the whole map.
"""

ROWS = {
    # 0 and 4: routes and versions
    "0/port": "HTTP/1.1 keep-alive on the envd port",
    "0/version": "the version that /init reports and --version prints is plain semver",
    "0/default-user": "root until /init sets a default user",
    # 1.1 methods
    **{
        f"1.1/{name}": f"/process.Process/{name}"
        for name in ("List", "Start", "Connect", "Update", "StreamInput", "SendInput", "SendSignal", "CloseStdin")
    },
    **{
        f"1.1/{name}": f"/filesystem.Filesystem/{name}"
        for name in (
            "Stat",
            "MakeDir",
            "Move",
            "ListDir",
            "Remove",
            "WatchDir",
            "CreateWatcher",
            "GetWatcherEvents",
            "RemoveWatcher",
        )
    },
    # 1.2 process messages
    "1.2/PTY": "size.cols=1, size.rows=2",
    "1.2/ProcessConfig": "cmd=1, args=2, envs=3, cwd=4",
    "1.2/ProcessInfo": "config=1, pid=2, tag=3",
    "1.2/StartRequest": "process=1, pty=2, tag=3, stdin=4 (absent: enabled)",
    "1.2/StartEvent": "pid=1",
    "1.2/DataEvent": "stdout=1, stderr=2, pty=3",
    "1.2/EndEvent": "exit_code=1 sint32, exited=2, status=3, error=4",
    "1.2/KeepAlive": "an empty message",
    "1.2/ProcessInput": "stdin=1, pty=2",
    "1.2/StreamInputRequest": "start=1, data=2 {input=2}, keepalive=3",
    "1.2/Signal": "SIGTERM 15, SIGKILL 9",
    "1.2/ProcessSelector": "pid=1, tag=2",
    # 1.3 filesystem messages
    "1.3/Move": "source=1, destination=2, entry=1",
    "1.3/MakeDir": "path=1, entry=1",
    "1.3/Remove": "path=1, empty reply",
    "1.3/Stat": "path=1, entry=1",
    "1.3/ListDir": "path=1, depth=2, entries=1",
    "1.3/EntryInfo": "the twelve fields with their numbers",
    "1.3/FileType": "FILE 1, DIRECTORY 2; SYMLINK never",
    "1.3/WatchDirRequest": "path=1, recursive=2, include_entry=3, allow_network_mounts=4",
    "1.3/WatchDirResponse": "start=1, filesystem=2, keepalive=3",
    "1.3/FilesystemEvent": "name=1, type=2, entry=3",
    "1.3/Watcher": "watcher_id=1, events=1",
    # 1.4 codecs
    "1.4/python": "e2b Python: JSON, Connect-Timeout-Ms on unary calls too",
    "1.4/older-python": "older e2b, novita, ppio: identity encodings named",
    "1.4/js": "e2b JavaScript: JSON, no timeout header on unary calls",
    "1.4/proto": "binary proto, unary and stream",
    "1.4/gzip": "gzip-compressed unary bodies and stream messages",
    "1.4/no-get": "Connect GET is not enabled",
    # 1.5 JSON rules
    "1.5/camel": "output names are lowerCamelCase",
    "1.5/snake": "input accepts both spellings",
    "1.5/unknown": "unknown input fields are discarded",
    "1.5/int64": "int64 is a string",
    "1.5/uint": "uint32 is a number, a string is accepted",
    "1.5/bytes-out": "bytes are standard base64 with padding",
    "1.5/bytes-in": "URL-safe and unpadded base64 is accepted",
    "1.5/enum-out": "enums are names",
    "1.5/enum-in": "enum numbers are accepted",
    "1.5/defaults": "default values are left out",
    "1.5/optional": "optional fields are there when set, even if empty",
    "1.5/timestamp": "RFC 3339 UTC with Z, 0, 3, 6 or 9 digits",
    "1.5/oneof": "only the chosen member",
    # 1.6 framing
    "1.6/envelope": "flags, big-endian length, payload",
    "1.6/end-frame": "0x02 and always JSON: {} or error",
    "1.6/status": "a stream is 200 even if it fails at once",
    "1.6/content-type": "the response echoes the codec",
    "1.6/415": "another content type: 415 with Accept-Post",
    "1.6/405": "another HTTP method: 405",
    "1.6/one-flush": "header and payload of a frame leave together",
    "1.6/flush": "each frame leaves at once",
    "1.6/buffering": "X-Accel-Buffering: no on server streams",
    "1.6/client-stream": "StreamInput sends many, the reply comes after the end",
    "1.6/malformed": "a frame that is no frame is refused, and the connection's neighbours live",
    # 1.7 codes
    **{
        f"1.7/{code}": f"HTTP {status}"
        for code, status in (
            ("canceled", 499),
            ("unknown", 500),
            ("invalid_argument", 400),
            ("deadline_exceeded", 504),
            ("not_found", 404),
            ("already_exists", 409),
            ("permission_denied", 403),
            ("resource_exhausted", 429),
            ("failed_precondition", 400),
            ("unauthenticated", 401),
            ("aborted", 409),
            ("out_of_range", 400),
            ("unimplemented", 501),
            ("internal", 500),
            ("unavailable", 503),
            ("data_loss", 500),
        )
    },
    "1.7/body": "JSON code and message, application/json",
    "1.7/unknown-procedure": "404",
    # 1.8 SDK mapping
    **{
        f"1.8/{name}": text
        for name, text in (
            ("invalid_argument", "InvalidArgument"),
            ("unauthenticated", "Authentication"),
            ("not_found", "NotFound"),
            ("file-not-found", "FileNotFound on filesystem calls"),
            ("kill-false", "kill of nobody is False"),
            ("exists-false", "exists of nothing is False"),
            ("connect", "connect(pid) of nobody is NotFound"),
            ("already_exists", "make_dir returns False"),
            ("resource_exhausted", "RateLimit"),
            ("unavailable", "Timeout: sandbox not found"),
            ("deadline_exceeded", "Timeout"),
            ("others", "SandboxException code: message"),
            ("http-bodies", "non-Connect bodies by status"),
            ("probe", "GET /health after a broken stream"),
        )
    },
    # 1.9 legacy
    "1.9/entries": "User-Agent connect-python: EntryInfo is name, type, path",
    "1.9/events": "events are name, type",
    "1.9/process": "process replies in their old shape",
    "1.9/header": "X-E2B-Legacy-SDK: true",
    # 1.10 errors
    **{
        f"1.10/{name}": text
        for name, text in (
            ("basic-unknown", "invalid username: '<u>'"),
            ("default-user", "invalid default user: '<u>'"),
            ("pid", "process with pid <n> not found"),
            ("tag", "process with tag <t> not found"),
            ("selector", "unimplemented: invalid input type"),
            ("cwd-missing", "cwd '<path>' does not exist"),
            ("cwd-home", "cannot expand user-specific home dir"),
            ("spawn", "error starting process '<cmd args>': <os error>"),
            ("spawn-pty", "error starting pty with command"),
            ("timeout-header", "malformed Connect-Timeout-Ms"),
            ("deadline", "deadline_exceeded"),
            ("stdin-closed", "error writing to stdin: stdin not enabled or closed"),
            ("stdin-broken", "broken pipe"),
            ("wrong-channel", "the message says which channel to use"),
            ("no-input", "invalid input type"),
            ("streaminput-event", "invalid event type"),
            ("streaminput-order", "data before start: failed_precondition"),
            ("streaminput-broken", "error streaming input"),
            ("signal", "invalid signal"),
            ("signal-finished", "error sending signal: os: process already finished"),
            ("update", "error resizing tty: tty not assigned to process"),
            ("closestdin-pty", "cannot close stdin for PTY process"),
            ("closestdin-again", "closing twice is fine"),
            ("watch-missing", "path … not found"),
            ("watch-file", "path … not a directory"),
            ("watch-network", "cannot watch path on network filesystem"),
            ("watcher", "watcher with id <id> not found"),
            ("frozen", "0.9: target cgroup frozen: unavailable"),
            ("exhausted", "0.9: EAGAIN and friends: resource_exhausted"),
            ("missing-program", "start, then end with 127"),
        )
    },
    # 2 processes
    "2.1/basic": "Basic auth names the user, the password is ignored",
    "2.1/everywhere": "an unknown user is refused on every route",
    "2.1/default": "without it the default user",
    "2.1/numeric": "numeric ids are not accepted",
    "2.1/groups": "supplementary groups come from /etc/group",
    "2.1/rest": "REST uses the query parameter username",
    "2.2/oom": "oom_score_adj 100",
    "2.2/nice": "nice 0",
    "2.2/ioprio": "best-effort 4",
    "2.2/127": "a missing binary exits 127",
    "2.2/126": "a non-executable exits 126",
    "2.2/pid": "the start event's pid is the command's own",
    "2.2/ids": "uid, gid and groups are the user's",
    "2.2/pty-session": "a pty process leads a session with the tty",
    "2.2/path": "the executable is found with the final PATH",
    "2.2/cgroup": "placed in user or ptys at clone time; _system stays",
    "2.3/base": "PATH, HOME, USER, LOGNAME",
    "2.3/sandbox": "E2B_SANDBOX, E2B_SANDBOX_ID, E2B_TEMPLATE_ID",
    "2.3/init": "variables of /init",
    "2.3/request": "variables of the request win",
    "2.3/nothing-else": "no TERM, SHELL, LANG",
    "2.3/login": "a login bash keeps the request's variables",
    "2.4/empty": "defaultWorkdir, else home",
    "2.4/tilde": "~ and ~/x",
    "2.4/relative": "below home",
    "2.4/absolute": "as given",
    "2.4/link": "a link to a folder counts as one",
    "2.4/missing": "refused before the spawn",
    "2.4/denied": "an unreadable folder is an error",
    "2.5/stdin-open": "stdin absent or true: a pipe",
    "2.5/stdin-false": "stdin false: /dev/null",
    "2.5/pty": "pty: winsize, stdin field ignored, pty data only",
    "2.5/resize": "Update is seen by a program that runs",
    "2.6/order": "start, data, one end, end frame",
    "2.6/bytes": "output is bytes, cut anywhere",
    "2.6/channels": "stdout and stderr each in their order",
    "2.6/end-after-output": "all output is before the end",
    "2.7/exit-0": "exit 0",
    "2.7/exit-n": "exit N",
    "2.7/signal": "signal: <Go's name>",
    "2.7/core": "(core dumped)",
    "2.7/readopted": "after a live upgrade",
    "2.8/fan-out": "any number of subscribers",
    "2.8/no-replay": "Connect shows only new output",
    "2.8/disconnect": "a client that goes does not kill",
    "2.8/retained": "the end is kept for 30 s, then not_found",
    "2.8/reuse": "a new Start with the tag replaces the retained end",
    "2.8/first": "Connect's first event is start",
    "2.9/interval": "Keepalive-Ping-Interval in seconds",
    "2.9/default": "unparsable, zero and negative are the default",
    "2.9/restart": "the timer restarts on data",
    "2.10/start": "deadline on Start: deadline_exceeded and SIGKILL",
    "2.10/client-gone": "even when the client is gone",
    "2.10/connect": "on Connect the stream ends, the process lives",
    "2.10/zero": "0 and absent: none",
    "2.10/unary": "on unary calls a request deadline",
    "2.11/kill": "after SIGKILL the pid is gone soon",
    "2.11/term": "SIGTERM",
    "2.11/list": "Connect, kill, drain: the list is empty",
    "2.12/all": "all users' processes with config, pid, tag",
    "2.12/same-tag": "tags need not be unique",
    "2.13/groups": "cgroup weights and limits",
    # 3 filesystem
    "3.1/empty": "default workdir, else home",
    "3.1/tilde": "~, ~/x",
    "3.1/other-home": "~name is invalid_argument",
    "3.1/relative": "below home",
    "3.1/absolute": "as given",
    "3.2/stat-missing": "file not found",
    "3.2/list-order": "pre-order, bytewise",
    "3.2/list-depth": "0 is 1",
    "3.2/list-link": "the base may be a link; the path stays the requested",
    "3.2/list-links": "links are not followed",
    "3.2/list-missing": "path not found",
    "3.2/list-cyclic": "failed_precondition",
    "3.2/list-file": "path is not a directory",
    "3.2/mkdir": "mkdir -p 0755, owned by the user",
    "3.2/mkdir-exists": "directory already exists",
    "3.2/mkdir-file": "invalid_argument",
    "3.2/move": "parents are made, a file is replaced",
    "3.2/move-missing": "source file not found",
    "3.2/move-nonempty": "onto a folder with content: refused",
    "3.2/remove": "recursive; missing is success",
    "3.3/name": "last component",
    "3.3/path": "expanded path as requested",
    "3.3/type": "file, directory, link by target, else unspecified",
    "3.3/mode": "permission bits; a link's are its target's",
    "3.3/permissions": "Go's text of the entry itself",
    "3.3/size": "lstat size as a string",
    "3.3/owner": "names, else ids",
    "3.3/modified": "mtime",
    "3.3/symlink-target": "fully resolved; own path when broken",
    "3.3/metadata": "user.e2b.* attributes",
    "3.3/is-symlink": "true for links",
    "3.4/mapping": "create, write, remove, rename, chmod",
    "3.4/name": "relative to the root, . for itself",
    "3.4/recursive": "the whole tree, new folders too",
    "3.4/entry": "include_entry for create, write, chmod",
    "3.4/network": "network mounts are refused",
    "3.4/stream": "WatchDir: start first, ends on timeout",
    "3.4/id": "w and 20 of [a-z0-9]",
    "3.4/drain": "GetWatcherEvents returns and clears",
    "3.4/upload-3": "a fresh upload: CREATE, CHMOD, WRITE",
    "3.4/nested": "MakeDir then upload in it at once",
    "3.4/overflow": "queue overflow",
    "3.5/created": "user's uid and gid, 0755 and 0644",
    "3.5/existing": "existing folders keep their owner, an overwritten file is chowned",
    # 4 REST
    "4/error-body": "{code, message} and nosniff",
    "4/binding": "a query that means nothing: 400 text/plain",
    "4/unknown-path": "404",
    "4/wrong-method": "405, HEAD too",
    "4/health": "204, no-store, no auth",
    "4.1/preflight": "204 before auth",
    "4.1/headers": "origin *, exposed headers, max-age",
    "4.2/metrics": "the fields",
    "4.2/no-store": "Cache-Control",
    "4.3/env": "envVars replace; absent leaves",
    "4.3/protected": "internal variables cannot be replaced",
    "4.3/token": "set, cleared, refused",
    "4.3/token-form": "empty or escaped: 400",
    "4.3/timestamp": "older: 204 and nothing applied",
    "4.3/user": "defaultUser, defaultWorkdir",
    "4.3/hyperloop": "hyperloopIP",
    "4.3/ca": "caBundle",
    "4.3/nfs": "volumeMounts",
    "4.3/lifecycle": "lifecycleID",
    "4.3/400": "bad JSON",
    "4.3/401": "the two texts",
    "4.3/503": "busy",
    "4.3/headers": "X-Envd-Version, no-store",
    "4.3/empty": "an empty body is valid",
    "4.3/mmds": "Firecracker's metadata",
    "4.4/envs": "name to value",
    "4.5/auth": "401 JSON",
    "4.5/user": "unknown user: 401 with its text",
    "4.5/path": "bad path form: 400",
    "4.5/missing": "404 path '<p>' does not exist",
    "4.5/directory": "400 path '<p>' is a directory",
    "4.5/406": "every encoding refused",
    "4.5/headers": "Vary, Content-Disposition, Last-Modified, Content-Type",
    "4.5/range": "206 and 416",
    "4.5/conditions": "304, If-Range",
    "4.5/gzip": "by Accept-Encoding",
    "4.5/procfs": "size 0 per stat",
    "4.6/multipart": "file parts with folders in their names",
    "4.6/path-wins": "path query over the part's name",
    "4.6/twice": "the same path twice: 400",
    "4.6/other-fields": "ignored",
    "4.6/octets": "application/octet-stream",
    "4.6/media": "unsupported content type",
    "4.6/gzip": "Content-Encoding",
    "4.6/metadata": "X-Metadata-<key>",
    "4.6/metadata-bad": "400 before any write",
    "4.6/reply": "200 JSON array",
    "4.6/400": "directory, no path",
    "4.6/401": "user",
    "4.6/507": "no space",
    "4.6/500": "malformed multipart, a parent is a file",
    "4.6/empty-file": "0 bytes",
    "4.6/parents": "mkdir -p",
    "4.7/compose": "concatenate, rename, delete the sources",
    "4.7/400": "its refusals",
    "4.7/401": "unknown user",
    "4.7/404": "source missing",
    "4.7/token": "needs the access token",
    "4.8/host-only": "refused to everybody but the host",
    "4.8/freeze": "what it does",
    "4.9/host-only": "refused to everybody but the host",
    "4.9/fsfreeze": "what it does",
    "4.10/host-only": "refused to everybody but the host",
    "4.10/collapse": "its reply",
    "4.11/host-only": "refused to everybody but the host",
    "4.11/upgrade": "live self-replacement",
    # 5 auth
    "5/open": "no token set: everything open",
    "5/token": "X-Access-Token must equal",
    "5/exempt": "/health, /files, /init",
    "5/failure": "the 401's text, on RPC too",
    "5/basic": "identity, not authentication",
    "5/upgrade": "after a live upgrade, before /init",
    "5/traffic": "checked by the proxy",
    "5/signature": "v1_ and unpadded SHA-256",
    "5/vector": "the given vector",
    "5/header-first": "a wrong header is refused whatever the signature",
    "5/missing": "missing signature query parameter",
    "5/invalid": "invalid signature",
    "5/expired": "signature is already expired, exact body",
    # 8 and 10, as far as they meet the agent
    "8.1/gates": "the version opens every gate of the SDKs",
    "8.2/headers": "what the SDKs send changes nothing",
    "8.3/debug": "E2B_DEBUG and E2B_SANDBOX_URL",
    "10/old-proto": "novita and ppio: unknown fields ignored, no FILE_TYPE_SYMLINK",
    "10/headers": "their headers",
    "10/parser": "whole frames",
    "10/retries": "complete answers, never a dropped connection after acting",
    "12/accel": "X-Accel-Buffering",
}

WITHOUT = {
    "1.7/canceled": "a client that cancels does not read the answer",
    "1.7/aborted": "no method of the contract answers it",
    "1.7/out_of_range": "no method of the contract answers it",
    "1.7/data_loss": "no method of the contract answers it",
    "1.7/unavailable": "only while a cgroup is frozen or the agent stops: the host's side, see 4.8/freeze",
    "1.8/unavailable": "hostd's answer, not the agent's: tests/api/test_proxy_answers.py",
    "1.10/frozen": "freezing is the host's and would stop the machine under the tests; the agent's own tests freeze groups they made",
    "2.13/groups": "server side: no client can ask for a cgroup's weights; src/guestd's own tests",
    "3.4/overflow": "envd ends the watcher, which is weakness 19: tests/conformance/test_weaknesses.py tries it",
    "4.3/ca": "writes the trust store of the machine under the tests; the agent's own tests use a root of their own",
    "4.3/nfs": "needs an NFS server",
    "4.3/hyperloop": "writes /etc/hosts of the machine under the tests",
    "4.3/503": "only while another call holds the lock for longer than the client waits: not to be forced from outside",
    "4.3/mmds": "only in Firecracker",
    "4.8/freeze": "the host's alone, and it would stop the machine under the tests; refusals are covered",
    "4.9/fsfreeze": "the host's alone, and it would stop the disk under the tests; refusals are covered",
    "4.10/collapse": "the host's alone; refusals are covered",
    "5/traffic": "checked by hostd's proxy: tests/api/test_proxy_routing.py",
}


def cases_by_row(items) -> dict[str, list[str]]:
    """The collected cases of each row, a case counted once for all its planes."""
    found: dict[str, list[str]] = {}
    for item in items:
        for marker in item.iter_markers("contract"):
            for row in marker.args:
                names = found.setdefault(row, [])
                name = case_name(item)
                if name not in names:
                    names.append(name)
    return found


def case_name(item) -> str:
    """File and name without the plane: `test_processes.py::test_x[exit-3]`."""
    call = getattr(item, "callspec", None)
    name = item.name
    if call and "plane" in call.params:
        words = [word for word in call.id.split("-")]
        words.remove(call.params["plane"])
        name = f"{item.originalname}[{'-'.join(words)}]" if words else item.originalname
    return f"{item.path.name}::{name}"


def count(items) -> tuple[int, int]:
    """How many cases there are, and how many of them also run through hostd."""
    cases = {case_name(item) for item in items if item.get_closest_marker("contract")}
    machines = {
        case_name(item) for item in items if item.get_closest_marker("contract") and item.get_closest_marker("through_hostd")
    }
    return len(cases), len(machines)


def render(found: dict[str, list[str]]) -> str:
    lines = []
    for row, text in ROWS.items():
        lines.append(f"{row}  {text}")
        if row in found:
            lines += [f"    {name}" for name in found[row]]
        else:
            lines.append(f"    none: {WITHOUT.get(row, 'NO CASE AND NO REASON')}")
    lines.append(
        f"{len(ROWS)} rows, {sum(row in found for row in ROWS)} with cases, {sum(row in WITHOUT for row in ROWS)} with a reason"
    )
    return "\n".join(lines)
