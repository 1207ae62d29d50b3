"""Mail, gray images and the files of Long Range Arena, as sequences with labels."""

import gzip
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from performers.data.fetch import NpmPackage, read_package
from performers.data.gray_images import FASHION_MNIST, read_idx, shrink_images
from performers.data.labeled import LabeledSequences, byte_rows
from performers.data.list_operations import SYMBOLS
from performers.data.long_range_arena import (
    read_cifar,
    read_document_pairs,
    read_list_operations,
    read_pathfinder,
    read_reviews,
)
from performers.data.mail import SPAM_ASSASSIN, Mail, classify_mail


def texts(tokens):
    return [bytes(row).rstrip(b"\0") for row in tokens.tolist()]


@pytest.mark.usefixtures("without_shape_checks")
def test_every_sequence_has_a_label():
    with pytest.raises(ValueError, match="a label for each sequence: got 2 for 3"):
        LabeledSequences(byte_rows([b"a", b"b", b"c"], 5), torch.tensor([0, 1]))


def test_the_most_frequent_label_is_right_so_often():
    drawn = LabeledSequences(byte_rows([b"a"] * 5, 3), torch.tensor([2, 0, 2, 2, 1]))
    assert drawn.most_frequent_share() == 3 / 5


def test_a_package_of_npm_is_unpacked_and_its_version_told(tmp_path):
    files = {"package/package.json": json.dumps({"version": "7.5.3"}), "package/a.txt": "content"}
    with tarfile.open(tmp_path / "p.tgz", "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    package = NpmPackage("p", "MIT", lambda folder: (folder / "package/a.txt").read_text())
    content, origin = read_package(package, tmp_path / "p.tgz", report=lambda line: None)
    assert content == "content"
    assert (origin["version"], origin["license"]) == ("7.5.3", "MIT")


def test_different_bodies_of_mail_are_read_without_their_headers(tmp_path):
    root = tmp_path / "package/spam-assassin/data"
    mails = {
        "spam-1/1.txt": "Subject: a\nTo: b\n\nBuy\n\nnow\n",
        "spam-2/1.txt": "Subject: c\n\nBuy\n\nnow",
        "hard-ham-1/1.txt": "Subject: d\n\nHello\n",
        "easy-ham-1/1.txt": "Subject: e\n\n\n",
    }
    for name, text in mails.items():
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(text)
    found, _ = read_package(SPAM_ASSASSIN, tmp_path)
    assert sorted(found) == [(b"Buy\n\nnow", True), (b"Hello", False)]


# Of every mail the first and the last half of its bytes tell which it is.
MAILS = [Mail(bytes([40 + number]) * 31, number < 30) for number in range(101)]


def test_mail_is_classified_with_as_many_of_both_kinds():
    train, test = classify_mail(MAILS, 13, num_test=10)
    assert (len(train), len(test)) == (50, 10)
    for part in (train, test):
        assert part.most_frequent_share() == 0.5
        for text, label in zip(texts(part.tokens), part.labels, strict=True):
            assert text in {mail.body[:13] for mail in MAILS if mail.is_spam == bool(label)}
    assert not set(texts(train.tokens)) & set(texts(test.tokens))


def test_more_to_test_with_than_there_is_are_refused():
    with pytest.raises(ValueError, match=r"there are 60 sequences, got 60\. Take fewer"):
        classify_mail(MAILS, 13, num_test=60)


def test_a_smaller_image_has_the_mean_of_the_pixels_that_each_of_its_pixels_covers():
    images = torch.randint(0, 256, (3, 35, 35), dtype=torch.uint8)
    small = shrink_images(LabeledSequences(images.flatten(1), torch.tensor([2, 0, 1])), 7)
    assert small.labels.tolist() == [2, 0, 1]
    expected = [
        [
            float(image[5 * i : 5 * i + 5, 5 * j : 5 * j + 5].double().mean())
            for i in range(7)
            for j in range(7)
        ]
        for image in images
    ]
    assert (small.tokens.double() - torch.tensor(expected)).abs().max() <= 0.5 + 1e-4
    with pytest.raises(ValueError, match=r"side must divide that of the images, 35, got 4"):
        shrink_images(LabeledSequences(images.flatten(1), torch.tensor([2, 0, 1])), 4)


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return gzip.compress(header + array.astype(np.uint8).tobytes())


def test_idx_files_are_images_row_by_row(tmp_path):
    root = tmp_path / "usr/share/datasets/fashion-mnist"
    root.mkdir(parents=True)
    images = np.arange(2 * 3 * 5).reshape(2, 3, 5)
    for part in ("train", "t10k"):
        (root / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(images))
        (root / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(np.array([7, 9])))
    (train, _), _ = read_package(FASHION_MNIST, tmp_path)
    assert train.tokens.tolist() == images.reshape(2, 15).tolist()
    assert train.labels.tolist() == [7, 9]
    damaged = root / "damaged.gz"
    damaged.write_bytes(gzip.compress(gzip.decompress(idx(images))[:-1]))
    with pytest.raises(ValueError, match=r"damaged\.gz must be an IDX file"):
        read_idx(damaged, damaged)


def test_published_expressions_are_read_without_their_parentheses(tmp_path):
    path = tmp_path / "basic_train.tsv"
    path.write_text("Source\tTarget\r\n( ( ( [SM 4 ) 9 ) ] )\t3\r\n")
    drawn = read_list_operations(path, 7)
    assert [SYMBOLS[token - 1] for token in drawn.tokens[0] if token] == ["[SM", "4", "9", "]"]
    assert drawn.labels.tolist() == [3]
    path.write_text("Source\tTarget\n[FIRST 1 2 ]\t1\n")
    with pytest.raises(ValueError, match=r"must have expressions of .*, got '\[FIRST'"):
        read_list_operations(path, 7)


def test_published_pairs_of_documents_are_read_with_quotes_and_all(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text('1.0\tP1\tP2\tone "text\tanother\n0.0\tP3\tP4\té\tb\n')
    pairs = read_document_pairs(path, 11)
    assert texts(pairs.tokens[:, 0]) == [b'one "text', "é".encode()]
    assert texts(pairs.tokens[:, 1]) == [b"another", b"b"]
    assert pairs.labels.tolist() == [1, 0]
    path.write_text("1.0\tP1\tP2\tone\n")
    with pytest.raises(ValueError, match="must have 5 columns, separated by tabs: line 1 has 4"):
        read_document_pairs(path, 11)


def test_reviews_are_read_from_a_folder_for_each_label(tmp_path):
    for kind, name in (("neg", "0_1.txt"), ("pos", "0_9.txt"), ("pos", "1_8.txt")):
        (tmp_path / kind).mkdir(exist_ok=True)
        (tmp_path / kind / name).write_text(f"{kind} {name}")
    reviews = read_reviews(tmp_path, 31)
    assert texts(reviews.tokens) == [b"neg 0_1.txt", b"pos 0_9.txt", b"pos 1_8.txt"]
    assert reviews.labels.tolist() == [0, 1, 1]
    with pytest.raises(FileNotFoundError, match="must have texts in neg/ and in pos/"):
        read_reviews(tmp_path / "pos", 31)


def test_colors_of_cifar_become_the_gray_that_pillow_makes_of_them(tmp_path):
    colors = np.random.default_rng(0).integers(0, 256, (2, 3, 1024), dtype=np.uint8)
    labels = np.array([[4], [9]], np.uint8)
    path = tmp_path / "data_batch_1.bin"
    path.write_bytes(np.concatenate([labels, colors.reshape(2, -1)], 1).tobytes())
    images = read_cifar([path])
    pictures = [Image.fromarray(image.T.reshape(32, 32, 3)).convert("L") for image in colors]
    gray = np.stack([np.asarray(picture).reshape(-1) for picture in pictures])
    assert np.abs(images.tokens.numpy().astype(int) - gray).max() <= 1
    assert images.labels.tolist() == [4, 9]
    path.write_bytes(b"short")
    with pytest.raises(ValueError, match="must have 3073 bytes an image, got 5 in 1 files"):
        read_cifar([path])


def test_published_images_of_pathfinder_are_read_in_the_order_of_their_lists(tmp_path):
    for place in ("metadata", "imgs/2", "imgs/10"):
        (tmp_path / place).mkdir(parents=True)
    for number, label in ((10, 0), (2, 1)):
        picture = Image.fromarray(np.full((5, 7), number, np.uint8))
        picture.save(tmp_path / f"imgs/{number}/sample_0.png")
        (tmp_path / f"imgs/{number}/sample_1.png").touch()
        lines = [f"imgs/{number} sample_{i}.png {i} {label} 1.0 2 3\n" for i in (0, 1)]
        (tmp_path / f"metadata/{number}.npy").write_text("".join(lines))
    images = read_pathfinder(tmp_path)
    assert images.tokens.tolist() == [[2] * 35, [10] * 35]
    assert images.labels.tolist() == [1, 0]
    with pytest.raises(FileNotFoundError, match="must have metadata/ and imgs/"):
        read_pathfinder(tmp_path / "imgs")
