"""Settings of every test."""

from __future__ import annotations

from hypothesis import settings

# how long one example takes says how busy the machine is, nothing of the code
settings.register_profile("graft", deadline=None)
settings.load_profile("graft")
