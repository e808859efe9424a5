"""Moved to tiny/comparison.py, since no run needs it; here until experiments/report.py imports it from there."""
from tiny.comparison import mean_and_spread, paired  # noqa: F401
