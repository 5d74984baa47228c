"""`ssl-lab demo`: a page where a person uploads a picture, asks about it, and sees where the answer looked."""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from ssl_lab.analysis.looked import laid_over
from ssl_lab.cli.partner import Conversation, conversation
from ssl_lab.data.conversation_text import Message
from ssl_lab.data.views import STATS, Resize
from ssl_lab.errors import UserError
from ssl_lab.pictures import unnormalize

_SIDE = 384  # of what is shown, in pixels
_SEEN = "what the model sees"
_LOOKED = "where the answer looked, light = most; {:.0f} % of its attention lay on the picture"


@dataclass
class Page:
    """What the page does, without the page: each visitor's conversation is a value of its own.

    Attributes:
        begin: a conversation about nothing yet, whose model all visitors share.
    """

    begin: Conversation

    def show(self, file: str | None) -> tuple[Conversation | None, list[Message], Any, str]:
        """Of an uploaded picture, or of none: conversation, what was said, pixels (H, W, 3) uint8, what they show.

        Raises:
            UserError: a file that is no picture.
        """
        if file is None:
            return None, [], None, ""
        talk = replace(self.begin)
        talk.show([file])
        return talk, [], _pixels(self._seen(talk)), _SEEN

    def ask(self, asked: str, talk: Conversation | None) -> Iterator[tuple[Conversation, list[Message], Any, str]]:
        """As `show`, again and again while the answer grows; at the end with the map of where it looked.

        Raises:
            UserError: an empty question, other numbers of markers than pictures, or more than the context holds.
        """
        begins = talk is not None and bool(talk.pictures) and not talk.messages
        if not asked.strip() and not begins:  # a picture alone is what a model of captions is asked
            raise UserError("ask something first")
        talk = replace(self.begin) if talk is None else talk
        before, said = self._told(talk), ""
        seen = self._seen(talk) if talk.pictures else None
        shown = None if seen is None else _pixels(seen)
        for piece in talk.ask(asked.strip()):
            said += piece
            now: list[Message] = [{"role": "user", "content": asked}, {"role": "assistant", "content": said}]
            yield talk, [*before, *now], shown, _SEEN
        note = _SEEN
        if seen is not None:
            try:
                found = talk.looked()[0].cpu()
                shown, note = _pixels(laid_over(seen, found)), _LOOKED.format(100 * float(found.sum()))
            except UserError as reason:
                note = str(reason)
        yield talk, self._told(talk), shown, note

    def forget(self, talk: Conversation | None) -> Conversation | None:
        """The same picture, and nothing said yet."""
        return talk and replace(talk, messages=[])

    def _told(self, talk: Conversation) -> list[Message]:
        """What was said, without markers."""
        marker = talk.partner.encode.marker
        return [{**message, "content": message["content"].replace(marker, "").strip()} for message in talk.messages]

    def _seen(self, talk: Conversation) -> Tensor:
        """(3, H, W) uint8: the part of the picture that the model sees, larger than it sees it."""
        look = talk.partner.look
        scale = math.ceil(_SIDE / look.size)
        view = Resize(
            look.size * scale, crop_pct=look.size / look.resize, interpolation=look.mode.value, stats=look.stats
        )
        return unnormalize(view(talk.pictures[:1], torch.zeros(1), 0)["image"][0], *STATS[look.stats])


def run(cfg: DictConfig) -> None:
    """Serve the page until it is interrupted.

    Raises:
        UserError: gradio is missing, no such run, one that does not see and speak, or a taken port.
    """
    gradio = _gradio()
    talk = conversation(cfg)
    if not isinstance(talk.partner.look, Resize):
        raise UserError(f"ckpt={cfg.ckpt} is shown no pictures, so there is no page for it: ask it with ssl-lab chat")
    blocks, options = page(gradio, Page(talk))
    print(
        f"http://{cfg.host}:{cfg.port} is the page, on this machine and without the internet; ctrl-c ends it",
        flush=True,
    )
    try:
        blocks.launch(server_name=str(cfg.host), server_port=int(cfg.port), **options)
    except OSError as error:
        raise UserError(f"host={cfg.host} port={cfg.port}: the page cannot be served there ({error})") from None


def page(gradio: Any, page: Page) -> tuple[Any, dict[str, Any]]:
    """The page as gradio's blocks, and what `launch` takes besides where it listens.

    Nothing of it asks for the internet: no analytics, no link that shares it, and fonts of the browser's own.
    """

    def show(uploaded: dict[str, Any] | None) -> Any:
        try:
            return page.show(None if uploaded is None else str(uploaded["path"]))
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    def ask(asked: str, talk: Conversation | None) -> Any:
        try:
            yield from page.ask(asked, talk)
        except UserError as error:
            raise gradio.Error(str(error), print_exception=False) from None

    with gradio.Blocks(title="ssl-lab", analytics_enabled=False) as blocks:
        talk = gradio.State(None)
        with gradio.Row():
            with gradio.Column():
                picture = gradio.Image(type="filepath", sources=["upload"], label="your picture", buttons=[])
                told = gradio.Chatbot(label="conversation", buttons=[], height=280)
                asked = gradio.Textbox(label="question", placeholder="what do you want to know?", submit_btn=True)
            with gradio.Column():
                where = gradio.Image(
                    label="seen", interactive=False, buttons=["fullscreen"], format="png", height=_SIDE + 40
                )
                note = gradio.Markdown()
        shown = [talk, told, where, note]
        # not preprocessed: gradio would decode the file itself, and have its own word for one that is no picture
        picture.change(show, picture, shown, api_name="show", preprocess=False)
        asked.submit(ask, [asked, talk], shown, api_name="ask").then(lambda: "", None, asked, api_visibility="private")
        told.clear(page.forget, talk, talk, api_visibility="private")
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["monospace"]}
    theme = gradio.themes.Default(**fonts)
    plain = {"quiet": True, "share": False, "footer_links": [], "enable_monitoring": False, "ssr_mode": False}
    return blocks, plain | {"theme": theme, "show_error": True}


def _gradio() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when the library is imported
    try:
        import gradio
    except ImportError as error:
        raise UserError("ssl-lab demo needs gradio: pip install 'ssl-lab[demo]'") from error
    return gradio


def _pixels(picture: Tensor) -> Any:
    """(3, H, W) uint8 -> (H, W, 3) array."""
    return picture.permute(1, 2, 0).contiguous().numpy()
