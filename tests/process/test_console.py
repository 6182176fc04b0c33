"""What a command says while something takes long."""

import time

import pytest

from vlarl_rllib.process import console
from vlarl_rllib.process.console import saying_so


def test_what_is_waited_for_is_said_again_and_again_also_over_several_stages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "SAY_SECONDS", 2.0)
    monkeypatch.setattr(console.Word, "last", time.monotonic())
    with saying_so("libraries"):
        time.sleep(0.8)
    with saying_so("Ray"):
        time.sleep(0.6)
    assert capsys.readouterr().err == ""
    with saying_so("the trial"):
        time.sleep(1.8)
    assert capsys.readouterr().err == "waiting for the trial ... 1 s\n", "2 s behind the first stage's begin"
