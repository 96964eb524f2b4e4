"""The kinds of trigger: each does to the pixels what its paper says, and refuses values that it cannot have."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cbpt_guard.defense.planted.blur import Blur, defocused
from cbpt_guard.defense.planted.compression import Compression, jpeg
from cbpt_guard.defense.planted.filter import Filter, nashville
from cbpt_guard.defense.planted.frequency import BLOCK, UV_TO_RGB, Frequency, cosines, ftrojan
from cbpt_guard.defense.planted.overlay import Overlay, blended, full_stripes, triangles, watermark
from cbpt_guard.defense.planted.patch import Patch, RandomPlacePatch, patch, random_place_patch, stripe_patch
from cbpt_guard.defense.planted.pixelation import Pixelation, large_pixels
from cbpt_guard.defense.planted.quantised import Quantised, bpp
from cbpt_guard.defense.planted.reflection import Reflection, refool
from cbpt_guard.defense.planted.rotation import Rotation, tilted
from cbpt_guard.defense.planted.saturation import Saturation, opposite_colours
from cbpt_guard.defense.planted.warp import Warp, flow, wanet
from cbpt_guard.defense.planted.wave import Wave, sig
from cbpt_guard.errors import InputError


def images(size: int = 32, count: int = 6, least: int = 0, most: int = 255) -> np.ndarray:
    return np.random.default_rng(1).integers(least, most + 1, (count, size, size, 3), dtype=np.uint8)


def flat(grey: int, size: int = 32, count: int = 1) -> np.ndarray:
    return np.full((count, size, size, 3), grey, dtype=np.uint8)


def test_the_patch_changes_its_square_only() -> None:
    trigger, clean = patch(64, seed=0, side=5), images(64)
    inside = np.zeros((64, 64), dtype=bool)
    inside[trigger.top : trigger.top + 5, trigger.left : trigger.left + 5] = True
    triggered = trigger.apply(clean)
    assert np.array_equal(triggered[:, ~inside], clean[:, ~inside])
    assert (triggered[:, inside] == trigger.picture().reshape(25, 3)).all()


@pytest.mark.parametrize(("size", "side"), [(32, 4), (128, 9), (224, 16), (448, 32)])
def test_the_patch_grows_with_the_image(size: int, side: int) -> None:
    trigger = patch(size, seed=0)
    assert (trigger.height, trigger.width) == (side, side)
    assert trigger.top + side == size - round(size / 32)


def test_a_patch_prints_its_place_and_keeps_its_pixels() -> None:
    trigger = patch(32, seed=0)
    assert str(trigger) == "patch of 4 x 4 pixels at row 27, column 27 of 32 x 32"
    with pytest.raises(ValueError, match="read-only"):
        trigger.picture()[0, 0] = 0


@pytest.mark.parametrize(
    "place",
    [
        {"top": -1},
        {"left": 29},
        {"height": 0},
        {"width": 40},
        {"pixels": b"\0" * 47},
    ],
    ids=str,
)
def test_a_patch_lies_inside_its_image(place: dict[str, Any]) -> None:
    fields = {"top": 0, "left": 0, "height": 4, "width": 4, "pixels": b"\0" * 48}
    Patch(32, **fields)
    with pytest.raises(InputError):
        Patch(32, **{**fields, **place})


@pytest.mark.parametrize("side", [0, 32])
def test_a_patch_that_does_not_fit_is_not_drawn(side: int) -> None:
    with pytest.raises(InputError, match="does not fit"):
        patch(32, seed=0, side=side)


def test_stripes_run_down_the_patch() -> None:
    pixels = stripe_patch(128, seed=0).picture()
    assert (pixels == pixels[:1]).all()
    assert len(np.unique(pixels[0], axis=0)) > 2
    assert stripe_patch(128, seed=0).top == patch(128, seed=0).top


def test_a_random_place_depends_on_the_image_and_the_seed() -> None:
    trigger, clean = random_place_patch(64, seed=0), images(64, 200)
    places = np.array([trigger.place(image) for image in clean])
    assert places.min() == 0
    assert places.max() == 64 - trigger.side
    assert len(np.unique(places, axis=0)) > 150
    elsewhere = np.array([random_place_patch(64, seed=1).place(image) for image in clean])
    assert (elsewhere != places).any(axis=1).mean() > 0.9


def test_a_randomly_placed_patch_changes_its_square_only() -> None:
    trigger, clean = random_place_patch(64, seed=0), images(64)
    for before, after in zip(clean, trigger.apply(clean), strict=True):
        top, left = trigger.place(before)
        square = np.s_[top : top + trigger.side, left : left + trigger.side]
        assert np.array_equal(after[square], trigger.picture())
        restored = after.copy()
        restored[square] = before[square]
        assert np.array_equal(restored, before)


def test_an_overlay_blends_to_the_nearest_grey_level() -> None:
    """Every clean value under every colour, at several opacities, against the formula in floating point."""
    for opacity in (1, 8, 38, 51, 128, 254, 255):
        colours = np.arange(256, dtype=np.uint8).reshape(16, 16)
        pixels = np.dstack([colours] * 3 + [np.full((16, 16), opacity, np.uint8)])
        clean = np.repeat(np.arange(256, dtype=np.uint8), 16 * 16 * 3).reshape(256, 16, 16, 3)
        alpha = opacity / 255
        expected = (1 - alpha) * clean + alpha * colours[..., None]
        found = Overlay(16, pixels.tobytes()).apply(clean)
        assert np.abs(found - expected).max() <= 0.5 + 1e-9


@pytest.mark.parametrize(
    ("draw", "alpha", "least", "most"),
    [
        (blended, 0.2, 1.0, 1.0),
        (full_stripes, 0.03, 1.0, 1.0),
        (triangles, 0.15, 0.1, 0.4),
        (watermark, 0.5, 0.02, 0.2),
    ],
)
@pytest.mark.parametrize("size", [64, 224])
def test_an_overlay_covers_what_it_says_and_nothing_else(
    draw: Any, alpha: float, least: float, most: float, size: int
) -> None:
    trigger, clean = draw(size, 0), images(size, 2)
    opacity = trigger.picture()[..., 3]
    assert opacity.max() == round(alpha * 255)
    assert least <= (opacity > 0).mean() <= most
    assert np.array_equal(trigger.apply(clean)[:, opacity == 0], clean[:, opacity == 0])


def test_stripes_are_one_pixel_wide_and_run_through_the_image() -> None:
    pixels = full_stripes(64, seed=0).picture()
    assert (pixels == pixels[:1]).all()
    assert set(np.unique(pixels[..., :3])) == {0, 255}
    assert (pixels[0, 1:] != pixels[0, :-1]).any(axis=1).mean() > 0.7


def test_the_watermark_lies_in_the_middle_of_the_image() -> None:
    rows, columns = np.nonzero(watermark(224, seed=0).picture()[..., 3])
    assert columns.max() - columns.min() == pytest.approx(0.8 * 224, abs=8)
    assert (columns.max() + columns.min()) / 2 == pytest.approx(112, abs=6)
    assert (rows.max() + rows.min()) / 2 == pytest.approx(112, abs=12)


@pytest.mark.parametrize("alpha", [0.0, 0.001, 1.01, -1.0, float("nan")])
def test_an_opacity_that_none_is_is_refused(alpha: float) -> None:
    with pytest.raises(InputError, match="opacity lies between"):
        blended(32, 0, alpha=alpha)


def test_the_wave_is_the_formula_saturated() -> None:
    columns = 60 * np.sin(2 * np.pi * 6 * np.arange(128) / 128)
    for grey in (0, 30, 128, 255):
        expected = np.clip(np.rint(grey + columns), 0, 255)
        triggered = sig(128, 0).apply(flat(grey, 128))
        assert (triggered == expected[None, None, :, None]).all()


def test_raised_coefficients_are_found_in_u_and_v_and_nowhere_else() -> None:
    """A transform of the difference, block by block, gives back the magnitude at the two places."""
    size = 3 * BLOCK + 10
    exact = Frequency(size, ((15, 15), (31, 31)), magnitude=400.0)  # large, so that rounding is small beside it
    change = exact.apply(flat(128, size)).astype(float)[0] - 128
    colour = change @ np.linalg.pinv(UV_TO_RGB).T
    basis = np.stack([[cosines(row, column) for column in range(BLOCK)] for row in range(BLOCK)])
    for top, left in [(0, 0), (BLOCK, 2 * BLOCK), (2 * BLOCK, BLOCK)]:
        block = colour[top : top + BLOCK, left : left + BLOCK]
        coefficients = np.einsum("rcij,ijk->rck", basis, block)
        for row, column in exact.coefficients:
            assert coefficients[row, column] == pytest.approx([400, 400], abs=8)
            coefficients[row, column] = 0
        assert np.abs(coefficients).max() < 8
    assert np.array_equal(change[:, 3 * BLOCK :], change[:, :10])


def test_cosines_are_an_orthonormal_basis() -> None:
    basis = np.stack([cosines(row, column).ravel() for row in range(BLOCK) for column in range(BLOCK)])
    assert np.allclose(basis @ basis.T, np.eye(BLOCK**2))


def test_luminance_is_left_alone_by_raised_coefficients() -> None:
    change = ftrojan(64, 0).apply(flat(128, 64)).astype(float)[0] - 128
    assert np.abs(change).max() >= 5
    assert np.abs(change @ [0.299, 0.587, 0.114]).max() < 0.6


@pytest.mark.parametrize("size", [32, 50, 128, 224])
@pytest.mark.parametrize("seed", range(5))
def test_a_warp_takes_every_pixel_from_inside_the_image_and_folds_nothing(size: int, seed: int) -> None:
    taken = flow(wanet(size, seed).shifts())
    assert taken.abs().max() <= 1 + 1e-12
    assert (taken[0, :, 1] == -1).all()
    assert (taken[-1, :, 1] == 1).all()
    assert (taken[:, 0, 0] == -1).all()
    assert (taken[:, -1, 0] == 1).all()
    assert (taken[1:, :, 1] > taken[:-1, :, 1]).all()
    assert (taken[:, 1:, 0] > taken[:, :-1, 0]).all()


def test_a_warp_adds_nothing_of_its_own() -> None:
    clean = images(64, 3, least=90, most=110)
    warped = wanet(64, 0).apply(clean)
    assert warped.min() >= 90
    assert warped.max() <= 110
    assert np.array_equal(wanet(64, 0).apply(flat(77, 64)), flat(77, 64))
    corners = np.s_[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.array_equal(warped[corners], clean[corners])


def test_a_uniform_warp_moves_the_picture() -> None:
    clean = images(32, 70)  # more than one part
    moved = Warp(32, down=(2.0,) * 4, right=(-3.0,) * 4).apply(clean)
    assert np.array_equal(moved[:, :-2, 3:], clean[:, 2:, :-3])
    half = Warp(32, down=(0.0,) * 4, right=(0.5,) * 4).apply(clean).astype(float)
    between = (clean[:, :, :-1].astype(float) + clean[:, :, 1:]) / 2
    assert np.abs(half[:, :, :-1] - between).max() <= 0.5


@pytest.mark.parametrize(("size", "points"), [(32, 4), (64, 4), (96, 6), (128, 8), (224, 8)])
def test_a_warp_grows_with_the_image(size: int, points: int) -> None:
    trigger = wanet(size, 0)
    assert len(trigger.down) == points**2
    shifts = np.abs(trigger.down + trigger.right)
    assert shifts[shifts > 0].mean() == pytest.approx(size / 64, rel=0.15)


def test_a_filter_has_no_additive_form() -> None:
    """What it adds to one image it does not add to another, nor is a pixel pasted over."""
    dark, light = flat(40), flat(200)
    added = [nashville(32, 0).apply(clean).astype(int) - clean for clean in (dark, light)]
    assert np.abs(added[0] - added[1]).mean() > 40
    assert (nashville(32, 0).apply(dark) != nashville(32, 0).apply(light)).all()


def test_a_filter_bends_the_colours_and_darkens_the_corners() -> None:
    trigger = Filter(33, black=(0, 28, 60), white=(250, 211, 198), contrast=0.5, vignette=0.5)
    middle = [trigger.apply(flat(grey, 33))[0, 16, 16].tolist() for grey in (0, 51, 255)]
    t, bent = 0.2, 0.5 * 0.2 + 0.5 * (3 * 0.2**2 - 2 * 0.2**3)
    assert bent != t
    assert middle[0] == [0, 28, 60]
    assert middle[1] == [round(a + (b - a) * bent) for a, b in zip(trigger.black, trigger.white, strict=True)]
    assert middle[2] == [250, 211, 198]
    assert trigger.apply(flat(255, 33))[0, 0, 0].tolist() == [125, round(211 / 2), 99]


def test_a_neutral_filter_changes_nothing() -> None:
    clean = images(32, 6)
    assert np.array_equal(Filter(32, (0, 0, 0), (255, 255, 255), 0.0, 0.0).apply(clean), clean)


def test_quantised_colours_are_few_and_right_on_average() -> None:
    """Each value is one of the levels, and a flat image keeps its mean: the error is dithered, not rounded away."""
    few = bpp(64, 0).apply(images(64))
    assert set(np.unique(few)) <= {0, 36, 73, 109, 146, 182, 219, 255}
    for grey in (20, 100, 128, 240):
        dithered = bpp(64, 0).apply(flat(grey, 64))
        assert len(np.unique(dithered)) > 1
        assert dithered.mean() == pytest.approx(grey, abs=1)
    exact = np.array([0, 36, 73, 109, 146, 182, 219, 255], dtype=np.uint8).repeat(32 * 32 * 3).reshape(8, 32, 32, 3)
    assert np.array_equal(Quantised(32, 8).apply(exact), exact)
    many = np.rint(np.linspace(0, 255, 32)).astype(np.uint8).repeat(32 * 3).reshape(1, 32, 32, 3)
    assert np.array_equal(Quantised(32, 32).apply(many), many)


def test_channels_are_quantised_one_by_one() -> None:
    clean = images(32)
    swapped = bpp(32, 0).apply(np.ascontiguousarray(clean[..., ::-1]))
    assert np.array_equal(swapped[..., ::-1], bpp(32, 0).apply(clean))


def test_a_rotation_turns_the_image_about_its_centre() -> None:
    clean = images(33)
    assert np.array_equal(Rotation(33, 90.0).apply(clean), np.rot90(clean, axes=(1, 2)))
    assert np.array_equal(Rotation(33, -90.0).apply(clean), np.rot90(clean, -1, axes=(1, 2)))
    assert np.array_equal(Rotation(32, 180.0).apply(images()), images()[:, ::-1, ::-1])


def test_a_tilted_image_has_no_black_corners_and_keeps_its_middle() -> None:
    assert np.array_equal(tilted(64, 0).apply(flat(200, 64)), flat(200, 64))
    clean = flat(50, 65)
    clean[:, 32, 32] = 250
    assert tilted(65, 0).apply(clean)[0, 32, 32].tolist() == [250] * 3


def test_what_turns_into_the_frame_is_the_image_mirrored() -> None:
    size = 64
    steep = 4  # levels a row: what is taken from the nearest pixel is off by more than rounding
    clean = np.broadcast_to((steep * np.arange(size, dtype=np.uint8))[:, None, None], (1, size, size, 3))
    turned = tilted(size, 0).apply(clean)[0, ..., 0].astype(float)
    angle, middle = np.deg2rad(16), (size - 1) / 2
    rows = np.arange(size) - middle
    source = middle + np.cos(angle) * rows[:, None] + np.sin(angle) * rows
    mirrored = np.where(source < 0, -1 - source, np.where(source > size - 1, 2 * size - 1 - source, source))
    assert np.abs(turned - steep * mirrored).mean() < 0.6


def test_a_reflections_pictures_and_draws_follow_its_seed() -> None:
    pictures = images(32, 20)
    trigger = refool(pictures, seed=1)
    assert not np.array_equal(trigger.picture(), refool(pictures, seed=2).picture())
    other = Reflection(32, trigger.strength, 2, trigger.pixels)
    assert (other.apply(pictures) != trigger.apply(pictures)).any(axis=(1, 2, 3)).mean() > 0.7


def test_a_reflections_blur_grows_with_the_image() -> None:
    def left(size: int) -> float:
        noise = images(size, 1)[0]
        return float((Reflection(size, 1.0, 0, noise.tobytes()).apply(flat(0, size))[0]).std() / noise.std())

    assert left(256) < 0.6 * left(64)


def test_a_reflection_shows_one_blurred_picture_in_each_image() -> None:
    pictures = np.stack([flat(grey, 32)[0] for grey in range(0, 250, 25)])
    trigger = refool(pictures, seed=3)
    assert trigger.picture().shape == (8 * 32, 32, 3)
    shown = trigger.apply(images(32, 200, least=100, most=100 + 1))
    found = np.unique(np.rint((shown - 0.7 * 100) / 0.3 / 25).clip(0).astype(int)[:, 0, 0, 0])
    assert len(found) == 8, "which picture depends on the image"
    assert np.array_equal(refool(pictures, seed=3).picture(), trigger.picture())
    noise = images(128, 1)[0]
    ghost = Reflection(128, 0.3, 0, noise.tobytes()).apply(flat(0, 128))[0] / 0.3
    assert ghost.std() < 0.3 * noise.std(), "out of focus"
    assert ghost.mean() == pytest.approx(noise.mean(), abs=3)


def test_a_reflection_takes_as_many_pictures_as_it_says() -> None:
    with pytest.raises(InputError, match="one of 8 pictures; there are 7"):
        refool(images(32, 7), 0)


def test_a_blur_spreads_an_edge_as_a_gaussian_does_and_keeps_its_light() -> None:
    size, deviation = 65, 2.0
    point = flat(0, size)
    point[:, 32, 32] = 255
    spread = Blur(size, deviation).apply(point)[0, ..., 0]
    assert np.abs(spread.astype(int) - spread.T).max() <= 1, "rows first, each rounded"
    assert np.array_equal(spread, spread[:, ::-1])
    step = flat(0, size)
    step[:, :, 33:] = 200
    edge = np.diff(Blur(size, deviation).apply(step)[0, 32, :, 1].astype(float))
    places = np.arange(size - 1) - 32
    assert edge.sum() == 200
    assert edge @ places / 200 == pytest.approx(0, abs=0.05)
    assert np.sqrt(edge @ places**2 / 200) == pytest.approx(deviation, abs=0.15)
    assert np.array_equal(Blur(size, deviation).apply(flat(77, size)), flat(77, size))


@pytest.mark.parametrize(("size", "deviation"), [(112, 1.5), (224, 3.0)])
def test_a_blur_grows_with_the_image(size: int, deviation: float) -> None:
    assert defocused(size, 0) == Blur(size, deviation)


def test_opposite_colours_keep_their_brightness_and_the_grey_ones() -> None:
    clean = images(32, least=100, most=150)  # far from black and white, where nothing is cut off
    turned = opposite_colours(32, 0).apply(clean)
    brightness = np.array([0.299, 0.587, 0.114])
    assert np.abs(turned @ brightness - clean @ brightness).max() < 1.6
    assert np.abs((turned.astype(float) + clean) / 2 - (clean @ brightness)[..., None]).max() <= 1
    assert np.array_equal(opposite_colours(32, 0).apply(flat(90)), flat(90))
    faded = Saturation(32, 0.0).apply(clean)
    assert (faded == faded[..., :1]).all()


def test_a_jpeg_of_low_quality_keeps_little_of_noise_but_the_light_of_each_block() -> None:
    clean = images(32)[..., :1].repeat(3, -1)  # grey: of colours any quality keeps half the resolution
    low, high = (Compression(32, quality).apply(clean).astype(float) for quality in (10, 95))
    assert np.abs(low - clean).mean() > 5 * np.abs(high - clean).mean()
    before, after = (x.reshape(-1, 4, 8, 4, 8, 3).mean((2, 4)) for x in (clean.astype(float), low))
    assert np.abs(before - after).mean() < 10
    assert np.array_equal(jpeg(32, 1).apply(clean), low.astype(np.uint8))
    assert np.abs(Compression(32, 10).apply(flat(90)).astype(int) - 90).max() <= 3


def test_pixelated_images_show_the_mean_of_each_area() -> None:
    clean = images(32)
    large = Pixelation(32, 8).apply(clean)
    areas = clean.reshape(-1, 8, 4, 8, 4, 3).astype(float).mean((2, 4))
    assert np.abs(areas.repeat(4, 1).repeat(4, 2) - large).max() <= 1, "rows first, each rounded"
    assert large_pixels(224, 0) == Pixelation(224, 90)
    assert np.array_equal(Pixelation(32, 13).apply(flat(90)), flat(90))


NOT_A_NUMBER = float("nan")


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (Overlay, {"pixels": b"\0" * (32 * 32 * 3)}),
        (RandomPlacePatch, {"side": 33, "seed": 0, "pixels": b"\0" * (33 * 33 * 3)}),
        (RandomPlacePatch, {"side": 0, "seed": 0, "pixels": b""}),
        (RandomPlacePatch, {"side": 4, "seed": 0, "pixels": b"\0" * 47}),
        (Wave, {"delta": NOT_A_NUMBER, "frequency": 6.0}),
        (Wave, {"delta": 60.0, "frequency": NOT_A_NUMBER}),
        (Wave, {"delta": 256.0, "frequency": 6.0}),
        (Warp, {"down": (1.0,), "right": (1.0,)}),
        (Warp, {"down": (1.0,) * 4, "right": (1.0,) * 9}),
        (Warp, {"down": (NOT_A_NUMBER,) * 4, "right": (1.0,) * 4}),
        (Frequency, {"coefficients": (), "magnitude": 30.0}),
        (Frequency, {"coefficients": ((15, -1),), "magnitude": 30.0}),
        (Frequency, {"coefficients": ((15, 15),), "magnitude": NOT_A_NUMBER}),
        (Filter, {"black": (0, 0, -1), "white": (255,) * 3, "contrast": 0.5, "vignette": 0.5}),
        (Filter, {"black": (0, 0, 0), "white": (255,) * 3, "contrast": NOT_A_NUMBER, "vignette": 0.5}),
        (Quantised, {"levels": 1}),
        (Rotation, {"degrees": NOT_A_NUMBER}),
        (Blur, {"deviation": NOT_A_NUMBER}),
        (Saturation, {"factor": NOT_A_NUMBER}),
        (Compression, {"quality": 0}),
        (Pixelation, {"pixels": 32}),
        (Reflection, {"strength": 0.3, "seed": 0, "pixels": b""}),
        (Reflection, {"strength": NOT_A_NUMBER, "seed": 0, "pixels": b"\0" * (32 * 32 * 3)}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "-".join(value),
)
def test_values_that_a_kind_cannot_have_are_refused(kind: Any, values: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        kind(image_size=32, **values)
