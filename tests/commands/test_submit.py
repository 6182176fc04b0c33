"""What is uploaded with a job, and how its command reads; with a cluster: tests/e2e/test_jobs.py."""

import subprocess
from pathlib import Path

import pytest

from vlarl_rllib.commands.jobs import parse_dashboard_address
from vlarl_rllib.commands.submit import MAX_UPLOAD_BYTES, PACKAGE, Submission, check_upload, copy_source, stop_seconds
from vlarl_rllib.settings import Settings, SettingsError

SOURCE = ("__init__.py", "cli/app.py", "templates/report.html.j2")
JUNK = (
    "__pycache__/a.pyc", "cli/b.pyc", ".git/HEAD", ".venv/bin/python", "runs/x/metrics.jsonl", ".ruff_cache/c",
    "checkpoints/iteration_000001/facts.json", "model.safetensors", "models/weights.bin", "videos/film.mp4",
)  # fmt: skip


def files(directory: Path) -> set[str]:
    return {str(file.relative_to(directory)) for file in directory.rglob("*") if file.is_file()}


def test_the_source_is_uploaded_and_nothing_else(tmp_path: Path) -> None:
    package, upload = tmp_path / PACKAGE.name, tmp_path / "upload"
    for name in (*SOURCE, *JUNK):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(name)
    copy_source(package, upload)
    assert files(upload / PACKAGE.name) == set(SOURCE)
    (entry_points,) = upload.glob("*.dist-info/entry_points.txt")
    assert "vllm.general_plugins" in entry_points.read_text(), "vLLM has to find the plugin of the uploaded package"


def test_all_of_this_package_is_source(tmp_path: Path) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(listing, cwd=PACKAGE, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    copy_source(PACKAGE, tmp_path)
    assert set(tracked.stdout.split()) <= files(tmp_path / PACKAGE.name)


def test_an_upload_that_ray_does_not_take_names_what_is_largest(tmp_path: Path) -> None:
    (tmp_path / "small").write_text("x")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(MAX_UPLOAD_BYTES)
    check_upload(tmp_path, MAX_UPLOAD_BYTES)
    with pytest.raises(SettingsError, match=r"--code: 105 MB, and .* 105 MB at most; .*: large \(105 MB\), small"):
        check_upload(tmp_path, MAX_UPLOAD_BYTES + 1)


def test_ray_waits_longer_than_the_run_and_in_whole_seconds() -> None:
    for seconds, waits in ((25.0, 50), (0.5, 26), (599.5, 625)):
        found = stop_seconds(Settings.from_dict({"run": {"stop_seconds": seconds}}))
        assert isinstance(found, int) and found == waits


def test_the_jobs_command_and_name() -> None:
    submission = Submission(Path("/data/my runs/pick & place"), "vlarl submit", python="/opt/venv/bin/python")
    assert submission.entrypoint == (
        "exec /opt/venv/bin/python -m vlarl_rllib train config.yaml --run-dir '/data/my runs/pick & place' "
        "--resume auto"
    )
    assert submission.new_job().startswith("pick-place-20")


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("http://head:8265", "http://head:8265"),
        ("https://head/", "https://head"),
        (" head:8265", "http://head:8265"),
        ("http://[::1]:8265/", "http://[::1]:8265"),
    ],
)
def test_a_dashboards_address_is_read(given: str, found: str) -> None:
    assert parse_dashboard_address(given) == found


@pytest.mark.parametrize("given", ["ray://head:10001", "head:port", "http://", "", "auto://", "http://head:99999"])
def test_what_is_no_dashboards_address_is_told(given: str) -> None:
    with pytest.raises(SettingsError, match=r"--address: .* is no dashboard's address; give one such as http://head"):
        parse_dashboard_address(given)


def test_a_password_is_not_for_the_address(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="set RAY_AUTH_TOKEN") as caught:
        parse_dashboard_address("http://user:secret@head:8265")
    assert "secret" not in str(caught.value)
