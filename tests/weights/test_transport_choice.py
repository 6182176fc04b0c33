"""Which transport a name means, which one `auto` chooses, and what Ray must offer for it."""

import inspect
import re
from pathlib import Path

import pytest
import ray

from tests.weights.probe_transport import PICKLED
from vlarl_rllib.process.plugins import added_by_packages
from vlarl_rllib.settings import Settings, SettingsError, transports
from vlarl_rllib.settings.transports import PARTS
from vlarl_rllib.types import Site
from vlarl_rllib.weights import find_transport
from vlarl_rllib.weights.placement import choose_transport
from vlarl_rllib.weights.protocol import WeightTransport
from vlarl_rllib.weights.ray_transports import tensor_transport_options

BOTH = frozenset({"cuda_ipc", "nixl"})


def test_an_installed_package_adds_a_transport(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "my_cluster-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: my-cluster\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text(
        f"[vlarl_rllib.transports]\nfast = {PICKLED}\nobject_store = their_cluster:Own\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    added_by_packages.cache_clear()
    try:
        assert Settings.from_dict({"weights": {"transport": "fast"}}).weights.transport == "fast"
        transport = find_transport("fast")
        assert (type(transport).__name__, transport.name) == ("PickledTransport", "fast")
        assert type(find_transport("object_store")).__name__ == "ObjectStoreTransport"  # the package's own
        with pytest.raises(ValueError, match="'slow': choose one of auto, fast, object_store, cuda_ipc, nixl, or name"):
            find_transport("slow")
    finally:
        monkeypatch.undo()
        added_by_packages.cache_clear()


def test_settings_ask_for_what_the_contract_asks_for():
    assert set(PARTS) == WeightTransport.__abstractmethods__ | set(WeightTransport.__annotations__) | {"obstacle"}


@pytest.mark.parametrize(
    ("learner", "engines", "name", "why"),
    [
        (Site("a"), [], "object_store", "the runners sample themselves"),
        (Site("a"), [Site("a")], "object_store", "not all of them are on GPUs"),
        (Site("a", "0", BOTH), [Site("a", "0", BOTH)] * 2, "cuda_ipc", "share one GPU"),
        (Site("a", "0", BOTH), [Site("a", "0", BOTH), Site("a", "1", BOTH)], "nixl", "different GPUs"),
        (Site("a", "0", BOTH), [Site("b", "0", BOTH)], "nixl", "different GPUs"),
        (Site("a", "0", BOTH), [Site("b", "1", BOTH - {"nixl"})], "object_store", "cannot serve: engine-0"),
        (Site("a", "0", BOTH), [Site("a", "0", BOTH), Site("a")], "object_store", "not all of them are on GPUs"),
        (Site("a", "0"), [Site("a", "0", BOTH)], "object_store", "nixl cannot serve: the first learner"),
    ],
)  # fmt: skip
def test_auto_chooses_by_place(learner: Site, engines: list[Site], name: str, why: str):
    choice = choose_transport("auto", learner, engines)
    assert choice.name == name and why in choice.why


@pytest.mark.parametrize(
    ("wanted", "learner", "engines", "message"),
    [
        ("cuda_ipc", Site("a", "0", BOTH), [Site("a", "1", BOTH)], "engine-0 is on another GPU .* use nixl or"),
        ("cuda_ipc", Site("a", "0", BOTH), [Site("b", "0", BOTH)], "engine-0 is on another GPU"),
        ("nixl", Site("a"), [Site("a", "0", BOTH)], "the first learner cannot take part in Ray's nixl"),
        ("nixl", Site("a", "0", BOTH), [Site("a", "0", BOTH), Site("a")], "engine-1 cannot take part"),
    ],
)
def test_what_is_named_and_cannot_serve_is_one_line(wanted: str, learner: Site, engines: list[Site], message: str):
    with pytest.raises(ValueError, match=f"weights.transport: {wanted}: .*{message}") as error:
        choose_transport(wanted, learner, engines)
    assert "\n" not in str(error.value)
    assert choose_transport("object_store", learner, engines).name == "object_store"


def test_a_transport_that_is_not_installed_is_one_line_before_any_actor_starts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(transports, "nixl_is_installed", lambda: False)
    with pytest.raises(SettingsError, match=re.escape("run: pip install 'vlarl-rllib[nixl]', or use auto")):
        tensor_transport_options(1.0, "nixl")
    assert tensor_transport_options(0.0, "auto") == {} != tensor_transport_options(0.5, "auto")


def test_this_ray_has_the_alpha_api_that_direct_transports_use():
    """Where a new Ray fails here, `weights/ray_transports.py` is what is to be changed."""
    from ray.experimental import register_nixl_memory, set_target_for_ref
    from ray.experimental.rdt.util import is_one_sided_transport, normalize_and_validate_tensor_transport

    assert inspect.signature(ray.put).parameters["_tensor_transport"].default is None
    assert list(inspect.signature(set_target_for_ref).parameters) == ["ref", "target"]
    assert callable(register_nixl_memory)
    for name in ("cuda_ipc", "nixl"):
        assert is_one_sided_transport(normalize_and_validate_tensor_transport(name))
    remote = ray.remote(type("Actor", (), {}))
    assert remote.options(enable_tensor_transport=True)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=re.escape("enable_tensor_transports")):
        remote.options(enable_tensor_transports=True)  # type: ignore[attr-defined]
