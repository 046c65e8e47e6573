"""Sections 1.3, 3.1 to 3.3 and 3.5: paths, entries, list, make, move, remove."""

import os

import pytest

from harness.planes import HOME

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd
CODECS = pytest.mark.parametrize("codec", ["json", "proto"])


def names(plane, path: str, depth: int = 1) -> list[str]:
    entries = plane.fs("ListDir", path=path, depth=depth).ok().get("entries", [])
    return [os.path.relpath(entry["path"], path) for entry in entries]


# --- paths ---


@hosted
@pytest.mark.parametrize(
    "path, real",
    [
        ("", HOME),
        ("~", HOME),
        ("~/", HOME),
        ("~/sub", f"{HOME}/sub"),
        ("sub", f"{HOME}/sub"),
        ("./sub", f"{HOME}/sub"),
        ("sub/../sub", f"{HOME}/sub"),
    ],
)
@contract("3.1/empty", "3.1/tilde", "3.1/relative", "3.3/path", "1.1/Stat")
def test_a_path_is_below_the_users_home(plane, path, real):
    plane.sh(f"install -d -o user -g user {HOME}/sub")
    entry = plane.fs("Stat", path=path).ok()["entry"]
    assert entry["path"].rstrip("/") == real
    assert entry["type"] == "FILE_TYPE_DIRECTORY"


@contract("3.1/empty", "4.3/user")
def test_an_empty_path_is_the_default_workdir_and_a_tilde_is_not(fresh):
    assert fresh.http.post("/init", json={"defaultUser": "user", "defaultWorkdir": "/usr"}).status_code == 204
    assert fresh.fs("Stat", path="").ok()["entry"]["path"] == "/usr"
    assert fresh.fs("Stat", path="~").ok()["entry"]["path"] == HOME


@hosted
@pytest.mark.parametrize("user, home", [("root", "/root"), ("user", HOME)])
@contract("3.1/tilde", "2.1/basic")
def test_the_named_users_home_counts(plane, user, home):
    assert plane.fs("Stat", _user=user, path="~").ok()["entry"]["path"] == home


@hosted
@pytest.mark.parametrize("method", ["Stat", "MakeDir", "ListDir", "Remove", "CreateWatcher"])
@contract("3.1/other-home", "1.7/invalid_argument")
def test_another_users_home_is_not_expanded(plane, method):
    status, code, message = plane.fs(method, path="~nobody/x").error
    assert (status, code) == (400, "invalid_argument")
    assert "cannot expand user-specific home dir" in message


@contract("3.1/other-home", "1.1/Move")
@pytest.mark.parametrize("source, destination", [("~nobody/x", "/tmp/x"), ("/tmp/x", "~nobody/x")])
def test_another_users_home_is_not_moved_from_or_to(plane, source, destination):
    assert plane.fs("Move", source=source, destination=destination).error[:2] == (400, "invalid_argument")


@contract("3.1/absolute")
@pytest.mark.parametrize("method", ["Stat", "MakeDir", "ListDir", "Remove"])
def test_a_path_with_a_zero_byte_is_an_invalid_argument(plane, method):
    assert plane.fs(method, path="/tmp/a\0b").error[:2] == (400, "invalid_argument")


# --- entries ---


@hosted
@CODECS
@contract(
    "1.3/EntryInfo",
    "1.3/Stat",
    "3.3/name",
    "3.3/path",
    "3.3/type",
    "3.3/mode",
    "3.3/permissions",
    "3.3/size",
    "3.3/owner",
    "3.3/modified",
)
def test_a_file_tells_everything_about_itself(plane, box, codec):
    plane.put(f"{box}/file", "hello", owner="nobody", mode="640")
    plane.sh(f"touch -d @1700000000 {box}/file")
    assert plane.fs("Stat", codec, path=f"{box}/file").ok() == {
        "entry": {
            "name": "file",
            "type": "FILE_TYPE_FILE",
            "path": f"{box}/file",
            "size": "5",
            "mode": 0o640,
            "permissions": "-rw-r-----",
            "owner": "nobody",
            "group": "nogroup",
            "modifiedTime": "2023-11-14T22:13:20Z",
        }
    }


KINDS = [
    ("touch x; chmod 644 x", "FILE_TYPE_FILE", 0o644, "-rw-r--r--"),
    ("touch x; chmod 000 x", "FILE_TYPE_FILE", None, "----------"),
    ("touch x; chmod 4755 x", "FILE_TYPE_FILE", 0o755, "urwxr-xr-x"),
    ("touch x; chmod 2755 x", "FILE_TYPE_FILE", 0o755, "grwxr-xr-x"),
    ("touch x; chmod 6711 x", "FILE_TYPE_FILE", 0o711, "ugrwx--x--x"),
    ("mkdir x; chmod 755 x", "FILE_TYPE_DIRECTORY", 0o755, "drwxr-xr-x"),
    ("mkdir x; chmod 1777 x", "FILE_TYPE_DIRECTORY", 0o777, "dtrwxrwxrwx"),
    ("mkdir x; chmod 2775 x", "FILE_TYPE_DIRECTORY", 0o775, "dgrwxrwxr-x"),
    ("mkfifo -m 644 x", None, 0o644, "prw-r--r--"),
    ("mknod -m 666 x c 1 3", None, 0o666, "Dcrw-rw-rw-"),
    ("mknod -m 660 x b 7 200", None, 0o660, "Drw-rw----"),
    ("python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('x')\"; chmod 755 x", None, 0o755, "Srwxr-xr-x"),
]


@pytest.mark.parametrize("made, kind, mode, permissions", KINDS, ids=[each[3] for each in KINDS])
@contract("3.3/type", "3.3/mode", "3.3/permissions", "1.3/FileType")
def test_each_kind_of_file_has_its_type_and_gos_letters(plane, box, made, kind, mode, permissions):
    plane.sh(f"cd {box}; {made}")
    entry = plane.fs("Stat", path=f"{box}/x").ok()["entry"]
    assert (entry.get("type"), entry.get("mode"), entry["permissions"]) == (kind, mode, permissions)


LINKS = [
    ("mkdir t; ln -s t x", "FILE_TYPE_DIRECTORY", 0o755, "t"),
    ("touch t; chmod 640 t; ln -s t x", "FILE_TYPE_FILE", 0o640, "t"),
    ("touch t; chmod 600 t; ln -s t m; ln -s m x", "FILE_TYPE_FILE", 0o600, "t"),
    ("mkdir d; touch d/t; chmod 644 d/t; ln -s d e; ln -s e/t x", "FILE_TYPE_FILE", 0o644, "d/t"),
    ("ln -s nothing x", None, None, "x"),
    ("ln -s x x", None, None, "x"),
]


@hosted
@pytest.mark.parametrize("made, kind, mode, target", LINKS, ids=["folder", "file", "twice", "through-a-link", "broken", "cyclic"])
@contract(
    "3.3/type", "3.3/symlink-target", "3.3/is-symlink", "3.3/mode", "3.3/permissions", "3.3/size", "1.3/FileType", "10/old-proto"
)
def test_a_link_has_its_targets_type_and_the_resolved_path(plane, box, made, kind, mode, target):
    plane.sh(f"cd {box}; umask 022; {made}")
    entry = plane.fs("Stat", path=f"{box}/x").ok()["entry"]
    assert (entry.get("type"), entry.get("mode")) == (kind, mode)
    assert entry["permissions"] == "Lrwxrwxrwx"
    assert entry["symlinkTarget"] == f"{box}/{target}"
    assert entry["isSymlink"] is True
    assert entry["size"] == str(
        len(os.readlink(f"/proc/{plane.guestd.process.pid}/root{box}/x"))
        if plane.guestd
        else int(plane.sh(f"stat -c %s {box}/x"))
    )


@hosted
@contract("3.3/owner")
def test_an_owner_without_a_name_is_a_number(plane, box):
    plane.sh(f"cd {box}; touch x; chown 54321:54322 x")
    entry = plane.fs("Stat", path=f"{box}/x").ok()["entry"]
    assert (entry["owner"], entry["group"]) == ("54321", "54322")


@contract("3.3/metadata")
def test_metadata_is_what_the_attributes_say_without_what_is_no_text(plane, box):
    plane.put(f"{box}/file")
    path = f"{box}/file"
    script = (
        "import os; p = %r; os.setxattr(p, 'user.e2b.one', b'1'); os.setxattr(p, 'user.e2b.two-b', '\u00fc'.encode());"
        " os.setxattr(p, 'user.e2b.bad', b'\\xff'); os.setxattr(p, 'user.other', b'x')" % path
    )
    plane.sh(f'python3 -c "{script}"')
    for codec in ("json", "proto"):
        assert plane.fs("Stat", codec, path=path).ok()["entry"]["metadata"] == {"one": "1", "two-b": "ü"}


@CODECS
@pytest.mark.parametrize("path", ["/no/such/file", "none", "~/none"])
@contract("3.2/stat-missing", "1.7/not_found")
def test_a_missing_file_is_not_found_with_its_full_path(plane, codec, path):
    full = path if path.startswith("/") else f"{HOME}/none"
    assert plane.fs("Stat", codec, path=path).error == (404, "not_found", f"file not found: {full}")


@hosted
@contract("3.3/size", "1.5/int64")
def test_a_size_beyond_32_bits_is_exact(plane, box):
    plane.sh(f"truncate -s 5000000001 {box}/big")
    for codec in ("json", "proto"):
        assert plane.fs("Stat", codec, path=f"{box}/big").ok()["entry"]["size"] == "5000000001"


@pytest.mark.parametrize("name", ["with space", "ünï", "new\nline", "-n", "100%", "a&b?c#d", "\\", "'\"", "~", "..."])
@contract("3.3/name", "3.3/path")
def test_any_name_is_a_name(plane, box, name):
    made = plane.fs("MakeDir", path=f"{box}/{name}").ok()["entry"]
    assert (made["name"], made["path"]) == (name, f"{box}/{name}")
    assert [entry["name"] for entry in plane.fs("ListDir", path=box).ok()["entries"]] == [name]


# --- list ---


@hosted
@CODECS
@contract("1.1/ListDir", "1.3/ListDir", "3.2/list-order", "3.2/list-depth")
def test_a_list_is_sorted_bytewise_each_folder_before_its_content(plane, box, codec):
    plane.sh(f"cd {box}; mkdir -p subdir1/subdir1_1/deep subdir1/subdir1_2 subdir2 B; touch a Z subdir1/file .hidden é 10 9")

    def told(depth: int) -> list[str]:
        entries = plane.fs("ListDir", codec, path=box, depth=depth).ok()["entries"]
        return [os.path.relpath(entry["path"], box) for entry in entries]

    top = [".hidden", "10", "9", "B", "Z", "a", "subdir1", "subdir2", "é"]
    assert told(0) == told(1) == top
    inner = ["subdir1/file", "subdir1/subdir1_1", "subdir1/subdir1_2"]
    assert told(2) == [*top[:7], *inner, *top[7:]]
    assert told(3) == told(99) == [*top[:7], *inner[:2], "subdir1/subdir1_1/deep", inner[2], *top[7:]]


@hosted
@contract("3.2/list-link", "3.3/path")
def test_a_listed_link_keeps_the_path_that_was_asked_for(plane, box):
    plane.sh(f"cd {box}; mkdir real; touch real/file; ln -s real link")
    assert [entry["path"] for entry in plane.fs("ListDir", path=f"{box}/link").ok()["entries"]] == [f"{box}/link/file"]


@hosted
@contract("3.2/list-links")
def test_links_inside_a_list_are_not_followed(plane, box):
    plane.sh(f"cd {box}; mkdir d; touch d/file; ln -s d link; ln -s .. d/up; ln -s nothing broken")
    assert names(plane, box, 9) == ["broken", "d", "d/file", "d/up", "link"]


@contract("3.2/list-missing", "3.2/list-file", "3.2/list-cyclic", "1.7/failed_precondition")
@pytest.mark.parametrize(
    "made, status, code, text",
    [
        ("true", 404, "not_found", "path not found: {}"),
        ("touch x", 400, "invalid_argument", "path is not a directory: {}"),
        ("ln -s x x", 400, "failed_precondition", None),
        ("ln -s y x; ln -s x y", 400, "failed_precondition", None),
        ("ln -s nothing x", 404, "not_found", None),
        ("touch t; ln -s t x", 400, "invalid_argument", None),
    ],
    ids=["missing", "file", "cyclic", "cyclic-pair", "broken-link", "link-to-file"],
)
def test_what_cannot_be_listed_says_why(plane, box, made, status, code, text):
    plane.sh(f"cd {box}; {made}")
    told = plane.fs("ListDir", path=f"{box}/x").error
    assert told[:2] == (status, code)
    if text:
        assert told[2] == text.format(f"{box}/x")


@contract("3.2/list-depth")
def test_a_list_of_nothing_is_nothing(plane, box):
    for depth in (0, 1, 2):
        assert plane.fs("ListDir", path=box, depth=depth).ok() == {}


@hosted
@contract("3.2/list-order")
def test_a_folder_of_two_thousand_is_listed_whole(plane, box):
    plane.sh(f"cd {box}; seq -f file-%04g 2000 | xargs touch")
    assert names(plane, box) == [f"file-{n:04}" for n in range(1, 2001)]


# --- make ---


@hosted
@CODECS
@contract("1.1/MakeDir", "1.3/MakeDir", "3.2/mkdir", "3.5/created")
def test_made_folders_are_the_users_with_all_their_parents(plane, box, codec):
    entry = plane.fs("MakeDir", codec, path=f"{box}/a/b/c").ok()["entry"]
    assert (entry["name"], entry["type"], entry["path"], entry["permissions"]) == (
        "c",
        "FILE_TYPE_DIRECTORY",
        f"{box}/a/b/c",
        "drwxr-xr-x",
    )
    assert plane.sh(f"cd {box}; stat -c '%U:%G %a' a a/b a/b/c") == "user:user 755\n" * 3


@hosted
@contract("3.5/existing", "3.2/mkdir")
def test_existing_parents_keep_their_owner(plane, box):
    plane.sh(f"install -d -o nobody -g nogroup -m 777 {box}/theirs")
    plane.fs("MakeDir", path=f"{box}/theirs/mine").ok()
    assert plane.sh(f"cd {box}; stat -c '%U %a' theirs theirs/mine") == "nobody 777\nuser 755\n"


@hosted
@CODECS
@contract("3.2/mkdir-exists", "3.2/mkdir-file", "1.7/already_exists")
def test_what_is_there_cannot_be_made(plane, box, codec):
    plane.put(f"{box}/file")
    assert plane.fs("MakeDir", codec, path=box).error == (409, "already_exists", f"directory already exists: {box}")
    assert plane.fs("MakeDir", codec, path=f"{box}/file").error[:2] == (400, "invalid_argument")
    assert plane.fs("MakeDir", codec, path="/").error[:2] == (409, "already_exists")


@hosted
@contract("3.2/mkdir")
def test_a_folder_is_the_named_users(plane, box):
    plane.sh(f"chmod 777 {box}")
    plane.fs("MakeDir", _user="nobody", path=f"{box}/theirs").ok()
    assert plane.sh(f"stat -c '%U:%G' {box}/theirs") == "nobody:nogroup\n"


# --- move ---


@hosted
@CODECS
@contract("1.1/Move", "1.3/Move", "3.2/move")
def test_a_move_makes_the_parents_and_tells_the_new_entry(plane, box, codec):
    plane.put(f"{box}/from", "content")
    entry = plane.fs("Move", codec, source=f"{box}/from", destination=f"{box}/x/y/to").ok()["entry"]
    assert (entry["name"], entry["path"], entry["size"]) == ("to", f"{box}/x/y/to", "7")
    assert plane.content(f"{box}/x/y/to") == b"content"
    assert names(plane, box, 9) == ["x", "x/y", "x/y/to"]
    assert plane.sh(f"cd {box}; stat -c '%U %a' x x/y") == "user 755\nuser 755\n"


@hosted
@contract("3.2/move")
@pytest.mark.parametrize("kind", ["file-over-file", "folder", "folder-over-empty", "onto-itself", "link"])
def test_a_move_does_what_rename_does(plane, box, kind):
    made = {
        "file-over-file": "echo -n new > a; echo -n old > b",
        "folder": "mkdir a; echo -n new > a/file",
        "folder-over-empty": "mkdir a b; echo -n new > a/file",
        "onto-itself": "echo -n new > b",
        "link": "echo -n new > t; ln -s t a",
    }[kind]
    plane.sh(f"cd {box}; {made}; chown -hR user:user .")
    source = "b" if kind == "onto-itself" else "a"
    entry = plane.fs("Move", source=f"{box}/{source}", destination=f"{box}/b").ok()["entry"]
    assert entry["path"] == f"{box}/b"
    assert plane.content(f"{box}/b/file" if kind.startswith("folder") else f"{box}/b") == b"new"
    assert "a" not in names(plane, box)
    if kind == "link":
        assert entry["isSymlink"] is True


@hosted
@CODECS
@contract("3.2/move-missing", "1.7/not_found")
def test_a_move_of_nothing_is_not_found(plane, box, codec):
    answer = plane.fs("Move", codec, source=f"{box}/none", destination=f"{box}/to")
    assert answer.error == (404, "not_found", f"source file not found: {box}/none")


@hosted
@contract("3.2/move-nonempty")
def test_a_move_onto_a_folder_with_content_is_refused_and_harms_neither(plane, box):
    plane.sh(f"cd {box}; mkdir a b; touch a/one b/two; chown -R user:user .")
    status, code, message = plane.fs("Move", source=f"{box}/a", destination=f"{box}/b").error
    # envd calls it internal; a precondition that can be met says more.
    assert (status, code) in [(500, "internal"), (400, "failed_precondition")]
    assert "not empty" in message.lower()
    assert names(plane, box, 2) == ["a", "a/one", "b", "b/two"]


@contract("3.2/move")
def test_a_folder_does_not_move_into_itself(plane, box):
    plane.sh(f"cd {box}; mkdir a; chown user:user a")
    assert plane.fs("Move", source=f"{box}/a", destination=f"{box}/a/b").status in (400, 500)
    assert "a" in names(plane, box)


# --- remove ---


@hosted
@CODECS
@contract("1.1/Remove", "1.3/Remove", "3.2/remove")
def test_a_remove_takes_everything_below_and_is_content_with_nothing(plane, box, codec):
    plane.sh(f"cd {box}; mkdir -p a/b; touch a/b/file a/file; chown -R user:user .")
    assert plane.fs("Remove", codec, path=f"{box}/a").ok() == {}
    assert names(plane, box) == []
    assert plane.fs("Remove", codec, path=f"{box}/a").ok() == {}
    assert plane.fs("Remove", codec, path=f"{box}/never/was").ok() == {}


@CODECS
@contract("3.2/remove", "3.2/move")
def test_leaving_the_path_out_costs_nobody_the_home_folder(plane, box, codec):
    """A path that is left out means the home folder, wherever nothing can be lost by it."""
    for method, message, field in (("Remove", {}, "path"), ("Move", {"destination": f"{box}/home"}, "source")):
        status, code, text = plane.fs(method, codec, **message).error
        assert (status, code) == (400, "invalid_argument")
        assert text.startswith(f"{field}: ")
    assert plane.fs("Stat", path="").ok()["entry"]["path"] == HOME


@hosted
@contract("3.2/remove")
def test_a_remove_takes_the_link_and_not_its_target(plane, box):
    plane.sh(
        f"cd {box}; mkdir precious; touch precious/file; ln -s precious link; mkdir d; ln -s ../precious d/inner; chown -hR user:user ."
    )
    for path in ("link", "d"):
        plane.fs("Remove", path=f"{box}/{path}").ok()
    assert names(plane, box, 2) == ["precious", "precious/file"]


@pytest.mark.through_hostd(only=True)
@contract("3.2/remove")
def test_the_root_is_not_removed(plane):
    for path in ("/", "//", "/usr/.."):
        assert plane.fs("Remove", path=path).status in (400, 403, 500)
    assert plane.fs("Stat", path="/usr/bin").status == 200
