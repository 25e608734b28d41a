"""What the proofs are to reach."""

STEP_GOALS = {
    "infini": ("segments", 1.15), "infini-delta": ("segments", 1.15),
    "landmark": ("dense", 1.5), "dilated": ("dense", 1 / 3),
}  # fmt: skip
"""Method -> (what a step is compared with, its time over that of the other at most)."""
