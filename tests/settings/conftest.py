"""What the tests of settings share."""

import psutil
import pytest


@pytest.fixture(autouse=True)
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """`env.num_processes: null` means the machine's cores; here always two."""
    monkeypatch.setattr(psutil, "cpu_count", lambda *args, **kwargs: 2)
