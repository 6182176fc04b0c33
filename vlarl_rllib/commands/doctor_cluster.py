"""`vlarl doctor --cluster [CONFIG]`: every node of a running cluster, what is wrong with it, and what of a run fits
where."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from rich.console import Console
from rich.table import Column, Table

from vlarl_rllib.process.console import make_console, make_progress
from vlarl_rllib.process.surroundings import cluster_address
from vlarl_rllib.ray_compat import ClusterNode
from vlarl_rllib.runs.capacity import mesh_advice
from vlarl_rllib.runs.cluster_check import COMPARED, OBJECT_STORE, Answer, ask_all, problems_of_nodes, remarks_on_nodes
from vlarl_rllib.runs.doubts import doubts
from vlarl_rllib.runs.nodes import node_problems
from vlarl_rllib.runs.places import impossible_places, in_words, lay, named, num_places, resources_in_words
from vlarl_rllib.runs.preflight import check
from vlarl_rllib.runs.ray_session import connect
from vlarl_rllib.settings import Role, RuntimeArgs, Settings, SettingsError, calculate_runtime_args

GB = 1e9


def report_on_cluster(settings: Settings | None, address: str | None, run: Path | None) -> bool:
    """Print the tables, and a line for each thing that is wrong; whether nothing is.

    Args:
        address: host and port of the cluster; None = RAY_ADDRESS.
        run: where runs are to be written.

    Raises:
        SettingsError: there is no such cluster, or no directory to be asked for.
    """
    if address:
        os.environ["RAY_ADDRESS"] = address
    if cluster_address() is None:
        raise SettingsError("--cluster: no cluster is named; set RAY_ADDRESS or --address to host:port of its head")
    connect({})
    try:
        return _report(settings, run, make_console())
    finally:
        ray.shutdown()


def _report(settings: Settings | None, run: Path | None, console: Console) -> bool:
    with make_progress(console, "nodes", auto_refresh=True) as progress:
        bar = progress.add_task("", total=None, shown="")
        answers = ask_all(lambda answered, asked: progress.update(bar, completed=answered, total=asked))
    console.print(_nodes(answers))
    console.print(_versions(answers))
    plan = calculate_runtime_args(settings, cores=1) if settings is not None else None
    problems = [*problems_of_nodes(answers, plan, settings)]
    remarks = [*remarks_on_nodes(answers, settings)]
    if plan is not None and settings is not None:
        nodes = [answer.node for answer in answers]
        console.print(_places(plan, answers))
        problems += [*_problems_of_run(plan, settings, nodes, run)]
        remarks += [*doubts(settings), *_remarks_on_run(plan, nodes)]
    for remark in remarks:
        console.print(remark, style="yellow")
    for problem in dict.fromkeys(problems):
        console.print(problem, style="red")
    if not problems:
        console.print(f"{len(answers)} node(s), and nothing wrong with them" + " for this run" * (plan is not None))
    return not problems


def _problems_of_run(
    plan: RuntimeArgs, settings: Settings, nodes: Sequence[ClusterNode], run: Path | None
) -> Iterator[str]:
    try:
        check(settings)
    except SettingsError as error:
        yield str(error)
    yield from impossible_places(plan, nodes)
    try:
        lacks = [*node_problems(plan, settings, _existing(run) if run else None)]
    except OSError as error:
        lacks = [f"--run-dir: {run} cannot be written to from here ({error.strerror}); give another directory"]
    yield from (lack for lack in lacks if not lack.startswith("cluster:"))  # which `problems_of_nodes` says too


def _remarks_on_run(plan: RuntimeArgs, nodes: Sequence[ClusterNode]) -> Iterator[str]:
    laid = lay(plan, nodes)
    learners = Counter(number for bundle, number in zip(plan.bundles, laid, strict=True) if bundle.role is Role.LEARNER)
    lacking = [bundle for bundle, number in zip(plan.bundles, laid, strict=True) if number is None]
    if lacking and not [*impossible_places(plan, nodes)]:
        yield f"no place now, since others use it, for: {named(lacking)}; the run would wait"
    elif advice := mesh_advice(plan, [count for number, count in learners.items() if number is not None]):
        yield advice


def _existing(directory: Path) -> Path:
    """The directory, or the nearest one above it that is there."""
    directory = directory.expanduser().absolute()
    return next(parent for parent in (directory, *directory.parents) if parent.is_dir())


# Tables


def _table(title: str, *columns: str) -> Table:
    return Table(*(Column(name, overflow="fold") for name in columns), title=title, title_justify="left")


def _nodes(answers: Sequence[Answer]) -> Table:
    table = _table("nodes", "node", "free of CPU", "free of GPU", "memory", "/dev/shm free", "renders with", "also has")
    for answer in answers:
        node, facts = answer.node, answer.facts
        shm = f"{facts['shm_free'] / GB:.1f} of {facts['shm_total'] / GB:.1f} GB" if facts else "?"
        custom = {kind: n for kind, n in node.total.items() if kind not in ("CPU", "GPU", "memory", OBJECT_STORE)}
        words = resources_in_words({"CPU": 0.0, **custom}).removeprefix("0 CPU").removeprefix(", ")
        labels = [f"{key}={value}" for key, value in node.labels.items() if not key.startswith("ray.io/node-")]
        table.add_row(
            answer.name,
            *(f"{node.free.get(kind, 0.0):g} of {node.total.get(kind, 0.0):g}" for kind in ("CPU", "GPU")),
            f"{node.total.get('memory', 0.0) / GB:.1f} GB",
            shm,
            str(facts.get("gl") or ("nothing" if "gl_error" in facts else "?")),
            ", ".join([*([words] if words else []), *labels]),
        )
    return table


def _versions(answers: Sequence[Answer]) -> Table:
    table = _table("versions", "node", "Python", *COMPARED.values())
    for answer in answers:
        table.add_row(
            answer.name,
            str(answer.facts.get("python", "?")),
            *(answer.version(package) or ("none" if answer.facts else "?") for package in COMPARED),
        )
    return table


def _places(plan: RuntimeArgs, answers: Sequence[Answer]) -> Table:
    """Which nodes hold each kind of actor, and where Ray is likely to put it now."""
    table = _table("this run", "actors", "what each asks for", "room on the whole nodes", "likely on, now")
    laid = lay(plan, [answer.node for answer in answers])
    for words, count in Counter(map(in_words, plan.bundles)).items():
        alike = [place for place, bundle in enumerate(plan.bundles) if in_words(bundle) == words]
        room = {answer.name: num_places(answer.node, plan.bundles[alike[0]]) for answer in answers}
        on = Counter("no place" if (number := laid[place]) is None else answers[number].name for place in alike)
        role = plan.bundles[alike[0]].role.value
        table.add_row(
            f"{count} x {role}",
            words.removeprefix(f"{role} (").removesuffix(")"),
            ", ".join(f"{number} on {name}" for name, number in room.items() if number) or "none",
            ", ".join(
                f"{number} on {name}" if name != "no place" else f"{number} nowhere" for name, number in on.items()
            ),
        )
    return table
