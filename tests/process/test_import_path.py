"""A command run in somebody else's directory, say a downloaded model's, runs none of the code in it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vlarl_rllib.process import import_path

ROOT = Path(__file__).parents[2]
NAMES = (
    "numpy", "torch", "yaml", "typer", "rich", "pydantic", "psutil", "json", "logging", "typing", "socket", "ray",
    "transformers", "PIL", "numba",
)  # fmt: skip


@pytest.fixture
def trap(tmp_path: Path) -> Path:
    """A directory with modules that leave a file, `ran`, when they are imported."""
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(
            f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r} + ' ')\nraise ImportError({name!r})\n"
        )
    (tmp_path / "config.yaml").write_text("env: {name: synthetic}\n")
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["-m", "vlarl_rllib", "train", "config.yaml"],
        ["-mvlarl_rllib", "doctor", "config.yaml"],
        ["SCRIPT", "train", "config.yaml"],
        ["-m", "vlarl_rllib.envs.worker"],
    ],
    ids=lambda command: " ".join(command)[:30],
)
@pytest.mark.parametrize("suffix", ["", os.pathsep])
def test_nothing_of_the_working_directory_runs(
    command: list[str], suffix: str, trap: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Also where PYTHONPATH has an empty entry, as `$PYTHONPATH:more` leaves one; up to the point where Ray would be
    joined."""
    script = tmp_path_factory.mktemp("bin") / "vlarl"
    script.write_text("from vlarl_rllib.cli import main\nmain()\n")  # as pip makes it
    environment = {**os.environ, "RAY_ADDRESS": "127.0.0.1:1", "PYTHONPATH": f"{ROOT}{suffix}"}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, *(str(script) if part == "SCRIPT" else part for part in command)],
        cwd=trap,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert not (trap / "ran").exists(), (trap / "ran").read_text()
    if command[-1] == "config.yaml":
        assert "nothing answers at 127.0.0.1:1" in done.stdout + done.stderr


def test_what_is_named_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    for named, path, kept in (
        ("", ["", str(tmp_path), "/elsewhere"], ["/elsewhere"]),
        (f"{os.pathsep}/elsewhere{os.pathsep}", ["", "/elsewhere"], ["/elsewhere"]),
        (str(tmp_path), ["", str(tmp_path)], ["", str(tmp_path)]),
        (".", ["/elsewhere", str(tmp_path)], ["/elsewhere", str(tmp_path)]),
    ):
        monkeypatch.setenv("PYTHONPATH", named)
        installed = [
            os.path.dirname(os.__file__),
            "/installed",
            str(tmp_path),
        ]  # the last by a .pth file: a project that is worked on here
        monkeypatch.setattr(sys, "path", path + installed)
        import_path.leave_working_directory()
        assert sys.path == kept + installed
        assert "" not in os.environ["PYTHONPATH"].split(os.pathsep) or not os.environ["PYTHONPATH"]
        assert import_path.is_import_path(str(tmp_path))


def test_a_checkout_that_the_package_runs_from_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    monkeypatch.setattr(sys, "path", [str(ROOT)])
    import_path.leave_working_directory()
    assert sys.path == [str(ROOT)]


def test_a_program_of_somebody_elses_keeps_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["-m"])
    for command, expected in (
        (["python", "-m", "my_robot.train"], False),
        (["python", "-P", "-m", "vlarl_rllib", "train"], True),
    ):
        monkeypatch.setattr(sys, "orig_argv", command)
        assert import_path.is_our_command() == expected
    for name, expected in (("train.py", False), ("/usr/bin/vlarl", True)):
        monkeypatch.setattr(sys, "argv", [name, "-m", "vlarl_rllib"])
        assert import_path.is_our_command() == expected


def test_not_even_what_comes_before_all_imports(tmp_path: Path) -> None:
    """Without site-packages, since an editable installation there has loaded `__future__` before the working directory
    is on the path."""
    (tmp_path / "__future__.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nraise ImportError")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTHONSAFEPATH", None)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "vlarl_rllib"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert not (tmp_path / "ran").exists() and "No module named" in done.stderr
