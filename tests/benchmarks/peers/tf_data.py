"""The idiomatic single process: tf.data reads, decodes and resizes on all cores while the network runs; scikit-learn's
PCA.

python tf_data.py PHOTOGRAPHS WEIGHTS

TensorFlow's own JPEG decoder and antialiased bicubic filter: the pixels differ from Pillow's by a level or two.
"""

import json
import sys
import time
from pathlib import Path


def main(photographs: Path, weights: str) -> None:
    """Featurize a folder, reduce the features to two components, and print how long featurizing took."""
    import keras
    import numpy as np
    import tensorflow as tf
    from sklearn.decomposition import PCA

    network = keras.applications.MobileNetV2(
        include_top=False, weights=weights, input_shape=(224, 224, 3), pooling="avg"
    )

    def load(path: tf.Tensor) -> tf.Tensor:
        pixels = tf.io.decode_jpeg(tf.io.read_file(path), channels=3)
        resized = tf.image.resize(pixels, (224, 224), method="bicubic", antialias=True)
        return keras.applications.mobilenet_v2.preprocess_input(tf.clip_by_value(resized, 0, 255))

    paths = sorted(str(path) for path in photographs.glob("*/*.jpg"))
    images = tf.data.Dataset.from_tensor_slices(paths).map(load, num_parallel_calls=tf.data.AUTOTUNE)
    begin = time.perf_counter()
    features = network.predict(images.batch(32).prefetch(tf.data.AUTOTUNE), verbose=0)
    seconds = time.perf_counter() - begin
    scores = PCA(2, svd_solver="full").fit_transform(np.asarray(features))
    print(json.dumps({"n_images": len(scores), "featurize_seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
