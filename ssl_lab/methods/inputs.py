"""What a method asks of its batch: the views that its `data.views` makes, in the number and sizes that it can take."""

from torch import Tensor

from ssl_lab.backbones.vit import ViT
from ssl_lab.errors import UserError
from ssl_lab.types import Batch


def views_of(
    batch: Batch, who: str, choice: str, *, least: int = 2, most: int | None = None, alike: int = 0
) -> list[Tensor]:
    """The views of a batch, V x (B, C, Hv, Wv).

    Args:
        batch: what the data give.
        who: the method, for the message.
        choice: recipe of views that it is made for.
        least: so many views at least.
        most: so many at most; None = any number.
        alike: the first so many are of one size.

    Raises:
        UserError: no views, too few or too many, or of several sizes.
    """
    if "views" not in batch:
        raise UserError(f"{who} compares views of an image, the data give none: choose views@data.views={choice}")
    views = batch["views"]
    if len(views) < least or (most is not None and len(views) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        raise UserError(f"{who} got {len(views)} views and needs {wanted}: choose views@data.views={choice}")
    sizes = [" x ".join(map(str, view.shape[-2:])) for view in views[:alike]]
    if len(set(sizes)) > 1:
        raise UserError(
            f"{who} needs its first {len(sizes)} views of one size, not {', '.join(sizes)} px: give them one size or "
            f"choose views@data.views={choice}"
        )
    return views


def image_of(batch: Batch, encoder: ViT, who: str, choice: str) -> Tensor:
    """The images of a batch (B, C, H, W), of the size that the encoder's grid of patches is made for.

    Raises:
        UserError: no images, or of another size.
    """
    if "image" not in batch:
        raise UserError(f"{who} takes one view of an image, the data give none: choose views@data.views={choice}")
    image, side = batch["image"], encoder.patch_embed.patch_size
    if tuple(n // side for n in image.shape[-2:]) != encoder.grid:
        height, width = (n * side for n in encoder.grid)
        got = " x ".join(map(str, image.shape[-2:]))
        raise UserError(
            f"{who} got images of {got} px, its encoder's patches cover {height} x {width} px: set data.image_size, "
            "which views and encoder both follow, and not data.views.size alone"
        )
    return image
