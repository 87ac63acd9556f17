import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps

from guided_diffusion.console import InputError
from guided_diffusion.data.datasets import PictureFolder, SceneDataset, load_data, survey
from guided_diffusion.data.pairing import cityscapes_ids
from guided_diffusion.random_streams import uniform


def centred(picture):
    return torch.from_numpy(np.array(picture) / np.float32(127.5) - 1).permute(2, 0, 1)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)


def make_cityscapes(root, count=5, split="train", size=(32, 16), images=True, instances=True, ids=34):
    """Write noise scenes in the Cityscapes layout; `size` is (width, height)."""
    rng = np.random.default_rng(0)
    shape = size[::-1]
    for k in range(count):
        stem = f"{split}/{('aachen', 'ulm')[k % 2]}/s_{k:06d}"
        save(root / f"gtFine/{stem}_gtFine_labelIds.png", rng.integers(0, ids, shape, dtype=np.uint8))
        if images:
            save(root / f"leftImg8bit/{stem}_leftImg8bit.png", rng.integers(0, 256, (*shape, 3), dtype=np.uint8))
        if instances:
            save(root / f"gtFine/{stem}_gtFine_instanceIds.png", rng.integers(0, 65536, shape, dtype=np.uint16))
    return root


def make_coco(root, count=3, split="train", size=(48, 40)):
    rng = np.random.default_rng(1)
    for k in range(count):
        save(root / f"images/{split}2017/{k}.jpg", rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        save(root / f"labels/{split}2017/{k}.png", rng.choice([0, 181, 255], size[::-1]).astype(np.uint8))
        save(root / f"images/{split}_inst/{k}.png", rng.integers(0, 256, size[::-1], dtype=np.uint8))
    return root


@pytest.fixture(scope="module")
def city(tmp_path_factory):
    return make_cityscapes(tmp_path_factory.mktemp("city"))


def load(root, mode="cityscapes", **options):
    return load_data(**{"dataset_mode": mode, "data_dir": root, "batch_size": 2, "image_size": 8, **options})


def rows(batches):
    """{position: sample} of an iterable of batches."""
    found = {}
    for batch in batches:
        for j, position in enumerate(batch["position"].tolist()):
            assert position not in found
            found[position] = {key: value[j] for key, value in batch.items()}
    return found


def equal(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def refuse(call, *fragments):
    """The call must raise InputError with one line that holds every fragment."""
    with pytest.raises(InputError) as caught:
        call()
    message = str(caught.value)
    assert type(caught.value) is InputError and "\n" not in message
    for fragment in fragments:
        assert str(fragment) in message, message


def test_load_data_shapes_types_and_ranges(city):
    batch = next(load(city))
    expected = {"image": (torch.float32, -1, 1), "image_edge": (torch.float32, 0, 1)}
    expected |= {"label": (torch.int64, 0, 33), "instance": (torch.int32, 0, 65535)}
    for key, (dtype, low, high) in expected.items():
        assert batch[key].shape == (2, 3 if key == "image" else 1, 8, 16) and batch[key].dtype == dtype
        assert low <= batch[key].min() < (low + high) / 2 < batch[key].max() <= high
    assert batch["position"].tolist() == [0, 1] and batch["position"].dtype == torch.int64
    assert all(path.endswith("_leftImg8bit.png") for path in batch["path"])


def test_item_edges_and_maps_follow_the_resized_and_mirrored_picture(city):
    dataset = SceneDataset("cityscapes", city, 8, augment=True, seed=3)
    position = next(p for p in range(99) if uniform(3, "flip", p) < 0.5)
    sample, pair = dataset.item(1, position), dataset.pairs[1]
    picture = Image.open(pair.image).resize((16, 8), Image.Resampling.BOX)
    picture = ImageOps.mirror(picture.resize((16, 8), Image.Resampling.BICUBIC))
    assert torch.equal(sample["image"], centred(picture))
    edges = np.asarray(picture.convert("L").filter(ImageFilter.FIND_EDGES))
    assert torch.equal(sample["image_edge"][0], torch.from_numpy(edges.astype(np.float32) / 255))
    for key in ("label", "instance"):
        ids = Image.open(getattr(pair, key)).resize((16, 8), Image.Resampling.NEAREST)
        assert np.array_equal(sample[key][0], np.asarray(ids).astype(np.int64)[:, ::-1])


def test_item_maps_label_ids(tmp_path):
    make_coco(tmp_path / "coco")
    coco = SceneDataset("coco", tmp_path / "coco", 8, num_classes=183)
    assert set(coco[0]["label"].unique().tolist()) == {0, 181, 182}
    save(tmp_path / "ade/annotations/validation/a.png", np.array([[0, 1], [150, 151]], np.uint8))
    ade = SceneDataset("ade20k", tmp_path / "ade", 2, is_train=False, num_classes=151)
    assert ade[0]["label"].tolist() == [[[150, 0], [149, 150]]]
    save(tmp_path / "city/gtFine/val/a/1_gtFine_labelIds.png", np.array([[255, 33], [0, 7]], np.uint8))
    licence = SceneDataset("cityscapes", tmp_path / "city", 2, is_train=False, num_classes=35)
    assert licence[0]["label"].tolist() == [[[34, 33], [0, 7]]]
    assert cityscapes_ids(np.array([-1, 40])).tolist() == [34, 40]


def test_scene_dataset_labels_alone_and_no_instance(tmp_path, city):
    make_cityscapes(tmp_path, images=False, instances=False)
    dataset = SceneDataset("cityscapes", tmp_path, 8)
    assert not dataset.has_images and not dataset.has_instances
    assert set(dataset[0]) == {"label", "path", "position"} and dataset[0]["path"].endswith("_labelIds.png")
    assert "instance" not in next(load(city, no_instance=True))


def test_item_square_modes(tmp_path):
    make_coco(tmp_path)
    make_coco(tmp_path, split="val")
    for is_train, deterministic in ((True, False), (True, True), (False, True)):
        batch = next(load(tmp_path, "coco", image_size=16, is_train=is_train, deterministic=deterministic))
        assert batch["image"].shape == (2, 3, 16, 16) and batch["label"].shape == (2, 1, 16, 16)
    squeezed = SceneDataset("coco", tmp_path, 16, is_train=False)
    picture = Image.open(squeezed.pairs[0].image).resize((24, 20), Image.Resampling.BOX)
    assert torch.equal(squeezed[0]["image"], centred(picture.resize((16, 16), Image.Resampling.BICUBIC)))
    assert squeezed.sample_size(0) == (16, 16)


def test_item_random_crops_are_windows_of_pictures_at_a_scale_of_at_least_08(tmp_path):
    make_coco(tmp_path, count=1, size=(30, 25))
    dataset = SceneDataset("coco", tmp_path, 20, augment=True, seed=2)
    whole = {}
    for short in range(20, 26):  # 20 / 0.8 = 25
        size = (round(30 * short / 25), short)
        picture = Image.open(dataset.pairs[0].image).resize(size, Image.Resampling.BICUBIC)
        label = np.asarray(Image.open(dataset.pairs[0].label).resize(size, Image.Resampling.NEAREST))
        whole[short] = (np.asarray(picture), np.where(label == 255, 182, label))
    windows = set()
    for position in range(60):
        sample = dataset.item(0, position)
        flip = uniform(2, "flip", position) < 0.5
        image, found = (sample[key].flip(-1) if flip else sample[key] for key in ("image", "label"))
        pixels = ((image + 1) * 127.5).round().permute(1, 2, 0).numpy()
        for short, (picture, label) in whole.items():
            for top, left in np.ndindex(picture.shape[0] - 19, picture.shape[1] - 19):
                window = (slice(top, top + 20), slice(left, left + 20))
                if np.array_equal(picture[window], pixels):
                    assert np.array_equal(label[window], found[0])
                    windows.add((short, top, left))
    assert {short for short, _, _ in windows} == set(whole) and len(windows) > 30


def test_item_flips_are_drawn_and_only_in_training(city):
    dataset = SceneDataset("cityscapes", city, 4, augment=True, seed=1)
    plain, flips = dataset.item(0)["label"], [uniform(1, "flip", position) < 0.5 for position in range(40)]
    assert 10 < sum(flips) < 30
    for position, flip in enumerate(flips):
        assert torch.equal(dataset.item(0, position)["label"], plain.flip(-1) if flip else plain)
    for index, row in rows(load(city, image_size=4, deterministic=True)).items():
        assert torch.equal(row["label"], dataset.item(index)["label"])


@pytest.mark.parametrize("workers", [0, 2])
def test_load_data_bad_files_are_one_line_with_and_without_workers(tmp_path, workers):
    def first_batches(**options):
        return list(load(tmp_path, deterministic=True, num_workers=workers, num_classes=35, **options))

    make_cityscapes(tmp_path, count=4)
    assert len(first_batches()) == 2
    image, label, instance, _ = SceneDataset("cityscapes", tmp_path, 8).pairs[3]
    save(Path(instance), np.zeros((8, 8), np.uint16))
    refuse(first_batches, f"{instance} has (8, 8) pixels", label)
    save(Path(label), np.zeros((16, 30), np.uint8))
    refuse(first_batches, f"{image} has (32, 16) pixels, but {label} has (30, 16)")
    os.remove(instance), os.truncate(label, 30)
    refuse(lambda: first_batches(no_instance=True), label, "cannot be read")
    save(Path(label), np.full((16, 32), 40, np.uint8))
    refuse(lambda: first_batches(no_instance=True), f"{label} has id 40, --num_classes is 35")


def test_load_data_pictures_of_two_sizes_in_one_batch(tmp_path):
    make_cityscapes(tmp_path, count=2, size=(32, 16))
    make_cityscapes(tmp_path, count=1, size=(48, 16))
    refuse(lambda: next(load(tmp_path)), "s_000000_leftImg8bit.png", "s_000001", "differ in size", "--batch_size 1")
    assert len(list(load(tmp_path, batch_size=1, deterministic=True))) == 2


def test_survey_equals_counting(city):
    dataset = SceneDataset("cityscapes", city, 4, num_classes=35)
    counts, void, smallest = survey(dataset, len(dataset))
    ids = np.concatenate([np.asarray(Image.open(pair.label)).ravel() for pair in dataset.pairs])
    assert counts.tolist() == [(ids == k).sum() for k in range(35)] and void == 0
    assert smallest == Image.open(dataset.pairs[0].label).size
    larger = SceneDataset("cityscapes", make_cityscapes(city / "more", ids=50), 4, num_classes=35)
    refuse(lambda: survey(larger, 1), larger.pairs[0].label, "--num_classes is 35")


def darkness(image):
    """Class 1 where a picture (1, 3, H, W) is dark, else 0."""
    return (image.mean(1, keepdim=True) < 0).long()


def test_picture_folder_gives_the_same_pictures_as_with_its_labels(scenes):
    plain = SceneDataset("cityscapes", str(scenes), 16, is_train=False)
    folder = PictureFolder("cityscapes", str(scenes), 16, False, darkness)
    assert [(pair.image, pair.stem) for pair in folder.pairs] == [(pair.image, pair.stem) for pair in plain.pairs]
    ours, theirs = folder.batch([1, 2]), plain.batch([1, 2])
    assert all(torch.equal(ours[key], theirs[key]) for key in ("image", "image_edge"))
    assert torch.equal(ours["label"], darkness(ours["image"])) and ours["label"].dtype == torch.int64
    assert torch.equal(ours["instance"], ours["label"].int())
    assert folder.sample_size(0) == plain.sample_size(0) == tuple(ours["label"].shape[2:])


def test_picture_folder_takes_any_folder(tmp_path):
    (tmp_path / "c.txt").write_text("")
    for name, size in (("b.png", (20, 40)), ("deep/a.jpg", (30, 60))):
        save(tmp_path / name, np.full((*size, 3), 200, np.uint8))
    folder = PictureFolder("cityscapes", str(tmp_path), 16, False, darkness, no_instance=True)
    assert [pair.stem for pair in folder.pairs] == ["b", "deep/a"]
    sample = folder.item(1)
    assert sample["image"].shape == (3, 16, 32) and "instance" not in sample and not folder.has_instances
    assert PictureFolder("ade20k", str(tmp_path), 16, False, darkness).item(0)["image"].shape == (3, 16, 16)
    (tmp_path / "none").mkdir()
    refuse(lambda: PictureFolder("ade20k", str(tmp_path / "none"), 16, False, darkness), "--data_dir", "no pictures")
