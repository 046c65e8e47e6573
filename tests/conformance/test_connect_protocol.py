"""Sections 1.1 to 1.7 and 1.9: codecs, JSON rules, frames, statuses."""

import base64
import gzip
import http.client
import json
import socket
import struct

import pytest

from harness import proto
from harness.connect import COMPRESSED, END, JSON_STREAM, PROTO_STREAM, Stream, envelope, frames, process
from harness.planes import b64, end_frame

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd

UNARY = [method for method in proto.METHODS if method.split("/")[1] not in ("Start", "Connect", "StreamInput", "WatchDir")]
STREAMS = [method for method in proto.METHODS if method not in UNARY]
ROW = {method: contract(f"1.1/{method.split('/')[1]}") for method in proto.METHODS}


def methods(names):
    return pytest.mark.parametrize("method", [pytest.param(name, marks=ROW[name], id=name.split("/")[1]) for name in names])


def post(plane, method: str, content: bytes, kind: str = "application/json", **headers):
    sent = {"Content-Type": kind, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return plane.http.post(f"/{method}", content=content, headers=sent)


# --- every method, its content type and its HTTP method ---


@methods(proto.METHODS)
@contract("1.6/415")
def test_another_content_type_is_415_and_told_what_is_accepted(plane, method):
    answer = post(plane, method, b"{}", "text/plain")
    assert answer.status_code == 415
    accepted = answer.headers["accept-post"]
    kinds = (JSON_STREAM, PROTO_STREAM) if method in STREAMS else ("application/json", "application/proto")
    for kind in kinds:
        assert kind in accepted


@methods(proto.METHODS)
@contract("1.6/405", "1.4/no-get", "4/wrong-method")
def test_another_http_method_is_405(plane, method):
    for verb in ("GET", "PUT", "DELETE"):
        assert plane.http.request(verb, f"/{method}").status_code == 405, verb
    query = {"connect": "v1", "encoding": "json", "message": "{}"}
    assert plane.http.get(f"/{method}", params=query).status_code == 405, "Connect GET is not enabled"


@methods(UNARY)
@contract("1.4/proto", "1.7/body")
def test_bytes_that_are_no_message_are_an_invalid_argument(plane, method):
    for body, kind in ((b'{"path": ', "application/json"), (b"", "application/json"), (b"\xff\xff\xff", "application/proto")):
        answer = post(plane, method, body, kind)
        assert answer.status_code == 400, f"{body!r}: {answer.text}"
        assert answer.headers["content-type"].startswith("application/json")
        assert answer.json()["code"] == "invalid_argument"
        assert answer.json()["message"]


@pytest.mark.parametrize("body", [b"[]", b'["/"]', b"5", b'"x"', b"null ", b'{"path": 5}', b'{"path": "/"} {}', b"{'path': '/'}"])
@contract("1.7/invalid_argument", "1.7/body")
def test_json_that_is_no_message_is_an_invalid_argument(plane, body):
    """Of a call that does no harm: an empty path means the home folder."""
    answer = post(plane, "filesystem.Filesystem/Stat", body)
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")


@pytest.mark.parametrize("encoding", ["identity", "gzip"])
@contract("1.7/invalid_argument", "3.2/remove")
def test_an_array_is_not_taken_for_the_fields_of_a_removal(plane, box, encoding):
    plane.sh(f"touch {box}/kept")
    for message in (f'["{box}"]', f' \n["{box}/kept"]', "[]", "null"):
        body = gzip.compress(message.encode()) if encoding == "gzip" else message.encode()
        answer = post(plane, "filesystem.Filesystem/Remove", body, Content_Encoding=encoding)
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
        assert "a message is an object" in answer.json()["message"]
    assert plane.fs("Stat", path=f"{box}/kept").status == 200


@pytest.mark.parametrize("method", ["process.Process/Start", "process.Process/Connect", "filesystem.Filesystem/WatchDir"])
@contract("1.6/malformed", "1.7/invalid_argument")
def test_an_array_is_no_message_of_a_stream(plane, method):
    for body in (b"[]", b'[{"cmd": "/bin/true"}]', b"null"):
        told = end_frame(post(plane, method, envelope(body), JSON_STREAM))
        assert (told["messages"], told["error"]["code"]) == (0, "invalid_argument")
        assert "a message is an object" in told["error"]["message"]


@hosted
@methods(STREAMS)
@contract("1.6/status", "1.6/malformed", "1.6/end-frame", "1.6/content-type")
def test_a_stream_message_that_is_none_ends_in_an_error_frame(plane, method):
    for body, kind in ((b'{"process": ', JSON_STREAM), (b"\xff\xff\xff", PROTO_STREAM)):
        answer = post(plane, method, envelope(body), kind)
        assert answer.headers["content-type"] == kind
        told = end_frame(answer)
        # StreamInput has one code of its own for whatever breaks its stream (1.10/streaminput-broken).
        code = "unknown" if method.endswith("/StreamInput") else "invalid_argument"
        assert (told["messages"], told["error"]["code"]) == (0, code)


@pytest.mark.parametrize("service", ["process.Process", "filesystem.Filesystem"])
@contract("1.7/unknown-procedure")
def test_an_unknown_procedure_is_404(plane, service):
    for path in (f"/{service}/Levitate", f"/{service}", f"/{service}/", f"/{service}/List/more"):
        assert plane.http.post(path, json={}).status_code == 404, path


@contract("1.7/unknown-procedure", "4/unknown-path")
@pytest.mark.parametrize("path", ["/", "/nothing", "/Process/List", "/grpc.health.v1.Health/Check"])
def test_an_unknown_path_is_404(plane, path):
    assert plane.http.post(path, json={}).status_code == 404
    assert plane.http.get(path).status_code == 404


# --- the shape of unary answers and errors ---


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.7/body", "1.7/not_found", "1.4/proto")
def test_a_unary_error_is_json_in_both_codecs(plane, codec):
    answer = plane.fs("Stat", codec, path="/no/such/file")
    assert answer.headers["content-type"].split(";")[0] == "application/json"
    assert (answer.status, set(answer.message)) == (404, {"code", "message"})


@hosted
@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.4/proto", "1.6/content-type")
def test_a_unary_answer_echoes_the_codec(plane, codec):
    answer = plane.fs("Stat", codec, path="/")
    assert answer.headers["content-type"].split(";")[0] == f"application/{codec}"
    assert answer.ok()["entry"]["path"] == "/"


@contract("1.4/js", "1.4/older-python", "8.2/headers", "10/headers")
@hosted
@pytest.mark.parametrize(
    "headers",
    [
        {
            "Connect-Protocol-Version": "1",
            "Connect-Timeout-Ms": "60000",
            "Accept-Encoding": "identity",
            "User-Agent": "e2b-python-sdk/2.63.0",
        },
        {"Connect-Protocol-Version": "1", "Accept": "*/*", "Accept-Language": "*", "User-Agent": "e2b-js-sdk/2.51.0"},
        {"Content-Encoding": "identity", "Accept-Encoding": "gzip", "User-Agent": "novita-sandbox-python-sdk/2.1.1"},
        {"Novita-Sandbox-Id": "x", "X-Novita-SDK-Name": "novita", "X-Novita-SDK-Version": "2.1.1"},
        {"Keepalive-Ping-Interval": "50", "X-Custom": "of the user's"},
        {},
    ],
    ids=["e2b-python", "e2b-js", "novita-python", "novita-js", "custom", "none"],
)
def test_what_the_sdks_send_beside_the_message_changes_nothing(plane, headers):
    assert plane.fs("Stat", _headers=headers, path="/").ok()["entry"]["type"] == "FILE_TYPE_DIRECTORY"
    ran = plane.start("/bin/echo", "hi", headers={name: value for name, value in headers.items() if name != "Content-Encoding"})
    assert (ran.stdout, ran.error) == (b"hi\n", None)


@contract("1.4/older-python", "10/parser")
@hosted
def test_a_stream_with_its_encoding_named_as_identity_is_read(plane):
    headers = {"Connect-Content-Encoding": "identity", "Connect-Accept-Encoding": "identity"}
    assert plane.start("/bin/echo", "hi", headers=headers).stdout == b"hi\n"


@pytest.mark.parametrize("codec", ["json", "proto"])
@contract("1.4/gzip")
@hosted
def test_a_gzipped_unary_body_is_read(plane, codec):
    message = {"path": "/"}
    body = json.dumps(message).encode() if codec == "json" else proto.request("filesystem.Filesystem/Stat", message)
    answer = post(plane, "filesystem.Filesystem/Stat", gzip.compress(body), f"application/{codec}", Content_Encoding="gzip")
    assert answer.status_code == 200, answer.text


@contract("1.4/gzip")
@hosted
def test_a_gzipped_stream_message_is_read(plane):
    message = gzip.compress(json.dumps({"process": process("/bin/echo", "squeezed")}).encode())
    answer = post(plane, "process.Process/Start", envelope(message, COMPRESSED), JSON_STREAM, Connect_Content_Encoding="gzip")
    assert b64("squeezed\n").encode() in answer.content


@contract("1.4/gzip")
def test_a_reader_that_offers_gzip_gets_frames_that_it_can_read(plane):
    body = envelope({"process": process("/bin/bash", "-c", "head -c 100000 /dev/zero")})
    answer = post(plane, "process.Process/Start", body, JSON_STREAM, Connect_Accept_Encoding="gzip")
    out = b""
    for flags, payload in frames([answer.content]):
        if flags & COMPRESSED:
            assert answer.headers["connect-content-encoding"] == "gzip"
            payload = gzip.decompress(payload)
        if not flags & END:
            out += base64.b64decode(json.loads(payload)["event"].get("data", {}).get("stdout", ""))
    assert out == bytes(100_000)


@contract("1.4/gzip", "1.7/unimplemented")
@pytest.mark.parametrize("kind", ["unary", "stream"])
def test_an_unknown_encoding_is_unimplemented(plane, kind):
    if kind == "unary":
        answer = post(plane, "filesystem.Filesystem/Stat", b"x", Content_Encoding="br")
        assert (answer.status_code, answer.json()["code"]) == (501, "unimplemented")
    else:
        answer = post(plane, "process.Process/Start", envelope(b"x", COMPRESSED), JSON_STREAM, Connect_Content_Encoding="br")
        assert end_frame(answer)["error"]["code"] == "unimplemented"


@contract("1.6/malformed")
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\0",
        b"\0\0\0\0",
        b"\0\0\0\0\x05{}",
        b"\0\xff\xff\xff\xff{}",
        envelope({"process": process("/bin/true")}, COMPRESSED),
    ],
    ids=["empty", "one-byte", "header-cut", "payload-cut", "four-gigabytes", "compressed-without-encoding"],
)
def test_a_broken_envelope_is_refused_and_the_agent_lives(plane, body):
    answer = post(plane, "process.Process/Start", body, JSON_STREAM)
    if answer.status_code == 200:
        told = end_frame(answer)
        assert told["messages"] == 0
        assert told["error"]["code"] in ("invalid_argument", "unimplemented", "internal", "resource_exhausted", "unknown")
    else:
        assert 400 <= answer.status_code < 500
    assert plane.process("List").status == 200


@contract("1.6/malformed")
def test_a_second_message_in_a_start_starts_nothing_else(plane, box):
    body = envelope({"process": process("/usr/bin/touch", f"{box}/one")}) + envelope(
        {"process": process("/usr/bin/touch", f"{box}/two")}
    )
    end_frame(post(plane, "process.Process/Start", body, JSON_STREAM))
    assert "two" not in plane.sh(f"ls {box}")


# --- HTTP/1.1 as clients really send it ---


def talk(plane, *pieces: bytes) -> bytes:
    with socket.create_connection(plane.address, timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@contract("0/port")
def test_one_connection_carries_many_calls(plane):
    connection = http.client.HTTPConnection(*plane.address, timeout=10)
    sockets = set()
    for path in ("/", "/no/such/file", "/"):
        connection.request(
            "POST", "/filesystem.Filesystem/Stat", json.dumps({"path": path}), {"Content-Type": "application/json"}
        )
        sockets.add(connection.sock)
        answer = connection.getresponse()
        assert answer.status == (200 if path == "/" else 404)
        assert json.loads(answer.read())
    assert len(sockets) == 1
    connection.close()


@contract("1.6/envelope", "10/parser")
def test_a_request_may_come_byte_by_byte_and_in_chunks(plane):
    message = envelope({"process": process("/bin/echo", "slowly")})
    head = b"POST /process.Process/Start HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: application/connect+json\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunks = [b"1\r\n" + bytes([byte]) + b"\r\n" for byte in message]
    told = talk(plane, head, *chunks, b"0\r\n\r\n")
    assert told.startswith(b"HTTP/1.1 200")
    assert b64("slowly\n").encode() in told


@contract("1.6/client-stream", "1.1/StreamInput")
def test_streamed_input_is_fed_before_its_stream_ends(plane):
    with plane.begin("/bin/cat", stdin=True) as response:
        stream = Stream(response)
        pid = stream.until("start")["pid"]
        with socket.create_connection(plane.address, timeout=10) as connection:
            connection.sendall(
                b"POST /process.Process/StreamInput HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
                b"Content-Type: application/connect+json\r\nTransfer-Encoding: chunked\r\n\r\n"
            )

            def send(message: dict):
                data = envelope(message)
                connection.sendall(f"{len(data):x}\r\n".encode() + data + b"\r\n")

            send({"start": {"process": {"pid": pid}}})
            for word in ("one", "two"):
                send({"data": {"input": {"stdin": b64(word)}}})
                assert base64.b64decode(stream.until("data")["stdout"]) == word.encode(), "echoed while the stream is open"
            connection.sendall(b"0\r\n\r\n")
            reply = b"".join(iter(lambda: connection.recv(65536), b""))
        assert reply.startswith(b"HTTP/1.1 200")
        assert b"\x02\0\0\0\x02{}" in reply
        plane.process("CloseStdin", {"process": {"pid": pid}}).ok()
        assert stream.rest().exit_code == 0


# --- JSON ---


@hosted
@contract("1.5/camel", "1.5/int64", "1.5/uint", "1.5/enum-out", "1.5/timestamp", "1.3/EntryInfo")
def test_an_entry_is_written_as_protobuf_writes_json(plane, box):
    plane.put(f"{box}/file", "12345")
    plane.sh(f"touch -d '2024-02-03T04:05:06.789Z' {box}/file")
    entry = plane.fs("Stat", path=f"{box}/file").ok()["entry"]
    assert entry["size"] == "5"
    assert entry["mode"] == 0o644
    assert entry["type"] == "FILE_TYPE_FILE"
    assert entry["modifiedTime"] in ("2024-02-03T04:05:06.789Z", "2024-02-03T04:05:06.789000Z", "2024-02-03T04:05:06.789000000Z")


@contract("1.5/timestamp")
@pytest.mark.parametrize(
    "touched, told",
    [
        ("2024-02-03T04:05:06Z", "2024-02-03T04:05:06Z"),
        ("2024-02-03T04:05:06.5Z", "2024-02-03T04:05:06.500Z"),
        ("2024-02-03T04:05:06.000007Z", "2024-02-03T04:05:06.000007Z"),
        ("2024-02-03T04:05:06.000000008Z", "2024-02-03T04:05:06.000000008Z"),
        ("1969-12-31T23:59:59.25Z", "1969-12-31T23:59:59.250Z"),
    ],
)
def test_a_time_has_0_3_6_or_9_digits(plane, box, touched, told):
    plane.put(f"{box}/file")
    plane.sh(f"touch -d {touched} {box}/file")
    assert plane.fs("Stat", path=f"{box}/file").ok()["entry"]["modifiedTime"] == told


@hosted
@contract("1.5/defaults", "1.3/EntryInfo")
def test_default_values_are_left_out(plane, box):
    plane.put(f"{box}/empty", mode="000")
    entry = plane.fs("Stat", path=f"{box}/empty").ok()["entry"]
    assert not {"size", "mode", "symlinkTarget", "metadata", "isSymlink"} & set(entry)
    assert plane.fs("ListDir", path=f"{box}/none-yet").status == 404
    plane.sh(f"mkdir {box}/void")
    assert plane.fs("ListDir", path=f"{box}/void").ok() == {}


@pytest.mark.parametrize(
    "message",
    [
        {"path": "/", "depth": "1"},
        {"path": "/", "depth": 1.0},
        {"path": "/", "depth": None},
        {"path": "/", "of_the_future": {"deep": [1, 2, None]}, "x": "y"},
    ],
    ids=["string", "float", "null", "unknown"],
)
@contract("1.5/uint", "1.5/unknown", "10/old-proto")
def test_lenient_input_is_accepted(plane, message):
    names = [entry["name"] for entry in plane.call("filesystem.Filesystem/ListDir", message).ok()["entries"]]
    assert "etc" in names


@contract("1.5/uint", "1.7/invalid_argument")
@pytest.mark.parametrize("depth", [-1, 1.5, "x", "1.5", 4294967296, [1], {}])
def test_a_number_that_is_none_is_an_invalid_argument(plane, depth):
    status, code, _ = plane.call("filesystem.Filesystem/ListDir", {"path": "/", "depth": depth}).error
    assert (status, code) == (400, "invalid_argument")


@hosted
@contract("1.5/snake", "1.5/camel", "1.3/Watcher")
@pytest.mark.parametrize("spelling", ["watcher_id", "watcherId"])
def test_both_spellings_of_a_name_are_read(plane, spelling):
    answer = plane.call("filesystem.Filesystem/GetWatcherEvents", {spelling: "wnone"})
    assert answer.error == (404, "not_found", "watcher with id wnone not found")


@pytest.mark.parametrize("text", ["_-8", "_-8=", "/+8=", "/+8"])
@contract("1.5/bytes-in")
def test_base64_is_read_in_every_spelling(plane, text):
    with plane.begin("/bin/cat", stdin=True) as response:
        stream = Stream(response)
        who = {"process": {"pid": stream.until("start")["pid"]}}
        plane.process("SendInput", {**who, "input": {"stdin": text}}).ok()
        plane.process("CloseStdin", who).ok()
        assert stream.rest().stdout == b"\xff\xef"


@contract("1.5/bytes-in", "1.7/invalid_argument")
def test_base64_that_is_none_is_an_invalid_argument(plane):
    status, code, _ = plane.process("SendInput", {"process": {"pid": 1}, "input": {"stdin": "!!!"}}).error
    assert (status, code) == (400, "invalid_argument")


@hosted
@contract("1.5/oneof", "1.5/bytes-out")
def test_an_event_has_only_its_chosen_member(plane):
    with plane.begin("/bin/sh", "-c", "printf hi; printf ho >&2", stdin=False) as response:
        events = list(Stream(response))
    assert [list(event) for event in events] == [["start"], ["data"], ["data"], ["end"]]
    data = [event["data"] for event in events if "data" in event]
    assert sorted(next(iter(each.items())) for each in data) == [("stderr", "aG8="), ("stdout", "aGk=")]


@contract("1.5/oneof", "1.7/invalid_argument")
def test_two_members_of_a_oneof_are_refused(plane):
    answer = plane.process("SendSignal", {"process": {"pid": 1, "tag": "x"}, "signal": 15})
    assert answer.error[:2] == (400, "invalid_argument")


# --- binary ---


@hosted
@contract("1.3/EntryInfo", "1.4/proto", "1.3/Stat")
def test_both_codecs_tell_the_same_entry(plane, box):
    plane.put(f"{box}/file", "12345")
    plane.sh(f"ln -s file {box}/link")
    for name in ("file", "link", ""):
        told = [plane.fs("Stat", codec, path=f"{box}/{name}").ok()["entry"] for codec in ("json", "proto")]
        for each in told:
            # A fraction may be written with 3, 6 or 9 digits.
            whole, _, digits = each.pop("modifiedTime").rstrip("Z").partition(".")
            each["time"] = (whole, digits.ljust(9, "0"))
        assert told[0] == told[1]


@contract("1.2/EndEvent", "1.4/proto")
def test_minus_one_is_written_in_zigzag(plane):
    """sint32: int32 would take ten bytes and read as another number."""
    body = envelope(proto.request("process.Process/Start", {"process": {"cmd": "/bin/sh", "args": ["-c", "kill -KILL $$"]}}))
    answer = post(plane, "process.Process/Start", body, PROTO_STREAM)
    end = [payload for flags, payload in frames([answer.content]) if not flags][-1]
    assert b"\x08\x01" in end, "field 1, varint 1: zigzag of -1"


@contract("1.6/envelope")
def test_the_length_of_a_frame_is_big_endian(plane):
    answer = post(plane, "process.Process/Start", envelope({"process": process("/bin/true")}), JSON_STREAM)
    flags, length = struct.unpack(">BI", answer.content[:5])
    assert flags == 0
    assert json.loads(answer.content[5 : 5 + length])["event"]["start"]["pid"] > 0


# --- the ancient client ---

LEGACY = {"User-Agent": "connect-python"}


@hosted
@contract("1.9/entries", "1.9/header")
@pytest.mark.parametrize("method", ["Stat", "MakeDir", "Move", "ListDir"])
def test_an_ancient_client_gets_the_entries_that_it_knows(plane, box, method):
    plane.put(f"{box}/folder-file", "x")
    message = {
        "Stat": {"path": f"{box}/folder-file"},
        "MakeDir": {"path": f"{box}/made"},
        "Move": {"source": f"{box}/folder-file", "destination": f"{box}/moved"},
        "ListDir": {"path": box},
    }[method]
    answer = plane.fs(method, _headers=LEGACY, **message)
    told = answer.ok()
    entries = told["entries"] if method == "ListDir" else [told["entry"]]
    assert entries and all(set(entry) == {"name", "type", "path"} for entry in entries)
    assert answer.headers["x-e2b-legacy-sdk"] == "true"


@contract("1.9/entries", "1.9/header")
@pytest.mark.parametrize("agent", ["connect-python/1.0", "Connect-Python", "python-connect"])
def test_only_the_exact_name_is_ancient(plane, agent):
    answer = plane.fs("Stat", _headers={"User-Agent": agent}, path="/")
    assert "owner" in answer.ok()["entry"]
    assert "x-e2b-legacy-sdk" not in answer.headers


@contract("1.9/events", "1.9/header")
def test_an_ancient_client_gets_events_of_name_and_type(plane, box):
    made = plane.fs("CreateWatcher", _headers=LEGACY, path=box, includeEntry=True).ok()["watcherId"]
    plane.put(f"{box}/file", "x")
    answer = plane.fs("GetWatcherEvents", _headers=LEGACY, watcherId=made)
    assert answer.ok()["events"] and all(set(event) == {"name", "type"} for event in answer.message["events"])
    assert answer.headers["x-e2b-legacy-sdk"] == "true"
    plane.fs("RemoveWatcher", watcherId=made)


@hosted
@contract("1.9/process", "1.9/header")
def test_an_ancient_client_runs_a_command(plane):
    ran = plane.start("/bin/sh", "-c", "echo out; exit 3", headers=LEGACY)
    assert (ran.stdout, ran.exit_code) == (b"out\n", 3)
    assert set(ran.end) <= {"exitCode", "exited", "status", "error"}


@contract("1.9/process")
def test_an_ancient_client_lists_processes(plane):
    with plane.begin("/bin/sleep", "30", tag="old") as response:
        pid = Stream(response).until("start")["pid"]
        [found] = [each for each in plane.process("List", headers=LEGACY).ok()["processes"] if each["pid"] == pid]
        assert found["config"]["cmd"] == "/bin/sleep"
        plane.signal(pid)
