"""Personal data and secrets found by patterns and checksums, replaced by surrogates.

A value has the same surrogate wherever it stands in the corpus (but for the few of equal digests), so who wrote
to whom stays readable. Surrogates come from a digest of the value and the `salt`, which is no secret: someone who
guesses a value can confirm the guess. They lie in ranges that are nobody's (RFC 2606, 2544, 3849), and none is
found again. Patterns miss what they do not know: names, addresses, unusual spellings.
"""

import functools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from pydantic import Field

from ftray.core.errors import ConfigError
from ftray.core.spec import spec
from ftray.data.rows import per_row, span_kinds, span_texts, with_span_texts
from ftray.data.spans import TOOLS
from ftray.data.transform.base import Applied

Kind = Literal["email", "api_key", "iban", "card", "ipv6", "ipv4", "phone"]


@dataclass(frozen=True)
class Recogniser:
    """How one kind of value is found and what stands for it."""

    hint: str
    """What a text needs to be looked at (RE2)."""
    pattern: re.Pattern[str]
    """What the value looks like."""
    normal: Callable[[str], str]
    """Spelling by which two values are the same; empty: not such a value after all."""
    surrogate: Callable[[int], str]
    """What stands for a value with a 64-bit digest."""


def _luhn(text: str) -> str:
    """Digits of a card number, or nothing if its check digit is wrong (ISO/IEC 7812)."""
    digits = re.sub(r"\D", "", text)
    doubled = [int(d) * (1 + place % 2) for place, d in enumerate(reversed(digits))]
    right = 13 <= len(digits) <= 19 and sum(d // 10 + d % 10 for d in doubled) % 10 == 0
    return digits if right and len(set(digits)) > 1 and not digits.startswith("0") else ""


def _iban(text: str) -> str:
    """An account number without spaces, or nothing if its check digits are wrong (ISO 13616)."""
    plain = re.sub(r"\s", "", text).upper()
    if not 15 <= len(plain) <= 34:
        return ""
    number = int("".join(str(int(char, 36)) for char in plain[4:] + plain[:4]))
    return plain if number % 97 == 1 else ""


def _ipv4(text: str) -> str:
    parts = [int(part) for part in text.split(".")]
    reserved = parts[0] in (0, 127) or parts[:2] in ([198, 18], [198, 19]) or parts == [255] * 4
    return "" if reserved or max(parts) > 255 else ".".join(map(str, parts))


def _ipv6(text: str) -> str:
    from ipaddress import AddressValueError, IPv6Address

    try:
        address = IPv6Address(text)
    except AddressValueError:
        return ""
    documented = address.exploded.startswith("2001:0db8")
    return "" if documented or address.is_loopback or address.is_unspecified else address.compressed


def _phone(text: str) -> str:
    digits = re.sub(r"\D", "", text)
    return "" if not 8 <= len(digits) <= 15 or digits.startswith("999") else digits


def _email(text: str) -> str:
    lower = text.lower()
    return "" if lower.endswith("@example.com") else lower


def _ip6_of(digest: int) -> str:
    words = f"{digest:016x}"
    return "2001:db8::" + ":".join(words[i : i + 4] for i in range(0, 16, 4))


# A run of digits and separators that is not part of a longer number or word.
_ALONE, _END = r"(?<![\w.+-])", r"(?![\w-]|\.\d)"
_KEY = (
    r"sk-(?:ant-|proj-)?[A-Za-z0-9_-]{20,}|(?:ghp|gho|ghu|ghs|ghr)_[A-Za-z0-9]{36}|github_pat_\w{22,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[A-Za-z0-9_-]{35}|xox[abprs]-[A-Za-z0-9-]{10,}|hf_[A-Za-z0-9]{30,}"
    r"|glpat-[A-Za-z0-9_-]{20}|(?:sk|rk)_live_[A-Za-z0-9]{20,}"
)
_KEY_HINT = r"sk-|gh[pousr]_|github_pat_|AKIA|ASIA|AIza|xox[abprs]-|hf_|glpat-|k_live_"

RECOGNISERS: dict[Kind, Recogniser] = {
    "email": Recogniser(
        r"\w@\w",
        re.compile(r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[a-zA-Z0-9-]{1,63}\.)+[a-zA-Z]{2,24}(?![\w-])"),
        _email,
        lambda digest: f"user-{digest & 0xFFFFFFFFFF:010x}@example.com",
    ),
    "api_key": Recogniser(
        _KEY_HINT,
        re.compile(rf"(?<![A-Za-z0-9_-])(?:{_KEY})(?![A-Za-z0-9_-])"),
        str,
        lambda digest: f"KEY-{digest:016X}",
    ),
    "iban": Recogniser(
        r"[A-Z]{2}\d\d ?[A-Z0-9]{4}",
        re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)"),
        _iban,
        lambda digest: f"ZZ00 X{digest:016X}",
    ),
    "card": Recogniser(
        r"\d{4}[ -]?\d{4,6}[ -]?\d{3}",
        re.compile(rf"{_ALONE}\d(?:[ -]?\d){{12,18}}{_END}"),
        _luhn,
        lambda digest: f"0000 0000 {digest % 10**8:08d}"[:14] + f" {digest % 10**4:04d}",
    ),
    "ipv6": Recogniser(
        r"[0-9a-fA-F]{1,4}::?[0-9a-fA-F]{0,4}:",
        re.compile(r"(?<![\w:.])(?:[0-9a-fA-F]{1,4}(?:::?)){2,7}[0-9a-fA-F]{1,4}(?![\w:])"),
        _ipv6,
        _ip6_of,
    ),
    "ipv4": Recogniser(
        r"\d\.\d{1,3}\.\d",
        re.compile(rf"{_ALONE}\d{{1,3}}(?:\.\d{{1,3}}){{3}}{_END}"),
        _ipv4,
        lambda digest: f"198.{18 + digest % 2}.{digest // 2 % 256}.{digest // 512 % 256}",
    ),
    "phone": Recogniser(
        r"\+\d|\d[ .()-]+\d",
        re.compile(
            rf"{_ALONE}(?:\+\d{{1,3}}[ .-]?(?:\(\d{{1,4}}\)[ .-]?)?\d{{1,4}}(?:[ .-]?\d{{2,4}}){{1,4}}"
            rf"|\(\d{{2,5}}\)[ .-]?\d{{3,4}}[ .-]?\d{{3,4}}|\d{{3}}[ .-]\d{{3}}[ .-]\d{{4}}){_END}"
        ),
        _phone,
        lambda digest: f"+999 {digest % 10**9:09d}",
    ),
}


@spec
class Pii:
    """Replace personal data and secrets in every span; counts values by recogniser."""

    recognisers: list[Kind] = Field(default_factory=lambda: list(RECOGNISERS))
    """Which kinds are looked for, in order."""
    action: Literal["surrogate", "tag", "drop"] = "surrogate"
    """Put a surrogate, put the kind's name as `<EMAIL>`, or filter the row out."""
    salt: str = "ftray"
    """Decides the surrogates; not a secret. The same in a whole corpus."""

    def __post_init__(self) -> None:
        if len(set(self.recognisers)) != len(self.recognisers):
            raise ConfigError(f"recognisers: one of {self.recognisers} stands twice; name each once")

    def __call__(self, rows: pa.Table) -> Applied:
        texts = span_texts(rows)
        found: Counter[str] = Counter()
        hit = np.zeros(len(texts), np.bool_)
        is_json = np.asarray(pc.is_in(span_kinds(rows), pa.array([TOOLS, "tool_calls"])), np.bool_)
        places = np.flatnonzero(is_json)
        objects = texts.take(pa.array(places)).to_pylist()
        for kind in self.recognisers:
            texts = self._replace(texts, kind, found, hit, ~is_json)
        if len(places):
            mended = [
                self._in_json(text, found, hit, place)
                for place, text in zip(places.tolist(), objects, strict=True)
            ]
            texts = pc.replace_with_mask(texts, pa.array(is_json), pa.array(mended, pa.string()))
        if self.action != "drop":
            return Applied(with_span_texts(rows, texts), Counter(), found)
        dropped = per_row(rows, hit) > 0
        return Applied(rows.filter(pa.array(~dropped)), Counter(found=int(dropped.sum())), found)

    def _in_json(self, text: str, found: Counter[str], hit: np.ndarray, place: int) -> str:
        """Tools or calls with the values replaced in their strings, so that they stay what they are.

        A number that is such a value (a card's) becomes the surrogate's text.
        """
        before = found.total()

        def mend(value: Any) -> Any:
            if isinstance(value, dict):
                return {self._in_text(key, found): mend(item) for key, item in value.items()}
            if isinstance(value, list):
                return [mend(item) for item in value]
            if isinstance(value, str):
                return self._in_text(value, found)
            if isinstance(value, int) and not isinstance(value, bool):
                text = str(value)
                mended = self._in_text(text, found)
                return value if mended == text else mended
            return value

        try:
            mended = mend(json.loads(text))
        except ValueError:
            return text  # an earlier transform broke it, which is told when the row is rendered
        if found.total() == before:
            return text
        hit[place] = True
        return json.dumps(mended, ensure_ascii=False)

    def _in_text(self, text: str, found: Counter[str]) -> str:
        for kind in self.recognisers:
            text = RECOGNISERS[kind].pattern.sub(functools.partial(self._put, kind, found), text)
        return text

    def _put(self, kind: Kind, found: Counter[str], match: re.Match[str]) -> str:
        """What stands for a match, which stays if it is no such value after all."""
        recogniser = RECOGNISERS[kind]
        value = recogniser.normal(match[0])
        if not value:
            return match[0]
        found[kind] += 1
        if self.action == "tag":
            return f"<{kind.upper()}>"
        digest = xxhash.xxh3_64_intdigest(f"{self.salt}\0{kind}\0{value}".encode())
        return recogniser.surrogate(digest)

    def _replace(
        self, texts: pa.StringArray, kind: Kind, found: Counter[str], hit: np.ndarray, looked_at: np.ndarray
    ) -> pa.StringArray:
        """Texts with the values of one kind replaced; the few texts that may hold one go through Python."""
        recogniser = RECOGNISERS[kind]
        may = np.asarray(pc.match_substring_regex(texts, recogniser.hint), np.bool_)
        places = np.flatnonzero(may & looked_at)
        if not len(places):
            return texts
        put = functools.partial(self._put, kind, found)

        changed = []
        for place, text in zip(places, texts.take(pa.array(places)).to_pylist(), strict=True):
            before = found[kind]
            changed.append(recogniser.pattern.sub(put, text))
            hit[place] |= found[kind] > before
        mask = np.zeros(len(texts), np.bool_)
        mask[places] = True
        return pc.replace_with_mask(texts, pa.array(mask), pa.array(changed, pa.string()))
