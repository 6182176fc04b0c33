"""What a run's actors are called on Ray's dashboard: `RUN/engine-0`, `RUN/runner-1`, `RUN/learner-0`, `RUN/reward`."""

from __future__ import annotations

import itertools
import secrets
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ActorAlreadyExistsError


@dataclass(frozen=True)
class ActorNames:
    """The names that one owner of actors gives out.

    Ray wants a name to be one living actor's in its namespace. So each owner has a namespace of its own: two trials
    whose runs are called the same, and a trial that starts anew while its old actors still end, do not meet.
    """

    run: str
    namespace: str = field(default_factory=lambda: f"vlarl-{secrets.token_hex(4)}")

    def of(self, role: str) -> dict[str, str]:
        """Ray's options for the actor with this role."""
        return {"name": f"{self.run}/{role}", "namespace": self.namespace}

    def start(self, actor_class: Any, role: str, options: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Start an actor under its name; `RUN/engine-0~2` where the one before it, which was killed, still has that.

        Args:
            options: of Ray, beside the name.
        """
        for attempt in itertools.count(1):
            try:
                name = role if attempt == 1 else f"{role}~{attempt}"
                return actor_class.options(**options, **self.of(name)).remote(*args, **kwargs)
            except ActorAlreadyExistsError:
                continue


def own_name(otherwise: str) -> str:
    """What this process's actor is called, else `otherwise`: in a driver, and of an actor without a name."""
    if not ray.is_initialized() or (context := ray.get_runtime_context()).get_actor_id() is None:
        return otherwise
    return context.get_actor_name() or otherwise
