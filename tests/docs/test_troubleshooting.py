"""Messages that docs/troubleshooting.md explains are messages of the code."""

import ast
import re
from functools import cache

import pytest
from pages import ROOT, prose

PAGE = ROOT / "docs" / "troubleshooting.md"
OTHERS = ("(git)", "(Ray)", "(torch)")
"""Behind what another program says."""
NOT_OURS = ("cannot cache function", "No space left on device")
"""numba and the system, in rows that say so in other words."""


VALUES = re.compile(r"\.\.\.|\[\d+\]|\b\d[\d.,e-]*")
"""What differs from case to case, in a symptom."""


@cache
def messages() -> str:
    """The texts of the package, between their values, one a line."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "vlarl_rllib").rglob("*.py")]
    texts = [node.value for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Constant)]
    return "\n".join(" ".join(text.split()) for text in texts if isinstance(text, str))


def is_ours(symptom: str) -> bool:
    """Whether its longest part without a value stands in one text of the package."""
    longest = max((" ".join(piece.split()).strip(" ,;:(") for piece in VALUES.split(symptom)), key=len)
    return len(longest) >= 8 and longest in messages()


def symptoms() -> list[str]:
    text = prose(PAGE).split("## How long a fault takes")[0]
    cells = re.findall(r"^\|([^|]*)\|", text, re.MULTILINE)
    return [
        symptom
        for cell in cells
        if not any(word in cell for word in OTHERS)
        for symptom in re.findall(r"`([^`]*)`", cell)
        if " " in symptom and not symptom.startswith(NOT_OURS)
    ]


@pytest.mark.parametrize("symptom", symptoms())
def test_the_code_says_so(symptom: str) -> None:
    assert is_ours(symptom)


def test_another_message_would_be_noticed() -> None:
    assert len(symptoms()) > 30
    assert not is_ours("the run stumbled: ...") and not is_ours("learner rank(s) [1] were not heard of for ...")
