"""Whether a model uses its context: tasks with one right answer, and perplexity over lengths."""

from .harness import harness_model
from .perplexity import PerplexityResult, perplexity
from .score import Score, evaluate, table
from .tasks import TASKS, Sample, make_samples

__all__ = [
    "TASKS",
    "PerplexityResult",
    "Sample",
    "Score",
    "evaluate",
    "harness_model",
    "make_samples",
    "perplexity",
    "table",
]
