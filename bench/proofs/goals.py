"""What the proofs are to reach."""

STEP_GOALS = {
    "infini": ("segments", 1.15, 0), "infini-delta": ("segments", 1.15, 0),
    "landmark": ("dense", 1.5, 0), "dilated": ("dense", 1 / 3, 131072),
}  # fmt: skip
"""Method -> (what a step is compared with, its time over that of the other at most, from so many
tokens on)."""
