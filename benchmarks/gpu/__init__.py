"""`python -m benchmarks gpu`: every row that needs a GPU, beside the peers that are installed, in one run."""
