"""Uploads and downloads over plain HTTP."""

import gzip
import os
import socket

import pytest

from harness.folders import USER, folder


def upload(agent, content: bytes, path=None, headers=None):
    return agent.post(
        "/files",
        params={"path": str(path)} if path else {},
        content=content,
        headers={"Content-Type": "application/octet-stream", **(headers or {})},
    )


def download(agent, path, **headers):
    return agent.get("/files", params={"path": str(path)}, headers=headers)


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_a_body_makes_the_round_trip(agent, tmp_path, size):
    data = os.urandom(size)
    answer = upload(agent, data, tmp_path / "new/folder/file")
    assert answer.status_code == 200, answer.text
    [written] = answer.json()
    assert (written["path"], written["name"], written["type"]) == (str(tmp_path / "new/folder/file"), "file", "file")
    assert (tmp_path / "new/folder/file").read_bytes() == data
    assert download(agent, tmp_path / "new/folder/file").content == data


def test_a_part_goes_where_its_file_name_says_with_its_folders(agent, tmp_path):
    files = [("file", (f"{tmp_path}/a/one.txt", b"1")), ("file", (f"{tmp_path}/b/c/two.txt", b"22"))]
    answer = agent.post("/files", files=files)
    assert answer.status_code == 200, answer.text
    assert [written["path"] for written in answer.json()] == [f"{tmp_path}/a/one.txt", f"{tmp_path}/b/c/two.txt"]
    assert (tmp_path / "a/one.txt").read_bytes() == b"1"
    assert (tmp_path / "b/c/two.txt").read_bytes() == b"22"


def test_the_path_of_the_query_wins_over_the_parts_file_name(agent, tmp_path):
    answer = agent.post(
        "/files", params={"path": f"{tmp_path}/here"}, files={"file": ("elsewhere", b"x")}, data={"other": "ignored"}
    )
    assert answer.status_code == 200, answer.text
    assert (tmp_path / "here").read_bytes() == b"x"


def test_the_same_path_twice_is_refused(agent, tmp_path):
    answer = agent.post("/files", files=[("file", (f"{tmp_path}/a", b"1")), ("file", (f"{tmp_path}/a", b"2"))])
    assert answer.status_code == 400


def test_overwriting_leaves_nothing_of_the_old(agent, tmp_path):
    upload(agent, b"long old content", tmp_path / "file")
    upload(agent, b"new", tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_gzipped_upload_is_unpacked(agent, tmp_path):
    answer = upload(agent, gzip.compress(b"plain"), tmp_path / "file", {"Content-Encoding": "gzip"})
    assert answer.status_code == 200, answer.text
    assert (tmp_path / "file").read_bytes() == b"plain"


@pytest.mark.parametrize(
    "headers, content",
    [({"Content-Encoding": "br"}, b"x"), ({"Content-Encoding": "gzip"}, b"no gzip"), ({"Content-Type": "text/html"}, b"x")],
)
def test_an_upload_that_cannot_be_understood_is_400(agent, tmp_path, headers, content):
    assert upload(agent, content, tmp_path / "file", headers).status_code == 400


def test_an_upload_needs_a_path_that_is_no_folder(agent, tmp_path):
    assert upload(agent, b"x").status_code == 400
    refused = upload(agent, b"x", tmp_path)
    assert refused.status_code == 400
    assert refused.json()["code"] == 400


def test_a_file_belongs_to_the_named_user(agent):
    with folder(USER) as home:
        agent.post("/files", params={"path": f"{home}/new/file", "username": USER}, files={"file": ("file", b"x")})
        for path in (home / "new", home / "new/file"):
            assert path.owner() == USER
        assert (home / "new/file").stat().st_mode & 0o777 == 0o644


def test_an_upload_that_is_cut_does_not_wedge_the_agent(guestd, agent, tmp_path):
    with socket.create_connection(("127.0.0.1", guestd.port)) as connection:
        connection.sendall(
            f"POST /files?path={tmp_path}/cut HTTP/1.1\r\nHost: localhost\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: 1000000\r\n\r\nonly this".encode()
        )
    assert upload(agent, b"whole", tmp_path / "cut").status_code == 200
    assert (tmp_path / "cut").read_bytes() == b"whole"


@pytest.mark.parametrize(
    "wanted, content, told",
    [("bytes=2-4", b"234", "bytes 2-4/10"), ("bytes=-3", b"789", "bytes 7-9/10"), ("bytes=8-", b"89", "bytes 8-9/10")],
)
def test_a_range_is_served(agent, tmp_path, wanted, content, told):
    (tmp_path / "file").write_bytes(b"0123456789")
    answer = download(agent, tmp_path / "file", Range=wanted)
    assert (answer.status_code, answer.content) == (206, content)
    assert answer.headers["content-range"] == told


def test_a_range_beyond_the_end_is_416(agent, tmp_path):
    (tmp_path / "file").write_bytes(b"0123456789")
    assert download(agent, tmp_path / "file", Range="bytes=20-30").status_code == 416


def test_a_download_is_gzipped_for_who_prefers_it(agent, tmp_path):
    (tmp_path / "file").write_bytes(b"a" * 100_000)
    packed = download(agent, tmp_path / "file", **{"Accept-Encoding": "gzip"})
    assert packed.headers["content-encoding"] == "gzip"
    assert packed.content == b"a" * 100_000
    plain = download(agent, tmp_path / "file", **{"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    assert plain.headers["content-length"] == "100000"
    assert download(agent, tmp_path / "file", **{"Accept-Encoding": "br, identity;q=0"}).status_code == 406


@pytest.mark.parametrize("path, status", [("none", 404), ("", 400)])
def test_what_cannot_be_downloaded_says_so(agent, tmp_path, path, status):
    answer = download(agent, tmp_path / path)
    assert answer.status_code == status
    assert answer.json()["code"] == status
    assert str(tmp_path) in answer.json()["message"]


def test_an_unknown_user_is_401(agent, tmp_path):
    answer = agent.get("/files", params={"path": str(tmp_path), "username": "nosuchuser"})
    assert answer.status_code == 401
    assert "nosuchuser" in answer.json()["message"]
