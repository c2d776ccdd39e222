"""The page that shows what was reconstructed beside the original."""

from base64 import b64decode
from io import BytesIO

import pytest
import torch
from PIL import Image

from privfm.checks import InvalidArgument
from privfm.reporting.reconstructions import Exhibit, marked, picture, write_reconstructions
from privfm.reporting.table import Column, ReportTable, TableRow

TABLE = ReportTable(
    (Column("Defence", "defence", "x"), Column("Batch 1", "B=1", "x")),
    (TableRow("", ("none <b>", "100 %")),),
    ("A note.",),
    (),
    "Texts",
)


def decoded(address):
    head, body = address.split(",")
    assert head == "data:image/png;base64"
    return Image.open(BytesIO(b64decode(body)))


def test_words_in_the_order_of_the_original_are_right():
    assert marked("a b c d", "x b c a") == (("x", False), ("b", True), ("c", True), ("a", False))
    assert marked("a b", "") == ()
    assert all(right for _, right in marked("a b c", "a b c"))


def test_a_picture_keeps_its_pixels():
    grey = torch.tensor([[[0.0, 1.0], [0.5, 2.0]]])
    assert list(decoded(picture(grey)).tobytes()) == [0, 255, 128, 255]
    colour = torch.zeros(3, 2, 2)
    colour[0] = 1.0
    assert decoded(picture(colour)).getpixel((1, 1)) == (255, 0, 0)
    assert decoded(picture(grey * torch.nan)).getpixel((0, 0)) == 0


@pytest.mark.parametrize("shape", [(2, 2), (2, 4, 4), (1, 1, 2, 2)])
def test_what_is_no_image_is_refused(shape):
    with pytest.raises(InvalidArgument, match="expected"):
        picture(torch.zeros(shape))


def test_the_page_holds_everything_and_escapes_it(tmp_path):
    image = picture(torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(0)))
    exhibits = [
        Exhibit(
            "pursuit, none", "exact 1", texts=(("the <secret>", marked("the <secret>", "the <public>")), ("x", ()))
        ),
        Exhibit("gradients, none", "psnr 30", images=((image, image, "30 dB"), (image, "", "nothing"))),
    ]
    path = write_reconstructions(
        tmp_path / "new", "What is read?", [("Texts", "All.")], [TABLE], exhibits, conditions={"Command": "python -m x"}
    )
    page = path.read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "the &lt;secret&gt;" in page
    assert '<mark>the</mark> <span class="missed">&lt;public&gt;</span>' in page
    assert "none &lt;b&gt;" in page
    assert page.count("<img ") == 3
    assert "nothing" in page
    assert "<script" not in page
    assert "http" not in page.replace("data:image", "")
    again = write_reconstructions(
        tmp_path / "new", "What is read?", [("Texts", "All.")], [TABLE], exhibits, conditions={"Command": "python -m x"}
    )
    assert again.read_text(encoding="utf-8") == page
