"""Ray Data: a pool of actors, each with the network, maps batches of 32; the same decoding as fruitdask's;
scikit-learn's PCA.

python ray_data.py PHOTOGRAPHS WEIGHTS

Ray gets more CPUs than there are actors, because its reading tasks would otherwise wait forever.
"""

import io
import json
import os
import sys
import time
from pathlib import Path
from typing import Any


class Featurizer:
    """An actor that decodes images and runs the network."""

    def __init__(self, weights: str) -> None:
        import keras
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
        self._network = keras.applications.MobileNetV2(
            include_top=False, weights=weights, input_shape=(224, 224, 3), pooling="avg"
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Turn the bytes of a batch into features."""
        import keras
        import numpy as np
        from PIL import Image

        images = [Image.open(io.BytesIO(data)).convert("RGB") for data in batch["bytes"]]
        resized = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) for image in images]
        pixels = keras.applications.mobilenet_v2.preprocess_input(np.stack(resized))
        return {"path": batch["path"], "features": self._network.predict_on_batch(pixels)}


def main(photographs: Path, weights: str) -> None:
    """Featurize a folder, reduce the features to two components, and print how long featurizing took."""
    import numpy as np
    import ray
    from sklearn.decomposition import PCA

    n_cores = os.cpu_count() or 1
    ray.init(num_cpus=n_cores + 2, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    begin = time.perf_counter()
    table = (
        ray.data.read_binary_files([str(path) for path in sorted(photographs.iterdir())], include_paths=True)
        .map_batches(
            Featurizer,
            fn_constructor_args=(weights,),
            batch_size=32,
            compute=ray.data.ActorPoolStrategy(size=n_cores),
        )
        .to_pandas()
    )
    seconds = time.perf_counter() - begin
    scores = PCA(2, svd_solver="full").fit_transform(np.stack(table["features"].to_numpy()))
    print(json.dumps({"n_images": len(scores), "featurize_seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
