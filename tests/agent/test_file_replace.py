"""Uploads that replace at once, digests in both directions, and full disks."""

import base64
import gzip
import hashlib
import os
import socket
import threading

import pytest

from harness.folders import folder, small_disk
from harness.processes import wait_until

ATOMIC = {"Guestd-Replace": "atomic"}
OLD = b"what was there before"


@pytest.fixture
def place():
    with folder() as path:
        yield path


def upload(agent, path, content=b"x", headers=None):
    return agent.post(
        "/files",
        params={"path": str(path)},
        content=content,
        headers={"Content-Type": "application/octet-stream", **(headers or {})},
    )


def digest(content: bytes, algorithm: str = "sha-256") -> str:
    value = hashlib.new(algorithm.replace("-", ""), content).digest()
    return f"{algorithm}=:{base64.b64encode(value).decode()}:"


def names(place):
    return sorted(path.name for path in place.iterdir())


def old_file(place, mode=0o640):
    path = place / "file"
    path.write_bytes(OLD)
    path.chmod(mode)
    os.chown(path, 12345, 12346)
    return path


def attributes_work(path) -> bool:
    try:
        os.setxattr(path, "user.e2b.author", b"ada")
    except OSError:
        return False
    os.setxattr(path, "user.other", b"kept")
    return True


def test_an_atomic_upload_is_a_new_file_with_the_old_ones_mode_and_owner(agent, place):
    path = old_file(place, 0o751)
    inode, held = path.stat().st_ino, open(path, "rb")
    answer = upload(agent, path, b"new", ATOMIC)
    assert answer.status_code == 200, answer.text
    now = path.stat()
    assert now.st_ino != inode
    assert (now.st_mode & 0o7777, now.st_uid, now.st_gid) == (0o751, 12345, 12346)
    assert path.read_bytes() == b"new"
    assert held.read() == OLD, "whoever has the old file open reads it to its end"
    held.close()
    assert names(place) == ["file"]


def test_an_atomic_upload_keeps_attributes_until_there_are_new_ones(agent, place):
    path = old_file(place)
    if not attributes_work(path):
        pytest.skip("attributes were not tested: this file system has none")
    upload(agent, path, b"1", ATOMIC)
    assert (os.getxattr(path, "user.e2b.author"), os.getxattr(path, "user.other")) == (b"ada", b"kept")
    upload(agent, path, b"2", {**ATOMIC, "X-Metadata-Kind": "report"})
    assert sorted(os.listxattr(path)) == ["user.e2b.kind", "user.other"]


def test_the_rights_of_a_program_do_not_pass_to_its_replacement(agent, place):
    path = old_file(place, 0o755)
    try:
        os.setxattr(path, "security.capability", bytes.fromhex("0100000200200000000000000000000000000000"))
    except OSError:
        pytest.skip("rights of programs were not tested: this file system has none")
    assert upload(agent, path, b"new", ATOMIC).status_code == 200
    assert "security.capability" not in os.listxattr(path)


def test_an_atomic_upload_replaces_what_a_link_leads_to_and_not_the_link(agent, place):
    path = old_file(place)
    (place / "other").mkdir()
    (place / "other/link").symlink_to("../file")
    (place / "chain").symlink_to("other/link")
    upload(agent, place / "chain", b"new", ATOMIC)
    assert path.read_bytes() == b"new" and (place / "chain").is_symlink() and (place / "other/link").is_symlink()
    (place / "dangling").symlink_to("other/fresh")
    upload(agent, place / "dangling", b"new", ATOMIC)
    assert (place / "other/fresh").read_bytes() == b"new" and (place / "dangling").is_symlink()


def test_an_atomic_upload_makes_folders_and_files(agent, place):
    assert upload(agent, place / "a/b/file", b"x", ATOMIC).status_code == 200
    assert (place / "a/b/file").stat().st_mode & 0o777 == 0o644
    long = "x" * 255
    assert upload(agent, place / long, b"x", ATOMIC).status_code == 200
    assert names(place) == ["a", long]


@pytest.mark.parametrize("value", ["yes", "", "Atomic", "atomic, atomic"])
def test_another_way_to_replace_is_400(agent, place, value):
    path = old_file(place)
    answer = upload(agent, path, b"new", {"Guestd-Replace": value})
    assert answer.status_code == 400
    assert "Guestd-Replace" in answer.json()["message"] and "atomic" in answer.json()["message"]
    assert path.read_bytes() == OLD


def test_a_client_that_goes_away_leaves_the_old_file(guestd, place):
    path = old_file(place)
    with socket.create_connection(("127.0.0.1", guestd.port)) as connection:
        connection.sendall(
            f"POST /files?path={path} HTTP/1.1\r\nHost: localhost\r\nGuestd-Replace: atomic\r\n"
            "Content-Type: application/octet-stream\r\nContent-Length: 10000000\r\n\r\n".encode()
            + bytes(3_000_000)
        )
        wait_until(lambda: len(names(place)) == 2, within=10, what="the new content is being written beside the old")
        hidden = next(name for name in names(place) if name != "file")
        assert hidden.startswith(".file.guestd-")
        assert path.read_bytes() == OLD
    wait_until(lambda: names(place) == ["file"], within=10, what="nothing of the new content is left")
    assert path.read_bytes() == OLD


def test_several_files_are_replaced_together_or_not_at_all(agent, place):
    (place / "one").write_text("old")
    files = [("file", (f"{place}/{name}", b"new")) for name in ("one", "two")]
    broken = files + [("file", (f"{place}/sub/", b"no name below a folder")), ("file", (str(place), b"a folder"))]
    assert agent.post("/files", files=broken, headers=ATOMIC).status_code == 400
    assert (place / "one").read_text() == "old"
    wait_until(lambda: "two" not in names(place) and not [n for n in names(place) if n[0] == "."], within=10, what="clean")
    assert agent.post("/files", files=files, headers=ATOMIC).status_code == 200
    assert ((place / "one").read_text(), (place / "two").read_text()) == ("new", "new")


def test_too_many_files_at_once_are_refused(agent, place):
    files = [("file", (f"{place}/{number}", b"x")) for number in range(101)]
    answer = agent.post("/files", files=files, headers=ATOMIC)
    assert answer.status_code == 400 and "100" in answer.json()["message"]
    wait_until(lambda: names(place) == [], within=10, what="none of them is left")


def test_readers_never_see_half_a_file(agent, place):
    path = place / "file"
    contents = [bytes([letter]) * 700_000 for letter in b"ab"]
    upload(agent, path, contents[0], ATOMIC)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(20):
        upload(agent, path, contents[number % 2], ATOMIC)
    done.set()
    reader.join()
    assert seen == {(700_000, 1)}


@pytest.mark.parametrize("field", ["Content-Digest", "Repr-Digest"])
@pytest.mark.parametrize("algorithm", ["sha-256", "sha-512"])
@pytest.mark.parametrize("mode", [{}, ATOMIC])
def test_a_digest_is_verified(agent, place, field, algorithm, mode):
    path, content = old_file(place), os.urandom(1_000_000)
    wrong = digest(b"something else", algorithm)
    refused = upload(agent, path, content, {field: wrong, **mode})
    assert refused.status_code == 400
    message = refused.json()["message"]
    assert wrong in message and digest(content, algorithm) in message and field in message
    if mode:
        assert "nothing was replaced" in message and path.read_bytes() == OLD
    else:
        assert "it is written all the same" in message and path.read_bytes() == content
    accepted = upload(agent, path, content, {field: digest(content, algorithm), **mode})
    assert accepted.status_code == 200, accepted.text
    assert path.read_bytes() == content
    wait_until(lambda: names(place) == ["file"], within=10, what="nothing is left beside the file")


def test_a_digest_covers_the_body_as_it_is_sent(agent, place):
    packed = gzip.compress(b"plain")
    headers = {"Content-Encoding": "gzip", "Content-Digest": digest(packed)}
    assert upload(agent, place / "file", packed, headers).status_code == 200
    assert (place / "file").read_bytes() == b"plain"
    headers["Content-Digest"] = digest(b"plain")
    assert upload(agent, place / "file", packed, headers).status_code == 400
    body = (
        f'--X\r\nContent-Disposition: form-data; name="file"; filename="{place}/part"\r\n\r\npart\r\n--X--\r\n'
        "what follows the last boundary counts as well"
    ).encode()
    headers = {"Content-Type": "multipart/form-data; boundary=X", "Content-Digest": digest(body)}
    answer = agent.post("/files", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert (place / "part").read_bytes() == b"part"


@pytest.mark.parametrize("value", ["sha-256=abc", "sha-256=:abc:", "sha-256", f"sha-512{digest(b'x')[7:]}", "nonsense"])
def test_a_digest_that_cannot_be_read_is_400_before_anything_is_written(agent, place, value):
    path = old_file(place)
    answer = upload(agent, path, b"x", {"Repr-Digest": value})
    assert answer.status_code == 400
    assert answer.json()["message"].startswith("malformed Repr-Digest: ")
    assert path.read_bytes() == OLD


def test_other_algorithms_are_passed_over(agent, place):
    answer = upload(agent, place / "file", b"x", {"Content-Digest": "md5=:AAAA:, unixsum=:AA==:"})
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize("size", [0, 10, 3_000_000])
def test_a_download_carries_its_digest_on_request(agent, place, size):
    content = os.urandom(size)
    (place / "file").write_bytes(content)

    def get(**headers):
        return agent.get("/files", params={"path": f"{place}/file"}, headers=headers)

    assert "repr-digest" not in get().headers
    for wish, algorithm in (("sha-256=1", "sha-256"), ("sha-512=5, sha-256=1", "sha-512")):
        answer = get(**{"Want-Repr-Digest": wish, "Accept-Encoding": "gzip"})
        assert answer.headers["repr-digest"] == digest(content, algorithm)
        assert "content-encoding" not in answer.headers, "the digest is that of the file, and so is what goes out"
        assert answer.content == content
    if size:
        part = get(**{"Want-Repr-Digest": "sha-256=1", "Range": "bytes=2-4"})
        assert (part.status_code, part.content) == (206, content[2:5])
        assert part.headers["repr-digest"] == digest(content), "of the whole file, not of the part"
    only_gzip = get(**{"Want-Repr-Digest": "sha-256=1", "Accept-Encoding": "gzip, identity;q=0"})
    assert only_gzip.content == content and "repr-digest" not in only_gzip.headers
    assert agent.head("/files", params={"path": f"{place}/file"}).status_code == 405


def test_a_full_disk_is_507_and_says_how_much_was_written(agent, place):
    with small_disk(place, "size=1m"):
        answer = upload(agent, place / "file", bytes(4 << 20))
        assert answer.status_code == 507, answer.text
        error = answer.json()
        assert error["code"] == 507 and "not enough disk space available" in error["message"]
        assert error["written"] == (place / "file").stat().st_size
        assert 0 < error["written"] <= 1 << 20


def test_a_full_disk_leaves_the_old_file_of_an_atomic_upload(agent, place):
    with small_disk(place, "size=1m"):
        path = old_file(place)
        answer = upload(agent, path, bytes(4 << 20), ATOMIC)
        assert (answer.status_code, answer.json()["code"]) == (507, 507), answer.text
        assert 0 < answer.json()["written"] <= 1 << 20
        wait_until(lambda: names(place) == ["file"], within=10, what="nothing of the new content is left")
        assert path.read_bytes() == OLD
        assert upload(agent, path, bytes(500_000), ATOMIC).status_code == 200, "the room is free again"


def test_no_room_for_another_name_is_507(agent, place):
    with small_disk(place, "size=1m,nr_inodes=3"):
        (place / "file").write_text("x")
        (place / "other").write_text("x")
        for path in (place / "new", place / "folder/new"):
            answer = upload(agent, path)
            assert answer.status_code == 507, answer.text
            assert answer.json() == {"code": 507, "message": "not enough inodes available", "written": 0}
        assert upload(agent, place / "file", b"fits").status_code == 200
