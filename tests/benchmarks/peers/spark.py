"""The usual recipe on EMR and Databricks: binary files, broadcast weights, a pandas UDF that builds the
network in each task, Parquet, Spark ML's PCA, toPandas.

python spark.py PHOTOGRAPHS WEIGHTS
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def main(photographs: Path, weights: str) -> None:
    """Featurize a folder, reduce the features to two components, and print how long featurizing took."""
    import pandas as pd
    from pyspark.ml.feature import PCA
    from pyspark.ml.functions import array_to_vector
    from pyspark.sql import SparkSession
    from pyspark.sql.functions import col, element_at, pandas_udf, split

    os.environ["PYSPARK_PYTHON"] = sys.executable
    n_cores = os.cpu_count() or 1
    spark = (
        SparkSession.builder.master(f"local[{n_cores}]")
        .config("spark.driver.memory", "4g")
        .config("spark.ui.enabled", "false")
        .config("spark.sql.execution.arrow.maxRecordsPerBatch", "64")
        .getOrCreate()
    )
    spark.sparkContext.setLogLevel("ERROR")
    broadcast_weights = spark.sparkContext.broadcast(_read_weights(weights))

    def build_network() -> Any:
        import keras

        network = keras.applications.MobileNetV2(
            include_top=False, weights=None, input_shape=(224, 224, 3), pooling="avg"
        )
        network.set_weights(broadcast_weights.value)
        return network

    @pandas_udf("array<float>")
    def featurize(contents: Iterator[pd.Series]) -> Iterator[pd.Series]:
        import io

        import keras
        import numpy as np
        from PIL import Image

        network = build_network()
        for content in contents:
            images = [Image.open(io.BytesIO(data)).convert("RGB") for data in content]
            resized = [np.asarray(image.resize((224, 224), Image.Resampling.BICUBIC), np.float32) for image in images]
            pixels = keras.applications.mobilenet_v2.preprocess_input(np.stack(resized))
            yield pd.Series(list(network.predict(pixels, verbose=0)))

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        images = (
            spark.read.format("binaryFile")
            .option("pathGlobFilter", "*.jpg")
            .option("recursiveFileLookup", "true")
            .load(str(photographs))
        )
        labelled = images.repartition(24).withColumn("label", element_at(split(col("path"), "/"), -2))
        labelled.select("path", "label", featurize("content").alias("features")).write.parquet(f"{folder}/features")
        seconds = time.perf_counter() - begin
        features = spark.read.parquet(f"{folder}/features").withColumn("vector", array_to_vector("features"))
        scores = PCA(k=2, inputCol="vector", outputCol="pca").fit(features).transform(features)
        table = scores.select("path", "label", "pca").toPandas()
    spark.stop()
    print(json.dumps({"n_images": len(table), "featurize_seconds": seconds}))


def _read_weights(path: str) -> list[Any]:
    """Read the weights once, on the driver."""
    import keras

    network = keras.applications.MobileNetV2(include_top=False, weights=path, input_shape=(224, 224, 3), pooling="avg")
    weights: list[Any] = network.get_weights()
    return weights


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
