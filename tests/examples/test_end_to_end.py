"""The chain from a dense encoder to a merged packed one: the committed figures pass its checks, others don't."""

import json
from pathlib import Path

import pytest


EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "restore"


def test_the_real_encoder_changed_nowhere_where_it_must_not(scripts):
    results = EXAMPLE.parent / "packed_base" / "results" / "end-to-end.json"
    stages = json.loads(results.read_text())["stages"]
    check = scripts("end_to_end").check
    check(stages)
    packed = next(stage for stage in stages if stage["stage"] == "packed")
    packed["difference"] = 1e-6
    with pytest.raises(ValueError, match=r"packed: embeddings differ by 1\.0e-06, more than 0\.0e\+00"):
        check(stages)
