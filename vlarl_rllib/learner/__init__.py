"""PPO on FSDP-sharded learners: advantages, loss, minibatches, and RLlib's Learner and LearnerGroup around them."""
