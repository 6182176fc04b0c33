"""Actions to ids and back, with numbers worked out by hand."""

import numpy as np
import pytest

from vlarl_rllib.models.openvla import ActionTokenizer
from vlarl_rllib.models.openvla.actions import OpenVLACodec, to_environment, to_policy

STATS = {"q01": [-1.0, 0.0], "q99": [3.0, 1.0], "mask": [True, False], "min": [-2.0, 0.0], "max": [4.0, 1.0]}


def test_published_ids_of_the_ends_and_the_middle():
    tokenizer = ActionTokenizer()
    assert tokenizer.encode([-1.0, 0.0, 1.0]).tolist() == [31999, 31872, 31744]
    # outside is clipped
    assert tokenizer.encode([-5.0, 5.0]).tolist() == [31999, 31744]
    # 255 centres for 256 ids: the two lowest ids decode alike, at 1 - 1/255
    np.testing.assert_allclose(tokenizer.decode([31999, 31872, 31745, 31744]), [-254 / 255, 0, 254 / 255, 254 / 255])


def test_every_centre_survives_a_round_trip_in_any_shape():
    tokenizer = ActionTokenizer(vocab_size=384)
    centers = tokenizer.bin_centers.reshape(5, 51)
    ids = tokenizer.encode(centers)
    assert ids.dtype == np.int64 and ids.min() == 129 and ids.max() == 383
    np.testing.assert_array_equal(tokenizer.decode(ids), centers)


def test_a_well_formed_reply_decodes():
    tokenizer = ActionTokenizer()
    reply = [31999, 31872, 31744, 31872, 31872, 31872, 31744]
    np.testing.assert_array_equal(tokenizer.decode_checked(reply), [tokenizer.decode(reply)])


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ([31872] * 6, "must be 7 token ids"),
        ([31872] * 8, "must be 7 token ids"),
        ([], "must be 7 token ids"),
        ([31872.0] * 7, "must be 7 token ids"),
        ([31872] * 6 + [2], "outside the action ids 31744..31999"),
        ([31872] * 6 + [32000], "outside the action ids 31744..31999"),
        ([31743] + [31872] * 6, "outside the action ids 31744..31999"),
    ],
)
def test_a_malformed_reply_is_an_error_and_never_an_action(reply, message):
    with pytest.raises(ValueError, match=message):
        ActionTokenizer().decode_checked(reply)


def test_unnormalise_scales_masked_dimensions_and_passes_the_others():
    # -1, 0, 1 -> q01, middle, q99 in the first dimension
    actions = ActionTokenizer.unnormalize([[-1.0, 0.3], [0.0, -1.0], [1.0, 1.0]], STATS)
    np.testing.assert_allclose(actions, [[-1.0, 0.3], [1.0, -1.0], [3.0, 1.0]])
    assert actions.dtype == np.float64


def test_normalise_inverts_clips_and_zeroes_constant_dimensions():
    normalized = ActionTokenizer.normalize([[1.0, 0.3], [9.0, 1.0]], STATS)
    np.testing.assert_allclose(normalized, [[0.0, 0.3], [1.0, 1.0]], atol=1e-8)
    constant = {**STATS, "min": [1.0, 0.0], "max": [1.0, 1.0]}
    np.testing.assert_allclose(ActionTokenizer.normalize([1.5, 0.3], constant), [0.0, 0.3])


def test_statistics_without_a_mask_scale_every_dimension():
    stats = {"q01": [0.0], "q99": [10.0]}
    np.testing.assert_allclose(ActionTokenizer.unnormalize([0.0], stats), [5.0])


@pytest.mark.parametrize(("policy", "environment"), [(1.0, -1.0), (0.0, 1.0), (0.996, -1.0), (0.2, 1.0)])
def test_gripper_of_the_policy_is_turned_round(policy, environment):
    # OpenVLA: 1 = open, 0 = close; robosuite: -1 = open, +1 = close.
    action = np.array([0.1, -0.2, 0.3, 0.0, 1.5, -0.6, policy])
    np.testing.assert_array_equal(to_environment(action), [0.1, -0.2, 0.3, 0.0, 1.5, -0.6, environment])
    assert action[6] == policy
    assert to_policy(to_environment(action))[6] == round(policy)


def test_what_a_codec_encodes_it_decodes_again():
    statistics = {"q01": [-0.5] * 6 + [0.0], "q99": [0.5] * 6 + [1.0], "mask": [True] * 6 + [False]}
    codec = OpenVLACodec(ActionTokenizer(), statistics)
    actions = np.array([[[-0.5, -0.25, 0.0, 0.25, 0.5, 0.1, -1.0]], [[0.4, 0.3, 0.2, 0.1, 0.0, -0.1, 1.0]]])
    tokens, normalized = codec.encode(actions)
    # -0.25 is a quarter of the way from q01 to q99; an open gripper is 1, a closed one 0
    np.testing.assert_allclose(normalized[0, 0], [-1.0, -0.5, 0.0, 0.5, 1.0, 0.2, 1.0], atol=1e-6)
    assert tokens.shape == (2, 7) and normalized[1, 0, 6] == 0.0
    for reply, action in zip(tokens, actions, strict=True):
        decoded = codec.decode(reply)
        np.testing.assert_allclose(decoded, action, atol=0.5 / 128)
        assert decoded[0, 6] == action[0, 6]
    np.testing.assert_allclose(codec.normalized(tokens), normalized, atol=1 / 128)
