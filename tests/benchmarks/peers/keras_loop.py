"""What people write without a cluster: one process, batches of 32, plain Keras, scikit-learn's PCA.

python keras_loop.py PHOTOGRAPHS WEIGHTS
"""

import json
import sys
import time
from pathlib import Path


def main(photographs: Path, weights: str) -> None:
    """Featurize a folder, reduce the features to two components, and print how long featurizing took."""
    import keras
    import numpy as np
    from PIL import Image
    from sklearn.decomposition import PCA

    paths = sorted(photographs.glob("*/*.jpg"))
    network = keras.applications.MobileNetV2(
        include_top=False, weights=weights, input_shape=(224, 224, 3), pooling="avg"
    )
    features = []
    begin = time.perf_counter()
    for start in range(0, len(paths), 32):
        images = [Image.open(path).convert("RGB") for path in paths[start : start + 32]]
        resized = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) for image in images]
        pixels = keras.applications.mobilenet_v2.preprocess_input(np.stack(resized))
        features.append(network.predict(pixels, verbose=0))
    seconds = time.perf_counter() - begin
    scores = PCA(2, svd_solver="full").fit_transform(np.concatenate(features))
    print(json.dumps({"n_images": len(scores), "featurize_seconds": seconds}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
