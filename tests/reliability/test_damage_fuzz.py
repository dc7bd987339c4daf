"""A small part of the fuzzer: no damage gives another result, a traceback or a refusal without a place."""

import pytest
from reliability import damage_fuzz


@pytest.mark.nightly
def test_damage_is_refused_or_changes_nothing_or_costs_one_checkpoint(ehr_config, shards, tmp_path):
    ehr_config.num_epochs = 2
    whole = damage_fuzz.make(tmp_path / "whole", shards, ehr_config)
    counts, failures = damage_fuzz.fuzz(whole, range(72), 1, tmp_path / "scratch")
    assert failures == []
    refused = {kind for kind, outcome in counts if outcome == damage_fuzz.REFUSED}
    assert refused >= {"manifest", "predictions", "shard", "workdir"}  # most of a checkpoint's files are never read
