# SPDX-License-Identifier: Apache-2.0
"""Launch configurations: pure functions, no larger than the problem, filling the device."""

import itertools
import math

import pytest
import torch

from vtclip.kernels import _configs, _tiles

TARGETS = {
    "sm_80": _configs.Target("cuda", 80, 163 * 1024),
    "sm_86": _configs.Target("cuda", 86, 99 * 1024),
    "sm_90": _configs.Target("cuda", 90, 227 * 1024),
    "sm_100": _configs.Target("cuda", 100, 227 * 1024),
    "gfx942": _configs.Target("hip", 0, 64 * 1024),
    "interpreter": _configs.Target("interpreter", 0, 1 << 30),
}
DTYPES = ((torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee"))
ATTENTION = [name for name, kind in _tiles.KINDS.items() if kind.tile is _tiles.Tile]
SIZES = {
    "single image, few classes": (1, 8, 20, 49, 64),
    "single image": (1, 8, 100, 49, 64),
    "RN50, few classes": (32, 8, 50, 49, 128),
    "RN50": (32, 8, 1000, 49, 128),
    "ViT-B/16": (128, 8, 1000, 196, 64),
    "one of each": (1, 1, 1, 1, 1),
    "wide heads": (2, 2, 129, 577, 200),
}


@pytest.fixture(params=TARGETS)
def target(request):
    return TARGETS[request.param]


@pytest.mark.parametrize("kind", _tiles.KINDS)
def test_a_tile_is_a_function_of_its_arguments(kind, target):
    asked = [
        (kind, dtype, precision, sizes[: len(_tiles.KINDS[kind].sizes)], target)
        for (dtype, precision), sizes in itertools.product(DTYPES, SIZES.values())
    ]
    before = [_tiles.choose(*arguments) for arguments in asked]
    with _tiles.choosing(_tiles.from_tables({})):  # with nothing remembered
        after = [_tiles.choose(*arguments) for arguments in reversed(asked)]
    assert before == after[::-1]
    assert len(set(before)) > 1 or _tiles.KINDS[kind].tile in (_tiles.RowTile, _tiles.CosineTile)


@pytest.mark.parametrize("kind", ATTENTION)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("dtype", "precision"), DTYPES)
def test_a_tile_is_a_power_of_two_no_larger_than_the_problem(kind, sizes, dtype, precision, target):
    tile = _tiles.choose(kind, dtype, precision, sizes, target)
    _, _, K, L, _ = sizes
    if tile.block_k == 0:  # the one-tile backward where registers never hold one
        assert kind == "rational_one_bwd"
        assert precision == "ieee"
        return
    for block, size in ((tile.block_k, K), (tile.block_l, L)):
        assert block == 1 << int(math.log2(block))
        assert 16 <= block <= _configs.padded(size)


def test_short_tiles_only_where_programs_are_few():
    """One image of 20 classes is spread; 32 images of 1000 classes keep the table's tile."""
    for name in ("sm_80", "sm_90", "sm_100"):
        tiles = [
            _tiles.choose("fwd", torch.bfloat16, "tf32", SIZES[which], TARGETS[name])
            for which in ("single image", "RN50")
        ]
        assert [tile.block_k for tile in tiles] == [16, 64 if name == "sm_90" else 128]


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("maps", [1, 8, 64, 256, 1024])
@pytest.mark.parametrize("K", [1, 20, 50, 100, 128])
def test_by_waves_is_never_later_than_the_table(name, maps, K):
    """Counted here again: waves * (rows + 16), a row twice as long under 64 rows from sm_90 on."""
    target = TARGETS[name]
    start = _tiles.Tile(128, 64, 8, 2)

    def time(rows):
        waves = math.ceil(maps * math.ceil(K / rows) / _configs.multiprocessors(target))
        return waves * (rows * (2 if target.capability >= 90 and rows < 64 else 1) + 16)

    chosen = _tiles.by_waves(start, maps, K, "tf32", target)
    best = min(time(rows) for rows in (128, 64, 32, 16))
    assert time(chosen.block_k) == best
    longer = [rows for rows in (128, 64, 32, 16) if rows > chosen.block_k]
    assert all(time(rows) > best for rows in longer)
    assert (chosen.block_l, chosen.num_stages) == (start.block_l, start.num_stages)
    assert chosen.num_warps == max(4, chosen.block_k // 16)


@pytest.mark.parametrize("name", ["sm_80", "sm_86", "sm_90", "sm_100"])
@pytest.mark.parametrize("B", [1, 2, 7, 32, 128, 1000])
@pytest.mark.parametrize("per_image", [1, 8, 64, 128, 400, 1320, 5000])
def test_image_chunks_fill_the_device(name, B, per_image):
    target = TARGETS[name]
    at_once = _configs.multiprocessors(target)
    images = _configs.images_per_program(B, per_image, target)
    chunks = math.ceil(B / images)
    assert 1 <= images <= B
    if B * per_image >= 2 * at_once:
        assert chunks * per_image >= 2 * at_once
    else:
        assert images == 1

    def time(images):  # of the program with most images; 1 to load and leave its tile
        waves = math.ceil(math.ceil(B / images) * per_image / at_once)
        return waves * (images + 1)

    assert time(images) <= time(1)
    if B >= 8 and B * per_image >= 16 * at_once:
        assert time(images) <= 1.6 * B * per_image / at_once
    assert chunks * per_image <= 8 * at_once + per_image  # partial sums stay few


@pytest.mark.parametrize("resident", [1, 2, 3])
@pytest.mark.parametrize("B", [1, 2, 7, 32, 128, 1000])
@pytest.mark.parametrize("per_image", [1, 8, 64, 128, 400, 1320, 5000])
def test_image_chunks_fill_waves_of_all_blocks_that_fit(B, per_image, resident):
    """No number of chunks, up to eight programs a multiprocessor, is done earlier."""
    target = TARGETS["sm_90"]
    processors = _configs.multiprocessors(target)
    chosen = _configs.images_per_program(B, per_image, target, resident)
    assert 1 <= chosen <= B

    def time(images):
        programs = math.ceil(B / images) * per_image
        return math.ceil(programs / (processors * resident)) * (images + 1)

    few = [n for n in range(1, B + 1) if math.ceil(B / n) * per_image <= 8 * processors + per_image]
    assert chosen in few or not few
    assert time(chosen) <= min((time(images) for images in few), default=math.inf)
    # 128 programs an image on twice 132 places: two chunks, where three would take a second wave
    if (B, per_image, resident) == (32, 128, 2):
        assert chosen == 16


def test_programs_that_share_a_multiprocessor_are_known_for_sm_90():
    half, single = torch.float16, torch.float32
    known = {
        name: _tiles.resident("fwd", half, 64, target) is not None
        for name, target in TARGETS.items()
    }
    assert known == {name: name == "sm_90" for name in TARGETS}
    held = [_tiles.resident("fwd", half, d, TARGETS["sm_90"]) for d in (64, 80, 128, 200)]
    assert held == [3, 2, 2, 1]
    assert _tiles.resident("masked fwd", half, 64, TARGETS["sm_90"]) == 2
    assert _tiles.resident("fwd", single, 64, TARGETS["sm_90"]) is None


def test_no_image_is_no_problem(target):
    assert _configs.images_per_program(0, 8, target) == 1
    assert _configs.images_per_program(8, 0, target) >= 1


def test_offsets_take_32_bits_where_a_matrix_allows_it():
    def strided(*strides):
        return torch.empty_strided((2, 3, 1, 1), strides, device="meta", dtype=torch.float16)

    def half(*sizes):
        return torch.empty(*sizes, dtype=torch.float16)

    assert not _configs.wide(half(2, 3, 1000, 64), None, half(2, 49))
    assert _configs.wide(half(2, 3, 1000, 64), torch.empty(2, 49))  # float32: registers
    assert not _configs.wide(strided(2**40, 2**40, 2**22, 1))  # images and heads have 64 bits
    assert _configs.wide(strided(1, 1, 2**23, 1))  # 257 rows of it pass 2^31
    assert _configs.wide(strided(1, 1, 1, 2**23))
    assert _configs.wide(half(4, 4), strided(1, 1, 2**23, 1))
    assert _configs.wide(half(1).expand(2**31 - 256, 1))
    assert not _configs.wide(half(1).expand(2**31 - 600, 1))


@pytest.mark.parametrize(
    ("programs", "D", "splits"),
    [
        # 64 steps by an image each on a quarter of the device, or 16 by four programs and a finish
        (32, 512, 4),
        (1, 512, 8),
        (128, 512, 1),  # the device is full
        (512, 1024, 1),
        (16, 128, 1),  # four steps: shorter than a second launch
    ],
)
def test_columns_of_the_head_are_split_where_that_is_done_first(programs, D, splits):
    tile = _tiles.HeadTile(64, 64, 64, 8, 3)
    columns, number = _tiles.head_splits(programs, D, tile, TARGETS["sm_90"])
    assert number == splits
    assert columns % tile.block_n == 0
    assert (number - 1) * columns < D <= number * columns
