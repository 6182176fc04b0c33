"""What the Dockerfile builds from is there, and what must not be in an image is left out; building it takes Docker."""

import re
import tomllib

from pages import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text()


def test_each_accelerator_has_a_base_and_a_lock() -> None:
    bases = re.findall(r"^FROM python:(\d\.\d+)-\S+ AS python-(\w+)$", DOCKERFILE, re.MULTILINE)
    accelerators = {accelerator: version for version, accelerator in bases}
    assert set(accelerators) == {"cpu", "cuda"}
    for accelerator in accelerators:
        assert (ROOT / "requirements" / f"{accelerator}.lock").is_file()
    # as `make setup` and `make setup-cuda` choose them
    makefile = (ROOT / "Makefile").read_text()
    assert f"command -v python{accelerators['cpu']} ||" in makefile
    assert f"requirements/cuda.lock PYTHON=$(shell command -v python{accelerators['cuda']})" in makefile
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11,<3.13"


def test_the_context_has_the_source_and_no_history_or_environment() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert {".git", ".venv", "runs"} < set(ignored)
    assert not {"scripts", "requirements", "vlarl_rllib", "configs", "pyproject.toml", "README.md", "LICENSE"} & set(
        ignored
    )
    assert re.search(r"^USER \$USER_ID$", DOCKERFILE, re.MULTILINE), "a number, which Kubernetes can see is not root"
