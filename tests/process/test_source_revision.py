"""The commit that a run's rows name."""

import subprocess
from pathlib import Path

import pytest

from vlarl_rllib.process.source_revision import ROOT, source_revision


def git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GIT_DIR", "/nowhere")  # as in a hook of another repository
    with monkeypatch.context() as patch:
        patch.delenv("GIT_DIR")
        git(tmp_path, "init", "-q")
        (tmp_path / "file.py").write_text("1\n")
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "-qm", "first")
        git(tmp_path, "tag", "-m", "a tag", "v1")
    return tmp_path


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean = source_revision.__wrapped__(checkout)
    assert clean is not None and len(clean) == 12
    (checkout / "new.txt").write_text("not of the source\n")
    assert source_revision.__wrapped__(checkout) == clean
    (checkout / "file.py").write_text("2\n")
    assert source_revision.__wrapped__(checkout) == f"{clean}-dirty"
    monkeypatch.delenv("GIT_DIR")
    assert git(checkout, "rev-parse", "HEAD").startswith(clean)


def test_what_is_no_checkout_of_its_own_has_none(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = checkout / "site-packages"
    inside.mkdir()
    assert source_revision.__wrapped__(inside) is None, "the checkout around it is somebody else's"
    monkeypatch.setenv("PATH", "")
    assert source_revision.__wrapped__(checkout) is None, "there need be no git"


def test_it_is_this_package_that_is_asked_about() -> None:
    assert (ROOT / "vlarl_rllib" / "process" / "source_revision.py").is_file()
