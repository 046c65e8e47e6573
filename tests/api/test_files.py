"""Files through the E2B SDK."""

import hashlib
import os

import pytest
from e2b import FileNotFoundException, InvalidArgumentException, Sandbox, SandboxException, WriteInfo

BIG = 64 << 20


def test_text_and_bytes_make_the_round_trip(sandbox):
    written = sandbox.files.write("notes/hello.txt", "grüße\n")
    assert isinstance(written, WriteInfo)
    assert written.path == "/home/user/notes/hello.txt"
    assert sandbox.files.read("notes/hello.txt") == "grüße\n"
    data = bytes(range(256)) * 10
    sandbox.files.write("/tmp/data", data)
    assert bytes(sandbox.files.read("/tmp/data", format="bytes")) == data


@pytest.mark.parametrize("octets", [False, True], ids=["multipart", "octet-stream"])
def test_64_mebibytes_make_the_round_trip(sandbox, octets):
    data = os.urandom(BIG)
    digest = hashlib.sha256(data).hexdigest()
    sandbox.files.write("/tmp/big", data, use_octet_stream=octets, request_timeout=120)
    assert sandbox.commands.run("sha256sum < /tmp/big", timeout=120).stdout.split()[0] == digest
    back = sandbox.files.read("/tmp/big", format="bytes", request_timeout=120)
    assert hashlib.sha256(back).hexdigest() == digest


def test_a_download_is_streamed(sandbox):
    sandbox.commands.run("head -c 20000000 /dev/zero > /tmp/zeros")
    pieces = [len(piece) for piece in sandbox.files.read("/tmp/zeros", format="stream")]
    assert sum(pieces) == 20_000_000
    assert len(pieces) > 1


def test_several_files_at_once(sandbox):
    sandbox.files.write_files([{"path": f"/tmp/many/{n}", "data": str(n)} for n in range(20)])
    assert sandbox.commands.run("cat $(seq -f /tmp/many/%g 0 19)").stdout == "".join(map(str, range(20)))


def test_a_gzipped_upload(sandbox):
    sandbox.files.write("/tmp/packed", "x" * 100_000, gzip=True)
    assert sandbox.files.read("/tmp/packed", gzip=True) == "x" * 100_000


def test_a_missing_file_is_not_found(sandbox):
    with pytest.raises(FileNotFoundException):
        sandbox.files.read("/no/such/file")
    with pytest.raises(FileNotFoundException):
        sandbox.files.list("/no/such/folder")
    with pytest.raises(FileNotFoundException):
        sandbox.files.rename("/no/such/file", "/tmp/x")
    assert sandbox.files.exists("/no/such/file") is False


def test_a_folder_is_not_a_file(sandbox):
    with pytest.raises(InvalidArgumentException):
        sandbox.files.read("/tmp")
    with pytest.raises(InvalidArgumentException):
        sandbox.files.write("/tmp", "x")


def test_what_is_made_belongs_to_the_user(sandbox):
    sandbox.files.write("new/folder/file", "x")
    assert sandbox.commands.run("stat -c '%U %a' new new/folder new/folder/file").stdout == "user 755\nuser 755\nuser 644\n"
    sandbox.files.write("/root/file", "x", user="root")
    assert sandbox.files.get_info("/root/file", user="root").owner == "root"
    with pytest.raises(SandboxException, match="user 'user' may not stat /root/file"):
        sandbox.files.get_info("/root/file")


def test_list_make_rename_remove(sandbox):
    assert sandbox.files.make_dir("a/b") is True
    assert sandbox.files.make_dir("a/b") is False
    sandbox.files.write("a/file", "x")
    assert [entry.name for entry in sandbox.files.list("a")] == ["b", "file"]
    assert sandbox.files.rename("a/file", "a/b/moved").path == "/home/user/a/b/moved"
    assert [entry.path for entry in sandbox.files.list("a", depth=2)] == ["/home/user/a/b", "/home/user/a/b/moved"]
    sandbox.files.remove("a")
    assert sandbox.files.exists("a") is False


@pytest.mark.parametrize("name", ["with space", "ünï", "a&b=c", "100%25", "q?x#y", "-n", "semi;colon", 'quo"te'])
def test_any_file_name_works(sandbox, name):
    path = f"/tmp/names/{name}"
    sandbox.files.write(path, name)
    assert sandbox.files.read(path) == name
    assert [entry.name for entry in sandbox.files.list("/tmp/names")] == [name]


def test_files_of_several_sandboxes_are_apart(containers, sandbox):
    other = Sandbox.create(**containers.sdk())
    sandbox.files.write("/tmp/mine", "x")
    assert other.files.exists("/tmp/mine") is False
