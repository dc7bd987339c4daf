"""A few signals at random times: docs/reliability.md has the command for hundreds."""

import pytest
from reliability import signals
from sweep_commands import write_config


@pytest.mark.slow
def test_signals_at_random_times_cost_nothing(tmp_path, shards):
    attacked = signals.of_main(write_config(tmp_path, shards, num_epochs=6))
    counts = signals.attack(attacked, tmp_path / "main", num_signals=4, seed=0)
    assert counts["obeyed"] + counts["finished"] == 4 and counts["completed"] >= 1, counts
    assert not any(counts[failure] for failure in ("hangs", "tracebacks", "losses")), counts
    assert "other statuses" not in counts
