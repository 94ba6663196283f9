"""Lists of addresses are read, or refused in one line that keeps their password."""

from __future__ import annotations

import pytest
from damage import attempt, examples
from hypothesis import given
from hypothesis import strategies as st

from dgm.common.errors import UserError
from shards.remote import _MAX_TARS, _expand


@examples(200)
@given(rest=st.text("{}.,:;0123456789ab/\\$'\"é \n-", max_size=40))
def test_lists_of_addresses_are_read_or_refused(rest: str) -> None:
    found = attempt(lambda: _expand(f"https://host/{rest}"))
    assert found is None or 1 <= len(found) <= _MAX_TARS


@pytest.mark.parametrize(
    "spec",
    [
        "https://h/{0..999999999}.tar",
        "https://h/{0..99999999999999999999999}.tar",
        "https://h/" + "{0..9}" * 30,
        "https://h/" + "{a,b}" * 60,
        "https://h/" + "{a,{b,c}}" * 60,
        "https://h/{000..004.tar",
        "https://h/a\n.tar",
    ],
)
def test_addresses_without_end_are_refused_without_the_password(spec: str) -> None:
    with pytest.raises(UserError) as caught:
        _expand(spec.replace("//h", "//me:secret@h"))
    assert "\n" not in str(caught.value) and "secret" not in str(caught.value)
