"""docs/cluster.md and the files beside it: the manifest has the fields that KubeRay knows, the script does what it says
with a Slurm that is a file, and options of `ray start` exist. Nobody runs a real Slurm or KubeRay here."""

import os
import re
import shlex
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from pages import ROOT, blocks
from ray.scripts.scripts import cli as ray_cli
from test_pages import parse

from vlarl_rllib.settings import Settings

PAGE = ROOT / "docs" / "cluster.md"
MANIFEST = ROOT / "docs" / "cluster" / "rayjob.yaml"
SCRIPT = ROOT / "docs" / "cluster" / "slurm.sh"

JOB_KEYS = {
    "entrypoint", "runtimeEnvYAML", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished",
    "rayClusterSpec",
}  # fmt: skip
CLUSTER_KEYS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
"""Of `ray.io/v1`, those that the manifest uses (https://ray-project.github.io/kuberay/reference/api/)."""


def start_options() -> set[str]:
    """Of `ray start`."""
    return {option for parameter in ray_cli.commands["start"].params for option in parameter.opts}


def groups() -> list[dict[str, Any]]:
    cluster = yaml.safe_load(MANIFEST.read_text())["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_manifest_is_a_rayjob_of_the_rayversion_that_is_installed() -> None:
    import ray

    job = yaml.safe_load(MANIFEST.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob") and job["metadata"]["name"]
    assert set(job["spec"]) == JOB_KEYS and set(job["spec"]["rayClusterSpec"]) == CLUSTER_KEYS
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
    assert job["spec"]["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    head, *workers = groups()
    assert set(head) == {"rayStartParams", "template"} and all(set(group) == GROUP_KEYS for group in workers)
    parse(shlex.split(job["spec"]["entrypoint"])[1:])
    assert {f"--{name}" for group in groups() for name in group["rayStartParams"]} <= start_options()


def test_pods_have_a_place_to_write_and_as_long_to_end_as_a_run_may_take() -> None:
    settings = Settings.from_yaml(ROOT / "configs" / "libero_spatial_2nodes.yaml")
    job = yaml.safe_load(MANIFEST.read_text())
    environment = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    assert int(environment["RAY_JOB_STOP_WAIT_TIME_S"]) == settings.run.stop_seconds + 25
    for group in groups():
        spec = group["template"]["spec"]
        assert spec["terminationGracePeriodSeconds"] > settings.run.stop_seconds + 25
        (container,) = spec["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        assert set(mounts) == {"/shared", "/dev/shm"} and set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert container["resources"]["requests"] == container["resources"]["limits"]


def test_the_pods_hold_the_config() -> None:
    """Their sizes are those that the config's own line names."""
    from vlarl_rllib.runs.capacity import Machine
    from vlarl_rllib.runs.places import check_places
    from vlarl_rllib.settings import calculate_runtime_args

    nodes = []
    for number, group in enumerate(groups()):
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        given = group["rayStartParams"]
        custom = yaml.safe_load(yaml.safe_load(given["resources"])) if "resources" in given else {}
        cpus, gpus = float(given.get("num-cpus", limits["cpu"])), int(limits.get("nvidia.com/gpu", 0))
        nodes.append(Machine(cpus, gpus, float(limits["memory"].removesuffix("Gi")), 80.0, custom).node(number))
    config = Settings.from_yaml(ROOT / "configs" / "libero_spatial_2nodes.yaml")
    check_places(calculate_runtime_args(config), nodes)


def test_ray_has_the_options_that_are_typed() -> None:
    lines = [line for block in blocks(PAGE) for line in block.text.splitlines() if "ray start" in line]
    assert len(lines) == 2
    for line in lines:
        words = [word.partition("=")[0] for word in shlex.split(line) if word.startswith("--")]
        assert set(words) <= start_options()
    options = {option for parameter in ray_cli.commands["symmetric-run"].params for option in parameter.opts}
    (run,) = re.findall(r"ray symmetric-run (.*) -- bash", SCRIPT.read_text())
    assert {word for word in run.split() if word.startswith("--")} <= options | start_options()


def test_the_section_on_the_page_is_valid() -> None:
    (section,) = (block.text for block in blocks(PAGE) if block.language == "yaml")
    Settings.from_dict(yaml.safe_load(section))


@pytest.mark.parametrize(
    ("name", "code", "said"),
    [("USR1", 75, "checkpoint\nscontrol requeue 42\n"), ("TERM", 0, "checkpoint\n"), (None, 0, "")],
)
def test_the_script_passes_signals_to_the_run_alone(name: str | None, code: int, said: str, tmp_path: Path) -> None:
    """With a Slurm, and a Ray, that are files: `srun` runs its command here, `ray symmetric-run` what stands behind its
    `--`, and a signal to Ray would end it with another code."""
    wait = f"trap 'echo checkpoint; exit {code}' {name}; echo began; while sleep 0.1; do :; done" if name else "exit 0"
    programs = {
        "vlarl": f'echo "$RAY_ADDRESS $*" > {tmp_path}/typed\n{wait}',
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"; exit $?',
        "srun": '"$@"',
        "scontrol": '[ "$1" = show ] && echo localhost || echo scontrol "$@"',
        "python": "echo token",
    }
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    for program, text in programs.items():
        (folder / program).write_text(f"#!/bin/bash\n{text}\n")
        (folder / program).chmod(0o700)
    environment = {
        "SLURM_JOB_ID": "42",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NODEID": "0",
    }
    job = subprocess.Popen(
        ["bash", str(SCRIPT), "my config.yaml", f"{tmp_path}/run"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env=environment | {"PATH": f"{folder}:/usr/bin:/bin", "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    if name:
        assert job.stdout is not None and job.stdout.readline() == "began\n"
        job.send_signal(getattr(signal, f"SIG{name}"))
    output, _ = job.communicate(timeout=20)
    assert (output, job.returncode) == (said, code)
    typed = (tmp_path / "typed").read_text().split(" ", 1)
    assert typed[0] == "localhost:6379"
    assert typed[1] == f"train my config.yaml --run-dir {tmp_path}/run --resume auto --set run.stop_seconds=180\n"
    assert not list(tmp_path.glob("*.pid")) and os.access(SCRIPT, os.R_OK)
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
