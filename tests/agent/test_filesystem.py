"""The filesystem service as SDKs and their tests observe it."""

import os

from harness.connect import call


def fs(agent, method: str, **request):
    return call(agent, f"filesystem.Filesystem/{method}", request)


def test_list_is_sorted_before_its_children_and_stops_at_its_depth(agent, tmp_path):
    for path in ("b/inner/deep", "a", "c"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "b/file").write_text("x")

    def names(depth: int) -> list[str]:
        entries = fs(agent, "ListDir", path=str(tmp_path), depth=depth).json()["entries"]
        return [os.path.relpath(entry["path"], tmp_path) for entry in entries]

    assert names(0) == names(1) == ["a", "b", "c"]
    assert names(2) == ["a", "b", "b/file", "b/inner", "c"]
    assert names(3) == ["a", "b", "b/file", "b/inner", "b/inner/deep", "c"]


def test_an_entry_tells_what_stat_tells(agent, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"hello")
    file.chmod(0o640)
    entry = fs(agent, "Stat", path=str(file)).json()["entry"]
    assert entry["name"] == "file"
    assert entry["type"] == "FILE_TYPE_FILE"
    assert entry["path"] == str(file)
    assert entry["size"] == "5", "an int64 is a string in protobuf's JSON"
    assert entry["mode"] == 0o640
    assert entry["permissions"] == "-rw-r-----"
    assert (entry["owner"], entry["group"]) == ("root", "root")
    assert entry["modifiedTime"].endswith("Z")


def test_a_link_has_its_targets_type_and_its_own_permissions(agent, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "broken").symlink_to("nothing")
    entry = fs(agent, "Stat", path=str(tmp_path / "link")).json()["entry"]
    assert entry["type"] == "FILE_TYPE_FILE"
    assert entry["permissions"] == "Lrwxrwxrwx"
    assert entry["symlinkTarget"] == str(tmp_path / "file")
    assert "type" not in fs(agent, "Stat", path=str(tmp_path / "broken")).json()["entry"], "unspecified is left out"


def test_make_dir_makes_parents_and_refuses_what_exists(agent, tmp_path):
    path = str(tmp_path / "a/b/c")
    assert fs(agent, "MakeDir", path=path).json()["entry"]["type"] == "FILE_TYPE_DIRECTORY"
    again = fs(agent, "MakeDir", path=path)
    assert (again.status_code, again.json()["code"]) == (409, "already_exists")
    (tmp_path / "file").write_text("x")
    over = fs(agent, "MakeDir", path=str(tmp_path / "file"))
    assert (over.status_code, over.json()["code"]) == (400, "invalid_argument")


def test_move_makes_parents_and_replaces_a_file(agent, tmp_path):
    (tmp_path / "from").write_text("new")
    (tmp_path / "to").write_text("old")
    answer = fs(agent, "Move", source=str(tmp_path / "from"), destination=str(tmp_path / "to"))
    assert answer.json()["entry"]["path"] == str(tmp_path / "to")
    assert (tmp_path / "to").read_text() == "new"
    fs(agent, "Move", source=str(tmp_path / "to"), destination=str(tmp_path / "x/y/z"))
    assert (tmp_path / "x/y/z").read_text() == "new"
    missing = fs(agent, "Move", source=str(tmp_path / "from"), destination=str(tmp_path / "w"))
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")


def test_remove_is_recursive_and_content_with_nothing(agent, tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    assert fs(agent, "Remove", path=str(tmp_path / "a")).status_code == 200
    assert not (tmp_path / "a").exists()
    assert fs(agent, "Remove", path=str(tmp_path / "a")).status_code == 200


def test_remove_takes_a_link_and_not_what_it_points_to(agent, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/file").write_text("x")
    (tmp_path / "link").symlink_to("precious")
    assert fs(agent, "Remove", path=str(tmp_path / "link")).status_code == 200
    assert (tmp_path / "precious/file").exists()


def test_listing_no_folder_says_which(agent, tmp_path):
    missing = fs(agent, "ListDir", path=str(tmp_path / "none"))
    assert (missing.status_code, missing.json()["code"]) == (404, "not_found")
    (tmp_path / "file").write_text("x")
    file = fs(agent, "ListDir", path=str(tmp_path / "file"))
    assert (file.status_code, file.json()["code"]) == (400, "invalid_argument")
    assert str(tmp_path / "file") in file.json()["message"]


def test_another_users_home_is_not_expanded(agent):
    answer = fs(agent, "Stat", path="~nobody/file")
    assert (answer.status_code, answer.json()["code"]) == (400, "invalid_argument")
