"""The real data and model beside the project; tests that read them say so when the folder is absent."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).parents[2] / "shared"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the real data is not there: {SHARED}")
