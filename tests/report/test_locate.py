"""Which run a path means."""

import pytest

from taperlit.errors import TaperlitError
from taperlit.report.locate import find_run
from taperlit.report.run import names_of, read_run


@pytest.fixture
def runs(tmp_path):
    """Three versions of one run, of which the second has a checkpoint and a folded model."""
    for version in ("version_2", "version_9", "version_10"):
        folder = tmp_path / "runs/mine" / version
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}\n")
    checkpoints = tmp_path / "runs/mine/version_9/checkpoints"
    (checkpoints / "last-folded").mkdir(parents=True)
    (checkpoints / "last.ckpt").touch()
    return tmp_path / "runs"


def test_a_path_means_a_run(runs):
    mine = runs / "mine"
    assert find_run(mine / "version_2") == mine / "version_2"
    assert find_run(mine) == mine / "version_10"  # by number, not by letters
    for path in ("checkpoints", "checkpoints/last.ckpt", "checkpoints/last-folded"):
        assert find_run(mine / "version_9" / path) == mine / "version_9"


def test_a_relative_path_means_the_same(runs, monkeypatch):
    monkeypatch.chdir(runs / "mine/version_9/checkpoints")
    assert find_run("last.ckpt").samefile(runs / "mine/version_9")
    monkeypatch.chdir(runs / "mine/version_9")
    assert find_run(".").samefile(runs / "mine/version_9")


def test_what_is_no_run_is_refused_with_advice_that_works(runs, tmp_path):
    with pytest.raises(TaperlitError, match="there is no such folder"):
        find_run(runs / "others")
    with pytest.raises(TaperlitError, match="holds no run") as error:
        find_run(runs)
    advised = str(error.value).partition("in it: ")[2].rstrip(".")
    assert find_run(advised) == runs / "mine/version_10"
    (tmp_path / "empty").mkdir()
    with pytest.raises(TaperlitError, match="name a run's folder"):
        find_run(tmp_path / "empty")


def test_names_are_as_short_as_they_tell_runs_apart(runs):
    other = runs / "other/version_2"
    other.mkdir(parents=True)
    (other / "config.yaml").touch()
    mine, its_second, others = (read_run(path) for path in (runs / "mine", runs / "mine/version_2", other))
    assert names_of([mine]) == ["mine"]
    assert names_of([mine, others]) == ["mine", "other"]
    assert names_of([mine, its_second]) == ["mine/version_10", "mine/version_2"]
    assert len({*names_of([mine, its_second, others])}) == 3
