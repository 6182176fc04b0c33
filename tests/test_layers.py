"""What holds the package together: imports point one way, importing it stays light, files and functions stay
readable."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vlarl_rllib"
SOURCES = sorted(PACKAGE.rglob("*.py"))

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors",),
    ("process",),
    ("types", "rllib_compat", "ray_compat", "telemetry"),
    ("envs",),
    ("settings",),
    ("models",),
    ("rewards", "weights"),
    ("engines",),
    ("policy", "data"),
    ("learner",),
    ("rollout",),
    ("observability",),
    ("runs",),
    ("config", "algorithm"),
    ("evaluation",),
    ("reports",),
    ("bench",),
    ("commands",),
    ("cli",),
    ("__init__", "__main__"),
)
"""A part imports from itself and from the layers above it in this table, not from its neighbours or from below."""
RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

EXCEPTIONS = {
    ("config", "algorithm"): "RLlib's config names the algorithm that it builds, and the algorithm its default config",
    ("algorithm", "config"): "as above",
}
"""Imports between neighbours, and why."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
MAX_TOP_MODULES = 9
HEAVY = ("torch", "ray", "vllm", "libero", "transformers", "mujoco", "robosuite")


def part_of(file: Path) -> str:
    """`engines` for vlarl_rllib/engines/pool.py, `types` for vlarl_rllib/types.py."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_parts(file: Path) -> Iterator[tuple[str, int]]:
    """Parts of the package that a file imports, inside functions and for type checkers too, with the line."""
    for node in ast.walk(ast.parse(file.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] == "vlarl_rllib":
                part = f"{name}.".split(".")[1]
                yield part if part in RANK else "__init__", node.lineno


def test_the_table_has_a_place_for_every_part() -> None:
    assert {part_of(file) for file in SOURCES} <= set(RANK)


def test_imports_point_one_way() -> None:
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {imported}"
        for file in SOURCES
        for imported, line in imported_parts(file)
        if imported != part_of(file)
        and RANK[imported] >= RANK[part_of(file)]
        and (part_of(file), imported) not in EXCEPTIONS
    ]
    assert wrong == []


def test_no_exception_is_out_of_use() -> None:
    used = {(part_of(file), imported) for file in SOURCES for imported, _ in imported_parts(file)}
    assert set(EXCEPTIONS) <= used


def test_the_top_folder_is_small() -> None:
    modules = [file.name for file in PACKAGE.glob("*.py")]
    assert len(modules) <= MAX_TOP_MODULES, modules


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(file: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, inside functions and for type checkers too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known | ({node.module} if inner - known else set())
    return found & known - {module_of(file)}


def test_modules_import_each_other_in_no_circle_but_one() -> None:
    known = {module_of(file) for file in SOURCES}
    imports = {module_of(file): imported_modules(file, known) for file in SOURCES}

    def reached_from(module: str) -> set[str]:
        seen: set[str] = set()
        waiting = [module]
        while waiting:
            for target in imports[waiting.pop()] - seen:
                seen.add(target)
                waiting.append(target)
        return seen

    circular = {module for module in known if module in reached_from(module)}
    assert {name.removeprefix("vlarl_rllib.") for name in circular} == {
        "config", "algorithm", "algorithm.vlappo", "algorithm.checkpointed",
    }  # fmt: skip


RLLIB_PRIVATE = {"_worker_manager", "_make_worker", "_storage", "_last_result", "_remote_config"}
"""Attributes of RLlib's and Tune's objects that lie beneath their public surface."""


def test_what_lies_beneath_rays_surface_is_touched_in_two_files() -> None:
    """But for what a subclass of theirs is told to set or call."""
    touched = []
    for file in SOURCES:
        if file.name in ("rllib_compat.py", "ray_compat.py"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            names: list[str] = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "ray":
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Attribute):
                is_rays = isinstance(node.value, ast.Name) and node.value.id == "ray"
                names = [node.attr] if is_rays or node.attr in RLLIB_PRIVATE else []
            touched += [f"{file.relative_to(ROOT)}:{node.lineno} {name}" for name in names if re.match("_[^_]", name)]
    assert touched == []


@pytest.mark.parametrize(
    "module",
    [
        "vlarl_rllib",
        "vlarl_rllib.settings",
        "vlarl_rllib.cli",
        "vlarl_rllib.runs.directory",
        "vlarl_rllib.runs.preflight",
    ],
)
def test_importing_stays_light(module: str) -> None:
    code = f"import sys, {module}\nassert not (heavy := set({HEAVY!r}) & set(sys.modules)), heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_files_fit_in_a_readers_head() -> None:
    assert [str(file) for file in SOURCES if len(file.read_text().splitlines()) > MAX_FILE_LINES] == []


def test_functions_fit_on_a_screen() -> None:
    long = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.name}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []


def test_the_library_does_not_print() -> None:
    calls = [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in SOURCES
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert calls == []


def test_no_file_names_a_package_host_or_a_developers_directory() -> None:
    """The project installs from wherever its user's tools are set up to install from, and runs wherever it is
    cloned."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode:
        pytest.skip("not a git checkout")
    # In pieces, so that this file does not name them either.
    hosts = [
        ".".join(host)
        for host in (("pypi", "org"), ("files", "pythonhosted"), ("deb", "debian"), ("registry", "npmjs"))
    ]
    directories = [f"/{directory}/" for directory in ("root", "work", "home")]
    forbidden = re.compile(
        "|".join([*map(re.escape, hosts), *(rf"(?<![\w./~-]){directory}" for directory in directories)])
    )
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        file = ROOT / name
        content = file.read_bytes() if file.is_file() else b""
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), start=1):
            if match := forbidden.search(line):
                found.append(f"{name}:{number} {match[0]}")
    assert found == []


def test_test_files_have_names_of_their_own() -> None:
    """pytest imports them by name, without their folder."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))


TENANTS = {
    "a kind of policy": (
        re.compile(r"open_?vla|prismatic|action_?tokenizer|gripper|dino|siglip", re.IGNORECASE),
        (
            "models/openvla/",
            "models/openvla_oft/",
            "engines/vllm/openvla.py",
            "settings/published.py",
            "envs/",
            "data/experts.py",
        ),
    ),
    "an environment": (
        re.compile(r"^libero$|libero_?(env|tasks|simulation)", re.IGNORECASE),
        ("envs/", "evaluation/"),
    ),
}
"""Names in code that only their own rooms may know: of OpenVLA's classes, tokens and gripper (which the environments
have too), and of LIBERO."""
NEUTRAL = ("engines/", "rollout/", "learner/", "policy/", "rewards/", "weights/")
"""Folders that ask a policy's family for its numbers."""
NUMBERS_OF_OPENVLA = {7, 256}
"""Tokens of an action, and their bins."""


def names_in_code(file: Path) -> Iterator[tuple[str, int]]:
    """Identifiers, imported modules, and texts that are one word, with their lines; not what comments and docstrings
    say."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Name):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute):
            yield node.attr, node.lineno
        elif isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((alias.name, node.lineno) for alias in node.names)
            if isinstance(node, ast.ImportFrom):
                yield node.module or "", node.lineno
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value.split()) == 1:
            yield node.value, node.lineno


@pytest.mark.parametrize("tenant", TENANTS)
def test_a_tenant_is_named_in_its_own_rooms_alone(tenant: str) -> None:
    pattern, rooms = TENANTS[tenant]
    named = [
        f"{file.relative_to(ROOT)}:{line} {name}"
        for file in SOURCES
        if not str(file.relative_to(PACKAGE)).startswith(rooms)
        for name, line in names_in_code(file)
        if pattern.search(name)
    ]
    assert named == []


def test_nothing_counts_on_openvlas_numbers() -> None:
    counted = [
        f"{file.relative_to(ROOT)}:{node.lineno} {node.value}"
        for file in SOURCES
        if str(file.relative_to(PACKAGE)).startswith(NEUTRAL) and file.name != "video.py"  # where 7 is a quality
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and type(node.value) is int and node.value in NUMBERS_OF_OPENVLA
    ]
    assert counted == []
