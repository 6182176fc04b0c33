"""Config files as people write them: what is refused, with its line, and that nothing of it takes memory or a
traceback."""

from pathlib import Path

import pytest

from vlarl_rllib.errors import SettingsError
from vlarl_rllib.settings.yaml_text import MAX_BYTES, MAX_DEPTH, parse_yaml, read_yaml

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED: dict[str, tuple[str, str]] = {
    "a section twice": (
        "run: {seed: 1}\nenv: {}\nrun: {iterations: 2}\n",
        "line 3: run stands here twice, first in line 1; keep one",
    ),
    "a key twice": ("run:\n  seed: 1\n  seed: 2\n", "line 3: seed stands here twice, first in line 2; keep one"),
    "a key twice in one line": ("{seed: 1, seed: 1}", "seed stands here twice, both in this line; keep one"),
    "a key twice in a list": ("- {a: 1}\n- {b: 1,\n   b: 2}\n", "line 3: b stands here twice, first in line 2"),
    "a key twice, quoted": ("a: 1\n'a': 2\n", "line 2: a stands here twice, first in line 1"),
    "an alias bomb": (BOMB, "line 2: *a repeats another value, which is not supported; write it out"),
    "a merge": ("base: &base {seed: 1}\nrun:\n  <<: *base\n", "line 3: *base repeats another value"),
    "a merge without an alias": ("run:\n  <<: {seed: 1}\n", "line 2: << is no name of a key"),
    "a value of itself": ("a: &a [*a]", "*a repeats another value"),
    "5,000 brackets": ("[" * 5000 + "]" * 5000, f"more than {MAX_DEPTH} lists or sections in each other"),
    "5,000 sections": ("{a: " * 5000 + "}" * 5000, f"more than {MAX_DEPTH} lists or sections in each other"),
    "a tag of Python": (
        "a: !!python/object/apply:os.system [ls]",
        "could not determine a constructor for the tag 'tag:yaml.org,2002:python",
    ),
    "a tag of its own": ("a: !include other.yaml", "could not determine a constructor for the tag '!include'"),
    "a number for a key": ("1: 2", "1 is no name of a key; keys are words"),
    "a truth for a key": ("on: 2", "on is no name of a key"),
    "a list for a key": ("? [a]\n: 1\n", "a list or section is no name of a key"),
    "a tab": ("run:\n\tseed: 1\n", "line 2: found character '\\t' that cannot start any token; indent with spaces"),
    "two documents": ("a: 1\n---\nb: 2\n", "line 2: but found another document"),
    "no day": ("a: 2025-13-45", "'2025-13-45' is no timestamp; put text into quotes"),
    "no number": ("a: !!int many", "'many' is no int"),
    "no truth": ("a: !!bool maybe", "'maybe' is no bool"),
    "an empty number": ("a: !!int ''", "'' is no int"),
    "a long number": ("a: " + "9" * 5000, "a number of 5000 digits"),
    "a bell": ("a: \a", "special characters are not allowed"),
    "an open bracket": ("a: [1\nb: {}\n", "line 2: expected ',' or ']', but got ':'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str, tmp_path: Path) -> None:
    text, message = REFUSED[case]
    file = tmp_path / "config.yaml"
    file.write_text(text)
    for read, where in ((lambda: read_yaml(file), str(file)), (lambda: parse_yaml(text, "--set a"), "--set a")):
        with pytest.raises(SettingsError) as caught:
            read()
        assert str(caught.value).startswith(f"{where}: not valid YAML (")
        assert message in str(caught.value)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_what_is_read() -> None:
    text = "a: {b: [1, 2.5, yes, null, text], a: {b: 1}}  # a key may stand in several sections\nc: 1e-5\n"
    assert parse_yaml(text, "") == {"a": {"b": [1, 2.5, True, None, "text"], "a": {"b": 1}}, "c": "1e-5"}
    assert parse_yaml("", "") is None
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH, "") is not None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a" * (MAX_BYTES + 1), "more than 1,000,000 bytes"),
        (b"a: \xff\xfe", "byte 3 is no UTF-8 text"),
        (b"\x89PNG\r\n\x1a\n", "is no UTF-8 text"),
    ],
    ids=["huge", "latin", "picture"],
)
def test_files_that_are_no_text(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError) as caught:
        read_yaml(file)
    assert str(caught.value).startswith(f"{file}: ") and message in str(caught.value)


def test_a_directory_and_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="is a directory; give the path of a YAML file in it"):
        read_yaml(tmp_path)
    with pytest.raises(SettingsError, match=r"cannot be read \(File name too long\)"):
        read_yaml(tmp_path / ("x" * 300))
    file = tmp_path / "config.yaml"
    file.write_text("a: 1")

    def refuse(*arguments: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)  # the tests may run as root, who may read everything
    with pytest.raises(SettingsError, match=r"cannot be read \(Permission denied\)"):
        read_yaml(file)
