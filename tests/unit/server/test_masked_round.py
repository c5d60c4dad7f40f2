"""A round under masks, both sides of it: sums, dropouts, and what is refused."""

import dataclasses
import hashlib
import hmac
import struct
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ContractError, MaskError
from pfm_llm.client.masked_client import MaskedClient
from pfm_llm.protocol.masks.messages import Advertisement, MaskedUpdate
from pfm_llm.protocol.masks.words import FixedPoint, Words
from pfm_llm.protocol.types import Refusal
from tests.support.masks import (
    CONTRACT,
    Play,
    clients_of,
    drawing,
    identity,
    random_words,
    session_of,
    uniform,
)

SIZE = 8  # words of `Play`

# Of the first run that was checked: whoever changes these speaks another protocol.
ADVERTISED = "bfc2fa4194a96f5ace45747b70a37f6c7d2019dc7c759f28cc9dd34880bf2ac1"
SEALED = "4d416d668c10ac8ccb54be0281ee5f2ab83d9b4c734bb23c3d0c0569d3055157"
MASKED = "2ec5c9f72065403779a8e40eb7d65422ced632790ed8285f8aa2d9ec22a4fcbb"
REVEALED = "2aa7599a6e8875940fefbb0ead974a22ce304e502bac5d2e4f46104ac1a99c17"


def plain_sum(words: dict[str, Words]) -> Words:
    return np.sum([*words.values()], axis=0, dtype=np.uint32)


@pytest.fixture(autouse=True, scope="module")
def _sums_as_words() -> Iterator[None]:
    """Sums of words that stand for no update: these tests are of the masks alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FixedPoint, "decode", lambda _, words, __: words)
        yield


@given(data=st.data(), count=st.integers(3, 24), neighbours=st.sampled_from([8, 12, 30]))
def test_the_sum_is_the_plain_sum_whoever_drops_out(
    data: st.DataObject, count: int, neighbours: int
) -> None:
    """Up to a third vanishes, some before their words and some after."""
    ids = clients_of(count)
    order, most = data.draw(st.permutations(ids)), count // 3
    vanished = order[: data.draw(st.integers(0, most))]
    silent = order[len(vanished) : data.draw(st.integers(len(vanished), most))]
    play = Play(session_of(count, neighbours=neighbours), label=data.draw(st.text(max_size=3)))
    play.share()
    words = {c: w for c, w in random_words(count, SIZE).items() if c not in vanished}
    survivors = play.send(words)
    assert set(survivors) == words.keys()
    found = play.server.unmask(play.reveals(survivors, silent))
    assert np.array_equal(found, plain_sum(words))


def test_a_cohort_of_64_of_which_21_vanish() -> None:
    play, words = Play(session_of(64), numbers=40_000), random_words(64, 40_002)
    play.share()
    for client_id in clients_of(64)[::3][:21]:
        del words[client_id]
    survivors = play.send(words)
    assert np.array_equal(play.server.unmask(play.reveals(survivors)), plain_sum(words))


def test_one_more_than_a_third_is_too_many() -> None:
    play, words = Play(session_of(7)), random_words(7, SIZE)
    play.share()
    left = dict([*words.items()][:4])
    with pytest.raises(MaskError, match=r"round 1: 4 of 7 clients sent their words.*at least 5"):
        play.send(left)
    # Clients do not believe a server that goes on.
    with pytest.raises(MaskError, match="4 of 7 clients sent their words"):
        play.players["user-0"].confirm([*left])


def test_too_few_who_reveal_are_too_few() -> None:
    play = Play(session_of(6))
    play.share()
    survivors = play.send(random_words(6, SIZE))
    reveals = play.reveals(survivors)
    with pytest.raises(MaskError, match=r"3 of 6 clients revealed their shares.*at least 4"):
        play.server.unmask(reveals[:3])
    # A client that sends others than the right shares does not count.
    odd = [
        dataclasses.replace(reveals[3], seeds={}),
        dataclasses.replace(reveals[3], client_id="x"),
    ]
    with pytest.raises(MaskError, match="3 of 6 clients revealed"):
        play.server.unmask([*reveals[:3], *odd])


def test_too_few_who_confirm_are_too_few() -> None:
    play = Play(session_of(6))
    play.share()
    survivors = play.send(random_words(6, SIZE))
    signed = {c: play.players[c].confirm(survivors) for c in survivors}
    few = {c: signed[c] for c in ("user-1", "user-2")}
    with pytest.raises(MaskError, match="3 of 6 clients confirmed who is left"):
        play.players["user-0"].reveal(few)


def test_vector_of_a_round() -> None:
    play = Play(session_of(4))
    play.share()
    adverts = [play.server._roster[c] for c in clients_of(4)]
    text = b"".join(a.seal_key + a.mask_key + a.signature for a in adverts)
    assert hashlib.sha256(text).hexdigest() == ADVERTISED
    assert hashlib.sha256(play.received["user-1"]["user-3"]).hexdigest() == SEALED
    words = {c: np.arange(SIZE, dtype=np.uint32) * (n + 1) for n, c in enumerate(clients_of(3))}
    messages = {c: play.message(c, own) for c, own in words.items()}  # user-3 vanishes
    assert messages["user-1"].words.tobytes().hex() == MASKED
    for message in messages.values():
        play.server.add(message)
    reveals = play.reveals(play.server.close())
    assert hashlib.sha256(str(reveals[0].seeds["user-1"]).encode()).hexdigest() == REVEALED
    assert play.server.unmask(reveals).tolist() == [6 * n for n in range(SIZE)]


def test_a_message_is_what_the_protocol_says() -> None:
    """Spelled out with the primitives alone: X25519, HMAC, AES of a counter."""

    def text(*parts: bytes) -> bytes:
        return struct.pack(f">{len(parts) + 1}I", len(parts), *map(len, parts)) + b"".join(parts)

    about = text(b"pfm_llm masks 1", CONTRACT.encode(), b"1", b"4", b"12")
    context = hashlib.sha256(about).digest()

    def stream(secret: bytes, *use: bytes) -> Words:
        extracted = hmac.digest(bytes(32), secret, "sha256")
        key = hmac.digest(extracted, text(b"pfm_llm masks", *use) + b"\x01", "sha256")
        blocks = b"".join(n.to_bytes(16, "big") for n in range(2, 2 + SIZE // 4))
        mask = Cipher(algorithms.AES(key), modes.ECB()).encryptor().update(blocks)
        return np.frombuffer(mask, "<u4")

    draws = {c: drawing(c) for c in clients_of(4)}
    drawn = {c: [draw(32) for _ in range(3)] for c, draw in draws.items()}  # two keys and a seed
    keys = {c: X25519PrivateKey.from_private_bytes(own[1]) for c, own in drawn.items()}
    own, words = "user-1", np.arange(SIZE, dtype=np.uint32)
    expected = words + stream(drawn[own][2], b"own mask", context, own.encode())
    for other in ("user-0", "user-2", "user-3"):
        secret = keys[own].exchange(keys[other].public_key())
        pair = [client_id.encode() for client_id in sorted((own, other))]
        mask = stream(secret, b"pair mask", context, *pair)
        expected = expected + mask if own < other else expected - mask
    play = Play(session_of(4))
    play.share()
    assert np.array_equal(play.message(own, words).words, expected)


def test_a_single_message_is_uniform_whatever_it_says() -> None:
    size = 100_000
    contents = {
        "user-0": np.zeros(size, np.uint32),
        "user-1": np.full(size, 2**31, np.uint32),
        "user-2": np.arange(size, dtype=np.uint32) % 7,
    }
    play = Play(session_of(3), numbers=size - 2)
    play.share()
    for client_id, words in contents.items():
        assert uniform(words) < 1e-9  # which the test tells from uniform
        masked = play.message(client_id, words).words
        assert 1e-3 < uniform(masked) < 1 - 1e-3
        # Nor does what is added repeat, or say which word it is added to.
        added = masked - words
        assert 1e-3 < uniform(added[1:] - added[:-1]) < 1 - 1e-3


def test_one_mask_that_stays_keeps_a_message_uniform() -> None:
    """The server knows the seed of a client that sends late, or the pairs: never both."""
    size = 100_000
    play = Play(session_of(3), numbers=size - 2)
    play.share()
    zeros = np.zeros(size, np.uint32)
    masked = [play.message(c, zeros).words for c in clients_of(3)]
    total = masked[0] + masked[1] + masked[2]  # pairs cancel, own masks stay
    assert 1e-3 < uniform(total) < 1 - 1e-3
    again = Play(session_of(3), numbers=size - 2)
    again.share()
    again.send(dict(zip(clients_of(3), [zeros] * 3, strict=True)))
    assert not again.server.unmask(again.reveals(clients_of(3))).any()


def test_two_rounds_mask_with_other_words() -> None:
    words = np.zeros(SIZE, np.uint32)
    found = []
    for round_number in (1, 2):
        play = Play(session_of(3, round_number))  # the same secret randomness, on purpose
        play.share()
        found.append(play.message("user-0", words).words.tolist())
    assert found[0] != found[1]


def bent(**changes: object) -> Callable[[list[Advertisement]], list[Advertisement]]:
    """Changes what the server passes on of the keys of the second client."""
    return lambda roster: [roster[0], dataclasses.replace(roster[1], **changes), *roster[2:]]


def forged(session_round: int, by: str) -> Advertisement:
    """Keys of ``user-1`` as another one, or it itself in another round, would sign them."""
    session = session_of(4, session_round)
    keys = (drawing("x")(32), drawing("y")(32))
    return Advertisement.signed(session, "user-1", keys, identity(by))


@pytest.mark.parametrize(
    "change",
    [
        bent(mask_key=drawing("another key")(32)),
        bent(seal_key=drawing("another key")(32)),
        bent(signature=bytes(64)),
        bent(client_id="stranger"),
        lambda roster: [roster[0], forged(1, by="user-2"), *roster[2:]],
        lambda roster: [roster[0], forged(2, by="user-1"), *roster[2:]],
    ],
    ids=["mask key", "seal key", "unsigned", "stranger", "of another client", "of another round"],
)
def test_keys_that_their_client_has_not_signed_for_this_round_are_refused(
    change: Callable[[list[Advertisement]], list[Advertisement]],
) -> None:
    play = Play(session_of(4))
    with pytest.raises(MaskError, match=r"'(user-1|stranger)' are not signed by it for round 1"):
        play.share(change)
    # The server leaves such keys out of the roster by itself.
    honest = [p.advertise() for p in Play(session_of(4)).players.values()]
    roster = Play(session_of(4)).server.open(change(honest))
    assert [one.client_id for one in roster] == ["user-0", "user-2", "user-3"]


@pytest.mark.parametrize(
    "change",
    [
        lambda roster: [*roster[1:]],
        lambda roster: [dataclasses.replace(roster[0], mask_key=bytes(32)), *roster[1:]],
        lambda roster: [*roster, roster[1]],
    ],
    ids=["without its own", "with others as its own", "twice"],
)
def test_a_client_knows_its_own_keys_in_the_roster(
    change: Callable[[list[Advertisement]], list[Advertisement]],
) -> None:
    with pytest.raises(MaskError, match="other keys than this client's as its own, or a client"):
        Play(session_of(4)).share(change)


def test_a_server_that_leaves_most_out_is_refused() -> None:
    with pytest.raises(MaskError, match="3 of 6 clients advertised keys"):
        Play(session_of(6)).share(lambda roster: roster[:3])


def test_a_cohort_larger_than_agreed_is_refused() -> None:
    session = dataclasses.replace(session_of(4), verify_keys=session_of(5).verify_keys)
    others = [MaskedClient(c, identity(c), session) for c in clients_of(5)]
    roster = [player.advertise() for player in others]
    with pytest.raises(MaskError, match="5 clients in a cohort of 4"):
        others[0].share(roster)


def test_both_secrets_of_a_client_are_never_revealed() -> None:
    """A client answers once, for one set of survivors; each other is in one half of the answer."""
    play = Play(session_of(6))
    play.share()
    survivors = play.send(random_words(6, SIZE))
    player = play.players["user-0"]
    signed = {c: play.players[c].confirm(survivors) for c in survivors}
    with pytest.raises(MaskError, match="'user-0' was asked to confirm after confirm"):
        player.confirm(survivors[:5])
    first = player.reveal(signed)
    assert first.seeds.keys() == set(survivors)
    assert first.keys == {}
    with pytest.raises(MaskError, match="'user-0' was asked to reveal after reveal"):
        player.reveal(signed)


def test_who_vanished_shows_the_mask_key_and_who_sent_the_seed() -> None:
    play, words = Play(session_of(6)), random_words(6, SIZE)
    play.share()
    del words["user-4"]
    for reveal in play.reveals(play.send(words)):
        assert reveal.keys.keys() == {"user-4"}
        assert reveal.seeds.keys() == words.keys()


def test_a_server_that_tells_clients_different_things_gets_no_shares() -> None:
    """Half of the clients are told that user-5 vanished: no side has enough who agree."""
    play = Play(session_of(6))
    play.share()
    survivors = play.send(random_words(6, SIZE))
    told = {c: survivors if n % 2 else survivors[:5] for n, c in enumerate(clients_of(5))}
    signed = {c: play.players[c].confirm(told[c]) for c in told}
    for client_id in told:
        with pytest.raises(MaskError, match="clients confirmed who is left"):
            play.players[client_id].reveal(signed)


def test_confirmations_of_another_round_or_roster_do_not_count() -> None:
    """Old keys cannot stand for clients that are away: what is signed has everybody's new keys."""
    old = Play(session_of(6), label="old")
    old.share()
    survivors = old.send(random_words(6, SIZE))
    stale = {c: old.players[c].confirm(survivors) for c in survivors}
    new = Play(session_of(6), label="new")
    new.share()
    player = new.players["user-0"]
    new.send(random_words(6, SIZE))
    player.confirm(survivors)
    with pytest.raises(MaskError, match="1 of 6 clients confirmed"):
        player.reveal(stale)


def test_survivors_that_masks_do_not_join_are_not_unmasked() -> None:
    """The neighbours of one client all vanish: its words would come out by themselves."""
    play = Play(session_of(30, neighbours=8))
    play.share()
    alone = "user-7"
    around = play.players[alone]._graph[alone]
    assert len(around) == 8 < 30 // 3
    words = {c: w for c, w in random_words(30, SIZE).items() if c not in around}
    survivors = play.send(words)
    with pytest.raises(MaskError, match=r"masks do not join all clients.*masks.neighbours"):
        play.reveals(survivors)


def test_neighbours_that_have_not_confirmed_do_not_join() -> None:
    """They may be made up by the server from keys that an earlier round has revealed."""
    play = Play(session_of(30, neighbours=8))
    play.share()
    survivors = play.send(random_words(30, SIZE))
    around = play.players["user-7"]._graph["user-7"]
    signed = {c: play.players[c].confirm(survivors) for c in survivors if c not in around}
    with pytest.raises(MaskError, match="masks do not join all clients"):
        play.players["user-7"].reveal(signed)


@pytest.mark.parametrize("claimed", [["user-1", "user-2"], ["user-0", "user-1", "nobody"]])
def test_impossible_survivors_are_not_confirmed(claimed: list[str]) -> None:
    play = Play(session_of(3))
    play.share()
    play.send(random_words(3, SIZE))
    with pytest.raises(MaskError, match="nothing is revealed"):
        play.players["user-0"].confirm(claimed)


def test_words_go_out_once_and_with_enough_others_alone() -> None:
    play, words = Play(session_of(6)), np.zeros(SIZE, np.uint32)
    with pytest.raises(MaskError, match="asked to mask after nothing"):
        play.players["user-0"].mask({}, words)
    play.share()
    few = {c: play.received["user-0"][c] for c in ("user-1", "user-2")}
    with pytest.raises(MaskError, match="3 of 6 clients shared their secrets"):
        play.players["user-0"].mask(few, words)
    play.players["user-1"].mask(play.received["user-1"], words)
    with pytest.raises(MaskError, match="asked to mask after mask"):
        play.players["user-1"].mask(play.received["user-1"], words)
    with pytest.raises(MaskError, match="a client that has not advertised keys"):
        play.players["user-2"].mask({**play.received["user-2"], "nobody": b""}, words)


def test_changed_shares_are_noticed() -> None:
    play = Play(session_of(3))
    play.share()
    own = play.received["user-0"]
    own["user-1"], own["user-2"] = own["user-2"], own["user-1"]
    survivors = play.send(random_words(3, SIZE))
    with pytest.raises(MaskError, match="the shares from client 'user-1' were changed"):
        play.reveals(survivors)


def test_a_client_that_shares_with_some_alone_takes_no_part() -> None:
    play = Play(session_of(6))
    roster = play.server.open(p.advertise() for p in play.players.values())
    sent = {c: player.share(roster) for c, player in play.players.items()}
    del sent["user-0"]["user-3"]
    received = play.server.deliver(sent)
    assert received.keys() == {c for c in clients_of(6) if c != "user-0"}
    assert all("user-0" not in own for own in received.values())
    with pytest.raises(MaskError, match="3 of 6 clients shared"):
        play.server.deliver(dict([*sent.items()][:4]))


@pytest.mark.parametrize("secret", ["seeds", "keys"])
def test_shares_that_do_not_fit_cost_the_round(secret: str) -> None:
    play, words = Play(session_of(6)), random_words(6, SIZE)
    play.share()
    del words["user-5"]
    reveals = play.reveals(play.send(words))
    wrong = {owner: share + 2**400 for owner, share in getattr(reveals[0], secret).items()}
    reveals[0] = dataclasses.replace(reveals[0], **{secret: wrong})
    with pytest.raises(MaskError, match=r"shares of client 'user-[05]' do not fit together"):
        play.server.unmask(reveals)


@pytest.mark.parametrize(
    ("changes", "message", "reason"),
    [
        ({"contract_hash": "another"}, "under another contract", Refusal.CONTRACT),
        ({"round_number": 2}, "masked for round 2, but round 1 is under way", Refusal.ROUND),
        ({"client_id": "stranger"}, "takes no part in round 1", Refusal.COHORT),
        ({"words": np.zeros(9, np.uint32)}, r"sends no uint32\[8\]", Refusal.MALFORMED),
        ({"words": np.zeros(8, np.int32)}, r"sends no uint32\[8\]", Refusal.MALFORMED),
        ({"words": "8 words"}, r"sends no uint32\[8\]", Refusal.MALFORMED),
    ],
)
def test_a_wrong_message_is_refused_and_changes_nothing(
    changes: dict[str, object], message: str, reason: str
) -> None:
    play, words = Play(session_of(3)), random_words(3, SIZE)
    play.share()
    honest = {c: play.message(c, own) for c, own in words.items()}
    with pytest.raises(ContractError, match=message) as caught:
        play.server.add(dataclasses.replace(honest["user-0"], **changes))  # type: ignore[arg-type]
    assert caught.value.reason == reason
    for update in honest.values():
        play.server.add(update)
    with pytest.raises(ContractError, match="'user-0' has sent words before") as caught:
        play.server.add(honest["user-0"])
    assert caught.value.reason == Refusal.TWICE
    assert np.array_equal(play.server.unmask(play.reveals(play.server.close())), plain_sum(words))


def test_a_message_of_a_client_that_was_not_asked_has_no_place() -> None:
    play = Play(session_of(3))
    play.share()
    with pytest.raises(ContractError, match="'x' takes no part"):
        play.server.add(MaskedUpdate("x", 1, CONTRACT, np.zeros(SIZE, np.uint32)))
