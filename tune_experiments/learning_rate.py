"""Learning rate and clip range of a config, by random search: `python tune_experiments/learning_rate.py CONFIG.yaml
[SAMPLES]`."""

import sys

from ray import tune

from vlarl_rllib import VLAPPO, VLAPPOConfig
from vlarl_rllib.runs.ray_session import start_ray
from vlarl_rllib.settings import Settings, calculate_runtime_args

if __name__ == "__main__":
    settings = Settings.from_yaml(sys.argv[1])
    start_ray(calculate_runtime_args(settings), settings)
    space = VLAPPOConfig.from_settings(settings).to_dict()
    space["vla"]["training"] |= {"lr": tune.loguniform(1e-6, 1e-4), "clip_high": tune.uniform(0.2, 0.4)}
    tuner = tune.Tuner(
        VLAPPO,
        param_space=space,
        tune_config=tune.TuneConfig(num_samples=int(sys.argv[2]) if len(sys.argv) > 2 else 8, max_concurrent_trials=1),
        run_config=tune.RunConfig(
            stop={"training_iteration": settings.run.iterations},
            checkpoint_config=tune.CheckpointConfig(num_to_keep=1, checkpoint_frequency=settings.run.checkpoint_every),
            failure_config=tune.FailureConfig(max_failures=settings.run.max_restarts),
        ),
    )
    print(
        tuner.fit().get_dataframe()[
            ["config/vla/training/lr", "config/vla/training/clip_high", "vlarl/success_rate", "vlarl/approx_kl"]
        ]
    )
