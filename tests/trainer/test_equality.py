"""The same step on every mesh: losses, gradients, tokens, metrics and weights."""

from pathlib import Path

import pytest

from tests.helpers.equality import LAYOUTS, MEASURES, equality_config, measured, table


@pytest.mark.slow
def test_devices_and_processes_change_nothing_but_rounding(tmp_path: Path):
    config = equality_config(tmp_path)
    found = {name: measured(tmp_path, config, name) for name in LAYOUTS}
    print("\n".join(table(found)))
    first, *others = found
    for other in others:
        for name, measure in MEASURES.items():
            most = 0 if name.startswith("sampled tokens") else 1e-4
            assert measure(found[other], found[first]) <= most, (other, name)
