import copy
import pickle

import pytest

from privfm.checks import Corrupt, InvalidArgument
from privfm.contracts import KEY_HOLDER, SERVER, Identity, Party
from privfm.defenses.channels.identities import derived, new_identity, pair_key, public_identity, sign, verify

IDENTITIES = {number: new_identity() for number in (1, 2, KEY_HOLDER, SERVER)}


def party(number, now=0):
    return Party(number, now, IDENTITIES[number], lambda other: public_identity(IDENTITIES[other]))


def test_two_parties_derive_the_same_key_for_one_direction():
    sent, received = pair_key(party(1), SERVER, b"x", sending=True), pair_key(party(SERVER), 1, b"x", sending=False)
    assert sent == received
    assert len(sent) == 32


def test_keys_differ_by_direction_round_purpose_and_party():
    keys = [
        pair_key(party(1), SERVER, b"x", sending=True),
        pair_key(party(1), SERVER, b"x", sending=False),
        pair_key(party(1), SERVER, b"y", sending=True),
        pair_key(party(1, 1), SERVER, b"x", sending=True),
        pair_key(party(1), KEY_HOLDER, b"x", sending=True),
        pair_key(party(2), SERVER, b"x", sending=True),
    ]
    assert len(set(keys)) == len(keys)


def test_a_third_party_derives_another_key():
    """It knows both public keys and its own secret."""
    outsider = Party(1, 0, IDENTITIES[2], party(1).pinned)
    assert pair_key(outsider, SERVER, b"x", sending=True) != pair_key(party(1), SERVER, b"x", sending=True)


def test_hkdf_separates_its_arguments():
    """Lengths stand before each part, so that moving a byte from one to the next changes the key."""
    assert derived(b"s", b"ab", b"c") != derived(b"s", b"a", b"bc")


def test_hkdf_is_that_of_the_rfc():
    # RFC 5869, appendix A.3 (zero-length salt and info), extracted and expanded by hand with HMAC
    import hmac

    secret = bytes.fromhex("0b" * 22)
    pseudo_random = hmac.digest(bytes(32), secret, "sha256")
    assert pseudo_random.hex() == "19ef24a32c717b167f33a91d6f648bdf96596776afdb6377ac434c1c293ccb04"
    info = b"\0" * 7 + b"\x06privfm" + b"\0" * 7 + b"\x01p"
    assert derived(secret, b"p") == hmac.digest(pseudo_random, info + b"\x01", "sha256")


def test_a_signature_verifies_only_what_was_signed_by_whom():
    public, signature = public_identity(IDENTITIES[1]), sign(party(1), b"content")
    verify(public, b"content", signature)
    for wrong in [(public, b"other", signature), (public, b"content", bytes(64)), (public, b"content", b"")]:
        with pytest.raises(Corrupt):
            verify(*wrong)
    with pytest.raises(Corrupt):
        verify(public_identity(IDENTITIES[2]), b"content", signature)


def test_public_identities_are_of_the_secret_alone_and_differ():
    assert public_identity(Identity(bytes(32))) == public_identity(Identity(bytes(32)))
    assert len({public_identity(new_identity()) for _ in range(20)}) == 20


def test_a_pinned_identity_of_another_size_is_refused():
    with pytest.raises(InvalidArgument, match=r"pinned\(5\) has 3 bytes"):
        pair_key(Party(1, 0, IDENTITIES[1], lambda other: b"abc"), 5, b"x", sending=True)


def test_a_secret_shows_nowhere():
    identity = Identity(b"thirty-two bytes that are secret")
    own = Party(1, 0, identity, lambda other: b"")
    for shown in (repr(identity), str(own), f"{own!r}"):
        assert "secret" not in shown.replace("secret=", "")
    for dump in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not pickled"):
            dump(own if dump is not copy.copy else identity)


def test_a_pinned_identity_that_is_no_key_is_named():
    """A point of small order would agree on one and the same secret with everybody."""
    low = Party(1, 0, IDENTITIES[1], lambda other: public_identity(IDENTITIES[2])[:32] + bytes(32))
    with pytest.raises(InvalidArgument, match=r"pinned\(2\)"):
        pair_key(low, 2, b"x", sending=True)
