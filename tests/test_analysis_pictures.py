"""Neighbours, the map and the page say what is true, whatever the features."""

import re
from html.parser import HTMLParser

import pytest
import torch
import torch.nn.functional as F

from ssl_lab.analysis import embedding
from ssl_lab.analysis.embedding import colour, projected, require_projection, scatter, thumbnails
from ssl_lab.analysis.neighbours import OTHER, SAME, UNKNOWN, framed, nearest, neighbour_grid
from ssl_lab.analysis.page import Picture, write_page
from ssl_lab.errors import UserError


def rgb(text):
    return [int(text[i : i + 2], 16) for i in (1, 3, 5)]


def has(picture, colour):
    return bool((picture == torch.tensor(colour, dtype=torch.uint8)[:, None, None]).all(0).any())


# ---- neighbours


def test_nearest_equals_a_loop():
    g = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(30, 5, generator=g), torch.randn(4, 5, generator=g)
    for row, query in zip(nearest(bank, queries, 6).tolist(), queries):
        similarity = [float(F.cosine_similarity(query, other, dim=0)) for other in bank]
        assert row == sorted(range(30), key=lambda i: -similarity[i])[:6]
    assert nearest(bank, queries, 99).shape == (4, 30)


def test_frames_say_whether_the_class_is_the_same():
    black = torch.zeros(2, 3, 24, 24, dtype=torch.uint8)
    classes = torch.tensor([[1, 0], [0, -1]])
    out = neighbour_grid(black, black[:, None].repeat(1, 2, 1, 1, 1), torch.tensor([1, 2]), classes)
    assert out.dtype == torch.uint8
    _, H, W = out.shape
    assert W == 3 * (26 * 5 + 2) + 2 and H > 2 * (26 * 5 + 2) + 2  # and a header
    column, row = (W - 2) // 3, (26 * 5 + 2)
    top = H - 2 - 2 * row
    cells = [[out[:, top + row * i :, column * j :][:, :row, :column] for j in range(3)] for i in range(2)]
    assert [[has(c, SAME) for c in cs] for cs in cells] == [[False, True, False], [False] * 3]
    assert [[has(c, OTHER) for c in cs] for cs in cells] == [[False, False, True], [False, True, False]]
    assert [[has(c, UNKNOWN) for c in cs] for cs in cells] == [[False] * 3, [False, False, True]]


def test_a_frame_surrounds_the_image():
    image = torch.randint(0, 256, (3, 5, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    out = framed(image, (1, 2, 3), 2)
    assert torch.equal(out[:, 2:-2, 2:-2], image)
    out[:, 2:-2, 2:-2] = torch.tensor([1, 2, 3], dtype=torch.uint8)[:, None, None]
    assert (out == torch.tensor([1, 2, 3])[:, None, None]).all()


# ---- the map


def test_principal_components_are_those_of_unit_rows():
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 3, 1, 1, 1, 1])
    points, axes = projected(x)
    unit = F.normalize(x.double(), dim=1)
    u, s, _ = torch.linalg.svd(unit - unit.mean(0), full_matrices=False)
    expected = u[:, :2] * s[:2]
    assert (points.abs() - expected.abs()).abs().max() < 1e-10
    assert f"{100 * s[0] ** 2 / (s**2).sum():.0f} %" in axes
    torch.testing.assert_close(points, projected(x * 7)[0], atol=1e-6, rtol=0)
    assert torch.equal(points, projected(x)[0])


@pytest.mark.parametrize("x", [torch.ones(5, 4), torch.randn(5, 1), torch.zeros(1, 3)])
def test_features_without_spread_have_a_map_too(x):
    points, _ = projected(x)
    assert points.shape == (len(x), 2) and points.isfinite().all()
    y = torch.zeros(len(x), dtype=torch.int64)
    assert scatter(points, y, ["one"]).shape[0] == 3
    assert thumbnails(points, torch.zeros(len(x), 3, 8, 8, dtype=torch.uint8)).shape[0] == 3


def test_points_have_the_colour_of_their_class_and_lie_where_they_should():
    points = torch.tensor([[-1.0, -1], [1, 1], [-1, 1], [1, -1]])
    out = scatter(points, torch.tensor([0, 1, 2, -1]), ["cat", "dog", "bird"])
    half = 380
    quarters = {0: out[:, half:760, :half], 1: out[:, :half, half:760], 2: out[:, :half, :half]}
    quarters[-1] = out[:, half:760, half:760]
    for c, quarter in quarters.items():
        assert [other for other in (0, 1, 2, -1) if has(quarter, rgb(colour(other)))] == [c]
    assert out.shape[2] > 760 and all(has(out[:, :, 760:], rgb(colour(c))) for c in range(3))  # the legend


def test_many_classes_have_no_legend_and_colours_of_their_own():
    points = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    assert scatter(points, torch.arange(60), [str(i) for i in range(60)]).shape[2] == 760
    assert len({colour(c) for c in range(60)}) == 60 and all(re.fullmatch("#[0-9a-f]{6}", colour(c)) for c in range(60))


def test_small_images_do_not_cover_each_other():
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[0, 0], images[1, 1], images[2, 2] = 255, 255, 255
    out = thumbnails(torch.tensor([[0.0, 0], [0.01, 0], [1, 1]]), images)
    assert has(out, (255, 0, 0)) and has(out, (0, 0, 255)) and not has(out, (0, 255, 0))


def test_a_projection_that_cannot_be_had_is_named(monkeypatch):
    with pytest.raises(UserError, match="projection=tsne does not exist; there are pca, umap"):
        require_projection("tsne")
    monkeypatch.setattr(embedding.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install umap-learn"):
        projected(torch.randn(9, 3), "umap")


def test_umap_gives_places():
    pytest.importorskip("umap", reason="umap-learn is not installed")
    points, axes = projected(torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), "umap")
    assert points.shape == (40, 2) and points.dtype == torch.float64 and "UMAP" in axes


# ---- the page


class Links(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [value for name, value in attrs if name in ("src", "href")]


def test_a_page_shows_everything_with_relative_links_and_escapes(tmp_path):
    pictures = [Picture("a.png", "A <b> & c", 'say "hi" <script>'), Picture("b.png", "B", "")]
    path = write_page(tmp_path / "new", "run <1>", pictures, notes=["none & nothing"], table=[["x", "<y>"], ["1", "2"]])
    text = path.read_text()
    assert path == tmp_path / "new/index.html" and Links(text).found == ["a.png", "b.png"]
    assert (
        "<script" not in text and "http" not in text and "A &lt;b&gt; &amp; c" in text and "<th>&lt;y&gt;</th>" in text
    )
    assert "none &amp; nothing" in text and text.count("<figure>") == text.count("</figure>") == 2
