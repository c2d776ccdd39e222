"""Identities of a simulation: one secret, a party's number, and nothing kept of who took part."""

from __future__ import annotations

import copy
import hashlib
import hmac
import pickle
import tracemalloc
from struct import pack

import pytest

from privfm.contracts import KEY_HOLDER, SERVER
from privfm.defenses.channels.identities import public_identity
from privfm.engines.local import Local, Roster

PARTIES = (SERVER, KEY_HOLDER, 0, 1, 2, 2**31 - 1, 2**40)


def by_hand(secret: bytes, party: int) -> bytes:
    """RFC 5869 with SHA-256, no salt, one block of output: extract, then expand over lengths and parts."""
    parts = (b"privfm", b"roster/identity", pack(">q", party))
    info = b"".join(pack(">Q", len(part)) + part for part in parts)
    key = hmac.new(bytes(32), secret, hashlib.sha256).digest()
    return hmac.new(key, info + b"\x01", hashlib.sha256).digest()


def test_identities_are_those_of_the_derivation_by_hand() -> None:
    roster = Roster()
    assert [roster.identity(party).secret for party in PARTIES] == [by_hand(roster._root.secret, n) for n in PARTIES]


def test_a_party_is_the_same_in_any_order_and_another_in_another_run() -> None:
    roster, other = Roster(), Roster()
    forward = {party: roster.identity(party).secret for party in PARTIES}
    assert {party: roster.identity(party).secret for party in reversed(PARTIES)} == forward
    assert len(set(forward.values())) == len(PARTIES), "nobody has another's"
    assert not set(forward.values()) & {other.identity(party).secret for party in PARTIES}, "fresh for each run"
    assert roster._root.secret not in forward.values(), "the secret itself is nobody's"
    assert all(roster.public(party) == public_identity(roster.identity(party)) for party in PARTIES)


def test_nothing_is_kept_of_who_took_part() -> None:
    """An Identity and its place in a dictionary took 265 bytes: 5.3 MB here."""
    roster = Roster()
    roster.identity(0)  # loads what is loaded once
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for party in range(20_000):
            roster.identity(party)
        after = tracemalloc.get_traced_memory()[0]
        kept = {party: roster.identity(party) for party in range(1000)}
        control = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert control - after > 100 * len(kept), "what is kept would be seen"


@pytest.mark.parametrize("dump", [pickle.dumps, copy.deepcopy], ids=["pickle", "deep copy"])
@pytest.mark.parametrize("used", [False, True], ids=["fresh", "used"])
def test_a_roster_is_never_pickled_or_copied(dump, used) -> None:
    engine = Local()
    if used:
        engine.party(3, 0)
    for holder in (engine, engine.roster):
        with pytest.raises(TypeError, match="not pickled"):
            dump(holder)
