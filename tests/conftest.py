"""Settings for all tests."""

from __future__ import annotations

from hypothesis import settings

# A busy machine is no reason to fail; pytest-timeout ends what hangs.
settings.register_profile("dlion", deadline=None)
settings.load_profile("dlion")
