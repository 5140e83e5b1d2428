"""Speed and memory of the method, each measured beside what it is held against: `python -m benchmarks`."""
