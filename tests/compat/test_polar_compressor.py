"""`compat.turbo_quant` beyond the crate's own tests: policies, shadows, errors, bytes."""

from __future__ import annotations

import math

import msgspec
import numpy as np
import pytest

from pagedtq import Polar
from pagedtq.codec import PolarCodec
from pagedtq.compat.turbo_quant import (
    SHADOW_WARNING,
    AttentionScale,
    AttentionScoreOptions,
    DimensionMismatch,
    Exact,
    InvalidBitWidth,
    KvCacheCompressor,
    KvCacheConfig,
    KvMemoryReportV1,
    KvQuantPolicy,
    KvRuntimeConfig,
    KvShadowScore,
    MalformedCode,
    NonFiniteInput,
    OddDimension,
    Quantized,
    RotationFailed,
    RotationKind,
    TurboMode,
    TurboQuantError,
    UnsupportedDimension,
    ZeroDimension,
    ZeroProjectionCount,
    json_schemas,
)
from pagedtq.errors import (
    ArgumentError,
    ArgumentTypeError,
    ConfigError,
    NonFiniteError,
    OverflowingError,
    UnsupportedError,
)

D = 32
TOP = (1 << 64) - 1
CODED = KvQuantPolicy.quantized(8, 16)
PLAIN = Quantized(6, 0, TurboMode.POLAR_ONLY)
EXACT = KvQuantPolicy.exact()
PAIRS = [(CODED, CODED), (CODED, EXACT), (EXACT, CODED), (EXACT, EXACT), (PLAIN, PLAIN)]


def draw(count, dim=D, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def cache_of(keys=CODED, values=CODED, shadow=True, dim=D, seed=42, count=0, **options):
    cache = KvCacheCompressor(KvRuntimeConfig(dim, keys, values, seed, shadow), **options)
    for key, value in zip(draw(count, dim, 1), draw(count, dim, 2)):
        cache.compress_token(key, value)
    return cache


# -- configuration --------------------------------------------------------------------------------


def test_policies_have_the_crates_defaults():
    assert Quantized(8, 16, TurboMode.POLAR_WITH_QJL, RotationKind.AUTO) == CODED
    stored = KvQuantPolicy.quantized_with_stored_rotation(8, 16)
    assert stored == Quantized(8, 16, TurboMode.POLAR_WITH_QJL, RotationKind.STORED_QR)
    assert all(isinstance(policy, KvQuantPolicy) for policy in (EXACT, CODED))
    assert AttentionScoreOptions().scale is AttentionScale.NONE


def test_symmetric_configuration_is_both_policies_and_shadows():
    old = KvCacheConfig(head_dim=D, bits=8, projections=16, seed=3)
    assert old.runtime() == KvRuntimeConfig(D, CODED, CODED, 3, True)
    assert KvCacheCompressor(old).config == old.runtime()


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (EXACT, Exact | Quantized, '{"kind":"exact"}'),
        (
            CODED,
            Exact | Quantized,
            '{"kind":"quantized","bits":8,"projections":16,"mode":"PolarWithQjl",'
            '"rotation_kind":"Auto"}',
        ),
        (AttentionScoreOptions(), AttentionScoreOptions, '{"scale":"None"}'),
        (
            AttentionScoreOptions(AttentionScale.BY_HEAD_DIM),
            AttentionScoreOptions,
            '{"scale":"ByHeadDim"}',
        ),
        (
            AttentionScoreOptions(AttentionScale.custom(0.5)),
            AttentionScoreOptions,
            '{"scale":{"Custom":0.5}}',
        ),
        (
            KvShadowScore(1.0, 0.5, 0.5),
            KvShadowScore,
            '{"exact":1.0,"compressed":0.5,"abs_error":0.5}',
        ),
    ],
)
def test_json_has_the_crates_names_and_tags(value, kind, text):
    assert msgspec.json.encode(value).decode() == text
    assert msgspec.json.decode(text, type=kind) == value


def test_configurations_survive_json_and_refuse_other_fields():
    config = KvRuntimeConfig(D, CODED, EXACT, TOP, False)
    text = msgspec.json.encode(config)
    assert msgspec.json.decode(text, type=KvRuntimeConfig) == config
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        msgspec.json.decode(text[:-1] + b',"more":1}', type=KvRuntimeConfig)


@pytest.mark.parametrize(
    "kind",
    [KvCacheConfig, KvRuntimeConfig, AttentionScoreOptions, KvShadowScore, KvMemoryReportV1],
)
def test_schema_names_every_field(kind):
    properties = msgspec.json.schema(kind)["$defs"][kind.__name__]["properties"]
    assert set(properties) == set(kind.__struct_fields__)


@pytest.mark.parametrize(
    "fields",
    [
        {"keys": "exact"},
        {"values": KvQuantPolicy()},
        {"keys": Quantized(8, 8, "PolarOnly")},
        {"values": Quantized(8, 8, rotation_kind="StoredQr")},
        {"shadow": 1},
    ],
)
def test_field_of_another_type_is_refused(fields):
    with pytest.raises(ArgumentTypeError):
        cache_of(**fields)


def test_scale_of_another_type_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"scale must be AttentionScale, got float 0\.5"):
        cache_of().attention_scores_with_options(np.zeros(D), AttentionScoreOptions(0.5))
    with pytest.raises(ArgumentTypeError, match="options must be AttentionScoreOptions"):
        cache_of().attention_scores_with_options(np.zeros(D), AttentionScale.BY_HEAD_DIM)
    options = AttentionScoreOptions(AttentionScale.custom("2"))
    with pytest.raises(ArgumentTypeError, match="scale must be a number"):
        cache_of().attention_scores_with_options(np.zeros(D), options)


def test_there_is_a_schema_of_every_configuration_and_report():
    schemas = json_schemas()
    assert set(schemas) == {
        "KvQuantPolicy",
        "KvCacheConfig",
        "KvRuntimeConfig",
        "AttentionScale",
        "AttentionScoreOptions",
        "KvShadowScore",
        "KvMemoryReportV1",
    }
    assert set(schemas["KvQuantPolicy"]["discriminator"]["mapping"]) == {"exact", "quantized"}
    assert schemas["KvMemoryReportV1"]["$ref"].endswith("/KvMemoryReportV1")


def test_schema_of_policies_tells_them_apart_by_kind():
    schema = msgspec.json.schema(Exact | Quantized)
    assert schema["discriminator"]["propertyName"] == "kind"
    assert set(schema["discriminator"]["mapping"]) == {"exact", "quantized"}


BAD_CONFIGS = [
    ({"dim": 0}, ZeroDimension),
    ({"dim": 0, "keys": EXACT, "values": EXACT}, ZeroDimension),
    ({"dim": 33}, OddDimension),
    ({"dim": 33, "keys": EXACT}, OddDimension),
    ({"dim": 1}, OddDimension),
    ({"dim": 2}, UnsupportedDimension),
    ({"dim": 1, "keys": EXACT, "values": EXACT}, UnsupportedDimension),
    ({"dim": 5000}, UnsupportedDimension),
    ({"keys": KvQuantPolicy.quantized(1, 8)}, InvalidBitWidth),
    ({"keys": KvQuantPolicy.quantized(17, 8)}, InvalidBitWidth),
    ({"values": KvQuantPolicy.quantized(0, 8)}, InvalidBitWidth),
    ({"values": Quantized(0, 8, TurboMode.POLAR_ONLY)}, InvalidBitWidth),
    ({"keys": KvQuantPolicy.quantized(8, 0)}, ZeroProjectionCount),
    ({"values": KvQuantPolicy.quantized(8, 0)}, ZeroProjectionCount),
    (
        {"dim": 80, "keys": Quantized(8, 8, rotation_kind=RotationKind.FAST_HADAMARD)},
        RotationFailed,
    ),
    ({"seed": -1}, ConfigError),
    ({"seed": TOP + 1}, ConfigError),
    ({"dim": -4}, ConfigError),
    ({"dim": 16.0}, ConfigError),
    ({"keys": KvQuantPolicy.quantized(8, -1)}, ConfigError),
]


@pytest.mark.parametrize(("fields", "error"), BAD_CONFIGS)
def test_configuration_that_cannot_be_is_refused(fields, error):
    with pytest.raises(error):
        cache_of(**fields)


@pytest.mark.parametrize(
    ("kind", "parents"),
    [
        (DimensionMismatch, (ArgumentError,)),
        (ZeroDimension, (ConfigError,)),
        (OddDimension, (ConfigError,)),
        (UnsupportedDimension, (ConfigError, UnsupportedError)),
        (InvalidBitWidth, (ConfigError,)),
        (ZeroProjectionCount, (ConfigError,)),
        (RotationFailed, (ConfigError,)),
        (MalformedCode, (ArgumentError,)),
        (NonFiniteInput, (NonFiniteError,)),
    ],
)
def test_every_error_is_the_crates_and_the_librarys(kind, parents):
    for parent in (TurboQuantError, ValueError, *parents):
        assert issubclass(kind, parent)


def test_errors_carry_their_numbers():
    with pytest.raises(OddDimension) as odd:
        cache_of(dim=33)
    assert odd.value.got == 33
    with pytest.raises(InvalidBitWidth, match="expected 2 to 16 bits, got 1") as bits:
        cache_of(keys=KvQuantPolicy.quantized(1, 8))
    assert bits.value.bits == 1


@pytest.mark.parametrize("dim", [4, 10, 64, 80])
@pytest.mark.parametrize("kind", [RotationKind.AUTO, RotationKind.STORED_QR])
def test_every_even_dimension_works(dim, kind):
    policy = Quantized(10, 8, rotation_kind=kind)
    cache = cache_of(policy, policy, dim=dim, count=3)
    assert np.abs(cache.decode_values([0, 1, 2]) - draw(3, dim, 2)).max() < 0.05


def test_odd_dimensions_work_where_nothing_is_coded():
    cache = cache_of(EXACT, EXACT, dim=7, count=3)
    assert np.array_equal(cache.decode_values([2, 0]), draw(3, 7, 2)[[2, 0]])


# -- tokens ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [42, TOP])
def test_codes_are_the_librarys_with_the_crates_seed_offset(seed):
    cache = cache_of(seed=seed, count=5)
    config = Polar(bits=8, mode="polar_qjl", projections=16)
    key_codec = PolarCodec(config, D, 1, seed=seed)
    value_seed = (seed + 0x1234_5678_ABCD_EF00) % 2**64
    value_codec = PolarCodec(Polar(bits=7), D, 1, seed=value_seed, stream="value")
    encoded = value_codec.encode(draw(5, seed=2)[:, None])
    expected = value_codec.decode(encoded, np.float64)[:, 0]
    assert np.abs(cache.decode_values(range(5)) - expected).max() < 1e-6
    query = draw(1, seed=3)
    encoded = key_codec.encode(draw(5, seed=1)[:, None])
    scores = key_codec.inner_products(query[:, None].astype(np.float64), encoded)[0, 0]
    assert np.abs(cache.attention_scores(query[0]) - scores).max() < 1e-5


BAD_TOKENS = [
    ({"key": np.zeros(D - 1)}, DimensionMismatch),
    ({"value": np.zeros(D + 1)}, DimensionMismatch),
    ({"key": np.full(D, math.nan), "value": np.zeros(3)}, DimensionMismatch),
    ({"key": np.full(D, math.nan)}, NonFiniteInput),
    ({"value": np.full(D, math.inf)}, NonFiniteInput),
    ({"value": np.full(D, 1e39)}, NonFiniteInput),
    ({"key": np.full(D, 6000.0)}, OverflowingError),
    ({"value": np.full(D, 1e5)}, OverflowingError),
    ({"key": "a" * D}, ArgumentTypeError),
    ({"key": np.zeros((1, D))}, ArgumentTypeError),
]


@pytest.mark.parametrize(("fields", "error"), BAD_TOKENS)
def test_token_that_cannot_be_stored_is_refused_and_nothing_changes(fields, error):
    cache = cache_of(count=2)
    query = draw(1, seed=3)[0]
    before = cache.shadow_attention_scores(query)
    good = {"key": np.zeros(D), "value": np.zeros(D)}
    with pytest.raises(error):
        cache.compress_token(**good | fields)
    assert cache.shadow_attention_scores(query) == before


def test_index_of_what_is_not_finite_is_told():
    key = np.zeros(D)
    key[7] = math.nan
    with pytest.raises(NonFiniteInput) as caught:
        cache_of().compress_token(key, np.zeros(D))
    assert caught.value.index == 7


@pytest.mark.parametrize("pair", PAIRS)
def test_vectors_of_any_norm_are_taken(pair):
    cache = cache_of(*pair)
    keys = draw(4, seed=5) * np.float32([[1e-2], [1], [100], [3000]])
    for key in keys:
        cache.compress_token(key, key)
    decoded = cache.decode_values(range(4))
    errors = np.linalg.norm(decoded - keys, axis=1) / np.linalg.norm(keys, axis=1)
    # No pair of six-bit angles turns by more than half a bin.
    assert errors.max() < math.pi / 64


def test_radii_in_float32_take_norms_that_float16_refuses():
    cache = cache_of(PLAIN, PLAIN, radii="f32")
    big = draw(1, seed=5)[0] * np.float32(1e6)
    cache.compress_token(big, big)
    assert np.linalg.norm(cache.decode_values([0])[0] - big) < 0.04 * np.linalg.norm(big)


# -- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("pair", PAIRS)
def test_scores_are_near_the_exact_ones_and_these_are_exact(pair):
    cache, query = cache_of(*pair, count=150), draw(1, seed=9)[0]
    true = draw(150, seed=1).astype(np.float64) @ query
    assert np.abs(cache.exact_attention_scores(query) - true).max() < 1e-5
    error = np.abs(cache.attention_scores(query) - true).max()
    assert error < 1.0
    assert (error < 1e-5) == (pair[0] == EXACT)


@pytest.mark.parametrize("pair", PAIRS)
def test_attention_is_softmax_of_unscaled_scores_over_decoded_values(pair):
    cache, query = cache_of(*pair, count=70), draw(1, seed=9)[0]
    logits = cache.attention_scores(query).astype(np.float64)
    weights = np.exp(logits - logits.max())
    expected = weights / weights.sum() @ cache.decode_values(range(70)).astype(np.float64)
    assert np.abs(cache.attend(query) - expected).max() < 1e-5


@pytest.mark.parametrize("mode", [TurboMode.POLAR_ONLY, TurboMode.POLAR_WITH_QJL])
def test_values_are_decoded_without_any_sketch(mode):
    bits = 6 + (mode is TurboMode.POLAR_WITH_QJL)
    cache = cache_of(values=Quantized(bits, 8, mode), count=6)
    codec = PolarCodec(
        Polar(bits=6, seed_offset=0x1234_5678_ABCD_EF00), D, 1, seed=42, stream="value"
    )
    expected = codec.decode(codec.encode(draw(6, seed=2)[:, None]))[:, 0]
    assert np.abs(cache.decode_values(range(6)) - expected).max() < 1e-6


@pytest.mark.parametrize(
    ("scale", "factor"),
    [
        (AttentionScale.NONE, 1.0),
        (AttentionScale.BY_HEAD_DIM, D**-0.5),
        (AttentionScale.custom(-2.5), -2.5),
    ],
)
@pytest.mark.parametrize("keys", [CODED, EXACT])
def test_scale_multiplies_the_scores(scale, factor, keys):
    cache, query = cache_of(keys, count=5), draw(1, seed=9)[0]
    scaled = cache.attention_scores_with_options(query, AttentionScoreOptions(scale))
    assert np.allclose(scaled, factor * cache.attention_scores(query), rtol=1e-6)
    assert scaled.dtype == np.float32


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e39])
def test_scale_that_is_not_finite_is_refused_even_without_tokens(value):
    options = AttentionScoreOptions(AttentionScale.custom(value))
    for count in (0, 2):
        with pytest.raises(MalformedCode, match="attention scale"):
            cache_of(count=count).attention_scores_with_options(np.zeros(D), options)
    with pytest.raises(DimensionMismatch):
        cache_of().attention_scores_with_options(np.zeros(3), options)


def test_shadow_scores_hold_both_and_their_distance():
    cache, query = cache_of(count=4), draw(1, seed=9)[0]
    exact, coded = cache.exact_attention_scores(query), cache.attention_scores(query)
    for index, score in enumerate(cache.shadow_attention_scores(query)):
        assert (score.exact, score.compressed) == (exact[index], coded[index])
        assert score.abs_error == abs(exact[index] - coded[index]) > 0
    for score in cache_of(EXACT, count=4).shadow_attention_scores(query):
        assert score.compressed == score.exact
        assert score.abs_error == 0


def test_without_shadows_exact_scores_are_refused_but_codes_are_read():
    cache, query = cache_of(shadow=False, count=3), draw(1, seed=9)[0]
    with_shadows = cache_of(count=3)
    assert np.array_equal(cache.attention_scores(query), with_shadows.attention_scores(query))
    assert np.array_equal(cache.attend(query), with_shadows.attend(query))
    for read in (cache.exact_attention_scores, cache.shadow_attention_scores):
        with pytest.raises(MalformedCode, match="keep_exact_shadow is off"):
            read(query)


def test_exact_keys_without_shadows_cannot_be_read():
    cache, query = cache_of(EXACT, CODED, shadow=False, count=3), np.ones(D)
    for read in (cache.attention_scores, cache.shadow_attention_scores, cache.attend):
        with pytest.raises(MalformedCode, match="exact keys cannot be read"):
            read(query)
    assert cache.decode_values([0]).shape == (1, D)


def test_exact_values_without_shadows_cannot_be_read():
    cache, query = cache_of(CODED, EXACT, shadow=False, count=3), np.ones(D)
    assert cache.attention_scores(query).shape == (3,)
    with pytest.raises(MalformedCode, match="exact values cannot be read"):
        cache.attend(query)
    with pytest.raises(MalformedCode, match="exact values cannot be read"):
        cache.decode_values([1, 5])
    with pytest.raises(DimensionMismatch):
        cache.decode_values([5, 1])
    assert cache.decode_values([]).shape == (0, D)


def test_keys_that_cannot_be_read_are_reported_before_values():
    with pytest.raises(MalformedCode, match="exact keys"):
        cache_of(EXACT, EXACT, shadow=False, count=1).attend(np.ones(D))


def test_empty_cache_reads_as_nothing():
    for pair in PAIRS:
        cache = cache_of(*pair, shadow=False)
        assert cache.is_empty()
        assert cache.attention_scores(np.ones(D)).shape == (0,)
        assert cache.exact_attention_scores(np.ones(D)).shape == (0,)
        assert cache.shadow_attention_scores(np.ones(D)) == []
        assert not cache.attend(np.ones(3)).any()
        assert cache.attend(np.ones(3)).shape == (D,)


@pytest.mark.parametrize("read", ["attention_scores", "exact_attention_scores", "attend"])
def test_query_is_checked(read):
    cache = cache_of(count=2)
    with pytest.raises(DimensionMismatch, match="expected dimension 32, got 31"):
        getattr(cache, read)(np.zeros(31))
    with pytest.raises(NonFiniteInput, match="finite query"):
        getattr(cache, read)(np.full(D, math.nan))


def test_index_behind_the_last_token_is_refused():
    with pytest.raises(DimensionMismatch) as caught:
        cache_of(count=3).decode_values([0, 7, 9])
    assert (caught.value.expected, caught.value.got) == (3, 8)
    for indices in ([-1], [0.5], [[0]]):
        with pytest.raises(ArgumentError, match="whole numbers"):
            cache_of(count=3).decode_values(indices)


def test_values_can_be_decoded_in_any_order_across_pages():
    cache, order = cache_of(values=EXACT, count=140), [139, 0, 64, 63, 64]
    assert np.array_equal(cache.decode_values(order), draw(140, seed=2)[order])


# -- bytes ----------------------------------------------------------------------------------------


def test_code_bytes_are_the_crates():
    # 64 radii of 4 bytes, 64 angles of 7 bits, 32 signs.
    assert KvQuantPolicy.quantized(8, 32).encoded_bytes(128) == 256 + 56 + 4
    assert Quantized(8, 32, TurboMode.POLAR_ONLY).encoded_bytes(128) == 256 + 64
    assert KvQuantPolicy.quantized(4, 9).encoded_bytes(10) == 20 + 2 + 2


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("shadow", [True, False])
def test_memory_report_adds_up(pair, shadow):
    count = 70
    cache = cache_of(*pair, shadow=shadow, count=count)
    report = cache.memory_report()
    sizes = [count * p.encoded_bytes(D) if isinstance(p, Quantized) else 0 for p in pair]
    shadows = [count * D * 4 if shadow or p == EXACT else 0 for p in pair]
    assert [report.compressed_key_bytes, report.compressed_value_bytes] == sizes
    assert [report.exact_shadow_key_bytes, report.exact_shadow_value_bytes] == shadows
    assert report.sidecar_only_bytes == sum(sizes) == cache.compressed_bytes()
    assert report.resident_bytes == sum(sizes) + sum(shadows)
    assert report.raw_fp32_baseline_bytes == count * 2 * D * 4 == cache.uncompressed_bytes()
    assert report.fp16_baseline_bytes == count * 2 * D * 2
    assert (report.schema, report.token_count, report.head_dim) == ("KvMemoryReportV1", count, D)
    assert report.warnings == [SHADOW_WARNING]
    ratio = cache.uncompressed_bytes() / sum(sizes) if sum(sizes) else 0.0
    assert cache.compression_ratio() == ratio
    assert msgspec.json.decode(msgspec.json.encode(report), type=KvMemoryReportV1) == report


@pytest.mark.parametrize(
    ("pair", "shadow", "row"),
    [
        # Keys: 16 angles of 7 bits, 16 f16 radii, 16 signs, a norm. Values: no sketch.
        ((CODED, CODED), False, (14 + 32 + 2 + 2) + (14 + 32)),
        ((CODED, CODED), True, (14 + 32 + 2 + 2) + (14 + 32) + 2 * 128),
        ((EXACT, EXACT), True, 2 * 128),
        ((EXACT, EXACT), False, 2 * 128),
        # Exact values are held once; the unread stream beside the keys' shadow is 1 bit wide.
        ((CODED, EXACT), True, (14 + 32 + 2 + 2) + 128 + 128 + (4 + 2)),
    ],
)
def test_page_bytes_are_what_the_planes_take(pair, shadow, row):
    report = cache_of(*pair, shadow=shadow, count=65).memory_report()
    layers = 1 + (shadow and pair != (EXACT, EXACT))
    # Two pages; an extent per layer is padded to 128 bytes, its planes to 16.
    assert 0 <= report.page_bytes - 2 * 64 * row < 2 * layers * 256
    assert report.pool_bytes == report.page_bytes // 2 * 9


def test_empty_cache_has_ratio_zero():
    cache = cache_of()
    assert (cache.compressed_bytes(), cache.compression_ratio()) == (0, 0.0)
    assert cache.memory_report().page_bytes == 0


def test_description_names_tokens_and_policies():
    assert repr(cache_of(count=2)).startswith("KvCacheCompressor(2 tokens, KvRuntimeConfig(")
