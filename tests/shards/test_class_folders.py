"""Folders of images: sub-folders, formats, split folders, and files that are left out."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dgm.common.errors import UserError
from shards.class_folders import NoTestImages, find_images
from shards.sources import FolderOptions, open_source


@pytest.fixture
def draw(tmp_path: Path) -> Callable[..., Path]:
    """Return a maker of small images and other files below tmp_path, by their names."""

    def make(*names: str) -> Path:
        for number, name in enumerate(names):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix in (".txt", ".csv", ".db", ".ini", "", ".DS_Store"):
                path.write_text("x")
            else:
                Image.new("RGB", (4, 4), (number, 0, 0)).save(path)
        return tmp_path

    return make


def labels(root: Path, split: str = "train", **options) -> list[tuple[str, str]]:
    tree = find_images(root, split, **options)
    return [(tree.classes[file.label], file.name) for file in tree.files]


def test_images_of_a_class_and_its_sub_folders_are_sorted_by_name(draw) -> None:
    names = [
        "cat/10.png", "cat/2.png", "cat/A.png", "cat/a b.png", "cat/a-b.png", "cat/a.png",
        "cat/day1/deep/y.png", "cat/day1/x.png", "cat/\u00e9.png", "dog/1.png",
    ]  # fmt: skip
    root = draw(*reversed(names))
    assert labels(root) == [(name[:3], name) for name in names]


def test_symlinks_are_followed_without_cycles(draw) -> None:
    root = draw("cat/a.png", "elsewhere/x/b.png")
    (root / "elsewhere").rename(root.parent / f"{root.name}-elsewhere")
    (root / "cat" / "linked").symlink_to(root.parent / f"{root.name}-elsewhere")
    (root / "cat" / "circle").symlink_to(root)
    (root / "cat" / "itself").symlink_to("itself")
    (root / "dog").symlink_to("cat")
    assert [name for _, name in labels(root)] == [
        "cat/a.png", "cat/linked/x/b.png", "dog/a.png", "dog/linked/x/b.png",
    ]  # fmt: skip


def test_images_of_every_format_and_mode_are_taken(draw) -> None:
    suffixes = [
        "png", "JPG", "jpeg", "jpe", "webp", "bmp", "dib", "gif", "tif", "TIFF", "ppm", "pgm",
        "tga", "ico", "pcx",
    ]  # fmt: skip
    root = draw(*(f"only/{number}.{suffix}" for number, suffix in enumerate(suffixes)))
    Image.new("RGB", (4, 4)).save(root / "only" / "a.jfif", "JPEG")
    for mode in ("L", "RGBA", "P"):
        Image.new("RGB", (4, 4)).convert(mode).save(root / "only" / f"{mode}.png")
    source = open_source(f"folder:{root}", "train", resize=4)
    found = [pixels.shape for pixels, _ in source.samples()]
    assert found == [(4, 4, 3)] * (len(suffixes) + 4)


def test_system_files_are_ignored_and_other_files_reported(draw) -> None:
    root = draw(
        "cat/a.png", "cat/._a.png", "cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini",
        "cat/@eaDir/a.png", "cat/.cache/b.png", "cat/labels.csv", "__MACOSX/cat/a.png",
        ".git/x.png", "preview.png", "readme.txt", "dog/b.png", "dog/clip.txt",
    )  # fmt: skip
    tree = find_images(root, "train")
    assert tree.classes == ("cat", "dog")
    assert [file.name for file in tree.files] == ["cat/a.png", "dog/b.png"]
    assert tree.notes == [
        "left out: 3 files that are not images (cat/labels.csv, dog/clip.txt, readme.txt), "
        "1 image outside class folders (preview.png)"
    ]


def test_a_pipe_in_a_class_folder_does_not_block(draw) -> None:
    root = draw("cat/a.png")
    os.mkfifo(root / "cat" / "b.png")
    assert labels(root) == [("cat", "cat/a.png")]


def test_file_names_that_are_not_utf8_are_listed(draw) -> None:
    root = draw("cat/a.png")
    os.rename(root / "cat" / "a.png", os.fsencode(root) + b"/cat/\xff\n.png")
    tree = find_images(root, "train")
    assert len(tree.files) == 1 and tree.listing.encode()
    assert len(list(open_source(f"folder:{root}", "train").samples())) == 1


@pytest.mark.parametrize("train", ["train", "Train", "TRAINING"])
@pytest.mark.parametrize("test", ["test", "Testing", "val", "VALID", "validation"])
def test_split_folders_may_have_any_usual_name(draw, train: str, test: str) -> None:
    root = draw(f"{train}/cat/1.png", f"{train}/dog/2.png", f"{test}/dog/3.png")
    assert labels(root) == [("cat", f"{train}/cat/1.png"), ("dog", f"{train}/dog/2.png")]
    assert labels(root, "test") == [("dog", f"{test}/dog/3.png")]
    notes = find_images(root, "test").notes
    note = [f"test images: those of {root / test}, as there is no folder test"]
    assert notes == (note if test.casefold().startswith("val") else [])


def test_val_is_not_used_where_test_exists(draw) -> None:
    root = draw("train/cat/1.png", "val/cat/2.png", "test/cat/3.png")
    assert labels(root, "test") == [("cat", "test/cat/3.png")]
    assert find_images(root, "train").notes == [
        f"left out: the folder {root / 'val'}, as there is a folder test"
    ]


def test_classes_may_be_named_train_and_test(draw) -> None:
    root = draw("train/1.png", "car/2.png", "bus/3.png", "test/4.png")
    assert find_images(root, "train").classes == ("bus", "car", "test", "train")
    inner = draw("splits/train/train/1.png", "splits/train/test/2.png") / "splits"
    assert find_images(inner, "train").classes == ("test", "train")


def test_class_folders_beside_split_folders_are_reported(draw) -> None:
    root = draw("train/cat/1.png", "test/cat/2.png", "extra/3.png")
    tree = find_images(root, "train")
    assert tree.classes == ("cat",)
    assert tree.notes == ["left out: the folders beside test, train (extra)"]


def test_the_remedies_of_split_folders_work(draw) -> None:
    root = draw("cat/1.png", "dog/2.png")
    with pytest.raises(NoTestImages, match=r"--holdout 0.1.*move the class folders into"):
        find_images(root, "test")
    (root / "train").mkdir()
    for name in ("cat", "dog"):
        (root / name).rename(root / "train" / name)
    draw("test/cat/3.png")
    assert [label for label, _ in labels(root)] == ["cat", "dog"]
    assert labels(root, "test") == [("cat", "test/cat/3.png")]


def test_images_are_held_out_by_their_names(draw) -> None:
    root = draw(*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(50)))
    train, test = labels(root, holdout=0.2), labels(root, "test", holdout=0.2)
    assert sorted([*train, *test]) == sorted(labels(root)) and not {*train} & {*test}
    assert 10 <= len(test) <= 30
    draw("cat/new.png", "dog/new.png")  # the others keep their split
    assert {*test} <= {*labels(root, "test", holdout=0.2)}
    assert {*train} <= {*labels(root, holdout=0.2)}
    source = open_source(f"folder:{root}", "test", options=FolderOptions(holdout=0.2))
    assert source.settings == {"holdout": 0.2} and source.classes == ("cat", "dog")
    assert sum(1 for _ in source.samples()) == len(source)


def test_a_holdout_that_leaves_a_split_without_images_is_refused(draw) -> None:
    root = draw("cat/1.png", "dog/2.png")
    for fraction, split, part in (
        (0.999999, "train", "leaves class cat"), (1e-9, "test", "raise it"),
        (1.0, "train", "from 0 to below 1"), (float("nan"), "train", "from 0"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=part):
            open_source(f"folder:{root}", split, options=FolderOptions(holdout=fraction))


def save(path: Path, image: Image.Image, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)


def transparent(mode: str) -> Image.Image:
    """Draw an opaque grey dot on a transparent black background."""
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (90, 90, 90, 255))
    return image.convert(mode)


def test_transparent_images_are_composited_on_white(tmp_path: Path) -> None:
    folder = tmp_path / "cat"
    save(folder / "a.png", transparent("RGBA"))
    save(folder / "b.png", transparent("LA"))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 90, 90, 90])
    palette.putpixel((1, 1), 1)
    save(folder / "c.png", palette, transparency=0)
    save(folder / "d.gif", palette, transparency=0)
    grey = Image.new("L", (4, 4), 0)
    grey.putpixel((1, 1), 90)
    save(folder / "e.png", grey, transparency=0)
    save(folder / "f.png", grey.convert("RGB"), transparency=(0, 0, 0))
    save(folder / "g.webp", transparent("RGBA"), lossless=True)
    save(folder / "h.png", Image.new("RGBA", (4, 4), (1, 2, 3, 255)))  # opaque
    for options, ground in (
        (FolderOptions(), 255), (FolderOptions("black"), 0), (FolderOptions("7,7,7"), 7),
    ):  # fmt: skip
        source = open_source(f"folder:{tmp_path}", "train", options=options)
        *found, last = [pixels for pixels, _ in source.samples()]
        expected = np.full((4, 4, 3), ground, np.uint8)
        expected[1, 1] = 90
        assert all(np.array_equal(pixels, expected) for pixels in found)
        assert (last == [1, 2, 3]).all()
        assert source.notes == [
            "7 images with transparent parts (cat/a.png, cat/b.png, cat/c.png, ...) composited on "
            f"{options.background}; --background chooses another colour"
        ]
    assert options.settings == {"background": "7,7,7"}


def test_half_transparent_images_are_composed_before_resizing(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)))
    [(pixels, _)] = open_source(f"folder:{tmp_path}", "train", resize=4).samples()
    assert (abs(pixels.astype(int) - 127) <= 1).all()


def test_an_unknown_background_is_refused(tmp_path: Path) -> None:
    for text in ("pink", "1,2", "1,2,300", "1,2,3,4", "-1,0,0", "a,b,c"):
        with pytest.raises(UserError, match=f"background is '{text}'; choose white"):
            open_source(f"folder:{tmp_path}", "train", options=FolderOptions(text))


def test_the_first_frame_is_used_and_reported(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), (value, value, value)) for value in (10, 200)]
    for name in ("a.gif", "b.tiff", "c.webp"):
        more = {"lossless": True} if name == "c.webp" else {}
        save(tmp_path / "cat" / name, frames[0], save_all=True, append_images=frames[1:], **more)
    source = open_source(f"folder:{tmp_path}", "train")
    assert all((pixels == 10).all() for pixels, _ in source.samples())
    assert source.notes == [
        "3 images of several frames or pages (cat/a.gif, cat/b.tiff, cat/c.webp): the first is used"
    ]


def test_all_damaged_images_are_listed_in_one_error(draw) -> None:
    root = draw(*(f"cat/{number:02d}.png" for number in range(40)))
    for number in range(3, 28):
        (root / "cat" / f"{number:02d}.png").write_bytes(b"" if number % 2 else b"no picture")
    with pytest.raises(UserError) as caught:
        list(open_source(f"folder:{root}", "train").samples())
    line = str(caught.value)
    assert line.startswith(f"25 of 40 images of {root} cannot be used: cat/03.png is empty")
    assert line.count("cat/") == 20 and "cat/22.png" in line and "and 5 more" in line
    assert line.endswith("replace or delete them, or leave damaged ones out with --skip-bad")
    skipping = FolderOptions(skip_bad=True)
    source = open_source(f"folder:{root}", "train", options=skipping)
    assert len(list(source.samples())) == len(source) == 15 and source.settings == {"skip_bad": 1}
    assert source.notes[0].startswith("left out: 25 damaged images (cat/03.png, cat/04.png")
    assert source.listing is not None and len(source.listing.splitlines()) == 41
    for path in (root / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="all images of class cat"):
        open_source(f"folder:{root}", "train", options=skipping)


def test_skip_bad_does_not_skip_unreadable_files(draw) -> None:
    root = draw("cat/a.png")
    for name in ("b.png", "c.png"):
        (root / "cat" / name).symlink_to("nowhere")
    with pytest.raises(UserError, match=r"2 of 3 images .*cat/b.png cannot be read"):
        open_source(f"folder:{root}", "train", options=FolderOptions(skip_bad=True))


def test_images_of_several_sizes_are_an_error_that_counts_them(draw) -> None:
    root = draw("cat/a.png", "cat/b.png", "dog/c.png")
    for name, size in (("dog/d.png", (5, 4)), ("dog/e.png", (6, 6))):
        Image.new("RGB", size).save(root / name)
    with pytest.raises(UserError) as caught:
        list(open_source(f"folder:{root}", "train").samples())
    assert str(caught.value) == (
        f"the images of {root} have 3 sizes: 3 of 4 x 4 (cat/a.png), 1 of 5 x 4 (dog/d.png), "
        "1 of 6 x 6 (dog/e.png); resize all to 4 x 4 with --resize 4, or to another side"
    )
    assert len(list(open_source(f"folder:{root}", "train", resize=4).samples())) == 5


def test_a_postscript_file_is_not_run_whatever_its_name(draw) -> None:
    root = draw("cat/a.png")
    (root / "cat" / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n")
    with pytest.raises(UserError, match=r"b.png is not a readable image \(cannot identify"):
        list(open_source(f"folder:{root}", "train").samples())
