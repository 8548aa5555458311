"""Launch scripts in forks of one process."""

import pytest

from tests.launch.launcher import ForkServer


@pytest.fixture(scope="session")
def forked(tmp_path_factory):
    """Run a stage in one process: `forked("eval", "--model", ..., cwd=...)`."""
    server = ForkServer(tmp_path_factory.mktemp("forked"))
    yield server
    server.close()
