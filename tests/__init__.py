"""Tests."""

import os
import tempfile

# What a gateway under test learns stays out of the state of whoever runs the tests.
_STATE = tempfile.TemporaryDirectory(prefix="cachewise-tests-", ignore_cleanup_errors=True)
os.environ["XDG_STATE_HOME"] = _STATE.name
