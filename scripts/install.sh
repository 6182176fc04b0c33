#!/bin/sh
# Install a lock file and this package into the environment of the given python. Usage: install.sh PYTHON LOCK [lock-only]
# lock-only: without the package, whose files need not be there; a layer of an image that new code leaves as it is.
set -eu
python=$1 lock=$2 package="--editable ."
[ "${3:-}" != lock-only ] || package=""

# uv has its own configuration; let it use what pip was given, where it was given nothing itself.
pip_option() { "$python" -m pip config get "global.$1" 2>/dev/null || true; }
[ -n "${UV_FIND_LINKS:-}" ] || UV_FIND_LINKS=${PIP_FIND_LINKS:-$(pip_option find-links)}
[ -n "${UV_INDEX_URL:-}" ] || UV_INDEX_URL=${PIP_INDEX_URL:-$(pip_option index-url)}
[ -n "$UV_FIND_LINKS" ] && export UV_FIND_LINKS || unset UV_FIND_LINKS
[ -n "$UV_INDEX_URL" ] && export UV_INDEX_URL || unset UV_INDEX_URL
[ -z "${PIP_CERT:-}" ] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"

# A CPU build of torch comes from a local wheel where one is configured, else from PyTorch's own index.
backend=""
case $lock in *cpu*) ls ${UV_FIND_LINKS:-/nonexistent}/torch-*+cpu-*.whl >/dev/null 2>&1 || backend="--torch-backend=cpu" ;; esac

# shellcheck disable=SC2086
"$python" -m uv pip install --quiet --python "$python" $backend --no-deps --requirements "$lock" $package
[ -n "$package" ] || exit 0

# The first import compiles bytecode: better now than in every actor of the first run. It is also the check that all is there.
# TensorFlow is imported alone, as the data process does.
"$python" -c "import vlarl_rllib.commands.train, vlarl_rllib.commands.report, vlarl_rllib.learner.supervised, vlarl_rllib.rollout.env_runner, vlarl_rllib.engines.vllm.stepper, vlarl_rllib.envs.libero"
TF_CPP_MIN_LOG_LEVEL=3 "$python" -c "import tensorflow, tensorflow_datasets"
