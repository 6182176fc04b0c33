"""In which order ranks take their places."""

from vlarl_rllib.learner.rank_group import side_by_side


def test_ranks_of_one_node_follow_one_another() -> None:
    """As Ray 2.60 laid eight bundles on two nodes under SPREAD: every other one on each."""
    nodes = dict(enumerate(["b", "a", "a", "b", "a", "b", "a", "b"]))
    assert side_by_side(nodes) == [0, 3, 5, 7, 1, 2, 4, 6]
    assert side_by_side(dict.fromkeys(range(4), "a")) == [0, 1, 2, 3]
    assert side_by_side({1: "b", 3: "a"}) == [1, 3], "of lost nodes' places there is none"
