"""Span corruption (T5, Raffel et al., 2019, arXiv:1910.10683): write what was cut out of a text."""

from ssl_lab.backbones.encoder_decoder import EncoderDecoder
from ssl_lab.methods.seq2seq import Seq2Seq


class SpanCorruption(Seq2Seq):
    """The source is a text whose spans were replaced by sentinels; the target lists each sentinel with its span.

    What is cut is drawn by the views; this is `Seq2Seq` with T5's habits: no label smoothing, padding as start token.

    Args:
        model: encoder and decoder.
        start_token: what the decoder reads first; in YAML -1 = the padding token of the data's tokenizer.
        label_smoothing: share of the target that is spread evenly over all V tokens.
    """

    def __init__(self, model: EncoderDecoder, start_token: int = 0, *, label_smoothing: float = 0.0) -> None:
        super().__init__(model, start_token, label_smoothing=label_smoothing)
