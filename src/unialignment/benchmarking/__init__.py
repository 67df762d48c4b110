"""How fast the tasks are, and against what: exact counts, interleaved timings, scaling. Knows nothing of training."""
