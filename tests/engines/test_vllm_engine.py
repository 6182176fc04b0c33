"""A real vLLM engine in a Ray actor, against the policy in plain torch."""

import os
import queue
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import ray
import torch
from engine_helpers import make_requests
from ray.exceptions import RayTaskError

from vlarl_rllib.engines.actor import engine_env_vars
from vlarl_rllib.engines.client import RemoteSampler
from vlarl_rllib.engines.protocol import MAX_PROMPT_TOKENS, EngineError
from vlarl_rllib.engines.torch_engine import TorchEngine
from vlarl_rllib.types import HALF_LOADED, SampleReply

SECONDS = 60
TEMPERATURES = (1.0, 0.0, 0.7, 1.6)
TOLERANCE = 1e-4


@pytest.fixture
def oracle(vllm_engine, make_oracle):
    """Weights in the engine = weights in the oracle; versions go on from the engine's."""
    oracle = make_oracle()
    oracle.version = max(0, vllm_engine.statuses()[0].policy_version)
    oracle.push(vllm_engine, seed=0)
    return oracle


def sample(pool, requests):
    return ray.get(pool.handles[0].sample.remote(requests), timeout=SECONDS)


def same_tokens(replies, others) -> bool:
    return all(np.array_equal(a.tokens, b.tokens) for a, b in zip(replies, others, strict=True))


def test_log_probs_are_the_models(vllm_engine, oracle):
    # 11 uneven prompts through a batch of 8: sampled and greedy requests side by side, then each kind alone.
    for temperatures in (TEMPERATURES, (0.0,), (1.0,), (1.6,)):
        requests = make_requests(11, temperatures)
        replies = sample(vllm_engine, requests)
        assert oracle.log_prob_error(requests, replies) <= TOLERANCE
        for request, reply in zip(requests, replies, strict=True):
            if request.temperature == 0:
                assert oracle.is_greedy(request, reply)


def test_values_are_the_models_whatever_shares_the_batch(vllm_engine, oracle):
    """Uneven prompts in batches of 1 to 8, and more than fit at once."""
    requests = make_requests(19, TEMPERATURES)
    for size in (1, 3, 8, 19):
        replies = [r for at in range(0, 19, size) for r in sample(vllm_engine, requests[at : at + size])]
        assert oracle.value_error(requests, replies) <= TOLERANCE
    assert np.std([reply.value for reply in replies]) > 100 * TOLERANCE, "all alike, so nothing is tested here"
    torch.nn.init.zeros_(oracle.model.value_head.fc3.weight)
    assert oracle.value_error(requests, replies) > 100 * TOLERANCE


def test_no_value_outlives_its_request(vllm_engine, oracle):
    def kept(actor):
        import gc

        from vlarl_rllib.engines.vllm.prompt_values import PromptValues

        (values,) = [thing for thing in gc.get_objects() if type(thing) is PromptValues]
        return len(values._found)

    sample(vllm_engine, make_requests(9))
    assert ray.get(vllm_engine.handles[0].__ray_call__.remote(kept), timeout=SECONDS) == 0


def test_sampled_tokens_follow_the_distribution(vllm_engine, oracle):
    """The first token of one frame over 400 seeds against the model's probabilities: total variation as expected."""
    frame = make_requests(1)[0]
    replies = sample(vllm_engine, [replace(frame, seed=seed) for seed in range(400)])
    first = np.array([reply.tokens[0] for reply in replies]) - oracle.model.action_token_ids[0]
    with torch.no_grad():
        logits = oracle._logits([frame], torch.tensor(replies[0].tokens.tolist())[None])[0, 0]
    probabilities = torch.softmax(logits, -1).numpy()
    # Sum of the probabilities of the drawn ids: E = sum p^2, standard deviation from the same formula.
    mean = np.square(probabilities).sum()
    deviation = np.sqrt(((probabilities**3).sum() - mean**2) / 400)
    assert abs(probabilities[first].mean() - mean) < 5 * deviation
    assert len(set(first.tolist())) > 100


def test_seeds_make_tokens_independent_of_the_batch(vllm_engine, oracle):
    requests = make_requests(8, temperatures=(1.0, 1.3))
    together = sample(vllm_engine, requests)
    assert same_tokens(together, sample(vllm_engine, requests[::-1])[::-1])
    assert same_tokens(together, [sample(vllm_engine, [request])[0] for request in requests])
    others = sample(vllm_engine, [replace(request, seed=request.seed + 1000) for request in requests])
    assert not any(np.array_equal(a.tokens, b.tokens) for a, b in zip(together, others, strict=True))


def test_prompts_longer_than_usual_wait_for_room_in_the_cache(vllm_engine, oracle):
    """Each fills two blocks of 128, of which there is one for each of a batch of 8, and two for the longest prompt."""
    long = "push " * 200
    while len(oracle.processor.prompt_ids(long)) > MAX_PROMPT_TOKENS:
        long = long.removesuffix("push ")
    requests = [replace(request, instruction=long) for request in make_requests(8)]
    patches, tokens = oracle.model.num_image_tokens, len(oracle.processor.prompt_ids(long))
    assert 128 < patches + tokens <= 256
    assert oracle.log_prob_error(requests, sample(vllm_engine, requests)) <= TOLERANCE


def test_weights_arrive_whole_each_time(vllm_engine, oracle):
    requests = make_requests(8, TEMPERATURES)
    torch_engine = TorchEngine(replace(vllm_engine._spec))
    for seed in (11, 12, 13):
        before = sample(vllm_engine, requests)
        manifest = oracle.keep(seed)
        assert oracle.log_prob_error(requests, before) > 0.1  # the weights did change
        torch_engine.load_weights(manifest)
        manifest = oracle.push(vllm_engine, seed)
        replies = sample(vllm_engine, requests)
        assert {reply.policy_version for reply in replies} == {manifest.version}
        assert oracle.log_prob_error(requests, replies) <= TOLERANCE
        hf_replies = torch_engine.sample(requests)
        assert oracle.log_prob_error(requests, hf_replies) <= TOLERANCE
        assert oracle.value_error(requests, replies) <= TOLERANCE
        assert oracle.value_error(requests, hf_replies) <= 1e-6
        greedy = [index for index, request in enumerate(requests) if request.temperature == 0]
        assert same_tokens([replies[i] for i in greedy], [hf_replies[i] for i in greedy])


def test_weights_that_do_not_fit_are_refused_and_the_old_ones_serve(vllm_engine, oracle):
    requests = make_requests(4)
    version = oracle.version
    before = sample(vllm_engine, requests)
    manifest = oracle.keep(seed=0)
    name = "language_model.model.layers.0.self_attn.q_proj.weight"
    others = tuple(spec for spec in manifest.tensors if spec.name != name)
    (fused,) = set(manifest.tensors) - set(others)
    wrong = [
        tuple(replace(spec, name=f"module.{spec.name}") for spec in manifest.tensors),
        others,
        (*manifest.tensors, replace(fused, name="value_head.fc4.weight")),
        (*others, replace(fused, shape=(fused.shape[0] - 1, fused.shape[1]))),
    ]
    for bad in wrong:
        with pytest.raises(ValueError, match="weights do not fit the policy"):
            vllm_engine.begin(vllm_engine.members, replace(manifest, tensors=bad))
    after = sample(vllm_engine, requests)
    assert {reply.policy_version for reply in after} == {version}
    assert all(np.array_equal(a.log_probs, b.log_probs) for a, b in zip(before, after, strict=True))
    assert vllm_engine.num_restarts == 0


def test_what_gets_no_weights_keeps_its_own(vllm_engine, oracle):
    """vLLM's layer-wise reload takes every layer apart; those that training does not change must come back whole."""
    oracle.model.requires_grad_(False)
    trained = "language_model.model.layers.1.self_attn.k_proj.weight"
    dict(oracle.model.named_parameters())[trained].requires_grad_(True)
    manifest = oracle.push(vllm_engine, seed=5)
    assert manifest.whole
    sync, requests = oracle.sync(vllm_engine), make_requests(4)
    for spread in (0.3, 0.6):
        with torch.no_grad():
            dict(oracle.model.named_parameters())[trained].normal_(std=spread)
        assert oracle.log_prob_error(requests, sample(vllm_engine, requests)) > TOLERANCE
        part = sync.push()
        assert not part.whole and 0 < part.num_bytes < manifest.num_bytes / 20
        assert oracle.log_prob_error(requests, sample(vllm_engine, requests)) <= TOLERANCE
    oracle.version = sync.version


def test_an_update_that_breaks_off_leaves_nothing_that_samples(vllm_engine, oracle):
    requests = make_requests(4)
    manifest = oracle.keep(seed=7)
    stream = vllm_engine.begin(vllm_engine.members, replace(manifest, transport="object_store"))
    oracle.begin_publishing(manifest.version, "object_store", whole=True, keep=False)
    stream.feed(oracle.next_bucket(0))
    stream.wait()
    stream.abort("the learner died")
    with pytest.raises(RayTaskError, match="weights of two versions"):
        sample(vllm_engine, requests)
    assert vllm_engine.statuses()[0].policy_version == HALF_LOADED
    manifest = oracle.push(vllm_engine, seed=7)
    replies = sample(vllm_engine, requests)
    assert {reply.policy_version for reply in replies} == {manifest.version} and vllm_engine.num_restarts == 0
    assert oracle.log_prob_error(requests, replies) <= TOLERANCE


def test_a_malformed_request_is_its_callers_problem_only(vllm_engine, oracle):
    good = make_requests(3)
    bad = [
        replace(good[0], image=good[0].image.astype(np.float32)),
        replace(good[0], image=good[0].image[:14]),
        replace(good[0], instruction="pick " * 200),
        replace(good[0], temperature=-1.0),
    ]
    handle = vllm_engine.handles[0]
    refs = [handle.sample.remote([request]) for request in [*good, *bad]]
    for ref in refs[: len(good)]:
        assert isinstance(ray.get(ref, timeout=SECONDS)[0], SampleReply)
    for ref in refs[len(good) :]:
        with pytest.raises(RayTaskError) as error:
            ray.get(ref, timeout=SECONDS)
        assert isinstance(error.value.cause, ValueError)
    assert len(sample(vllm_engine, good)) == 3


def test_updates_between_overlapping_callers_keep_versions_apart(vllm_engine, oracle):
    handle = vllm_engine.handles[0]
    requests = make_requests(6)
    old = oracle.version
    before = [handle.sample.remote([request]) for request in requests]
    with ThreadPoolExecutor(1) as thread:
        update = thread.submit(oracle.push, vllm_engine, 21)
        during = [handle.sample.remote([request]) for request in requests]
        update.result(SECONDS)
    after = [handle.sample.remote([request]) for request in requests]
    replies = [ray.get(refs, timeout=SECONDS) for refs in (before, during, after)]
    assert {reply.policy_version for (reply,) in replies[0]} == {old}
    assert {reply.policy_version for (reply,) in replies[1]} <= {old, oracle.version}
    assert {reply.policy_version for (reply,) in replies[2]} == {oracle.version}
    fresh = [reply for (reply,) in replies[1] if reply.policy_version == oracle.version]
    fresh_requests = [r for r, (reply,) in zip(requests, replies[1], strict=True) if reply.policy_version != old]
    assert oracle.log_prob_error([*fresh_requests, *requests], [*fresh, *(r for (r,) in replies[2])]) <= TOLERANCE


def test_vllm_measures_memory_with_a_frame_of_the_policys_size(vllm_engine, spec):
    """Asked in the engine's process, which has vLLM: it replaces parts of torch."""

    def frame(actor, path):
        from types import SimpleNamespace

        from vllm import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY

        from vlarl_rllib.engines.vllm.plugin import architecture_of
        from vlarl_rllib.models.openvla.family import FAMILY

        architectures = [architecture_of(FAMILY.vllm_model)]
        arguments = EngineArgs(model=path, hf_overrides={"architectures": architectures})
        processor = MULTIMODAL_REGISTRY.create_processor(arguments.create_engine_config().model_config)
        made = processor.apply(SimpleNamespace(mm_data_items={}), None)
        (frame,), (place,) = made["mm_kwargs"]["image"], made["mm_placeholders"]["image"]
        pixels = frame.get_data()["pixel_values"]
        most = processor.info.get_mm_max_tokens_per_item(0, {})
        return tuple(pixels.shape), str(pixels.dtype), place.length, list(most.values())

    asked = vllm_engine.handles[0].__ray_call__.remote(frame, spec.model_path)
    assert ray.get(asked, timeout=SECONDS) == ((28, 28, 3), "torch.uint8", 4, [4])


def test_a_killed_engine_fails_what_it_was_asked_and_what_it_is_asked(vllm_engine, oracle):
    """That it is replaced and made current, test_algorithm.py asserts with engines that it needs anyway."""
    completions = queue.SimpleQueue()
    sampler = RemoteSampler(completions, vllm_engine.handles)
    requests = make_requests(64)
    pid = vllm_engine.statuses()[0].pid
    for key, request in enumerate(requests):
        sampler.submit(key, request)
    first_key, first = completions.get(timeout=SECONDS)
    assert isinstance(first, SampleReply)
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    outcomes = {first_key: first} | dict(completions.get(timeout=SECONDS) for _ in range(63))
    assert time.monotonic() - killed < 10
    assert len(outcomes) == 64 and sampler.num_outstanding == 0
    lost = [outcome for outcome in outcomes.values() if not isinstance(outcome, SampleReply)]
    assert lost and all(isinstance(error, EngineError) for error in lost)
    sampler.submit("refused", requests[0])
    assert isinstance(completions.get(timeout=SECONDS)[1], EngineError)
    sampler.close()


def test_a_gpu_engine_keeps_its_compiler_and_a_cpu_engine_runs_one_thread(spec):
    assert engine_env_vars(spec)["OMP_NUM_THREADS"] == "1"
    assert "TORCHDYNAMO_DISABLE" in engine_env_vars(spec)
    on_gpu = engine_env_vars(replace(spec, gpus=1, enforce_eager=False))
    assert not any(name.startswith(("TORCHDYNAMO", "VLLM_CPU")) for name in on_gpu)


def test_importing_the_engine_loads_neither_torch_nor_vllm():
    code = "import sys, vlarl_rllib.engines.actor, vlarl_rllib.engines.client; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not {"torch", "vllm", "transformers"} & set(modules)
