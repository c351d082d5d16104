"""What the tests of ResNeSt share: a fifth network, which is small."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="module")
def small_network():
    """While a module's tests run, `resnest14` is one of the networks."""
    from resnest14 import added

    with pytest.MonkeyPatch.context() as patch:
        for table, entry in added():
            patch.setitem(table, "resnest14", entry)
        yield
