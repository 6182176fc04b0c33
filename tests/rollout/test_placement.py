"""Places that Tune was asked for by somebody else than the plan."""

import pytest

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.rollout.placement import check_bundles
from vlarl_rllib.settings import Settings, calculate_runtime_args

PLAN = calculate_runtime_args(
    Settings.from_dict({"engines": {"num": 1, "cpus": 2}, "learners": {"num": 1}, "env": {"num_processes": 1}})
)
NEEDED = [{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 2.0}]


def test_the_plans_own_places_more_of_each_and_more_behind_them_fit() -> None:
    check_bundles(PLAN, NEEDED)
    check_bundles(PLAN, [{"CPU": 3.0, "GPU": 1.0}, *NEEDED[1:], {"CPU": 8.0}])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([{"CPU": 16.0}], "bundle 1 is {}, but the runner there needs {'CPU': 1.0}"),
        ([*NEEDED[:3], {"CPU": 1.0}], "bundle 3 is {'CPU': 1.0}, but the engine there needs {'CPU': 2.0}"),
    ],
)
def test_others_are_refused_with_what_is_needed(given: list[dict[str, float]], said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        check_bundles(PLAN, given)
    assert said in str(raised.value) and f"PlacementGroupFactory({NEEDED})" in str(raised.value)
