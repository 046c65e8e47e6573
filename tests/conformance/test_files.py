"""Sections 4.5 to 4.7: downloads, uploads, compose."""

import gzip
import socket
import time

import httpx
import pytest

from harness.planes import HOME, basic
from harness.processes import wait_until

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
OCTETS = {"Content-Type": "application/octet-stream"}


def get(plane, path: str | None, headers=None, **query):
    params = {**({} if path is None else {"path": path}), **query}
    return plane.http.get("/files", params=params, headers={"Accept-Encoding": "identity", **(headers or {})})


def put(plane, content: bytes, path: str | None = None, headers=None, **query):
    params = {**({} if path is None else {"path": path}), **query}
    return plane.http.post("/files", params=params, content=content, headers={**OCTETS, **(headers or {})})


def parts(plane, *files: tuple[str, bytes], path: str | None = None, headers=None, **query):
    params = {**({} if path is None else {"path": path}), **query}
    return plane.http.post("/files", params=params, files=[("file", each) for each in files], headers=headers)


def refused(answer, status: int, message: str | None = None, contains: str = "") -> None:
    assert answer.status_code == status, f"{answer.status_code}: {answer.text}"
    told = answer.json()
    assert told["code"] == status
    if message is not None:
        assert told["message"] == message
    assert contains in told["message"]


# --- downloads ---


@hosted
@pytest.mark.parametrize("path", ["{box}/file", "~/{short}/file", "{short}/file"])
@contract("4.5/headers", "3.1/relative", "3.1/tilde")
def test_a_file_is_downloaded_with_its_headers(plane, box, path):
    plane.put(f"{box}/file", "hello\n")
    plane.sh(f"touch -d '2024-02-03T04:05:06Z' {box}/file")
    answer = get(plane, path.format(box=box, short=box.removeprefix(f"{HOME}/")))
    assert (answer.status_code, answer.content) == (200, b"hello\n")
    assert (
        answer.headers["vary"].lower().split(", ")[0] == "accept-encoding" or "accept-encoding" in answer.headers["vary"].lower()
    )
    assert answer.headers["content-disposition"] == "inline; filename=file"
    assert answer.headers["last-modified"] == "Sat, 03 Feb 2024 04:05:06 GMT"
    assert answer.headers["content-length"] == "6"
    assert answer.headers["accept-ranges"] == "bytes"
    assert "content-encoding" not in answer.headers


@contract("4.5/headers")
@pytest.mark.parametrize(
    "name, content, kind",
    [
        ("a.txt", b"x", "text/plain; charset=utf-8"),
        ("a.html", b"x", "text/html; charset=utf-8"),
        ("a.json", b"{}", "application/json"),
        ("a.png", b"x", "image/png"),
        ("noext", b"\x89PNG\r\n\x1a\n", "image/png"),
        ("noext2", b"plain words", "text/plain; charset=utf-8"),
        ("noext3", b"\0\1\2\3", "application/octet-stream"),
        ("noext4", b"%PDF-1.4", "application/pdf"),
    ],
)
def test_the_type_is_the_extensions_or_the_bytes(plane, box, name, content, kind):
    plane.put(f"{box}/{name}", content)
    assert get(plane, f"{box}/{name}").headers["content-type"] == kind


@pytest.mark.parametrize("name", ["with space", "ünï", "a&b=c", "100%25", "q?x#y", "-n", "semi;colon", 'quo"te', "plus+"])
@contract("4.5/headers", "4.6/octets")
def test_any_file_name_goes_up_and_down(plane, box, name):
    assert put(plane, name.encode(), f"{box}/{name}").json()[0]["path"] == f"{box}/{name}"
    answer = get(plane, f"{box}/{name}")
    assert answer.content == name.encode()
    assert answer.headers["content-disposition"].startswith("inline; filename")


@hosted
@pytest.mark.parametrize("path", ["/no/such/file", "none", "~/none/deep"])
@contract("4.5/missing", "4/error-body")
def test_a_missing_file_is_404_with_its_path(plane, path):
    full = {"none": f"{HOME}/none", "~/none/deep": f"{HOME}/none/deep"}.get(path, path)
    answer = get(plane, path)
    refused(answer, 404, f"path '{full}' does not exist")
    assert answer.headers["content-type"].startswith("application/json")


@contract("4/error-body")
def test_an_error_body_is_not_to_be_sniffed(plane):
    assert get(plane, "/no/such/file").headers["x-content-type-options"] == "nosniff"


@hosted
@pytest.mark.parametrize("path, full", [("", HOME), ("~", HOME), ("/tmp", "/tmp"), (None, HOME)])
@contract("4.5/directory")
def test_a_folder_is_not_downloaded(plane, path, full):
    refused(get(plane, path), 400, f"path '{full}' is a directory")


@hosted
@pytest.mark.parametrize("verb", ["GET", "POST"])
@contract("4.5/path", "4.6/400", "3.1/other-home")
def test_another_users_home_is_400(plane, verb):
    answer = plane.http.request(
        verb, "/files", params={"path": "~root/x"}, content=b"x" if verb == "POST" else None, headers=OCTETS
    )
    refused(answer, 400, contains="cannot expand user-specific home dir")


@hosted
@pytest.mark.parametrize("verb", ["GET", "POST"])
@contract("4.5/user", "4.6/401", "2.1/rest")
def test_an_unknown_user_in_the_query_is_401(plane, verb):
    query = {"path": "/etc/hostname", "username": "ghost"}
    answer = plane.http.request(verb, "/files", params=query, content=b"x" if verb == "POST" else None, headers=OCTETS)
    refused(answer, 401, "error looking up user 'ghost': user: unknown user ghost")


@hosted
@contract("2.1/rest", "3.1/relative")
def test_the_user_of_the_query_decides_the_home(plane):
    plane.sh("install -m 600 /dev/null /root/conformance-file && echo -n root > /root/conformance-file")
    try:
        assert get(plane, "conformance-file", username="root").content == b"root"
        assert get(plane, "conformance-file", username="user").status_code == 404
    finally:
        plane.sh("rm /root/conformance-file")


@contract("2.1/everywhere", "1.10/basic-unknown")
def test_an_unknown_basic_user_is_refused_on_files_too(plane):
    answer = plane.http.get("/files", params={"path": "/etc/hostname"}, headers=basic("ghost"))
    assert answer.status_code == 401
    assert answer.json()["message"] == "invalid username: 'ghost'"


@pytest.mark.parametrize(
    "wanted, status, content, told",
    [
        ("bytes=0-0", 206, b"0", "bytes 0-0/10"),
        ("bytes=2-4", 206, b"234", "bytes 2-4/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-100", 206, b"89", "bytes 8-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-100", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=20-30", 416, None, "bytes */10"),
    ],
)
@contract("4.5/range")
def test_a_range_is_served_exactly(plane, box, wanted, status, content, told):
    plane.put(f"{box}/file", "0123456789")
    answer = get(plane, f"{box}/file", {"Range": wanted})
    assert answer.status_code == status
    assert answer.headers["content-range"] == told
    if content is not None:
        assert answer.content == content
        assert answer.headers["content-length"] == str(len(content))


@pytest.mark.parametrize("wanted", ["bytes=0-", "bytes=0-0", "bytes=5-", "bytes=-5"])
@contract("4.5/range")
def test_a_range_of_an_empty_file_is_the_empty_file(plane, box, wanted):
    plane.put(f"{box}/file", "")
    answer = get(plane, f"{box}/file", {"Range": wanted})
    assert (answer.status_code, answer.content, answer.headers.get("content-range")) == (200, b"", None)


@contract("4.5/gzip", "4.5/conditions", "4.5/range")
def test_a_packed_download_is_not_resumed_with_bytes_of_the_file(plane, box):
    plane.put(f"{box}/file.txt", "0123456789")
    packed = get(plane, f"{box}/file.txt", {"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.headers["etag"] != get(plane, f"{box}/file.txt").headers["etag"]
    for validator in [packed.headers["etag"], packed.headers["last-modified"]]:
        answer = get(plane, f"{box}/file.txt", {"Accept-Encoding": "gzip", "Range": "bytes=4-", "If-Range": validator})
        assert (answer.status_code, answer.content) == (200, b"0123456789")
    answer = get(plane, f"{box}/file.txt", {"Accept-Encoding": "gzip", "If-None-Match": packed.headers["etag"]})
    assert answer.status_code == 304


@hosted
@contract("4.5/conditions")
def test_what_has_not_changed_is_304(plane, box):
    plane.put(f"{box}/file", "0123456789")
    plane.sh(f"touch -d '2024-02-03T04:05:06Z' {box}/file")
    when = "Sat, 03 Feb 2024 04:05:06 GMT"
    answer = get(plane, f"{box}/file", {"If-Modified-Since": when})
    assert (answer.status_code, answer.content) == (304, b"")
    assert get(plane, f"{box}/file", {"If-Modified-Since": "Fri, 02 Feb 2024 04:05:06 GMT"}).status_code == 200
    assert get(plane, f"{box}/file", {"Range": "bytes=1-2", "If-Range": when}).content == b"12"
    assert get(plane, f"{box}/file", {"Range": "bytes=1-2", "If-Range": "Fri, 02 Feb 2024 04:05:06 GMT"}).content == b"0123456789"


@pytest.mark.parametrize(
    "accepted, status, packed",
    [
        ("gzip", 200, True),
        ("gzip, deflate, br", 200, True),
        ("gzip;q=1.0, identity;q=0.5", 200, True),
        ("gzip;q=0.5, identity;q=1.0", 200, False),
        ("*", 200, False),
        ("gzip;q=0", 200, False),
        ("identity", 200, False),
        ("br", 200, False),
        ("*;q=0.5, identity;q=0", 200, True),
        ("identity;q=0", 406, None),
        ("br, identity;q=0", 406, None),
        ("*;q=0", 406, None),
    ],
)
@contract("4.5/gzip", "4.5/406")
def test_the_client_decides_about_compression(plane, box, accepted, status, packed):
    plane.put(f"{box}/file.txt", "a" * 10_000)
    with plane.http.stream("GET", "/files", params={"path": f"{box}/file.txt"}, headers={"Accept-Encoding": accepted}) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.status_code == status
    assert "accept-encoding" in answer.headers["vary"].lower()
    if packed:
        assert answer.headers["content-encoding"] == "gzip"
        assert gzip.decompress(raw) == b"a" * 10_000
    elif packed is False:
        assert "content-encoding" not in answer.headers
        assert raw == b"a" * 10_000


@contract("4.5/gzip", "4.5/range", "4.5/406")
def test_a_range_is_never_compressed(plane, box):
    plane.put(f"{box}/file.txt", "a" * 10_000)
    answer = get(plane, f"{box}/file.txt", {"Range": "bytes=0-9", "Accept-Encoding": "gzip"})
    assert (answer.status_code, "content-encoding" in answer.headers, answer.content) == (206, False, b"a" * 10)
    refused_identity = {"Range": "bytes=0-9", "Accept-Encoding": "gzip, identity;q=0"}
    assert get(plane, f"{box}/file.txt", refused_identity).status_code == 406


@hosted
@contract("4.5/procfs")
@pytest.mark.parametrize("accepted", ["identity", "gzip"])
def test_a_file_that_says_it_is_empty_is_read_to_its_end(plane, accepted):
    answer = get(plane, "/proc/self/status", {"Accept-Encoding": accepted})
    assert answer.status_code == 200
    assert answer.text.startswith("Name:")


# --- uploads ---


@hosted
@pytest.mark.parametrize("size", [0, 1, 70_000, 3_000_000])
@contract("4.6/octets", "4.6/reply", "4.6/parents", "4.6/empty-file", "3.5/created")
def test_octets_become_the_file(plane, box, size):
    data = bytes(n * 7 % 251 for n in range(min(size, 997))) * (size // 997 + 1)
    data = data[:size]
    answer = put(plane, data, f"{box}/a/b/file")
    assert answer.status_code == 200
    assert answer.json() == [{"path": f"{box}/a/b/file", "name": "file", "type": "file"}]
    assert get(plane, f"{box}/a/b/file").content == data
    assert (
        plane.sh(f"cd {box}; stat -c '%U:%G %a %s' a a/b a/b/file | sed 's/ 4096$//; s/ [0-9]*0$/&/'").splitlines()[-1]
        == f"user:user 644 {size}"
    )
    assert plane.sh(f"cd {box}; stat -c '%U:%G %a' a a/b") == "user:user 755\n" * 2


@hosted
@contract("4.6/multipart", "4.6/reply", "4.6/parents")
def test_each_part_goes_where_its_name_says(plane, box):
    short = box.removeprefix(f"{HOME}/")
    answer = parts(plane, (f"{box}/a/one.txt", b"1"), (f"{short}/b/c/two.txt", b"22"), (f"~/{short}/three", b""))
    assert answer.status_code == 200, answer.text
    assert answer.json() == [
        {"path": f"{box}/{name}", "name": name.rsplit("/", 1)[-1], "type": "file"}
        for name in ("a/one.txt", "b/c/two.txt", "three")
    ]
    assert plane.sh(f"cd {box}; cat a/one.txt b/c/two.txt three") == "122"


@contract("4.6/octets", "4.5/path")
def test_names_that_are_no_text_are_files_of_their_own(plane, box):
    for name in ["%fe", "%ff"]:
        answer = plane.http.post(f"/files?path={box}/raw{name}", content=name.encode(), headers=OCTETS)
        assert answer.status_code == 200, answer.text
    for name in ["%fe", "%ff"]:
        assert plane.http.get(f"/files?path={box}/raw{name}").text == name
    assert plane.sh(f"ls {box} | wc -l").strip() == "2"


@hosted
@contract("4.6/path-wins", "4.6/other-fields")
def test_the_query_wins_and_other_fields_are_ignored(plane, box):
    answer = plane.http.post(
        "/files",
        params={"path": f"{box}/here"},
        files={"file": ("elsewhere", b"x"), "other": ("nope", b"y")},
        data={"text": "ignored"},
    )
    assert answer.json() == [{"path": f"{box}/here", "name": "here", "type": "file"}]
    assert plane.sh(f"ls {box}") == "here\n"


@contract("4.6/twice")
@pytest.mark.parametrize("second", ["{box}/a", "{box}/./a", "{box}//a", "{box}/x/../a"])
def test_the_same_path_twice_is_400(plane, box, second):
    answer = parts(plane, (f"{box}/a", b"1"), (second.format(box=box), b"2"))
    assert answer.status_code == 400, answer.text


@contract("4.6/multipart")
def test_any_multipart_type_is_accepted(plane, box):
    body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\ndata\r\n--B--\r\n'
    answer = plane.http.post(
        "/files", params={"path": f"{box}/file"}, content=body, headers={"Content-Type": "multipart/mixed; boundary=B"}
    )
    assert answer.status_code == 200, answer.text
    assert plane.content(f"{box}/file") == b"data"


@pytest.mark.parametrize("kind", ["text/plain", "application/json", "application/x-www-form-urlencoded", ""])
@contract("4.6/media")
def test_another_media_type_is_400(plane, box, kind):
    answer = put(plane, b"x", f"{box}/file", {"Content-Type": kind})
    refused(answer, 400, contains="unsupported content type")
    assert plane.sh(f"ls {box}") == ""


@hosted
@pytest.mark.parametrize("form", ["octets", "multipart"])
@contract("4.6/gzip")
def test_a_gzipped_body_is_unpacked(plane, box, form):
    if form == "octets":
        answer = put(plane, gzip.compress(b"plain"), f"{box}/file", {"Content-Encoding": "gzip"})
    else:
        body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nplain\r\n--B--\r\n'
        headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Encoding": "gzip"}
        answer = plane.http.post("/files", params={"path": f"{box}/file"}, content=gzip.compress(body), headers=headers)
    assert answer.status_code == 200, answer.text
    assert plane.content(f"{box}/file") == b"plain"


@pytest.mark.parametrize("encoding, content", [("br", b"x"), ("deflate", b"x"), ("gzip", b"no gzip"), ("gzip", b""), ("gzip, gzip", b"x")])
@contract("4.6/gzip")
def test_a_body_that_cannot_be_unpacked_is_400(plane, box, encoding, content):
    plane.sh(f"printf old > {box}/file")
    refused(put(plane, content, f"{box}/file", {"Content-Encoding": encoding}), 400)
    assert plane.content(f"{box}/file") == b"old"


@contract("4.6/gzip")
def test_every_member_of_a_gzipped_body_counts_and_nothing_else_may_follow(plane, box):
    members = gzip.compress(b"one") + gzip.compress(b"two")
    assert put(plane, members, f"{box}/file", {"Content-Encoding": "GZIP"}).status_code == 200
    assert plane.content(f"{box}/file") == b"onetwo"
    headers = {"Content-Encoding": "gzip", "Guestd-Replace": "atomic"}
    refused(put(plane, members + b"garbage", f"{box}/file", headers), 400)
    assert plane.content(f"{box}/file") == b"onetwo"


@hosted
@contract("4.6/400")
def test_octets_need_a_path(plane):
    refused(put(plane, b"x"), 400, contains="path")


@hosted
@pytest.mark.parametrize("path", ["{box}", "~", "/", ""])
@contract("4.6/400")
def test_a_folder_is_not_written(plane, box, path):
    answer = put(plane, b"x", path.format(box=box))
    refused(answer, 400)


@hosted
@pytest.mark.parametrize("form", ["octets", "multipart"])
@contract("4.6/metadata", "3.3/metadata")
def test_metadata_goes_with_the_file_and_is_replaced(fresh_or_plane, form):
    plane, box = fresh_or_plane

    def send(headers: dict):
        return (
            put(plane, b"x", f"{box}/file", headers)
            if form == "octets"
            else parts(plane, ("file", b"x"), path=f"{box}/file", headers=headers)
        )

    answer = send({"X-Metadata-Key-One": "first value", "X-METADATA-two": "2"})
    wanted = {"key-one": "first value", "two": "2"}
    assert answer.json() == [{"path": f"{box}/file", "name": "file", "type": "file", "metadata": wanted}]
    assert plane.fs("Stat", path=f"{box}/file").ok()["entry"]["metadata"] == wanted
    assert send({"X-Metadata-three": "3"}).json()[0]["metadata"] == {"three": "3"}
    assert plane.fs("Stat", "proto", path=f"{box}/file").ok()["entry"]["metadata"] == {"three": "3"}
    assert "metadata" not in send({}).json()[0]
    assert "metadata" not in plane.fs("Stat", path=f"{box}/file").ok()["entry"]


@pytest.fixture
def fresh_or_plane(plane, box):
    """Where the home folder keeps attributes: tmpfs below Linux 6.6 does not."""
    tried = plane.start("/usr/bin/python3", "-c", f"import os; os.setxattr('{box}', 'user.try', b'1')")
    if tried.exit_code:
        pytest.skip(f"metadata was not tested on {plane.name}: {tried.stderr.decode().splitlines()[-1]}")
    return plane, box


@pytest.mark.parametrize(
    "headers",
    [
        {"X-Metadata-": "no key"},
        {"X-Metadata-key": b"\xc3\xbc"},
        {"X-Metadata-key": b"tab\there"},
        {f"X-Metadata-{'k' * 247}": "long key"},
        {"X-Metadata-key": "v" * 4097},
        {f"X-Metadata-{n}": "v" * 500 for n in range(9)},
    ],
    ids=["no-key", "not-ascii", "tab", "long-key", "long-value", "too-much"],
)
@contract("4.6/metadata-bad")
def test_bad_metadata_is_400_before_anything_is_written(plane, box, headers):
    refused(put(plane, b"x", f"{box}/new/file", headers), 400)
    assert plane.sh(f"ls {box}") == ""


@hosted
@contract("4.6/metadata-bad")
def test_metadata_of_a_thousand_headers_meets_the_rule_about_its_bytes(plane, box):
    headers = {f"X-Metadata-{number:04}": "" for number in range(1400)}
    refused(put(plane, b"x", f"{box}/file", headers), 400, contains="metadata is 5600 bytes in all, the limit is 4096")
    assert plane.sh(f"ls {box}") == ""


@contract("4.6/metadata-bad")
def test_metadata_of_a_thousand_headers_meets_the_rule_over_http_2_as_well(plane, box):
    headers = {f"x-metadata-{number:04}": "" for number in range(1400)}
    with httpx.Client(base_url=plane.url, http1=False, http2=True, trust_env=False) as client:
        answer = client.post("/files", params={"path": f"{box}/file"}, content=b"x", headers={**OCTETS, **headers})
    refused(answer, 400, contains="metadata is 5600 bytes in all, the limit is 4096")


@hosted
@contract("3.5/existing", "4.6/octets")
def test_an_overwritten_file_becomes_the_users_and_keeps_its_mode(plane, box):
    """As far as the user may give it away: root may; `user` may write to what is open to it, and it stays whose it was (weakness 11)."""
    plane.put(f"{box}/file", "long old content", owner="nobody", mode="646")
    assert put(plane, b"new", f"{box}/file", username="root").status_code == 200
    assert plane.sh(f"stat -c '%U %a %s' {box}/file") == "root 646 3\n"
    assert put(plane, b"newer", f"{box}/file").status_code == 200
    assert plane.sh(f"stat -c '%a %s' {box}/file; cat {box}/file") == "646 5\nnewer"


@pytest.mark.parametrize("late", [b"\r\n", b""], ids=["line-break", "end-of-the-chunks"])
@contract("4.6/multipart")
def test_what_follows_the_last_boundary_late_does_not_cost_the_connection(plane, box, late):
    body = b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\nx\r\n--B--'
    length = f"Content-Length: {len(body + late)}" if late else "Transfer-Encoding: chunked"
    head = f"POST /files?path={box}/f HTTP/1.1\r\nHost: a\r\nContent-Type: multipart/form-data; boundary=B\r\n{length}\r\n\r\n"
    with socket.create_connection(plane.address, timeout=10) as connection:
        connection.sendall(head.encode() + (body if late else b"%x\r\n%s\r\n" % (len(body), body)))
        time.sleep(0.05)
        connection.sendall(late or b"0\r\n\r\n")
        answers = connection.makefile("rb")
        assert answers.readline().startswith(b"HTTP/1.1 200")
        while answers.readline() != b"\r\n":
            pass
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        assert b"HTTP/1.1 204" in answers.read()


@hosted
@pytest.mark.parametrize("user", ["root", "nobody"])
@contract("3.5/created", "2.1/rest")
def test_an_upload_belongs_to_the_user_of_the_query(plane, box, user):
    plane.sh(f"chmod 777 {box}")
    assert put(plane, b"x", f"{box}/new/file", username=user).status_code == 200
    assert plane.sh(f"cd {box}; stat -c %U new new/file") == f"{user}\n{user}\n"


@contract("4.6/500")
@pytest.mark.parametrize(
    "body, boundary",
    [
        (b'--B\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\ncut off', "B"),
        (b"no boundary at all", "B"),
        (b"--B\r\nContent-Disposition", "B"),
        (b"x", ""),
    ],
    ids=["cut-off", "no-parts", "cut-header", "no-boundary"],
)
def test_a_malformed_multipart_is_an_error(plane, box, body, boundary):
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}" if boundary else "multipart/form-data"}
    answer = plane.http.post("/files", params={"path": f"{box}/file"}, content=body, headers=headers)
    assert answer.status_code in (400, 500)
    assert answer.json()["code"] == answer.status_code


@hosted
@contract("4.6/500")
def test_a_parent_that_is_a_file_is_an_error(plane, box):
    plane.put(f"{box}/file", "stays")
    answer = put(plane, b"x", f"{box}/file/below")
    # envd says 500; a wrong path is the client's.
    assert answer.status_code in (400, 500)
    assert answer.json()["code"] == answer.status_code
    assert plane.content(f"{box}/file") == b"stays"


@pytest.mark.through_hostd(only=True)
@contract("4.6/507", "1.7/resource_exhausted")
def test_a_full_disk_is_507_and_resource_exhausted(plane, box):
    plane.sh(f"mkdir -m 777 {box}/full && mount -t tmpfs -o size=256k,nr_inodes=8,mode=777 tmpfs {box}/full")
    try:
        answer = put(plane, bytes(1 << 20), f"{box}/full/file")
        refused(answer, 507, contains="not enough disk space available")
        assert "attempted to write" in answer.json()["message"]
        for n in range(12):
            answer = put(plane, b"", f"{box}/full/{n}")
            if answer.status_code != 200:
                break
        refused(answer, 507, contains="not enough inodes available")
        assert plane.fs("MakeDir", path=f"{box}/full/dir").error[:2] == (429, "resource_exhausted")
    finally:
        plane.sh(f"umount {box}/full")


@contract("4.6/octets", "10/retries")
def test_an_upload_that_breaks_off_leaves_the_agent_whole(plane, box):
    with socket.create_connection(plane.address) as connection:
        connection.sendall(
            f"POST /files?path={box}/cut HTTP/1.1\r\nHost: a\r\nContent-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\nonly this".encode()
        )
        # In place: once it is there, the upload that is about to break off has emptied it.
        wait_until(lambda: get(plane, f"{box}/cut").status_code == 200, within=10, what="the upload has begun")
    assert put(plane, b"whole", f"{box}/cut").status_code == 200
    time.sleep(0.1)
    assert plane.content(f"{box}/cut") == b"whole"


@pytest.mark.parametrize("verb", ["HEAD", "PUT", "DELETE", "PATCH"])
@contract("4/wrong-method")
def test_files_have_no_other_method(plane, verb):
    answer = plane.http.request(verb, "/files", params={"path": "/etc/hostname"})
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, POST")
