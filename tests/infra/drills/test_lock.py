"""Only one drill at a time, and none for ever."""

from pathlib import Path

import pytest

from infra.drills.lock import only_drill
from infra.drills.scene import DrillError


def test_a_second_drill_is_refused_until_the_first_is_over(tmp_path: Path) -> None:
    with only_drill(tmp_path), pytest.raises(DrillError, match="another drill"), only_drill(tmp_path):
        pass
    with only_drill(tmp_path):
        pass


def test_without_a_stack_the_remedy_is_named(tmp_path: Path) -> None:
    with pytest.raises(DrillError, match="make up"), only_drill(tmp_path / "none"):
        pass
