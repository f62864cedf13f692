"""Which lengths there are, how they are factored, the matrices of their factors, and signs packed in words."""

import functools
import hashlib

import jax
import numpy as np
import pytest
from cases import ORDER_LENGTHS, ORDERS, lengths, rng
from oracle import BASE_ORDERS, decompose, dense, paley, sylvester

from jax_hadacore import _orders, _signs
from jax_hadacore.bench.models import BY_ORDERS

# SHA-256 of the int8 entries, row by row. Weights that a transform was folded into depend on every one of them: a
# change here is a change of CONVENTION.
HASHES = {
    12: "862ec4fbae3ba2a8c82afa675136e5886c4caeec817da633b5a2eb9dc2b0d658",
    20: "feaed270d144e926424196520902e976cab2f19299f1293602281b603d22475e",
    28: "a24c9c5912c711a9bad9f9a9ee25a5fa088b3effa4e660143e5272d3fe4290b1",
    36: "1a7aed2f42a8c71de2ae13e765a6df2c2023519ef899b00d5d0baa7ee26f341b",
    44: "bfb31e6347d52917509643cc5b358c2c546f966977a21689186803def5aab606",
    52: "f50db5d0f93762d36bf0327006bb3512c21dad67afe84c53c33e5c9649f27ca3",
    60: "2d9332996e4fee2d4b86046640b8cee66661e45099c1d4d0ceb00a7cc951baf5",
    68: "d101d2ce78cf024fd45e85fb119446d686af21aabdf84ccf9a5f1719748dd2d6",
    76: "290dc2c593bbcba4e222e035aa4efb86901c43a06037e7c62bc84ffd3bd54197",
    84: "a0f4e862eede5c124a2aca8726305de925784a8c42c71d46e82e4b169f3a9989",
    100: "89d400ecb6ea82c83b28372532f15618bf86caf0c2d68085fc84d97193cbcd23",
    108: "52b6a64f00a23e611cc4a1e25013b7a27496bed6cc48d37cb9a112e992369324",
    132: "db79d5a16d2d0e24e9733932d76bfadf7dc86a4e8f3050fc0ae31d6d350a11f8",
    140: "2a2c3c5869bf83b2a2fb68f9b159a9b32da89d3bc42068e795518b160b0be624",
    148: "1a8964dfe75c61f5113b1c7a953a939daecaa628da6f83156e29b9059eec94ed",
    180: "d92ea88935135773d6ccdcd48b9771d7d399a646c99fdc84e6ff27fa3d76bcbb",
    284: "643fe3074e6b6348f10f68d174c1404710d7d3e935658e855fa768677b8ae6fc",
    344: "d80f13c4051f9f9141092ba6fcc91fe7d37b01af6289ba200a117e5432fefec1",
}


class TestDecompose:
    @pytest.mark.parametrize(
        ("n", "factors"),
        [
            (1, (1,)),
            (4096, (4096,)),
            (2**24, (2**24,)),
            (12, (12, 1)),
            (24, (12, 2)),
            (3072, (12, 256)),
            (14336, (28, 512)),
            (11008, (344, 32)),
            (10944, (36, 76, 4)),
            (29568, (44, 84, 8)),
            (19968, (12, 52, 32)),  # and not 312
            (144, (36, 4)),  # and not 12 * 12
            (23 * 16, (368, 1)),  # beyond the limit of a single order, but there is no pair
            (4416, (276, 16)),  # and not 12 * 368
        ],
    )
    def test_examples(self, n, factors):
        assert _orders.decompose(n) == factors
        assert _orders.orders(n) == factors[:-1]
        assert _orders.is_supported(n)

    def test_every_length_follows_the_rule(self):
        for n in range(1, 40001):
            expected = decompose(n)
            assert _orders.is_supported(n) == (expected is not None), n
            if expected:
                assert _orders.decompose(n) == expected, n

    def test_model_dimensions(self):
        for orders, dimensions in BY_ORDERS.items():
            assert {_orders.orders(n) for n in dimensions} == {orders}

    def test_takes_any_integer(self):
        assert _orders.decompose(np.int32(24)) == (12, 2)
        with pytest.raises(TypeError):
            _orders.is_supported(24.0)  # pyright: ignore[reportArgumentType]


class TestUnsupported:
    @pytest.mark.parametrize(
        ("n", "reason", "ways"),
        [
            (
                13696,
                r"107 \* 2\^7; no Hadamard matrix of order 107 \* 2\^j is known to this library for j <= 7",
                r"Transform blocks of it with block_size=128, pass an orthogonal matrix of order 107 as matrix= "
                r"or pad the axis to 13824",
            ),
            (
                4304,
                r"269 \* 2\^4; no Hadamard matrix of order 269 \* 2\^j is known to this library for j <= 4",
                r"Transform blocks of it with block_size=16, pass an orthogonal matrix of order 269 as matrix= "
                r"or pad the axis to 4352",
            ),
            (6, r"3 \* 2; no .* 3 \* 2\^j .* j <= 1", r"Transform blocks .*block_size=2, .*pad the axis to 8"),
            (8191, r"8191; no .* 8191 \* 2\^j .* j <= 0", "Pad the axis to 8192"),
            (2**25, r"2\^25; supported are lengths up to 2\^24", "Transform blocks of it with block_size=16777216"),
            (
                3 * 2**23,
                r"3 \* 2\^23; supported are lengths up to 2\^24",
                "Transform blocks of it with block_size=8388608",
            ),
        ],
    )
    def test_the_message_names_the_ways_out(self, n, reason, ways):
        assert not _orders.is_supported(n)
        with pytest.raises(ValueError, match=rf"^hadamard: the transformed axis has size {n} = {reason}\. {ways}\.$"):
            _orders.decompose(n)

    def test_nothing_is_proposed_where_nothing_helps(self):
        with pytest.raises(ValueError, match=r"31 \* 601 \* 1801; supported are lengths up to 2\^24\.$"):
            _orders.decompose(2**25 - 1)

    def test_ways_out_can_be_followed(self):
        for n in range(1, 3000):
            if not _orders.is_supported(n):
                padded = _orders._next_supported(n)
                assert n < padded < 2 * n
                assert _orders.is_supported(padded)

    @pytest.mark.parametrize("n", [0, -4])
    def test_there_must_be_an_element(self, n):
        assert not _orders.is_supported(n)
        with pytest.raises(ValueError, match=f"size {n}; it must have at least one element"):
            _orders.decompose(n)


class TestMatrices:
    @pytest.mark.parametrize("k", BASE_ORDERS)
    def test_every_base_order(self, k):
        m = _orders.order_matrix(k)
        assert m.dtype == np.int8
        assert not m.flags.writeable
        wide = m.astype(np.float64)
        np.testing.assert_array_equal(wide @ wide.T, k * np.eye(k))
        np.testing.assert_array_equal(m, paley(k))
        np.testing.assert_array_equal(m, m.T)

    @pytest.mark.parametrize("k", ORDERS)
    def test_no_entry_ever_changes(self, k):
        assert hashlib.sha256(_orders.order_matrix(k).tobytes()).hexdigest() == HASHES[k]
        assert _orders.CONVENTION == 1

    def test_there_are_no_others(self):
        with pytest.raises(KeyError):
            _orders.order_matrix(40)

    @lengths(1, 2, 8, 12, 24, 40, 80, 576, 864)
    def test_hadamard_matrix(self, n):
        np.testing.assert_array_equal(_orders.hadamard_matrix(n), dense(n))

    def test_the_order_is_the_slow_index_and_the_smaller_one_the_slowest(self):
        m = _orders.hadamard_matrix(48)
        for a, b, i, j in [(0, 0, 3, 3), (5, 7, 1, 3), (11, 2, 2, 2)]:
            assert m[4 * a + i, 4 * b + j] == paley(12)[a, b] * sylvester(4)[i, j]
        m = _orders.hadamard_matrix(12 * 52)
        for a, b, c, d in [(0, 0, 1, 1), (5, 7, 50, 33), (11, 2, 8, 20)]:
            assert m[52 * a + c, 52 * b + d] == paley(12)[a, b] * paley(52)[c, d]

    def test_the_result_has_the_dtype_and_is_the_callers(self):
        assert _orders.hadamard_matrix(4).dtype == np.int8
        m = _orders.hadamard_matrix(12, np.float32)
        assert m.dtype == np.float32
        m *= 2
        assert set(np.unique(_orders.hadamard_matrix(12))) == {-1, 1}


class TestSigns:
    """Element e of 32 is in bit e / 2, those with odd e are 16 bits further."""

    @pytest.mark.parametrize("jitted", [False, True], ids=["numpy", "jitted"])
    @pytest.mark.parametrize("shape", [(1,), (31,), (32,), (33,), (100,), (2, 3, 40), (0,), (0, 40), (2, 0)], ids=str)
    def test_pack(self, shape, jitted):
        negative = rng("signs", shape).integers(2, size=shape) == 1
        call = jax.jit if jitted else lambda function, **_: function
        words = call(_signs.pack)(negative)
        assert isinstance(words, jax.Array if jitted else np.ndarray)
        assert words.dtype == np.uint32
        expected = np.zeros((*shape[:-1], -(-shape[-1] // 32)), np.uint32)
        for *row, e in np.argwhere(negative):
            expected[(*row, e // 32)] |= np.uint32(1 << (e % 32 // 2 + e % 2 * 16))
        np.testing.assert_array_equal(words, expected)
        unpacked = call(functools.partial(_signs.unpack, n=shape[-1]))(words)
        assert isinstance(unpacked, jax.Array if jitted else np.ndarray)
        assert unpacked.dtype == bool
        np.testing.assert_array_equal(unpacked, negative)


@lengths(*ORDER_LENGTHS)
def test_orders_are_within_what_the_native_calls_take(n):
    assert len(_orders.orders(n)) <= 2
    assert all(k <= 1024 for k in _orders.orders(n))
