"""Clean images: what is listed, what is refused, and which images are drawn and held out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from started import powerless

from cbpt_guard.defense.data import Listing, list_images, load_images, load_triggered, split
from cbpt_guard.errors import InputError
from cbpt_guard.images import Preprocess, load_image, prepare

SMALL = Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


def picture(path: Path, colour: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 18), (colour, 100, 200)).save(path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes of three images; the folders were not made in the order of their names."""
    for number, name in enumerate(["dog", "apple", "cat"]):
        for image in range(3):
            picture(tmp_path / "data" / name / f"{2 - image}.png", 10 * number + image)
    return tmp_path / "data"


def classes(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "classes.txt"
    path.write_bytes(text.encode())
    return path


def table(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "images.csv"
    path.write_bytes(text.encode())
    return path


def names(listing: Listing) -> list[list[str]]:
    return [[path.name for path in paths] for paths in listing.files]


def test_folders_are_classes_in_the_order_of_their_names(data: Path) -> None:
    listing = list_images(data)
    assert listing.classes == ("apple", "cat", "dog")
    assert names(listing) == [["0.png", "1.png", "2.png"]] * 3
    loaded = load_images(listing, SMALL)
    assert loaded.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert loaded.images.shape == (9, 16, 16, 3)
    assert loaded.images.dtype == torch.uint8
    assert loaded.counts() == {"apple": 3, "cat": 3, "dog": 3}
    wanted = prepare(load_image(data / "cat" / "1.png"), SMALL)
    assert np.array_equal(loaded.images[4].numpy(), wanted)


def test_only_visible_images_are_listed(data: Path) -> None:
    picture(data / "cat" / "deep" / "er" / "x.JPG")
    for hidden in ("cat/.hidden.png", "cat/.checkpoints/1.png", ".git/1.png"):
        picture(data / hidden)
    (data / "cat" / "notes.txt").write_text("no image")
    (data / "readme.png").write_text("no class")
    listing = list_images(data)
    assert listing.classes == ("apple", "cat", "dog")
    assert names(listing)[1] == ["0.png", "1.png", "2.png", "x.JPG"]


def test_a_link_to_nowhere_is_an_image_that_cannot_be_read(data: Path) -> None:
    (data / "cat" / "gone.png").symlink_to(data / "nowhere.png")
    os.mkfifo(data / "cat" / "pipe.png")
    assert names(list_images(data))[1] == ["0.png", "1.png", "2.png", "gone.png", "pipe.png"]
    with pytest.raises(InputError, match=r"2 images cannot be read[^$]*gone\.png[^$]*pipe\.png"):
        load_images(list_images(data), Preprocess(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))


def test_a_folder_that_cannot_be_looked_into_is_not_an_empty_one(data: Path) -> None:
    (data / "cat" / "deep").mkdir()
    (data / "cat" / "deep").chmod(0)
    code = "import sys, pathlib, cbpt_guard.listing as listing\nlisting.list_images(pathlib.Path(sys.argv[1]))"
    command = [*powerless(), sys.executable, "-c", code, str(data)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (data / "cat" / "deep").chmod(0o700)
    assert "InputError" in done.stderr
    assert f"{data / 'cat' / 'deep'} cannot be read: Permission denied" in done.stderr


def test_one_class_is_enough_to_count_answers(tmp_path: Path) -> None:
    picture(tmp_path / "cat" / "0.png")
    assert list_images(tmp_path, fewest_classes=1).classes == ("cat",)
    (tmp_path / "dog").mkdir()
    assert list_images(tmp_path, fewest_classes=1).classes == ("cat", "dog")


def test_a_csv_lies_beside_its_images(data: Path, tmp_path: Path) -> None:
    elsewhere = picture(tmp_path / "elsewhere.png")
    rows = f"path,note,label\r\ndata/dog/0.png,a,hound\r\ndata/cat/1.png,b,kitten\r\n{elsewhere},c,hound\r\n"
    listing = list_images(table(tmp_path, "\ufeff" + rows))
    assert listing.classes == ("hound", "kitten")
    assert set(listing.files[0]) == {data / "dog" / "0.png", elsewhere}
    assert load_images(listing, SMALL).labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file,label\na,b\n", "needs the columns path and label; it has 'file', 'label'"),
        ("", "needs the columns path and label"),
        ("path,label\n", "lists no image"),
        ("path,label\na.png,\n", "line 2 lacks a path or a label"),
        ("path,label\na.png\n", "line 2 lacks a path or a label"),
        ("path,label\na.png,cat\nb.png,cat\n", "one class"),
        ("path,label\na.png,cat\nb.png,dog\n./a.png,dog\n", r"line 4 lists './a\.png' again, as line 2 does"),
    ],
)
def test_a_bad_csv_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_images(table(tmp_path, text))


def test_a_csv_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "images.csv").write_bytes(b"path,label\n\xff\xfe,cat\n")
    with pytest.raises(InputError, match="cannot be read as a UTF-8 CSV"):
        list_images(tmp_path / "images.csv")


def test_a_csv_that_names_a_missing_image_says_so(data: Path, tmp_path: Path) -> None:
    listing = list_images(table(tmp_path, "path,label\ndata/dog/0.png,dog\ngone.png,cat\n"))
    with pytest.raises(InputError, match=r"1 image cannot be read.*\n.*gone\.png"):
        load_images(listing, SMALL)


def test_classes_rename_and_add(data: Path, tmp_path: Path) -> None:
    text = "\ufeffcat\ttabby cat\r\n\r\nzebra\n  naïve été \n"
    listing = list_images(data, classes(tmp_path, text))
    assert listing.classes == ("apple", "tabby cat", "dog", "zebra", "naïve été")
    assert [len(files) for files in listing.files] == [3, 3, 3, 0, 0]
    assert load_images(listing, SMALL).counts()["zebra"] == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bird\tcanary", "renames 'bird', but .* has no such class; it has 'apple', 'cat', 'dog'"),
        ("cat\tdog", "class 'dog' stands twice"),
        ("dog", "class 'dog' stands twice"),
        ("zebra\nzebra", "class 'zebra' stands twice"),
        ("cat\ta\ncat\tb", "line 2 renames 'cat' a second time"),
        ("cat\t", "line 1 needs a folder and a name"),
        ("\tcat", "line 1 needs a folder and a name"),
    ],
)
def test_a_bad_classes_file_is_refused(data: Path, tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list_images(data, classes(tmp_path, text))


def test_a_missing_or_binary_classes_file_is_refused(data: Path, tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("missing", "binary"):
        with pytest.raises(InputError, match=f"{name} cannot be read as UTF-8"):
            list_images(data, tmp_path / name)


def test_folders_without_what_is_needed_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        list_images(tmp_path / "missing")
    with pytest.raises(InputError, match="holds no class folders"):
        list_images(tmp_path)
    (tmp_path / "cat").mkdir()
    with pytest.raises(InputError, match=r"one class \('cat'\)"):
        list_images(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(InputError, match="no image"):
        list_images(tmp_path)
    picture(tmp_path / "cat" / "0.png")
    with pytest.raises(InputError, match=r"images of one class only \('cat'\)"):
        list_images(tmp_path)
    picture(tmp_path / "dog" / "0.png")
    assert list_images(tmp_path).classes == ("cat", "dog")


def test_corrupt_images_are_listed_or_left_out(data: Path) -> None:
    for number in range(12):
        (data / "cat" / f"bad{number:02}.png").write_bytes(b"\x89PNG broken")
    with pytest.raises(InputError) as caught:
        load_images(list_images(data), SMALL, skip_bad=False)
    message = str(caught.value)
    with pytest.raises(InputError) as caught:
        load_images(list_images(data), SMALL)
    assert "--skip-bad" not in str(caught.value), "who calls it so has no such flag"
    assert message.startswith("12 images cannot be read")
    assert "--skip-bad" in message
    assert "bad09.png" in message
    assert "bad10.png" not in message
    assert message.endswith("and 2 more")
    loaded = load_images(list_images(data), SMALL, skip_bad=True)
    assert loaded.counts() == {"apple": 3, "cat": 3, "dog": 3}
    assert len(loaded.skipped) == 12
    assert "bad00.png" in loaded.skipped[0]


def test_what_is_left_without_bad_images_must_do(data: Path) -> None:
    for name in ("cat", "dog"):
        for path in (data / name).iterdir():
            path.write_bytes(b"broken")
    with pytest.raises(InputError, match="only images of 'apple' can be read"):
        load_images(list_images(data), SMALL, skip_bad=True)
    for path in (data / "apple").iterdir():
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match="none of the 9 images can be read"):
        load_images(list_images(data), SMALL, skip_bad=True)


def test_unlabelled_images_come_from_every_sub_folder(data: Path, tmp_path: Path) -> None:
    assert load_triggered(data, SMALL).images.shape == (9, 16, 16, 3)
    with pytest.raises(InputError, match="is no folder"):
        load_triggered(tmp_path / "missing", SMALL)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no image"):
        load_triggered(tmp_path / "empty", SMALL)
    (data / "cat" / "bad.png").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"--skip-bad(.|\n)*bad\.png"):
        load_triggered(data, SMALL)
    loaded = load_triggered(data, SMALL, skip_bad=True)
    assert loaded.images.shape == (9, 16, 16, 3)
    assert [item.partition(":")[0] for item in loaded.skipped] == [str(data / "cat" / "bad.png")]


def listing(counts: dict[str, int]) -> Listing:
    return Listing(tuple(counts), tuple(tuple(Path(f"{name}/{i:03}") for i in range(n)) for name, n in counts.items()))


def test_shots_depend_on_the_seed_and_their_own_class_only() -> None:
    many = listing({"a": 30, "b": 30, "c": 3})
    drawn = many.drawn(8, seed=0)
    assert [len(files) for files in drawn.files] == [8, 8, 3]
    assert drawn == many.drawn(8, seed=0)
    assert drawn != many.drawn(8, seed=1)
    assert drawn.files[1] == listing({"x": 9, "b": 30, "y": 2}).drawn(8, seed=0).files[1]
    assert [path.name for path in drawn.files[0]] != [path.name for path in drawn.files[1]]
    assert list(drawn.files[0]) == sorted(set(drawn.files[0]))
    assert many.drawn(None, seed=0) == many


@pytest.mark.parametrize(
    ("most", "kept"), [(6, [3, 0, 3]), (9, [3, 0, 3]), (3, [2, 0, 1]), (2, [1, 0, 1]), (1, [1, 0, 0])]
)
def test_a_listing_is_thinned_evenly(most: int, kept: list[int]) -> None:
    whole = listing({"a": 3, "b": 0, "c": 3})
    thinned = whole.thinned(most)
    assert thinned.classes == whole.classes
    assert [len(files) for files in thinned.files] == kept
    assert all(set(few) <= set(files) for few, files in zip(thinned.files, whole.files, strict=True))


@pytest.mark.parametrize("shots", [0, -1])
def test_no_shots_are_refused(shots: int) -> None:
    with pytest.raises(InputError, match="leave no image"):
        listing({"a": 3, "b": 3}).drawn(shots, seed=0)


@pytest.mark.parametrize(
    ("count", "held_out", "held"),
    [(16, 0.2, 3), (4, 0.2, 1), (5, 0.2, 1), (3, 0.2, 0), (1, 0.2, 0), (100, 0.2, 20), (16, 0.0, 0), (4, 0.99, 3)],
)
def test_the_split_counts(count: int, held_out: float, held: int) -> None:
    labels = torch.arange(3).repeat(count)
    kept, hold = split(labels, held_out, seed=0)
    assert sorted([*kept.tolist(), *hold.tolist()]) == list(range(3 * count))
    assert labels[hold].bincount(minlength=3).tolist() == [held] * 3
    assert labels[kept].bincount(minlength=3).tolist() == [count - held] * 3


def test_the_split_is_decided_by_the_seed_class_by_class() -> None:
    labels = torch.arange(4).repeat_interleave(16)
    kept, hold = split(labels, 0.2, seed=0)
    again, other = split(labels, 0.2, seed=0), split(labels, 0.2, seed=1)
    assert torch.equal(hold, again[1])
    assert not torch.equal(hold, other[1])
    assert torch.equal(kept, kept.sort().values)
    fewer = split(labels[labels < 2], 0.2, seed=0)[1]
    assert torch.equal(fewer, hold[hold < 32])


def test_small_classes_give_nothing_away() -> None:
    labels = torch.tensor([0] * 8 + [1] * 3 + [2] * 8)
    assert labels[split(labels, 0.2, seed=0)[1]].tolist() == [0, 0, 2, 2]


def test_one_class_alone_is_not_held_out() -> None:
    """Success towards it could not be counted: there would be no image of another class."""
    labels = torch.tensor([0] * 20 + [1] * 3 + [3] * 2)
    kept, hold = split(labels, 0.2, seed=0)
    assert len(hold) == 0
    assert len(kept) == 25
