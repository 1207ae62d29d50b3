import json
import struct
import zlib

from performers.data.books import AMERICAN, AUSTEN, SPURGEON
from performers.data.fetch import read_package


def test_novels_are_read_from_the_database_of_the_r_package(tmp_path):
    def block(lines):
        header = b"X\n" + bytes(25)
        strings = [struct.pack(">ii", 9, len(s.encode())) + s.encode() for s in lines]
        body = header + struct.pack(">i", len(lines)) + b"".join(strings)
        return struct.pack(">i", len(body)) + zlib.compress(body)

    folder = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    folder.mkdir(parents=True)
    novels = (["EMMA", "", "é one"], ["Persuasion", "two"])
    (folder / "Rdata.rdb").write_bytes(b"".join(map(block, novels)))
    texts, origin = read_package(AUSTEN, tmp_path)
    assert texts == {"Emma": "EMMA\n\né one", "Persuasion": "Persuasion\ntwo"}
    assert origin["package"] == "r-cran-janeaustenr"


def test_of_the_american_texts_those_before_1919_are_read(tmp_path):
    novel, addresses = tmp_path / "package/moby-dick/data", tmp_path / "package/sotu/data"
    novel.mkdir(parents=True)
    addresses.mkdir(parents=True)
    (novel / "data.txt").write_text("Call me Ishmael.\n", "utf-8")
    for year, name in [(1790, "george_washington_n"), (1918, "woodrow_wilson_d"), (1919, "x_d")]:
        (addresses / f"{year}_{name}.txt").write_text(f"{year} – é", "utf-8")
        (addresses / f"{year}_{name}.json").write_text(json.dumps({}), "utf-8")
    texts, _ = read_package(AMERICAN, tmp_path)
    assert texts == {
        "Moby-Dick": "Call me Ishmael.\n",
        "1790 George Washington": "1790 – é",
        "1918 Woodrow Wilson": "1918 – é",
    }


def test_the_commentary_is_read_without_its_markup_a_paragraph_to_a_line(tmp_path):
    psalms = [
        '<chapter sID="a"/> <title type="x">Psalm 1</title> <div sID="b"/> Blessed <hi>is</hi> '
        '&amp; was <div eID="b"/> <chapter eID="a"/>',
        '<chapter sID="c"/> <div sID="d"/> Why — é? <div eID="d"/>',
    ]
    folder = tmp_path / "usr/share/sword/modules/comments/zcom/tdavid"
    folder.mkdir(parents=True)
    blocks = [zlib.compress(psalm.encode()) for psalm in psalms]
    starts = [0, len(blocks[0])]
    index = [
        struct.pack("<III", start, len(block), len(psalm.encode()))
        for start, block, psalm in zip(starts, blocks, psalms, strict=True)
    ]
    (folder / "ot.czz").write_bytes(b"".join(blocks))
    (folder / "ot.czs").write_bytes(b"".join(index))
    texts, _ = read_package(SPURGEON, tmp_path)
    assert texts == {"The Treasury of David": "Psalm 1\n\nBlessed is & was\n\nWhy — é?"}
