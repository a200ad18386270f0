"""What a mistyped name may mean."""

from microdit.io.near_names import did_you_mean, did_you_mean_path


def test_a_path_is_compared_with_what_lies_beside_it_by_name_alone(tmp_path):
    for name in ("emoji", "icons"):
        (tmp_path / "a-long-folder" / name).mkdir(parents=True)
    assert did_you_mean_path(tmp_path / "a-long-folder" / "emjoi") == f" Did you mean {tmp_path / 'a-long-folder' / 'emoji'}?"
    assert did_you_mean_path(tmp_path / "a-long-folder" / "later") == ""
    assert did_you_mean_path(tmp_path / "nowhere" / "emoji") == ""


def test_a_home_folder_is_known(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "pictures").mkdir()
    assert did_you_mean_path("~/pictuers") == f" Did you mean {tmp_path / 'pictures'}?"


def test_the_nearest_of_several_is_named():
    assert did_you_mean("emoji-flo", ["emoji", "emoji-fast", "emoji-flow"]) == " Did you mean emoji-flow?"
    assert did_you_mean("", ["emoji"]) == ""
