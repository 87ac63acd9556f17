import re
import warnings

import blobfile as bf
import pytest
from test_datasets import refuse

from guided_diffusion.data.pairing import Pair, chosen, find_pairs


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def touch_cityscapes(root, *stems, split="train", kinds=("image", "label", "instance")):
    names = {"image": "leftImg8bit/{}_leftImg8bit.png", "label": "gtFine/{}_gtFine_labelIds.png"}
    names["instance"] = "gtFine/{}_gtFine_instanceIds.png"
    touch(root, *(names[kind].format(f"{split}/{stem}") for stem in stems for kind in kinds))


def test_find_pairs_cityscapes_pairs_are_sorted_and_keep_cities_apart(tmp_path):
    stems = ["ulm/a_000001", "aachen/b_000000", "aachen/a_000001"]
    touch_cityscapes(tmp_path, *stems)
    touch_cityscapes(tmp_path, "bonn/other", split="val")
    touch(tmp_path, "gtFine/train/ulm/a_000001_gtFine_color.png", "gtFine/train/ulm/a_000001_gtFine_polygons.json")
    touch(tmp_path, "gtFine/train/ulm/._a_000001_gtFine_labelIds.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pairs = find_pairs("cityscapes", tmp_path, True)
    assert [pair.stem for pair in pairs] == sorted(stems)
    assert pairs[0].image == str(tmp_path / "leftImg8bit/train/aachen/a_000001_leftImg8bit.png")
    assert pairs[0].label == str(tmp_path / "gtFine/train/aachen/a_000001_gtFine_labelIds.png")
    assert pairs[0].instance == str(tmp_path / "gtFine/train/aachen/a_000001_gtFine_instanceIds.png")
    assert [pair.stem for pair in find_pairs("cityscapes", str(tmp_path) + "/", False)] == ["bonn/other"]


def test_find_pairs_linked_city_folders_are_followed(tmp_path):
    touch_cityscapes(tmp_path / "disk", "aachen/a")
    for kind in ("leftImg8bit", "gtFine"):
        (tmp_path / "data" / kind / "train").mkdir(parents=True)
        (tmp_path / "data" / kind / "train" / "aachen").symlink_to(tmp_path / "disk" / kind / "train" / "aachen")
    assert [pair.stem for pair in find_pairs("cityscapes", tmp_path / "data", True)] == ["aachen/a"]


def test_find_pairs_both_ade20k_layouts_and_coco(tmp_path):
    touch(tmp_path / "flat", "training/a/x.jpg", "training/a/x_seg.png", "validation/y.JPG", "validation/y_seg.png")
    touch(tmp_path / "official", "images/training/x.jpg", "annotations/training/x.png")
    touch(tmp_path / "coco", "images/val2017/7.jpg", "labels/val2017/7.png", "images/val_inst/7.png")
    (flat,) = find_pairs("ade20k", tmp_path / "flat", True)
    assert flat.stem == "a/x" and flat.instance is None and flat.label.endswith("training/a/x_seg.png")
    assert find_pairs("ade20k", tmp_path / "flat", False)[0].image.endswith("validation/y.JPG")
    (official,) = find_pairs("ade20k", tmp_path / "official", True)
    assert official.label.endswith("annotations/training/x.png")
    (coco,) = find_pairs("coco", tmp_path / "coco", False)
    assert coco.instance.endswith("images/val_inst/7.png") and coco.label.endswith("labels/val2017/7.png")
    assert find_pairs("coco", tmp_path / "coco", False, no_instance=True)[0].instance is None


def test_find_pairs_incomplete_scenes_are_left_out_and_named_in_one_line(tmp_path):
    touch_cityscapes(tmp_path, "a/whole")
    touch_cityscapes(tmp_path, "a/no_label", kinds=("image", "instance"))
    touch_cityscapes(tmp_path, "a/no_picture", kinds=("label", "instance"))
    touch_cityscapes(tmp_path, "a/no_map", kinds=("image", "label"))
    touch_cityscapes(tmp_path, *(f"z/{k}" for k in range(4)), kinds=("image",))
    with pytest.warns(UserWarning) as caught:
        pairs = find_pairs("cityscapes", tmp_path, True)
    assert [pair.stem for pair in pairs] == ["a/whole"]
    (message,) = [str(each.message) for each in caught]
    assert "\n" not in message and message.startswith("7 scene(s)") and message.endswith(", …")
    for part in ("a/no_label (no label)", "a/no_picture (no picture)", "a/no_map (no instance map)"):
        assert part in message
    assert message.count("z/") == 2  # five names in all
    with pytest.warns(UserWarning, match=r"6 scene\(s\)"):
        assert len(find_pairs("cityscapes", tmp_path, True, no_instance=True)) == 2


def test_find_pairs_folders_without_a_data_set(tmp_path):
    def refused(mode, data_dir, *fragments):
        refuse(lambda: find_pairs(mode, data_dir, True), *fragments)

    touch(tmp_path, "a_file", "two/labels/train2017/1.png", "two/images/train2017/1.jpg", "two/images/train2017/1.jpeg")
    for folder in ("", tmp_path / "nowhere", tmp_path / "a_file"):
        refused("cityscapes", folder, f'--data_dir "{folder}" is not a folder;', "--dataset_mode cityscapes")
    missing = f'--data_dir "{tmp_path}" has no folder gtFine/train;'
    refused("cityscapes", tmp_path, missing, "--dataset_mode cityscapes")
    refused("cityscapes", "s3://bucket/data", "--data_dir s3://bucket/data")
    refused("ade20k", tmp_path, "training or annotations/training")
    refused("coco", tmp_path / "two", "1.jpg", "1.jpeg", "same stem")
    touch(tmp_path, "images/train2017/1.jpg", "labels/train2017/001.txt")
    refused("coco", tmp_path, tmp_path / "labels/train2017", "no label file (*.png)")
    touch(tmp_path, "labels/train2017/001.png")
    refused("coco", tmp_path, "match", "train2017/1.jpg", "train2017/001.png")


def test_find_pairs_remote_folders_are_listed_through_blobfile(monkeypatch):
    # blobfile spells Azure paths differently from what the user typed
    tree = {
        "leftImg8bit/val": [("", [], []), ("/ulm", [], ["x_leftImg8bit.png"]), ("/bonn", [], ["y_leftImg8bit.png"])],
        "gtFine/val": [("", [], []), ("/bonn", [], ["y_gtFine_labelIds.png"]), ("/ulm", [], ["x_gtFine_labelIds.png"])],
    }

    def walk(top):
        folder = re.fullmatch("az://account/container/(.+)", top)[1]
        base = f"https://account.blob.core.windows.net/container/{folder}/"
        return [(base + below.strip("/"), dirs, files) for below, dirs, files in tree[folder]]

    monkeypatch.setattr(bf, "isdir", lambda path: True)
    monkeypatch.setattr(bf, "walk", walk)
    pairs = find_pairs("cityscapes", "az://account/container", False)
    assert [pair.stem for pair in pairs] == ["bonn/y", "ulm/x"]
    assert pairs[1].image == "az://account/container/leftImg8bit/val/ulm/x_leftImg8bit.png"

    def fail(top):
        raise bf.Error("no\ncredentials")

    monkeypatch.setattr(bf, "walk", fail)
    refuse(lambda: find_pairs("cityscapes", "az://account/container", False), "listed: no credentials")


def test_chosen_scenes_begin_with_a_word():
    pairs = [Pair(None, None, None, stem) for stem in ("aachen/a_1", "aachen/b_1", "bonn/a_1")]

    def stems(*words):
        return [pair.stem for pair in chosen(pairs, *words)]

    assert stems() == ["aachen/a_1", "aachen/b_1", "bonn/a_1"]
    assert stems("bonn, aachen/b") == ["aachen/b_1", "bonn/a_1"] and stems("", "aachen") == ["bonn/a_1"]
    assert stems("aachen", "aachen/a") == ["aachen/b_1"]
    refuse(lambda: stems("", "koeln"), "--leave_out koeln", "aachen/a_1")
    refuse(lambda: stems("bonn", "bonn"), "--only bonn --leave_out bonn", "no scene is left")
