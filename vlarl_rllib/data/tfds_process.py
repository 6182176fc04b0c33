"""TensorFlow Datasets, in a process of its own that `data/rlds.py` starts: this file is its program, and imports
nothing of this package there.

TensorFlow carries an LLVM whose symbols Mesa's software rasteriser then finds: drawing a LIBERO frame crashes in a
process that has imported TensorFlow before. It would also cost a learner 0.4 GB and some seconds.

FD is an inherited socket. The first message is a command and its arguments; every answer is `("value", something)`,
`("end", None)` or `("error", (name of an exception class, its text))`.
"""

from __future__ import annotations

import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0", "CUDA_VISIBLE_DEVICES": "-1", "TF_USE_LEGACY_KERAS": "1",
}  # fmt: skip
"""No greetings, no memory of the GPU that a policy is on, and no Keras: TensorFlow imports the new one, which takes a
third of its start, and the old one only where it is used."""
VERSION = "1.0.0"
EPISODES_PER_FILE = 64
MAX_EPISODE_STEPS = 2**20
EMPTY = "Dataset was empty"
"""What TensorFlow says of an episode without steps."""
STATE_SIZE, JOINT_STATE_SIZE = 8, 7
RAISED = {kind.__name__: kind for kind in (ValueError, ImportError, OSError)}
"""What a command may end with, in the caller too."""


class TFDSProcess:
    """The caller's end."""

    def __init__(self, *command: Any) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            from vlarl_rllib.process.interpreter import given_path, python_command

            # Ctrl-C is the caller's to handle, who closes the socket; a blocked signal is inherited, so that not even
            # importing sees it.
            unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                self._process = subprocess.Popen(
                    python_command(__file__, str(theirs.fileno())),
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env=os.environ | ENVIRONMENT | {"PYTHONPATH": given_path()},
                )
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        self._connection = Connection(ours.detach())
        self.send(command)

    def send(self, message: Any) -> None:
        """A process that is gone is noticed by `receive`."""
        try:
            self._connection.send(message)
        except OSError:
            return

    def receive(self) -> tuple[bool, Any]:
        """(whether there was one, the next value).

        Raises:
            ValueError, ImportError, OSError: what the other process ended with.
            RuntimeError: it died.
        """
        try:
            kind, content = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(
                f"the process that reads and writes RLDS data died with exit code {self._process.wait(10)}"
            ) from None
        if kind == "error":
            raise RAISED[content[0]](content[1])
        return kind == "value", content

    def close(self, patience_seconds: float = 10.0) -> None:
        """End it, after that time whatever it is doing."""
        self._connection.close()
        try:
            self._process.wait(patience_seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def main(arguments: list[str]) -> None:
    """Serve one command."""
    os.dup2(2, 1)
    connection = Connection(int(arguments[0]))
    try:
        command, *rest = connection.recv()
        commands: dict[str, Callable[..., Iterator[Any]]] = {"read": read, "write": write}
        for value in commands[command](connection, *rest):
            connection.send(("value", value))
        connection.send(("end", None))
    except tuple(RAISED.values()) as error:
        if not isinstance(error, (BrokenPipeError, ConnectionResetError)):
            name = next(name for name, kind in RAISED.items() if isinstance(error, kind))
            connection.send(("error", (name, str(error))))
    except EOFError:
        return


def read(connection: Connection, path: Path, split: str) -> Iterator[dict[str, Any]]:
    """Episodes as stored: `image` (T files, or [T, H, W, 3] of raw frames), `action` [T, ...] and `instruction`
    (bytes), none of which is checked.

    `path` is one whose metadata `data.schema.check_metadata` has passed.
    """
    tfds = _tfds()
    import tensorflow as tf

    try:
        builder = tfds.builder_from_directory(str(path))
        observation = builder.info.features["steps"].feature["observation"]
    except Exception as error:  # parsers of several kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{path}: its metadata cannot be read ({type(error).__name__}: {reason}); copy or collect it again"
        ) from None
    if split.partition("[")[0] not in builder.info.splits:
        raise ValueError(f"{path}: has no split {split!r}; it has {', '.join(builder.info.splits)}")
    cameras = [name for name, feature in observation.items() if isinstance(feature, tfds.features.Image)]
    as_stored = {"steps": {"observation": {name: tfds.decode.SkipDecoding() for name in cameras}}}
    number = 0

    def columns(episode: Any) -> tuple[Any, Any, Any]:
        """In TensorFlow's graph: 800 episodes of 11 steps in 1.3 s, where an iterator for each took 25 s (2 busy
        cores)."""
        steps = episode["steps"].batch(MAX_EPISODE_STEPS).get_single_element()
        return steps["observation"]["image"], steps["action"], steps["language_instruction"][0]

    try:
        episodes = builder.as_dataset(split=split, decoders=as_stored, shuffle_files=False)
        for images, actions, instruction in episodes.map(
            columns, num_parallel_calls=tf.data.AUTOTUNE
        ).as_numpy_iterator():
            encoded = images.dtype == object
            yield {
                "image": [bytes(image) for image in images] if encoded else images,
                "action": actions,
                "instruction": instruction,
            }
            number += 1
    except (tf.errors.OpError, OSError, ValueError) as error:
        reason = re.sub(r"\{\{.*?\}\} | \[Op:.*", "", (str(error).strip() or type(error).__name__).splitlines()[0])
        if EMPTY in reason:
            raise ValueError(
                f"{path}: episode {number} has no steps, must have at least 1; collect it again without that episode"
            ) from None
        raise ValueError(
            f"{path}: damaged or incomplete after {number} episodes ({reason}); copy or collect it again"
        ) from None


def write(connection: Connection, path: Path, name: str) -> Iterator[None]:
    """Append the lots of examples that arrive, answering each, until None does.

    The first example shows what all have.
    """
    tfds = _tfds()
    writer: Any = None
    while (examples := connection.recv()) is not None:
        if writer is None:
            writer = _writer(tfds, path, name, examples[0]["steps"][0]["observation"])
        writer.add_examples(
            {"train": examples}
        )  # which also writes all metadata anew, the longer part for a single example
        yield None
    if writer is not None:
        writer.close_all()


def _writer(tfds: Any, path: Path, name: str, observation: dict[str, Any]) -> Any:
    from PIL import Image

    width, height = Image.open(io.BytesIO(observation["image"])).size
    identity = tfds.core.dataset_info.DatasetIdentity(
        name=name, version=tfds.core.Version(VERSION), data_dir=str(path), module_name=name
    )
    features = _features(tfds, (height, width), wrist_camera="wrist_image" in observation)
    info = tfds.core.DatasetInfo(
        builder=identity, features=features, description="Demonstrations written by vlarl_rllib."
    )
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=EPISODES_PER_FILE)
    writer.initialize_splits(["train"])
    return writer


def _features(tfds: Any, image_shape: tuple[int, int], wrist_camera: bool) -> Any:
    import numpy as np

    image = tfds.features.Image(shape=(*image_shape, 3), dtype=np.uint8, encoding_format="jpeg")
    step = {
        "observation": {
            "image": image,
            **({"wrist_image": image} if wrist_camera else {}),
            "state": tfds.features.Tensor(shape=(STATE_SIZE,), dtype=np.float32),
            "joint_state": tfds.features.Tensor(shape=(JOINT_STATE_SIZE,), dtype=np.float32),
        },
        "action": tfds.features.Tensor(shape=(7,), dtype=np.float32),
        "discount": tfds.features.Scalar(dtype=np.float32),
        "reward": tfds.features.Scalar(dtype=np.float32),
        "is_first": tfds.features.Scalar(dtype=np.bool_),
        "is_last": tfds.features.Scalar(dtype=np.bool_),
        "is_terminal": tfds.features.Scalar(dtype=np.bool_),
        "language_instruction": tfds.features.Text(),
    }
    return tfds.features.FeaturesDict(
        {"steps": tfds.features.Dataset(step), "episode_metadata": {"file_path": tfds.features.Text()}}
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise ImportError(
            f"RLDS data need TensorFlow Datasets ({error}); run: pip install 'vlarl-rllib[data]'"
        ) from None
    return tensorflow_datasets


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stderr.flush()
    os._exit(0)  # taking TensorFlow down in order takes a second, for which the caller would wait
