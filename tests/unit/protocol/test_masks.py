"""The parts of a round under masks: keys, shares, the graph, words."""

import hmac
import math

import numpy as np
import pytest
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given
from hypothesis import strategies as st

from pfm_llm.base.errors import ContractError, MaskError
from pfm_llm.protocol.contract import TensorSpec
from pfm_llm.protocol.masks import shares
from pfm_llm.protocol.masks.agreement import (
    KeyPair,
    derived,
    digest,
    is_signed,
    opened,
    own_mask,
    packed,
    pair_mask,
    sealed,
)
from pfm_llm.protocol.masks.neighbours import mask_graph, reaches, usual_number
from pfm_llm.protocol.masks.words import FixedPoint, Words, add_masks
from pfm_llm.protocol.types import ClientUpdate, Refusal
from tests.support.masks import clients_of, drawing, identity

NAMES = ("head.item_bias", "lora.m.A")

# Of the first run that was checked: whoever changes these speaks another protocol.
OWN = "be33f49419ba191d64d558ab60018f7778abd1bb878f89180fa8535833545d9a"
PAIR = "549334f5b83e6a50ec383965c3d8a915bc8f469258b0d794b9fa589a2892c991"
DIGEST = "45981999b639e84a741cfa2b95ff19f4cf48111dc50c7151844b497e10658cb6"
STREAM = "170e23d1735cd2d579e63a887bc9c813480d3ceda63605659579b51694e2b82e"


def test_what_is_derived_is_hkdf_of_rfc_5869() -> None:
    """Spelled out with HMAC: extract without a salt, then one block of expand."""
    secret = bytes(range(32))
    extracted = hmac.digest(bytes(32), secret, "sha256")
    expected = hmac.digest(
        extracted, packed("pfm_llm masks", "shares", b"c", "u") + b"\x01", "sha256"
    )
    assert derived(secret, "shares", b"c", "u") == expected


def test_vectors_of_keys() -> None:
    secret, context = bytes(range(32)), bytes(32)
    assert packed("a", b"bc", "") == bytes.fromhex("00000003000000010000000200000000616263")
    assert own_mask(context, "user-1", secret).hex() == OWN
    assert pair_mask(context, secret, "user-1", "user-2") == (bytes.fromhex(PAIR), 1)
    assert pair_mask(context, secret, "user-2", "user-1") == (bytes.fromhex(PAIR), -1)
    assert digest("pfm_llm", b"masks").hex() == DIGEST


def test_two_parts_are_not_one() -> None:
    assert packed("ab", "c") != packed("a", "bc")
    assert digest("ab") != digest("a", "b")
    secret = bytes(32)
    uses = [
        derived(secret, "shares", b"x"),
        derived(secret, "pair mask", b"x"),
        derived(secret, "x"),
    ]
    assert len(set(uses)) == 3


def test_two_clients_agree_and_nobody_else_does() -> None:
    first, second, third = (KeyPair(drawing(label)(32)) for label in "abc")
    assert first.agree(second.public) == second.agree(first.public)
    assert first.agree(third.public) != first.agree(second.public)


@pytest.mark.parametrize("public", [bytes(32), b"short", (1).to_bytes(32, "little")])
def test_a_public_key_that_is_none_is_refused(public: bytes) -> None:
    with pytest.raises(MaskError, match="a public key that is none"):
        KeyPair(drawing("a")(32)).agree(public)


def test_what_is_sealed_opens_with_its_key_alone_and_unchanged_alone() -> None:
    key = bytes(range(32))
    message = sealed(key, b"two shares", "u", "v")
    assert opened(key, message, "u", "v") == b"two shares"
    for wrong_key, wrong in ((bytes(32), message), (key, message[:-1] + b"\x00"), (key, b"")):
        with pytest.raises(MaskError, match="from client 'u' were changed on their way"):
            opened(wrong_key, wrong, "u", "v")
    with pytest.raises(MaskError, match="from client 'v' were changed on their way"):
        opened(key, message, "v", "u")  # sent back as if it were the answer


def test_a_signature_is_of_one_key_and_one_message() -> None:
    key, other = identity("a"), identity("b")
    public = key.public_key().public_bytes_raw()
    assert is_signed(public, key.sign(b"yes"), b"yes")
    assert not is_signed(public, key.sign(b"yes"), b"no")
    assert not is_signed(public, other.sign(b"yes"), b"yes")
    assert not is_signed(b"no key", key.sign(b"yes"), b"yes")


@given(data=st.data(), count=st.integers(1, 30), secret=st.binary(min_size=32, max_size=32))
def test_any_shares_of_the_threshold_give_the_secret_and_fewer_do_not(
    data: st.DataObject, count: int, secret: bytes
) -> None:
    threshold = data.draw(st.integers(1, count))
    split = shares.split(secret, threshold, count, drawing("shares"))
    places = data.draw(st.permutations(range(1, count + 1)))[:threshold]
    weights = shares.weights_at_zero(places)
    assert shares.joined([split[place - 1] for place in places], weights) == secret
    if threshold > 1:
        fewer = places[1:]
        found = [split[place - 1] for place in fewer]
        # One share less fits every secret: what comes out is as good as random, so above 2^256.
        assert shares.joined(found, shares.weights_at_zero(fewer)) is None


def test_shares_of_a_polynomial_by_hand() -> None:
    # Coefficients 3 and 5 for x^2 and x: 3 x^2 + 5 x + 7 at 1, 2, 3.
    drawn = iter([3, 5])
    secret = (7).to_bytes(32, "big")
    split = shares.split(secret, 3, 3, lambda size: next(drawn).to_bytes(size, "big"))
    assert split == [15, 29, 49]
    assert shares.joined(split, shares.weights_at_zero([1, 2, 3])) == secret


@pytest.mark.parametrize("count", [3, 4, 13, 14, 20, 21, 64, 101])
@pytest.mark.parametrize("neighbours", [2, 8, 11, 12, 200])
def test_the_graph_is_mutual_regular_connected_and_the_same_for_all(
    count: int, neighbours: int
) -> None:
    ids = clients_of(count)
    graph = mask_graph(ids, neighbours, b"beacon")
    assert graph == mask_graph(ids[::-1], neighbours, b"beacon")
    assert all(own in graph[other] for own in ids for other in graph[own])
    assert all(own not in graph[own] for own in ids)
    wanted = min(neighbours + neighbours % 2, count - 1)
    assert {len(graph[own]) for own in ids} == {wanted}
    assert reaches(graph, ids, ids)


def test_another_beacon_is_another_graph() -> None:
    ids = clients_of(64)
    assert mask_graph(ids, 12, b"one") != mask_graph(ids, 12, b"two")


def test_who_is_cut_off_is_not_reached_and_only_those_who_take_part_lead_on() -> None:
    graph = {"a": frozenset("b"), "b": frozenset("ac"), "c": frozenset("bd"), "d": frozenset("c")}
    assert reaches(graph, "abcd", "abcd")
    assert not reaches(graph, "acd", "acd")  # b is gone
    assert reaches(graph, "abcd", "bc")  # a and d hang on those who take part
    assert not reaches(graph, "abcd", "ab")  # nobody vouches for c, so d is not reached


def test_the_usual_number_keeps_the_stated_risk() -> None:
    assert [usual_number(count) for count in (3, 8, 64)] == [10, 10, 10]
    for count in (64, 200, 1000, 10_000):
        number, gone = usual_number(count), count // 3 + count // 10
        risk = (count - gone) * math.comb(gone, number) / math.comb(count - 1, number)
        assert risk <= 2**-8
        fewer = math.comb(gone, number - 2) / math.comb(count - 1, number - 2)
        assert number == 10 or (count - gone) * fewer > 2**-8


def test_dropouts_rarely_cut_the_graph() -> None:
    """Of rounds of 64 in which 21 vanish, none of 300 is cut with the usual neighbours."""
    ids = clients_of(64)
    source = np.random.default_rng(0)
    for number in range(300):
        graph = mask_graph(ids, usual_number(64), str(number).encode())
        left = source.choice(ids, 43, replace=False).tolist()
        assert reaches(graph, left, left)


def update_of(delta: dict[str, torch.Tensor], examples: int = 1, loss: float = 0.0) -> ClientUpdate:
    return ClientUpdate("u", 1, "hash", examples, loss, delta)


def fixed_point(count: int, norm: float, by_examples: bool = False) -> FixedPoint:
    specs = {NAMES[0]: TensorSpec((5,)), NAMES[1]: TensorSpec((2, 3))}
    return FixedPoint(specs, norm, count, 1000, by_examples)


def drawn_update(source: np.random.Generator, norm: float) -> dict[str, torch.Tensor]:
    """An update of at most that norm, of which some hit the bound with a single number."""
    flat = source.normal(size=11)
    if source.random() < 0.3:
        flat[source.integers(11)] = 1e6
    flat *= norm * source.choice([0.0, 1e-6, 0.5, 1 - 1e-6]) / np.linalg.norm(flat)
    values = torch.from_numpy(flat.astype(np.float32))
    return {NAMES[0]: values[:5].clone(), NAMES[1]: values[5:].view(2, 3).clone()}


@given(
    count=st.integers(3, 200),
    norm=st.floats(1e-6, 1e3),
    by_examples=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_the_sum_of_words_is_the_weighted_sum_within_the_stated_error(
    count: int, norm: float, by_examples: bool, seed: int
) -> None:
    source, coder = np.random.default_rng(seed), fixed_point(count, norm, by_examples)
    deltas = [drawn_update(source, norm) for _ in range(count)]
    examples = source.integers(1, 1500, count).tolist()  # some beyond what counts
    losses = source.uniform(-10, 10, count).tolist()
    total = np.zeros(coder.num_words, np.uint32)
    for delta, number, loss in zip(deltas, examples, losses, strict=True):
        total += coder.encode(update_of(delta, number, loss))
    found = coder.decode(total, count)
    counted = [min(number, 1000) for number in examples]
    weights = counted if by_examples else [1] * count
    assert found.num_examples == sum(counted)
    assert found.weight == sum(weights)
    expected = math.fsum(w * x for w, x in zip(weights, losses, strict=True))
    assert found.weighted_loss == pytest.approx(expected, abs=found.weight * 1e-2)
    # Half a step for each client; with a weight, factor and product are rounded to 24 bits before.
    unit = 1000 if by_examples else 1
    bound = count * unit / coder.scale / 2 + by_examples * sum(weights) * norm * 2**-23
    for name in NAMES:
        exact = sum(w * d[name].double() for w, d in zip(weights, deltas, strict=True))
        assert float((found.tensors[name] - exact).abs().max()) <= bound
        assert found.tensors[name].dtype is torch.float64
    assert coder.scale * norm <= (2**31 - 1) // count < 2 * coder.scale * norm


def test_the_extremes_of_all_clients_do_not_overflow() -> None:
    for sign in (1.0, -1.0):
        coder = fixed_point(64, 0.75)
        delta = {NAMES[0]: torch.zeros(5), NAMES[1]: torch.zeros(2, 3)}
        delta[NAMES[0]][0] = sign * 0.75
        words = coder.encode(update_of(delta, 1000, sign * 1e5))
        found = coder.decode(words * np.uint32(64), 64)
        assert found.tensors[NAMES[0]][0] == sign * 64 * 0.75
        assert found.num_examples == 64_000
        assert found.weighted_loss == sign * 64 * 1024  # the largest loss that travels


@pytest.mark.parametrize(
    ("value", "loss", "reason"),
    [
        (math.nan, 0.0, Refusal.NOT_FINITE),
        (math.inf, 0.0, Refusal.NOT_FINITE),
        (0.0, math.nan, Refusal.NOT_FINITE),
        (1.1, 0.0, Refusal.TOO_LARGE),
    ],
)
def test_a_client_does_not_send_what_nobody_could_check_later(
    value: float, loss: float, reason: Refusal
) -> None:
    delta = {NAMES[0]: torch.zeros(5), NAMES[1]: torch.full((2, 3), value)}
    with pytest.raises(ContractError, match=r"client 'u': .* so it sends none") as caught:
        fixed_point(3, 1.0).encode(update_of(delta, loss=loss))
    assert caught.value.reason == reason


def test_a_sum_that_no_updates_within_the_bound_have_is_refused() -> None:
    coder = fixed_point(3, 1.0)
    delta = {NAMES[0]: torch.ones(5) * 0.2, NAMES[1]: torch.zeros(2, 3)}
    words = coder.encode(update_of(delta))
    assert coder.decode(words * np.uint32(3), 3).num_examples == 3
    long, many = words.copy(), words.copy()
    long[0] = 2**30
    many[-2] = 4000
    for wrong in (long, many, words * np.uint32(0)):
        with pytest.raises(ContractError, match="a client did not keep to it") as caught:
            coder.decode(wrong, 3)
        assert caught.value.reason == Refusal.TOO_LARGE


def stream(key: bytes, size: int) -> Words:
    """AES-256 in counter mode from the counter 2, as words."""
    start = (2).to_bytes(16, "big")
    counter = Cipher(algorithms.AES(key), modes.CTR(start)).encryptor()
    return np.frombuffer(counter.update(bytes(4 * size)), "<u4")


def test_streams_are_aes_in_counter_mode_and_cancel() -> None:
    size = 70_001  # more than two blocks
    keys = [bytes([number]) * 32 for number in range(3)]
    plain = np.arange(size, dtype=np.uint32)
    words = plain.copy()
    add_masks(words, [(keys[0], 1), (keys[1], -1), (keys[2], 1)])
    expected = plain.copy()
    for key, sign in zip(keys, (1, -1, 1), strict=True):
        expected = expected + stream(key, size) if sign > 0 else expected - stream(key, size)
    assert np.array_equal(words, expected)
    add_masks(words, [(keys[2], -1), (keys[1], 1), (keys[0], -1)])
    assert np.array_equal(words, plain)


def test_vector_of_a_stream() -> None:
    """AES-256 of the counters 2 and 3 under the key of NIST SP 800-38A, F.5.5, as words."""
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    words = np.zeros(8, np.uint32)
    add_masks(words, [(key, 1)])
    assert words.tobytes().hex() == STREAM
    blocks = Cipher(algorithms.AES(key), modes.ECB()).encryptor()
    text = blocks.update((2).to_bytes(16, "big") + (3).to_bytes(16, "big"))
    assert words.tobytes() == text
