"""OpenVLA's LIBERO observation path in TensorFlow, as a program: `tensorflow_reference.py RAW.npy OUT.npz`.

RAW.npy holds [N, 256, 256, 3] uint8 frames as rendered; OUT.npz the images after each stage. A process of its own keeps
TensorFlow out of the tests'.
"""

import sys

import numpy as np
import tensorflow as tf

SIDE = 224


def compress(image: np.ndarray) -> tf.Tensor:
    return tf.io.decode_image(tf.io.encode_jpeg(image), expand_animations=False)


def resize(image: tf.Tensor) -> tf.Tensor:
    resized = tf.image.resize(image, (SIDE, SIDE), method="lanczos3", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(resized), 0, 255), tf.uint8)


def crop(image: tf.Tensor) -> tf.Tensor:
    side = tf.sqrt(tf.constant(0.9))
    start = (1 - side) / 2
    box = tf.stack([start, start, start + side, start + side])[None]
    cropped = tf.image.crop_and_resize(tf.image.convert_image_dtype(image, tf.float32)[None], box, [0], (SIDE, SIDE))[0]
    return tf.image.convert_image_dtype(tf.clip_by_value(cropped, 0, 1), tf.uint8, saturate=True)


def main(raw_file: str, out_file: str) -> None:
    compressed = [compress(raw[::-1, ::-1]) for raw in np.load(raw_file)]
    resized = [resize(image) for image in compressed]
    cropped = [crop(image) for image in resized]
    np.savez(out_file, compressed=np.stack(compressed), resized=np.stack(resized), cropped=np.stack(cropped))


if __name__ == "__main__":
    main(*sys.argv[1:])
