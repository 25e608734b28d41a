"""Whether a model uses its context: tasks with one right answer, and perplexity over lengths."""

from .perplexity import PerplexityResult, perplexity
from .score import Score, evaluate, table
from .tasks import TASKS, Sample, make_samples

__all__ = [
    "TASKS",
    "PerplexityResult",
    "Sample",
    "Score",
    "evaluate",
    "make_samples",
    "perplexity",
    "table",
]
