"""Campaigns of kills and of broken folders: a slice of each runs in the suite, the whole by `launch/benchmark.py`."""
