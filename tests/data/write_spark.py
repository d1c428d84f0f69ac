"""Write the Parquet folders of tests/data/spark with PySpark: features of the images that tests/test_compare.py draws.

    python tests/data/write_spark.py FOLDER

Needs pyspark and Java 17 besides what the tests need. `arrays` holds arrays of floats, partitioned by label; `vectors`
holds dense and sparse vectors of Spark ML, and the scores of its PCA.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import compute_colours, draw  # noqa: E402

#: The images: one name needs percent-encoding in a URL.
NAMES = [f"{label}/{number} a.png" for label in ("apple", "pear", "quince") for number in range(8)]


def main(target: str) -> None:
    """Compute features of the drawn images with NumPy and write them with Spark."""
    from pyspark.ml.feature import PCA
    from pyspark.ml.linalg import Vectors
    from pyspark.sql import SparkSession
    from pyspark.sql.types import ArrayType, FloatType, StringType, StructField, StructType

    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), *NAMES)
        features = compute_colours(Path(folder), NAMES).tolist()
    builder: Any = SparkSession.builder
    spark = builder.master("local[1]").config("spark.ui.enabled", "false").getOrCreate()
    text, floats = StringType(), ArrayType(FloatType())
    schema = StructType([StructField("path", text), StructField("label", text), StructField("features", floats)])
    # As the function input_file_name writes paths.
    paths = [f"file:///data/photos/{name.replace(' ', '%20')}" for name in NAMES]
    labels = [name.split("/")[0] for name in NAMES]
    arrays = spark.createDataFrame(list(zip(paths, labels, features, strict=True)), schema)
    arrays.coalesce(1).write.partitionBy("label").parquet(f"{target}/arrays")
    # As the data source binaryFile writes paths.
    paths = [f"dbfs:/mnt/photos/{name}" for name in NAMES]
    mixed = [
        Vectors.sparse(len(row), dict(enumerate(row))) if number % 3 == 0 else Vectors.dense(row)
        for number, row in enumerate(features)
    ]
    vectors = spark.createDataFrame(list(zip(paths, labels, mixed, strict=True)), ["path", "label", "features"])
    reduced = PCA(k=2, inputCol="features", outputCol="pcaFeatures").fit(vectors).transform(vectors)
    reduced.repartition(2).write.parquet(f"{target}/vectors")
    spark.stop()


if __name__ == "__main__":
    main(sys.argv[1])
