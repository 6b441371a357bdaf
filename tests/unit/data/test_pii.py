"""PII: what each recogniser finds and leaves, and that a value has one surrogate in the whole corpus."""

import json

import pyarrow as pa
import pytest

from ftray.core.errors import ConfigError
from ftray.core.spec import parse
from ftray.data.rows import Row, Span, parse_row, span_kinds, span_texts, to_table
from ftray.data.transform.pii import RECOGNISERS, Pii


def table(*texts: str) -> pa.Table:
    return to_table((i, i, Row("text", (Span("text", text, True),))) for i, text in enumerate(texts))


def tagged(text: str) -> str:
    rows, filtered, _ = Pii(action="tag")(table(text))
    assert not filtered
    return str(span_texts(rows).to_pylist()[0])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("write to Ann.Lee+x@mail.test.org, now", "write to <EMAIL>, now"),
        ("<a@b.co>;c@d.net.", "<<EMAIL>>;<EMAIL>."),
        ("no@where and @handle and a@b", "no@where and @handle and a@b"),
        ("host 8.8.4.4:80 or 300.1.1.1 or 127.0.0.1", "host <IPV4>:80 or 300.1.1.1 or 127.0.0.1"),
        ("version 1.2.3.4.5 and v1.2.3.4", "version 1.2.3.4.5 and v1.2.3.4"),
        ("at 2a00:1450:4001:81b::200e today", "at <IPV6> today"),
        ("at 12:30:45 std::vector a::b ::1", "at 12:30:45 std::vector a::b ::1"),
        ("card 4111 1111 1111 1111.", "card <CARD>."),
        ("card 4111-1111-1111-1112", "card 4111-1111-1111-1112"),
        ("amex 378282246310005", "amex <CARD>"),
        ("zeros 0000 0000 0000 0000", "zeros 0000 0000 0000 0000"),
        ("call +44 20 7946 0958 or (030) 1234-5678", "call <PHONE> or <PHONE>"),
        ("call 415-555-2671 on 2024-01-31", "call <PHONE> on 2024-01-31"),
        (
            "10000 200 and 3.14159265358979 and id 123456789",
            "10000 200 and 3.14159265358979 and id 123456789",
        ),
        ("pay DE89 3704 0044 0532 0130 00 please", "pay <IBAN> please"),
        ("pay GB82WEST12345698765432", "pay <IBAN>"),
        ("pay DE88 3704 0044 0532 0130 00", "pay DE88 3704 0044 0532 0130 00"),
        ("key=sk-proj-" + "a1B2" * 8, "key=<API_KEY>"),
        ("AKIAIOSFODNN7EXAMPLE ghp_" + "x" * 36, "<API_KEY> <API_KEY>"),
        ("sk-learn and hf_token and ghp_short", "sk-learn and hf_token and ghp_short"),
    ],
)
def test_what_is_found_and_what_is_left(text: str, expected: str) -> None:
    assert tagged(text) == expected


def test_a_value_has_one_surrogate_and_surrogates_are_not_found_again() -> None:
    first = table("a@b.org 8.8.4.4 +44 20 7946 0958", "x@y.org 2a00:1450::200e 4111111111111111")
    second = table("A@B.org said 4111 1111 1111 1111", f"DE89370400440532013000 ghp_{'x' * 36} +442079460958")
    one, _, counts = Pii()(first)
    two, _, _ = Pii()(second)
    assert counts == {"email": 2, "ipv4": 1, "phone": 1, "ipv6": 1, "card": 1}
    email, ipv4, phone = span_texts(one).to_pylist()[0].split(" ", 2)
    other, _, card = span_texts(one).to_pylist()[1].split(" ", 2)
    assert email != other and email.endswith("@example.com") and ipv4.startswith("198.1")
    assert span_texts(two).to_pylist()[0] == f"{email} said {card}"
    assert span_texts(two).to_pylist()[1].endswith(phone)
    for rows in (one, two):
        again, _, none = Pii()(rows)
        assert again.equals(rows) and not +none
    assert not Pii(salt="other")(first).rows.equals(one)


def test_rows_can_be_dropped_and_recognisers_chosen() -> None:
    rows = table("a@b.org a@c.org", "8.8.4.4", "nothing")
    kept, filtered, found = Pii(action="drop", recognisers=["email"])(rows)
    assert span_texts(kept).to_pylist() == ["8.8.4.4", "nothing"]
    assert filtered == {"found": 1} and found == {"email": 2}
    with pytest.raises(ConfigError, match="stands twice"):
        parse(Pii, {"recognisers": ["email", "email"]})
    with pytest.raises(ConfigError, match="recognisers"):
        parse(Pii, {"recognisers": ["name"]})


def test_surrogates_are_never_values() -> None:
    for kind, recogniser in RECOGNISERS.items():
        for digest in (0, 1, 2**63 + 12345, 2**64 - 1):
            surrogate = recogniser.surrogate(digest)
            assert tagged(f"see {surrogate} there") == f"see {surrogate} there", kind


def test_tools_and_calls_are_mended_as_json() -> None:
    """In their strings and numbers, whatever JSON writes around them, and they stay JSON."""
    call = {
        "name": "pay",
        "arguments": {"card": 4111111111111111, "to": "a\n4111 1111 1111 1111", "n": [1, "x@y.org"]},
    }
    value = {
        "tools": [{"name": "pay", "description": 'ask "ann@mail.org"'}],
        "messages": [
            {"role": "user", "content": "pay"},
            {"role": "assistant", "tool_calls": [{"function": call}]},
        ],
    }
    rows, _, found = Pii(action="tag")(to_table([(0, 0, parse_row(value))]))
    assert found == {"card": 2, "email": 2}
    texts = dict(zip(span_kinds(rows).to_pylist(), span_texts(rows).to_pylist(), strict=True))
    assert json.loads(texts["tools"])[0]["function"]["description"] == 'ask "<EMAIL>"'
    arguments = json.loads(texts["tool_calls"])[0]["function"]["arguments"]
    assert arguments == {"card": "<CARD>", "to": "a\n<CARD>", "n": [1, "<EMAIL>"]}
    dropped, filtered, _ = Pii(action="drop")(to_table([(0, 0, parse_row(value))]))
    assert dropped.num_rows == 0 and filtered == {"found": 1}
    untouched, _, none = Pii()(to_table([(0, 0, parse_row({**value, "tools": [], "messages": CLEAN}))]))
    assert none == {} and json.loads(span_texts(untouched).to_pylist()[-1])[0]["function"]["name"] == "odd"


CLEAN = [
    {"role": "user", "content": "is 7 odd?"},
    {"role": "assistant", "tool_calls": [{"function": {"name": "odd", "arguments": {"x": 7}}}]},
]
