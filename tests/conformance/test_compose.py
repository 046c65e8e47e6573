"""Section 4.7: parts that become one file."""

import json

import pytest

from harness.planes import HOME

contract = pytest.mark.contract
hosted = pytest.mark.through_hostd


def refused(answer, status: int, message: str | None = None, contains: str = "") -> None:
    assert answer.status_code == status, f"{answer.status_code}: {answer.text}"
    told = answer.json()
    assert told["code"] == status
    if message is not None:
        assert told["message"] == message
    assert contains in told["message"]


def compose(plane, headers=None, **body):
    return plane.http.post("/files/compose", json=body, headers=headers)


@hosted
@contract("4.7/compose")
def test_parts_are_joined_in_order_and_gone(plane, box):
    for n, text in enumerate(("one ", "two ", "", "three")):
        plane.put(f"{box}/part-{n}", text)
    answer = compose(plane, source_paths=[f"{box}/part-{n}" for n in (1, 0, 2, 3)], destination=f"{box}/whole")
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"path": f"{box}/whole", "name": "whole", "type": "file"}
    assert plane.content(f"{box}/whole") == b"two one three"
    assert plane.sh(f"ls -A {box}") == "whole\n"


@hosted
@contract("4.7/compose", "3.5/created")
def test_the_whole_is_the_users_and_its_folders_are_made(plane, box):
    plane.put(f"{box}/part", "x", owner="nobody")
    plane.sh(f"chmod 777 {box}")
    assert compose(plane, source_paths=[f"{box}/part"], destination=f"{box}/a/b/whole", username="user").status_code == 200
    assert plane.sh(f"cd {box}; stat -c '%U %a' a a/b a/b/whole") == "user 755\nuser 755\nuser 644\n"


@contract("4.7/compose", "3.1/relative", "3.1/tilde")
def test_compose_takes_paths_below_home(plane, box):
    short = box.removeprefix(f"{HOME}/")
    plane.put(f"{box}/part", "x")
    assert compose(plane, source_paths=[f"{short}/part"], destination=f"~/{short}/whole").json()["path"] == f"{box}/whole"


@pytest.mark.parametrize(
    "body",
    [
        {"source_paths": [], "destination": "{box}/whole"},
        {"destination": "{box}/whole"},
        {"source_paths": ["{box}/part"]},
        {"source_paths": ["{box}/part"], "destination": ""},
        {"source_paths": ["{box}/part"], "destination": "{box}/part"},
        {"source_paths": ["{box}/part", "{box}"], "destination": "{box}/whole"},
        {"source_paths": ["{box}/part"], "destination": "~nobody/whole"},
        {"source_paths": "{box}/part", "destination": "{box}/whole"},
        [],
        None,
    ],
    ids=[
        "no-sources",
        "sources-absent",
        "no-destination",
        "empty-destination",
        "itself",
        "folder",
        "other-home",
        "no-list",
        "no-object",
        "null",
    ],
)
@contract("4.7/400")
def test_what_cannot_be_composed_is_400_and_harms_nothing(plane, box, body):
    plane.put(f"{box}/part", "stays")
    text = json.dumps(body).replace("{box}", box)
    answer = plane.http.post("/files/compose", content=text, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400, answer.text
    assert plane.sh(f"ls -A {box}") == "part\n"
    assert plane.content(f"{box}/part") == b"stays"


@hosted
@contract("4.7/404", "4.7/401")
def test_a_missing_part_is_404_and_an_unknown_user_401(plane, box):
    plane.put(f"{box}/part", "stays")
    refused(compose(plane, source_paths=[f"{box}/part", f"{box}/none"], destination=f"{box}/whole"), 404)
    refused(compose(plane, source_paths=[f"{box}/part"], destination=f"{box}/whole", username="ghost"), 401, contains="ghost")
    assert plane.sh(f"ls -A {box}") == "part\n"


@contract("4.7/token")
def test_compose_needs_the_token(fresh):
    assert fresh.http.post("/init", json={"accessToken": "secret"}).status_code == 204
    assert compose(fresh, source_paths=["/a"], destination="/b").status_code == 401
    assert compose(fresh, {"X-Access-Token": "secret"}, source_paths=["/no/such/a"], destination="/tmp/b").status_code == 404


@contract("4.7/compose", "10/retries")
def test_a_list_that_is_too_long_is_told_so_to_a_client_that_is_still_sending(plane, box):
    """The body is much larger than what the sockets on the way hold."""
    for _ in range(3):
        answer = plane.http.post("/files/compose", content=b'{"destination":"' + b"a" * (8 << 20) + b'"}')
        assert (answer.status_code, answer.json()["code"]) == (413, 413)
    assert compose(plane, source_paths=[], destination=f"{box}/whole").status_code == 400
