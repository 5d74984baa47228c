"""Where an answer looked, a conversation about a picture, and the page around both."""

import functools
import socket
import sys

import pytest
import torch
from parity import gap, images
from test_llava import Data, speaking
from test_vlm import MARK, ids, small, theirs_and_ours
from torchvision.transforms.v2.functional import to_pil_image

from ssl_lab.analysis.looked import laid_over, looked
from ssl_lab.cli.demo import Page, page
from ssl_lab.cli.main import main
from ssl_lab.cli.partner import Conversation, Partner
from ssl_lab.data.shapes import Shapes
from ssl_lab.data.views import Resize
from ssl_lab.errors import UserError
from ssl_lab.generation.generate import GREEDY
from ssl_lab.generation.seeing import stream_seen
from ssl_lab.nn.connectors import LinearConnector, MLPConnector, ResamplerConnector


def test_where_an_answer_looked_is_what_transformers_says_of_its_attention():
    theirs, ours = theirs_and_ours()
    theirs.set_attn_implementation("eager")
    pictures, row = images(batch=2), [1, MARK, 2, MARK, 3, 4, 5]
    wide, _ = ids([x for t in row for x in ([t] * 16 if t == MARK else [t])])
    with torch.no_grad():
        weights = theirs(input_ids=wide, pixel_values=pictures, output_attentions=True).attentions
        seen = ours.see(pictures)
    for layer in (None, 0):
        want = weights[1 if layer is None else layer][0].double().mean(0)
        found = looked(ours, torch.tensor([row]), seen, 5, layer=layer)  # 4 and 5 are the answer, said by 3 and 4
        assert found.shape == (2, 4, 4)
        for k, begin in enumerate((1, 18)):
            part = want[[34, 35], begin : begin + 16].mean(0)
            assert gap(found[k].flatten(), part) < 1e-6  # their softmax is float32's


def test_an_image_that_ends_a_prompt_asks_with_its_last_token():
    model, pictures = small(functools.partial(MLPConnector, pool=2), drop_prefix=True), images(batch=1)
    seen = model.see(pictures)
    found = looked(model, torch.tensor([[1, MARK, 7]]), seen, 2)
    assert found.shape == (1, 2, 2) and 0 < found.sum() < 1
    full = small(LinearConnector, drop_prefix=False)
    assert looked(full, torch.tensor([[MARK, 3, 7]]), full.see(pictures), 2).shape == (1, 4, 4)
    resampled = small(functools.partial(ResamplerConnector, num_latents=4, depth=1))
    with pytest.raises(UserError, match="no place in the picture"):
        looked(resampled, torch.tensor([[1, MARK, 7]]), resampled.see(pictures), 2)
    with pytest.raises(UserError, match="no map"):
        looked(model, torch.tensor([[1, MARK]]), seen, 2)


def test_a_map_lies_over_its_picture_and_is_light_where_most_was_seen():
    seen = torch.zeros(2, 2)
    seen[0, 1] = 0.3
    out = laid_over(torch.full((3, 16, 16), 128, dtype=torch.uint8), seen)
    assert out.shape == (3, 16, 16) and out.dtype == torch.uint8
    assert out[:, 2, 13].sum() > out[:, 2, 2].sum() + 100 and out[:, 2, 13].sum() > out[:, 13, 2].sum() + 100


def talk():
    data = Data()
    method = speaking(data)
    method.model.float()
    return Conversation(Partner(method.model, data.test.encode, Resize(32)), GREEDY, 4)


def picture(path, side=48):
    to_pil_image(Shapes("test", 2, image_size=side).read([1]).data[0]).save(path)
    return str(path)


def test_a_conversation_goes_on_about_its_picture(tmp_path):
    one = talk()
    with pytest.raises(UserError, match="nothing was asked"):
        one.looked()
    one.show([picture(tmp_path / "a.png")])
    first = "".join(one.ask("what color is it?"))
    encode, marker = one.partner.encode, one.partner.encode.marker
    assert [message["role"] for message in one.messages] == ["user", "assistant"]
    assert one.messages[0]["content"] == f"{marker}\nwhat color is it?" and one.messages[1]["content"] == first.strip()
    ids = encode.prompt(one.messages[:1])
    steps = stream_seen(one.partner.model, [ids], one.visual, max_new_tokens=4, eos=encode.end)
    assert encode.tokenizer.decode([int(x) for x in steps]).strip() == first.strip()
    assert one.looked().shape == (1, 4, 4)
    list(one.ask("sure?"))
    assert len(one.messages) == 4 and marker not in one.messages[2]["content"]
    before = list(one.messages)
    with pytest.raises(UserError, match="mentions 1 pictures"):
        list(one.ask(f"{marker} again?"))
    assert one.messages == before
    one.show([picture(tmp_path / "a.png")] * 2)
    list(one.ask(""))  # a picture alone, as captions are taught
    assert one.messages[0]["content"] == f"{marker}\n{marker}"


def test_the_page_without_a_browser(tmp_path):
    mine = Page(talk())
    assert mine.show(None) == (None, [], None, "")
    state, told, pixels, note = mine.show(picture(tmp_path / "a.png"))
    assert told == [] and pixels.shape == (384, 384, 3) and "sees" in note
    *growing, (state, told, seen, note) = mine.ask("what color is it?", state)
    assert growing[0][1][0] == {"role": "user", "content": "what color is it?"}
    assert told[0]["content"] == "what color is it?" and "% of its attention" in note
    assert seen.shape == pixels.shape and (seen != pixels).any()
    again = mine.forget(state)
    assert mine.forget(None) is None and again.messages == [] and again.visual is state.visual
    other = mine.show(picture(tmp_path / "b.png"))[0]
    assert other is not state and other.messages == [] and len(state.messages) == 2 and not mine.begin.messages
    assert list(mine.ask("of nothing?", None))[-1][2] is None
    with pytest.raises(UserError, match="ask something"):
        next(mine.ask(" ", state))
    alone = mine.show(picture(tmp_path / "d.png"))[0]
    assert [*mine.ask("", alone)][-1][1][1]["role"] == "assistant"  # the picture itself is the question
    (tmp_path / "c.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"c.png cannot be read"):
        mine.show(str(tmp_path / "c.png"))


def test_without_gradio_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["demo", "ckpt=nowhere"]) == 2
    told = capsys.readouterr().err
    assert "pip install 'ssl-lab[demo]'" in told and told.count("\n") == 1


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_the_page_is_served_on_this_machine_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    gradio = pytest.importorskip("gradio", reason="pip install 'ssl-lab[demo]'")
    client = pytest.importorskip("gradio_client")
    blocks, options = page(gradio, Page(talk()))
    _, url, shared = blocks.launch(
        server_name="127.0.0.1", server_port=free_port(), prevent_thread_lock=True, **options
    )
    try:
        assert url.startswith("http://127.0.0.1") and shared is None and not blocks.analytics_enabled
        caller = client.Client(url, verbose=False)
        told, seen, note = caller.predict(client.handle_file(picture(tmp_path / "a.png")), api_name="/show")
        assert told == [] and seen and "sees" in note
        told, seen, note = caller.predict("what color is it?", api_name="/ask")
        assert len(told) == 2 and "% of its attention" in note
        (tmp_path / "bad.png").write_bytes(b"no picture")
        with pytest.raises(Exception, match="cannot be read"):
            caller.predict(client.handle_file(str(tmp_path / "bad.png")), api_name="/show")
    finally:
        blocks.close()
