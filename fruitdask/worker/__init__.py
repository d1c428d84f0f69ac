"""What runs on a worker: fetch, decode, explore and featurize images; models are built on the client."""
