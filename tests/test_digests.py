"""Digests of arrays by pieces, and of JSON objects."""

import json

import ml_dtypes
import numpy as np
import pytest

from clip_jax.digests import (
    DamagedError,
    SavedArray,
    check,
    covers,
    digest,
    from_json,
    is_finite,
    piece_of,
    seal,
    to_json,
    unseal,
    whole,
)

RNG = np.random.default_rng(0)
LEFT, RIGHT = ((0, 6), (0, 4)), ((0, 6), (4, 8))
TOP, BOTTOM = ((0, 2), (0, 8)), ((2, 6), (0, 8))


def parts_of(array, *boxes):
    return {box: array[tuple(slice(*ends) for ends in box)] for box in boxes}


def saved(array, *boxes):
    return SavedArray(
        array.shape, array.dtype.name, {box: digest(part) for box, part in parts_of(array, *boxes).items()}
    )


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int32])
def test_every_flipped_bit_is_noticed(dtype):
    array = RNG.normal(size=5).astype(dtype)
    digests = saved(array, whole(array.shape))
    check("a", digests, {whole(array.shape): array})
    content = array.tobytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        with pytest.raises(DamagedError, match="a differs from its digest"):
            check("a", digests, {whole(array.shape): np.frombuffer(bytes(flipped), dtype)})


@pytest.mark.parametrize("before", [(LEFT, RIGHT), (TOP, BOTTOM), (whole((6, 8)),)])
@pytest.mark.parametrize("after", [(LEFT, RIGHT), (TOP, BOTTOM), (whole((6, 8)),)])
def test_pieces_are_compared_with_the_parts_of_any_other_split(before, after):
    array = RNG.normal(size=(6, 8)).astype(np.float32)
    digests = saved(array, *before)
    check("a", digests, parts_of(array, *after))
    for number in range(array.size):
        other = array.copy()
        other.flat[number] += 1
        with pytest.raises(DamagedError):
            check("a", digests, parts_of(other, *after))


def test_a_piece_that_the_parts_do_not_cover_is_not_compared():
    array = RNG.normal(size=(6, 8)).astype(np.float32)
    digests, zeros = saved(array, LEFT, RIGHT), np.zeros_like(array)
    check("a", digests, parts_of(zeros, TOP))
    assert not covers([TOP], LEFT) and covers([TOP, BOTTOM], LEFT)
    with pytest.raises(DamagedError):
        check("a", digests, parts_of(zeros, LEFT))


def test_a_piece_within_a_part_is_a_view():
    array = np.zeros((6, 8), np.float32)
    assert np.shares_memory(piece_of({whole(array.shape): array}, LEFT), array)


def test_an_array_without_axes_is_one_piece():
    array = np.float32(3).reshape(())
    check("a", saved(array, ()), {(): array})
    with pytest.raises(DamagedError):
        check("a", saved(array, ()), {(): array + 1})


def test_another_type_with_the_same_bytes_is_refused():
    array = np.zeros(4, np.float32)
    with pytest.raises(DamagedError, match="a has the type int32, but float32 was saved"):
        check("a", saved(array, ((0, 4),)), {((0, 4),): array.view(np.int32)})


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_infinities_and_nans_are_found_wherever_they_are(dtype, value):
    array = RNG.normal(size=(3, 2**18)).astype(dtype)
    array[0, :4] = [np.finfo(np.float16).max, np.finfo(np.float16).min, 0.0, -0.0]
    assert is_finite(array)
    for place in (0, array.size // 2, array.size - 1):
        other = array.copy()
        other.flat[place] = value
        assert not is_finite(other)
        assert is_finite(other[:, 1:-1]) == (place == 0 or place == array.size - 1)


def test_whole_numbers_are_always_finite():
    assert is_finite(np.array([0x7F800000, -1], np.int32))


def test_every_flipped_bit_of_a_sealed_object_is_noticed():
    content = {"position": 160, "data_fingerprint": "ab-12"}
    text = json.dumps(seal(content)).encode()
    assert unseal(text, "file") == (content, True)
    assert unseal(json.dumps(content), "file") == (content, False)
    for bit in range(8 * len(text)):
        flipped = bytearray(text)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found, is_sealed = unseal(bytes(flipped), "file")
        except DamagedError:
            continue
        assert found == content or not is_sealed  # without its seal, a reader that expects one refuses it


@pytest.mark.parametrize("text", [b"", b"null", b"[1]", b"3", b'{"a": ', b"\xff\xfe"])
def test_what_is_no_object_is_refused_with_its_name(text):
    with pytest.raises(DamagedError, match="data/metadata is not a JSON object"):
        unseal(text, "data/metadata")


def test_digests_of_several_processes_are_put_together():
    array = RNG.normal(size=(6, 8)).astype(np.float32)
    files = {
        "digests/k-0.json": to_json({"a": saved(array, LEFT)}, 2).encode(),
        "digests/k-1.json": to_json({"a": saved(array, RIGHT)}, 2).encode(),
    }
    assert from_json(files) == {"a": saved(array, LEFT, RIGHT)}
    with pytest.raises(DamagedError, match=r"digests/k-1\.json is missing"):
        from_json({"digests/k-0.json": files["digests/k-0.json"]})
    lost = files | {"digests/k-1.json": to_json({}, 2).encode()}
    with pytest.raises(DamagedError, match="some elements of a have no digest"):
        from_json(lost)
    with pytest.raises(DamagedError, match=r"digests/k-0\.json has no digest"):
        from_json(files | {"digests/k-0.json": json.dumps({"processes": 2, "arrays": {}}).encode()})
