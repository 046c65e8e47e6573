"""The Connect protocol to the byte: SDK parsers differ, so frames, statuses and content types are exact."""

import gzip
import json
import re
import socket
from pathlib import Path

import httpx
import pytest

from harness.connect import (
    COMPRESSED,
    END,
    JSON_STREAM,
    PROTO_STREAM,
    Stream,
    call,
    envelope,
    frames,
    open_stream,
    process,
    proto_field,
    proto_fields,
    start,
)

REPOSITORY = Path(__file__).parents[2]
GHOST = {"Authorization": "Basic Z2hvc3Q6"}


def test_a_unary_error_is_json_with_its_code_and_status(agent):
    answer = call(agent, "filesystem.Filesystem/Stat", {"path": "/no/such/file"})
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["code"] == "not_found"
    assert "/no/such/file" in answer.json()["message"]


def test_a_unary_error_stays_json_for_the_binary_codec(agent):
    answer = agent.post(
        "/filesystem.Filesystem/Stat",
        content=proto_field(1, "/no/such/file"),
        headers={"Content-Type": "application/proto"},
    )
    assert answer.status_code == 404
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json()["code"] == "not_found"


def test_a_unary_answer_echoes_the_binary_codec(agent, tmp_path):
    (tmp_path / "file").write_bytes(b"12345")
    answer = agent.post(
        "/filesystem.Filesystem/Stat",
        content=proto_field(1, str(tmp_path / "file")),
        headers={"Content-Type": "application/proto"},
    )
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/proto"
    entry = proto_fields(proto_fields(answer.content)[1][0])
    assert (entry[1], entry[4]) == ([b"file"], [5])


def test_malformed_json_is_an_invalid_argument(agent):
    answer = agent.post(
        "/filesystem.Filesystem/Stat", content=b'{"path": ', headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 400
    assert answer.json()["code"] == "invalid_argument"


def test_unknown_fields_and_snake_case_are_accepted(agent, tmp_path):
    answer = call(agent, "filesystem.Filesystem/ListDir", {"path": str(tmp_path), "depth": 1, "of_the_future": {"a": 1}})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("method", ["process.Process/Start", "process.Process/List"])
def test_another_content_type_is_415_and_names_what_is_accepted(agent, method):
    answer = agent.post(f"/{method}", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415
    assert "application/" in answer.headers["accept-post"]


def methods() -> dict[str, bool]:
    """Each method of the services that SDKs call, and whether it has a stream."""
    found = {}
    for file in ("process", "filesystem"):
        proto = (REPOSITORY / f"src/protocol/proto/{file}.proto").read_text()
        [service] = re.findall(r"^service (\w+) {$", proto, re.M)
        for name, signature in re.findall(r"^  rpc (\w+)(.*)$", proto, re.M):
            found[f"{file}.{service}/{name}"] = "stream " in signature
    assert len(found) == 17 and sum(found.values()) == 4, found
    return found


@pytest.mark.parametrize("method, streams", methods().items())
def test_a_codec_of_the_other_kind_of_method_is_415_and_what_is_named_instead_is_taken(agent, method, streams):
    unary, stream = ["application/json", "application/proto"], [JSON_STREAM, PROTO_STREAM]
    right, wrong = (stream, unary) if streams else (unary, stream)
    for kind in (*wrong, wrong[0].title(), f"{wrong[0]}; charset=utf-8"):
        answer = agent.post(f"/{method}", content=b"{}", headers={"Content-Type": kind})
        assert (answer.status_code, answer.content) == (415, b""), kind
        accepted = answer.headers["accept-post"].split(", ")
        assert set(right) < set(accepted) and not set(wrong) & set(accepted)
        assert "application/grpc" in accepted
    for kind in right:
        assert agent.post(f"/{method}", content=b"", headers={"Content-Type": kind}).status_code != 415


def test_a_refused_type_does_not_break_the_next_call_on_its_connection(guestd):
    body = b"x" * 40_000
    with guestd.client(limits=httpx.Limits(max_connections=1)) as client:
        ports = set()
        for _ in range(20):
            answer = client.post("/process.Process/Start", content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code == 415
            ports.add(answer.extensions["network_stream"].get_extra_info("client_addr"))
        assert len(ports) == 1, "one connection carried all of them"
        too_long = client.post("/process.Process/List", content=body * 5, headers={"Content-Type": JSON_STREAM})
        assert (too_long.status_code, too_long.headers["connection"]) == (415, "close")


@pytest.mark.parametrize("kind", ["Application/JSON", "APPLICATION/json; charset=utf-8", "application/PROTO"])
def test_a_unary_codec_may_be_written_in_upper_case(agent, kind):
    content = proto_field(1, "/etc") if "proto" in kind.lower() else b'{"path": "/etc"}'
    answer = agent.post("/filesystem.Filesystem/Stat", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == kind.lower().split(";")[0]


@pytest.mark.parametrize("kind", ["Application/Connect+JSON", "application/connect+Proto"])
def test_a_streams_codec_may_be_written_in_upper_case(agent, kind):
    argv = proto_field(1, "/bin/true")
    message = proto_field(1, argv) if "Proto" in kind else {"process": process("/bin/true")}
    answer = agent.post("/process.Process/Start", content=envelope(message), headers={"Content-Type": kind})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == kind.lower()
    assert list(frames([answer.content]))[-1] == (END, b"{}")


@pytest.mark.parametrize("kind", [JSON_STREAM, PROTO_STREAM, "Application/Connect+JSON"])
@pytest.mark.parametrize("method", ["process.Process/Start", "process.Process/Connect", "process.Process/StreamInput",
                                    "filesystem.Filesystem/WatchDir"])
def test_a_stream_of_nobody_is_told_so_in_its_end_frame(agent, method, kind):
    answer = agent.post(f"/{method}", content=envelope(b""), headers={"Content-Type": kind, **GHOST})
    assert (answer.status_code, answer.headers["content-type"]) == (200, kind.lower())
    [(flags, payload)] = frames([answer.content])
    assert flags == END
    assert json.loads(payload) == {"error": {"code": "unauthenticated", "message": "invalid username: 'ghost'"}}


@pytest.mark.parametrize("kind", ["application/grpc", "application/grpc+json", "application/grpc-web+proto"])
@pytest.mark.parametrize("method", ["process.Process/Start", "process.Process/List"])
def test_a_grpc_call_of_nobody_ends_in_a_status_of_its_own(guestd, method, kind):
    with guestd.client(http1=False, http2=True) as client:
        answer = client.post(f"/{method}", content=envelope(b""), headers={"Content-Type": kind, **GHOST})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith(kind)
    assert (answer.headers["grpc-status"], answer.headers["grpc-message"]) == ("16", "invalid username: 'ghost'")


def test_a_unary_call_of_nobody_is_401_and_its_connection_goes_on(guestd):
    with guestd.client(limits=httpx.Limits(max_connections=1)) as client:
        for _ in range(20):
            answer = call(client, "filesystem.Filesystem/Stat", {"path": "/", "padding": "x" * 20_000}, headers=GHOST)
            assert answer.status_code == 401
            assert answer.json() == {"code": "unauthenticated", "message": "invalid username: 'ghost'"}


def test_a_stream_without_the_token_stays_a_401_whoever_it_names(agent):
    assert agent.post("/init", json={"accessToken": "secret"}).status_code == 204
    answer = agent.post("/process.Process/Start", content=envelope(b""), headers={"Content-Type": JSON_STREAM, **GHOST})
    assert answer.status_code == 401
    assert "access token" in answer.json()["message"]


@pytest.mark.parametrize("method", ["process.Process/Start", "process.Process/List"])
def test_another_http_method_is_405(agent, method):
    assert agent.get(f"/{method}").status_code == 405


def test_an_unknown_procedure_is_404(agent):
    assert call(agent, "process.Process/Levitate").status_code == 404


@pytest.mark.parametrize("codec", [JSON_STREAM, PROTO_STREAM])
def test_a_stream_fails_in_its_end_frame_with_status_200(agent, codec):
    config = {"process": process("/bin/true", cwd="/no/such/folder")}
    message = config if codec == JSON_STREAM else proto_field(1, proto_field(1, "/bin/true") + proto_field(4, "/no/such/folder"))
    answer = agent.post("/process.Process/Start", content=envelope(message), headers={"Content-Type": codec})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == codec
    [(flags, payload)] = frames([answer.content])
    assert flags == END
    error = json.loads(payload)["error"]
    assert error["code"] == "invalid_argument"
    assert "/no/such/folder" in error["message"]


def test_a_stream_ends_with_an_empty_end_frame(agent):
    with open_stream(agent, "process.Process/Start", {"process": process("/bin/true")}) as response:
        assert response.headers["content-type"] == JSON_STREAM
        sent = list(frames(response.iter_raw()))
    assert sent[-1][0] == END
    assert json.loads(sent[-1][1]) == {}


def test_the_binary_codec_runs_a_command(agent):
    config = proto_field(1, "/bin/sh") + proto_field(2, "-c") + proto_field(2, "printf hello; exit 3")
    answer = agent.post(
        "/process.Process/Start",
        content=envelope(proto_field(1, config)),
        headers={"Content-Type": PROTO_STREAM},
    )
    *messages, last = frames([answer.content])
    assert last == (END, b"{}")
    events = [proto_fields(proto_fields(payload)[1][0]) for _, payload in messages]
    assert proto_fields(events[0][1][0])[1][0] > 0, "the first event is the start with its pid"
    stdout = b"".join(proto_fields(event[2][0]).get(1, [b""])[0] for event in events if 2 in event)
    assert stdout == b"hello"
    end = proto_fields(events[-1][3][0])
    assert end[1] == [6], "exit code 3, zigzag"
    assert end[2] == [1]


def test_a_gzipped_unary_request_is_read(agent, tmp_path):
    answer = agent.post(
        "/filesystem.Filesystem/Stat",
        content=gzip.compress(json.dumps({"path": str(tmp_path)}).encode()),
        headers={"Content-Type": "application/json", "Content-Encoding": "gzip"},
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["entry"]["type"] == "FILE_TYPE_DIRECTORY"


def test_a_gzipped_stream_message_is_read(agent):
    message = gzip.compress(json.dumps({"process": process("/bin/echo", "squeezed")}).encode())
    answer = agent.post(
        "/process.Process/Start",
        content=envelope(message, COMPRESSED),
        headers={"Content-Type": JSON_STREAM, "Connect-Content-Encoding": "gzip"},
    )
    assert b"c3F1ZWV6ZWQK" in answer.content  # "squeezed\n"


def test_a_frame_leaves_in_one_piece_and_at_once(guestd):
    """The Novita and PPIO parser is fragile about a header that arrives without its payload."""
    message = envelope({"process": process("/bin/sh", "-c", "for n in 1 2 3; do echo $n; sleep 0.3; done")})
    with socket.create_connection(("127.0.0.1", guestd.port), timeout=20) as connection:
        connection.sendall(
            b"POST /process.Process/Start HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/connect+json\r\n"
            + f"Content-Length: {len(message)}\r\n\r\n".encode()
            + message
        )
        reader = connection.makefile("rb")
        assert b" 200 " in reader.readline()
        headers = list(iter(reader.readline, b"\r\n"))
        assert any(header.lower() == b"transfer-encoding: chunked\r\n" for header in headers), headers
        pieces = []
        while size := int(reader.readline().strip(), 16):
            pieces.append(reader.read(size))
            reader.readline()
    assert len(pieces) >= 6, "start, three outputs, end and the end frame come one by one"
    for piece in pieces:
        assert list(frames([piece])), f"a chunk that is no whole frame: {piece!r}"


def test_http2_without_tls_is_spoken(guestd):
    with guestd.client(http1=False, http2=True) as client:
        answer = client.get("/health")
        assert (answer.http_version, answer.status_code) == ("HTTP/2", 204)
        assert start(client, "/bin/echo", "two").stdout == b"two\n"


def test_many_streams_share_one_http2_connection(guestd):
    with guestd.client(http1=False, http2=True, limits=httpx.Limits(max_connections=1)) as client:
        with open_stream(client, "process.Process/Start", {"process": process("/bin/sleep", "100")}) as response:
            sleeping = Stream(response)
            pid = sleeping.until("start")["pid"]
            assert start(client, "/bin/echo", "beside").stdout == b"beside\n"
            call(client, "process.Process/SendSignal", {"process": {"pid": pid}, "signal": "SIGNAL_SIGKILL"})
            assert sleeping.rest().end["status"] == "signal: killed"


def test_a_preflight_is_answered_before_any_credential_is_asked_for(agent):
    call_headers = {"Origin": "http://localhost", "Access-Control-Request-Method": "POST"}
    assert agent.post("/init", json={"accessToken": "secret"}).status_code == 204
    answer = agent.options("/process.Process/List", headers=call_headers)
    assert answer.status_code in (200, 204)
    assert answer.headers["access-control-allow-origin"] == "*"
