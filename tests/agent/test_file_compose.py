"""Several files become one: `/files/compose`."""

import os

import pytest

from harness.connect import call
from harness.folders import USER, folder, small_disk
from harness.processes import wait_until


@pytest.fixture
def place():
    with folder() as path:
        yield path


def compose(agent, *sources, destination, **more):
    request = {"source_paths": [str(path) for path in sources], "destination": str(destination), **more}
    return agent.post("/files/compose", json=request)


def parts(place, *contents):
    paths = [place / f"part{number}" for number in range(len(contents))]
    for path, content in zip(paths, contents):
        path.write_bytes(content)
    return paths


def names(place):
    return sorted(path.name for path in place.iterdir())


def test_the_parts_become_one_file_in_their_order_and_go(agent, place):
    contents = [os.urandom(700_000), b"", b"small", os.urandom(100_001)]
    sources = parts(place, *contents)
    answer = compose(agent, *reversed(sources), destination=place / "new/whole")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"path": f"{place}/new/whole", "name": "whole", "type": "file"}
    assert (place / "new/whole").read_bytes() == b"".join(reversed(contents))
    assert names(place) == ["new"] and names(place / "new") == ["whole"]


def test_the_same_part_may_come_twice_and_from_a_file_without_a_size(agent, place):
    [source] = parts(place, b"ab")
    answer = compose(agent, source, source, "/proc/version", destination=place / "whole")
    assert answer.status_code == 200, answer.text
    assert (place / "whole").read_bytes() == b"abab" + open("/proc/version", "rb").read()
    [warning] = answer.json()["warnings"]
    assert warning.startswith("source '/proc/version' was not removed: ")


def test_the_destination_keeps_its_mode_its_owner_and_its_metadata(agent, place):
    whole = place / "whole"
    whole.write_text("old")
    whole.chmod(0o751)
    os.chown(whole, 12345, 12346)
    try:
        os.setxattr(whole, "user.e2b.author", b"ada")
        attributes = True
    except OSError:
        attributes = False
    assert compose(agent, *parts(place, b"1", b"2"), destination=whole).status_code == 200
    assert whole.read_text() == "12"
    now = whole.stat()
    assert (now.st_mode & 0o7777, now.st_uid, now.st_gid) == (0o751, 12345, 12346)
    if attributes:
        entry = call(agent, "filesystem.Filesystem/Stat", {"path": str(whole)}).json()["entry"]
        assert entry["metadata"] == {"author": "ada"}


def test_a_part_that_cannot_be_removed_is_told_and_the_file_is_whole(agent, place):
    place.chmod(0o755)
    sources = parts(place, b"1", b"2")
    with folder(USER) as home:
        answer = compose(agent, *sources, destination=home / "whole", username=USER)
        assert answer.status_code == 200, answer.text
        assert (home / "whole").read_text() == "12" and (home / "whole").owner() == USER
        warnings = answer.json()["warnings"]
        assert len(warnings) == 2 and str(sources[0]) in warnings[0] and "Permission denied" in warnings[0]
    assert names(place) == ["part0", "part1"]


def test_a_link_is_a_part_and_goes_and_its_target_stays(agent, place):
    [target] = parts(place, b"content")
    (place / "link").symlink_to(target)
    assert compose(agent, place / "link", destination=place / "whole").status_code == 200
    assert (place / "whole").read_bytes() == b"content"
    assert names(place) == ["part0", "whole"]


@pytest.mark.parametrize(
    "request_body, message",
    [
        ({"destination": "/tmp/x"}, "'source_paths' is empty"),
        ({"source_paths": [], "destination": "/tmp/x"}, "'source_paths' is empty"),
        ({"source_paths": ["/etc/hostname"]}, "'destination' is missing"),
        ({"source_paths": ["/etc/hostname"], "destination": ""}, "'destination' is missing"),
        ({"source_paths": "/etc/hostname", "destination": "/tmp/x"}, "malformed JSON"),
        ({"source_paths": ["~root/x"], "destination": "/tmp/x"}, "cannot expand user-specific home dir"),
        ({"source_paths": ["a\0b"], "destination": "/tmp/x"}, "NUL"),
        ([], "malformed JSON"),
    ],
)
def test_a_request_that_means_nothing_is_400(agent, request_body, message):
    answer = agent.post("/files/compose", json=request_body)
    assert (answer.status_code, answer.json()["code"]) == (400, 400), answer.text
    assert message in answer.json()["message"]


def test_what_cannot_be_composed_leaves_everything_as_it_was(agent, place):
    one, two = parts(place, b"1", b"2")
    (place / "folder").mkdir()
    (place / "link").symlink_to(two)
    os.link(two, place / "hard")
    before = names(place)
    cases = [
        ([one, place / "missing"], place / "new/whole", 404, "does not exist"),
        ([one, place / "folder"], place / "whole", 400, "is a directory"),
        ([one, "/dev/null"], place / "whole", 400, "is not a regular file"),
        ([one], place / "folder", 400, "is a directory"),
        ([one, two], two, 400, "the same file"),
        ([one, f"{place}/folder/../part1"], two, 400, "the same file"),
        ([one, two], place / "link", 400, "the same file"),
        ([one, two], place / "hard", 400, "the same file"),
        ([one], one / "below", 400, ""),
    ]
    for sources, destination, status, message in cases:
        answer = compose(agent, *sources, destination=destination)
        assert (answer.status_code, answer.json()["code"]) == (status, status), f"{sources}: {answer.text}"
        assert message in answer.json()["message"]
        wait_until(lambda: names(place) == before, within=10, what="nothing is left of it")
    assert (one.read_bytes(), two.read_bytes()) == (b"1", b"2")


def test_an_unknown_user_is_401_and_the_text_says_so(agent, place):
    answer = compose(agent, *parts(place, b"1"), destination=place / "whole", username="ghost")
    assert answer.status_code == 401
    assert "unknown user ghost" in answer.json()["message"]


def test_a_full_disk_is_507_and_the_parts_stay(agent, place):
    with small_disk(place, "size=1m"):
        sources = parts(place, bytes(300_000), bytes(300_000))
        (place / "whole").write_bytes(b"old")
        answer = compose(agent, *sources, destination=place / "whole")
        assert (answer.status_code, answer.json()["code"]) == (507, 507), answer.text
        assert 0 < answer.json()["written"] < 600_000
        wait_until(lambda: names(place) == ["part0", "part1", "whole"], within=10, what="nothing else is left")
        assert (place / "whole").read_bytes() == b"old"


def test_a_request_of_megabytes_is_413(agent):
    answer = compose(agent, "x" * (2 << 20), destination="/tmp/x")
    assert (answer.status_code, answer.json()["code"]) == (413, 413)


def test_only_post_composes(agent):
    assert agent.get("/files/compose").status_code == 405
