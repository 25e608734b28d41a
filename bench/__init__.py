"""The benchmark: one command line, one timer, results as JSON. Start at run.py."""
