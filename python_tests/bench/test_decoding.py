"""The table of time per token."""

from bench.decoding import Row, table


def test_table():
    row = Row("landmark, head", 8192, 25e-6, 80e-6, 50_000_000, 12_500_000)
    head, line = table([row]).splitlines()
    assert head.split() == ["state", "history", "GPU", "us", "wall", "us", "GB/s", "GPU", "MB"]
    assert line.split() == ["landmark,", "head", "8k", "25.0", "80.0", "2000", "12.5"]
