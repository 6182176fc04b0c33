"""Names of actors on Ray's dashboard: nobody's name is in anybody's way."""

import ray
import ray.util

from vlarl_rllib.telemetry.actors import ActorNames, own_name


def named_class() -> type:
    """An actor that says what it is called; a class of this function, so that Ray ships it by value."""

    class Named:
        def __repr__(self) -> str:
            return own_name("nobody")

        def called(self) -> str:
            return repr(self)

    return Named


def names_alive() -> list[str]:
    return [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]


def test_two_owners_give_the_same_name_and_one_gives_the_next(ray_session: None) -> None:
    """Two trials whose runs are called the same; and an engine that is replaced while the old one still dies."""
    actor_class = ray.remote(num_cpus=0)(named_class())
    first, other = ActorNames("same"), ActorNames("same")
    actors = [names.start(actor_class, "engine-0", {"max_restarts": 0}) for names in (first, other, first)]
    called = ray.get([actor.called.remote() for actor in actors])
    assert called == ["same/engine-0", "same/engine-0", "same/engine-0~2"]
    assert sorted(name for name in names_alive() if name.startswith("same/")) == sorted(called)

    for actor in actors:
        ray.kill(actor)
    again = first.start(actor_class, "engine-0", {})
    assert ray.get(again.called.remote()).startswith("same/engine-0")
    ray.kill(again)


def test_outside_of_an_actor_there_is_no_name(ray_session: None) -> None:
    assert own_name("driver") == "driver"
