"""`name,key=value,…`: what people type after a flag."""

import pytest

from parsim.errors import ParsimError
from parsim.settings_text import Settings, choice, parse_settings

KNOWN = {"rank": int, "slow": float, "mode": choice("sync", "async")}


def test_values_are_read_by_key() -> None:
    settings = parse_settings(" rank=7 ,slow=1.5,mode=async", KNOWN, where="--straggler")
    assert settings == Settings("", {"rank": 7, "slow": 1.5, "mode": "async"})
    assert parse_settings("torus", {}, where="--fabric", named=True) == Settings("torus", {})
    assert parse_settings("", KNOWN, where="--straggler") == Settings("", {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("rnk=7", "did you mean 'rank'?"),
        ("rank", "key=value"),
        ("rank=", "key=value"),
        ("rank=7,rank=8", "given twice"),
        ("rank=seven", "a whole number"),
        ("slow=x", "a number"),
        ("mode=asinc", "did you mean 'async'?"),
    ],
)
def test_what_cannot_be_read_is_said(text: str, words: str) -> None:
    with pytest.raises(ParsimError) as caught:
        parse_settings(text, KNOWN, where="--straggler")
    assert words in str(caught.value)
    assert "--straggler" in str(caught.value)


@pytest.mark.parametrize("text", ["", "rank=7", " , "])
def test_a_name_in_front_where_one_is_needed(text: str) -> None:
    with pytest.raises(ParsimError, match="starts with a name"):
        parse_settings(text, KNOWN, where="--fabric", named=True)
