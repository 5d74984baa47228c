"""What folders and tables are searched for: pictures, or sound."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Medium:
    """How one kind of file is called, found and described in words.

    Attributes:
        one: its name in arguments, such as image in `image_column`.
        many: its name in sentences.
        suffixes: of its files, in lower case.
        columns: usual names of a column that holds it.
        paths: usual names of a column of a .csv that says where it is.
        feature: its type in `datasets`.
        words: what a text about it is called, such as caption in `caption_column`.
        texts: usual names of a column of such texts.
    """

    one: str
    many: str
    suffixes: tuple[str, ...]
    columns: tuple[str, ...]
    paths: tuple[str, ...]
    feature: str
    words: str
    texts: tuple[str, ...]


IMAGES = Medium(
    one="image",
    many="images",
    suffixes=(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".jp2"),
    columns=("image", "img", "picture", "jpg", "png"),
    paths=("image", "filepath", "file_path", "image_path", "filename", "file_name", "image_name", "path", "file"),
    feature="Image",
    words="caption",
    texts=("caption", "captions", "text", "title", "sentence", "sentences", "raw", "description", "annotation"),
)
AUDIO = Medium(
    one="audio",
    many="audio clips",
    suffixes=(".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aif", ".aiff"),
    columns=("audio", "speech", "sound", "clip", "wav", "flac", "mp3", "path", "file"),
    paths=("audio", "path", "file", "clip", "wav", "filename", "file_name", "filepath", "file_path", "audio_path"),
    feature="Audio",
    words="transcript",
    texts=("transcript", "transcripts", "transcription", "text", "sentence", "normalized_text", "words"),
)
