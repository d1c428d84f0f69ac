"""What runs on a worker: images are fetched, decoded, explored and turned into features."""
