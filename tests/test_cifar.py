import dataclasses
import hashlib
import io
import tarfile
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch

from pysparse_ticket import data
from pysparse_ticket.data import cifar

NAMES = ["cifar10", "cifar100"]


def fake_files(layout: cifar.Layout) -> dict[str, np.ndarray]:
    """Records ``[N, bytes]`` of each file: labels in range, pixels at random."""
    draws = np.random.default_rng(0)
    files = {}
    for file, size in layout.sizes.items():
        records = draws.integers(0, 256, (size // layout.record_bytes, layout.record_bytes), dtype=np.uint8)
        for column, limit in enumerate(layout.label_ranges):
            records[:, column] = draws.integers(0, limit, len(records))
        files[file] = records
    return files


def write(files: dict[str, np.ndarray], folder) -> None:
    folder.mkdir(parents=True)
    for file, records in files.items():
        records.tofile(folder / file)


def pack(files: dict[str, np.ndarray], folder: str, extra: dict[str, bytes] | None = None) -> bytes:
    members = {f"{folder}/{file}": records.tobytes() for file, records in files.items()} | (extra or {})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(params=NAMES)
def small(request, monkeypatch):
    """A set's name, its layout with a few records a file, its files and its archive; nothing goes to the network."""
    name = request.param
    layout = dataclasses.replace(cifar.LAYOUTS[name], train_records=30, test_records=20)
    files = fake_files(layout)
    archive = pack(files, layout.folder, {"../escaped.bin": b"x", f"{layout.folder}/readme.html": b"x"})
    layout = dataclasses.replace(layout, md5=hashlib.md5(archive).hexdigest())
    monkeypatch.setitem(cifar.LAYOUTS, name, layout)

    def offline(url, **_):
        raise AssertionError(f"{url} was asked for")

    monkeypatch.setattr(urllib.request, "urlopen", offline)
    return name, layout, files, archive


def test_published_sizes():
    ten, hundred = (cifar.LAYOUTS[name] for name in NAMES)
    assert set(ten.sizes.values()) == {30_730_000} and len(ten.sizes) == 6
    assert hundred.sizes == {"train.bin": 153_700_000, "test.bin": 30_740_000}


def test_images_and_labels_are_the_files(small, tmp_path):
    name, layout, files, _ = small
    write(files, tmp_path / layout.folder)
    images = data.load(name, tmp_path)
    assert (images.shape, images.classes, images.flip, images.crop) == ((3, 32, 32), layout.label_ranges[-1], True, 4)
    records = np.concatenate([files[file] for file in layout.train_files])
    skip = len(layout.label_ranges)
    assert images.train_labels.tolist() == records[:, skip - 1].tolist()  # CIFAR-100: the fine label is the second
    # the first 1024 bytes of a record's pixels are red, row by row
    red = records[4, skip : skip + 1024].reshape(32, 32)
    assert torch.equal(images.train_images[4, 0], torch.from_numpy(red))
    assert np.array_equal(images.test_images.numpy().reshape(-1, 3072), files[layout.test_file][:, skip:])
    assert images.mean == pytest.approx(records[:, skip:].reshape(-1, 3, 1024).mean((0, 2)) / 255)


def test_folder_parent_and_renamed_folder_are_the_same(small, tmp_path):
    name, layout, files, _ = small
    write(files, tmp_path / layout.folder)
    write(files, tmp_path / "renamed")
    roots = [tmp_path, tmp_path / layout.folder, tmp_path / "renamed", str(tmp_path)]
    first, *others = (data.load(name, root) for root in roots)
    assert all(torch.equal(first.train_images, other.train_images) for other in others)


@pytest.mark.parametrize("root", [".", "{folder}", "{archive}"])
def test_archive_is_unpacked_in_its_known_files_alone(small, tmp_path, root):
    name, layout, files, archive = small
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / layout.archive).write_bytes(archive)
    images = data.load(name, tmp_path / "home" / root.format(folder=layout.folder, archive=layout.archive))
    assert np.array_equal(
        images.test_images.numpy().reshape(20, -1), files[layout.test_file][:, len(layout.label_ranges) :]
    )
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"home/{layout.archive}"} | {f"home/{layout.folder}/{file}" for file in layout.sizes}


def test_archive_fills_a_half_empty_folder_and_keeps_what_is_there(small, tmp_path):
    name, layout, files, archive = small
    own = {**files, layout.test_file: files[layout.test_file][::-1].copy()}
    write(own, tmp_path / layout.folder)
    (tmp_path / layout.folder / layout.train_files[-1]).unlink()
    (tmp_path / layout.archive).write_bytes(archive)
    images = data.load(name, tmp_path / layout.folder)
    assert images.test_labels.tolist() == own[layout.test_file][:, len(layout.label_ranges) - 1].tolist()
    assert (tmp_path / layout.folder / layout.train_files[-1]).read_bytes() == files[layout.train_files[-1]].tobytes()


def test_damaged_archive_is_refused_and_nothing_unpacked(small, tmp_path):
    name, layout, _, archive = small
    (tmp_path / layout.archive).write_bytes(archive[:-1])
    with pytest.raises(ValueError, match=rf"{layout.archive} is damaged .*delete it"):
        data.load(name, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [layout.archive]


@pytest.mark.parametrize("kind", ["missing", "short", "link"])
def test_archive_with_a_foreign_member_is_refused(small, tmp_path, monkeypatch, kind):
    name, layout, files, _ = small
    file = layout.train_files[0]
    wrong = {key: value for key, value in files.items() if key != file}
    if kind == "short":
        wrong[file] = files[file][:-1]
    content = pack(wrong, layout.folder)
    if kind == "link":
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
            member = tarfile.TarInfo(f"{layout.folder}/{file}")
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
            tar.addfile(member)
        content = buffer.getvalue()
    monkeypatch.setitem(cifar.LAYOUTS, name, dataclasses.replace(layout, md5=hashlib.md5(content).hexdigest()))
    (tmp_path / layout.archive).write_bytes(content)
    with pytest.raises(ValueError, match=f"lacks {file} in its known size"):
        data.load(name, tmp_path)
    assert not (tmp_path / layout.folder / file).exists()


def test_missing_folder_names_what_to_put_where(small, tmp_path):
    name, layout, _, _ = small
    with pytest.raises(FileNotFoundError, match=rf"{layout.folder}.*{layout.archive}.*download=True"):
        data.load(name, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_half_there_names_the_missing_file(small, tmp_path):
    name, layout, files, _ = small
    write(files, tmp_path / layout.folder)
    (tmp_path / layout.folder / layout.test_file).unlink()
    with pytest.raises(FileNotFoundError, match=rf"lacks {layout.test_file}: put {layout.archive} beside it"):
        data.load(name, tmp_path)


@pytest.mark.parametrize("change", [-1, 1], ids=["truncated", "too long"])
def test_file_of_another_size_is_refused(small, tmp_path, change):
    name, layout, files, _ = small
    write(files, tmp_path / layout.folder)
    path = tmp_path / layout.folder / layout.train_files[0]
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + b"x")
    with pytest.raises(ValueError, match=rf"{path.name} has .* instead of .*delete it"):
        data.load(name, tmp_path)


def test_label_out_of_range_is_refused(small, tmp_path):
    name, layout, files, _ = small
    for column, limit in enumerate(layout.label_ranges):
        folder = tmp_path / f"{column}" / layout.folder
        write(files, folder)
        records = files[layout.test_file].copy()
        records[7, column] = limit
        records.tofile(folder / layout.test_file)
        with pytest.raises(ValueError, match=rf"{layout.test_file} has a label {limit} where {limit - 1}"):
            data.load(name, folder)


def test_root_is_asked_for():
    with pytest.raises(ValueError, match="cifar10 needs root="):
        data.load("cifar10")


def test_download_only_when_asked(small, tmp_path, monkeypatch):
    name, layout, _, archive = small
    asked = []

    def urlopen(url, **_):
        asked.append(url)
        return io.BytesIO(archive)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(FileNotFoundError):
        data.load(name, tmp_path / "new")
    assert not asked
    images = data.load(name, tmp_path / "new", download=True)
    assert asked == [f"https://www.cs.toronto.edu/~kriz/{layout.archive}"]
    assert len(images.test_images) == 20
    data.load(name, tmp_path / "new", download=True)
    assert len(asked) == 1
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == sorted([layout.archive, layout.folder])


@pytest.mark.parametrize(
    ("sent", "error", "message"),
    [
        (lambda archive: io.BytesIO(archive[:-1]), ValueError, "is damaged .*try again"),
        (
            lambda archive: (_ for _ in ()).throw(urllib.error.URLError("no route")),
            ConnectionError,
            "no route.*by hand",
        ),
    ],
    ids=["cut off", "no network"],
)
def test_failed_download_leaves_nothing(small, tmp_path, monkeypatch, sent, error, message):
    name, _, _, archive = small

    def urlopen(url, **_):
        source = sent(archive)
        return source if isinstance(source, io.BytesIO) else next(source)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(error, match=message):
        data.load(name, tmp_path, download=True)
    assert list(tmp_path.iterdir()) == []
