"""Going on with prompts: token by token as an iterator, or all at once."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.backbones.speech_transformer import SpeechTransformer
from ssl_lab.errors import UserError
from ssl_lab.generation.batch import Prompts, check, pad_left, pad_right, pad_sound, room_of
from ssl_lab.generation.processors import PADDING, LogitsProcessor
from ssl_lab.generation.sampling import Sampling
from ssl_lab.generation.steppers import LanguageModel, Stepper, stepper
from ssl_lab.nn.mode import evaluating

GREEDY = Sampling()
BEYOND_SOURCE = 50  # a translation is at most so much longer than its source (arXiv:1706.03762, section 6.1)


def generate(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    eos: int | Sequence[int] = (),
    pad: int = 0,
    start: int = 0,
    cache: bool = True,
    compact: bool = True,
) -> Tensor:
    """Tokens that follow the prompts, (B, N) int64 with N at most `max_new_tokens`; see `stream`."""
    steps = stream(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos=eos,
        pad=pad,
        start=start,
        cache=cache,
        compact=compact,
    )
    return torch.stack(list(steps), 1)


def stream(
    model: LanguageModel,
    prompts: Prompts,
    *,
    max_new_tokens: int | None = None,
    sampling: Sampling = GREEDY,
    eos: int | Sequence[int] = (),
    pad: int = 0,
    start: int = 0,
    cache: bool = True,
    compact: bool = True,
) -> Iterator[Tensor]:
    """Yield the tokens (B,) int64 of every step until all rows have ended. A row gives `pad` after its end.

    The model is in evaluation mode meanwhile, and computes in the dtype that its weights have.

    Args:
        model: a decoder, which goes on with the prompts, or an encoder and decoder, which answers to them.
        prompts: ids, one sequence a row; they may differ in length. For a `SpeechTransformer` samples.
        max_new_tokens: tokens to generate at most. An encoder and decoder gives 50 more than the longest prompt has
            where nothing is said.
        sampling: how a token is chosen; greedy by default.
        eos: id or ids that end a text; they are yielded too.
        pad: id that fills rows.
        start: id that every target begins with; for an encoder and decoder.
        cache: keep keys and values; without, each step computes all tokens again.
        compact: steps of few operations where the decoder allows it, see `Compact`.

    Raises:
        UserError: before anything is computed: an empty prompt, unknown ids, or more tokens than the context holds.
    """
    tokens, valid, new = prepare(model, prompts, max_new_tokens, pad)
    ends = (eos,) if isinstance(eos, int) else tuple(eos)
    return continued(
        model,
        stepper(model, start=start, cache=cache, compact=compact),
        tokens,
        valid,
        new,
        sampling,
        ends,
        (pad, start),
    )


def prepare(
    model: LanguageModel, prompts: Prompts, max_new_tokens: int | None, pad: int
) -> tuple[Tensor, Tensor | None, int]:
    """Prompts as (B, L) on the model's device, sound as (B, S), where they are valid, and how many tokens may follow.

    Raises:
        UserError: see `stream`.
    """
    device = model.embed.weight.device
    if isinstance(model, SpeechTransformer):
        audio, valid = pad_sound(prompts, device)
        room = model.target_positions.max_length
        new = room - 1 if max_new_tokens is None else max_new_tokens
        check(torch.zeros(1, 1, dtype=torch.int64), new, model.vocab_size, room)
        return audio, valid, new
    if isinstance(model, EncoderDecoder):
        tokens, valid = pad_right(prompts, pad, device)
        length, room = tokens.shape[1], model.target_positions.max_length
        if length > (most := room_of(model)):
            raise UserError(f"the source has {length} tokens, the model's context holds {most}: shorten it")
        new = min(length + BEYOND_SOURCE, room - 1) if max_new_tokens is None else max_new_tokens
        check(tokens[:, :1], new, model.vocab_size, room)
        return tokens, valid, new
    if max_new_tokens is None:
        raise UserError("max_new_tokens is not given: say how many tokens a decoder may add")
    tokens, valid = pad_left(prompts, pad, device)
    check(tokens, max_new_tokens, model.vocab_size, room_of(model))
    return tokens, valid, max_new_tokens


def first_read(model: nn.Module, tokens: Tensor, start: int) -> Tensor:
    """Tokens (B, L) int64 that a decoder has read when it begins: the prompt, or the start token after a source."""
    if not isinstance(model, EncoderDecoder):
        return tokens
    return torch.full((len(tokens), 1), start, dtype=torch.int64, device=tokens.device)


@torch.inference_mode()
def continued(
    model: nn.Module,
    steps: Stepper,
    tokens: Tensor,
    valid: Tensor | None,
    new: int,
    sampling: Sampling,
    eos: tuple[int, ...],
    fill: tuple[int, int],
    seen: Tensor | None = None,
) -> Iterator[Tensor]:
    """What `stream` yields, by a stepper of one's own; arguments are those that it prepares.

    Args:
        model: put into evaluation mode meanwhile.
        steps: gives the scores.
        tokens: (B, L) prompts.
        valid: (B, L), False on the left.
        new: tokens at most.
        sampling: how a token is chosen.
        eos: ids that end a text.
        fill: what fills rows, and what a target begins with.
        seen: (B, L) what processors take for the prompts; None = what the model reads first.
    """
    pad, start = fill
    seen = first_read(model, tokens, start) if seen is None else seen
    if valid is not None and seen.shape == tokens.shape:
        seen = seen.masked_fill(~valid, PADDING)
    processors = sampling.processors(seen.shape[1], eos)
    generator = sampling.generator(tokens.device)
    ended = Ended(eos, len(tokens), tokens.device)
    with evaluating(model):
        logits = steps.begin(tokens, valid, new)
        for i in range(new):
            logits = processed(logits, seen, processors)
            token = sampling.choose(logits, generator)
            if ended.any:
                token = token.masked_fill(ended.rows, pad)
            yield token
            if ended.after(token) or i == new - 1:
                return
            if processors:
                seen = torch.cat([seen, token[:, None]], 1)
            logits = steps.step(token)


def processed(logits: Tensor, seen: Tensor, processors: Sequence[LogitsProcessor]) -> Tensor:
    """Scores (B, V) in float32 at least, through all processors."""
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    for processor in processors:
        logits = processor(seen, logits)
    return logits


class Ended:
    """Which rows have had an end.

    Args:
        eos: ids that end a text.
        rows: B.
        device: of the tokens.
    """

    def __init__(self, eos: tuple[int, ...], rows: int, device: torch.device) -> None:
        self.eos, self.any = eos, False
        self.rows = torch.zeros(rows, dtype=torch.bool, device=device)

    def after(self, token: Tensor) -> bool:
        """Note the tokens (B,) of a step; True when all rows have ended."""
        for eos in self.eos:
            self.rows |= token == eos
        if self.eos:
            self.any = bool(self.rows.any())
        return self.any and bool(self.rows.all())
