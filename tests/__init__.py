"""Tests."""

import os
import tempfile

# What a gateway under test learns stays out of the state of whoever runs the tests.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="cachewise-tests-")
