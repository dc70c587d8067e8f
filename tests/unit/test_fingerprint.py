"""The canonical hash: what must agree agrees, what must differ differs."""

import itertools

import numpy as np
import pytest

from handheld.export.formats.fingerprint import Fact, Fingerprint


def digest(*facts: Fact) -> str:
    fingerprint = Fingerprint()
    fingerprint.feed(*facts)
    return fingerprint.hexdigest()


def test_unlike_facts_never_agree() -> None:
    facts: list[tuple[Fact, ...]] = [
        (1,), (True,), (1.0,), ("1",), (b"1",), (None,), ("None",), (), ([],), ([1],), ([1], 2), ([1, 2],), (1, 2),
        ("ab", "c"), ("a", "bc"), ({"a": 1},), (["a", 1],), ({"a": [1]},), (-0.0,), (0.0,), ({},),
    ]  # fmt: skip
    for a, b in itertools.combinations(facts, 2):
        assert digest(*a) != digest(*b), (a, b)


def test_order_of_keys_and_kind_of_sequence_do_not_matter() -> None:
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})


def test_a_buffer_is_its_bytes() -> None:
    weights = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert digest(weights.data) == digest(weights.tobytes())
    assert digest(weights.data) != digest((weights + np.float32(1e-6)).data)


def test_values_are_numbered_by_first_use() -> None:
    fingerprint = Fingerprint()
    assert not fingerprint.seen("y")
    assert [fingerprint.number(v) for v in ("y", "x", "y", ("x", 1))] == [0, 1, 0, 2]
    assert fingerprint.seen("y")


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(TypeError, match="cannot fingerprint a set"):
        digest({1, 2})  # type: ignore[arg-type]
