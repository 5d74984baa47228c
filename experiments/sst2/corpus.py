"""One text of five sets of English sentences, shuffled: what the masked language model reads.

`python corpus.py <folder with sst2, ljspeech_sentences, mrpc, xquad, multi30k> corpus.txt`; training splits only, an
empty line between documents, seed 0.
"""

import random
import sys
from pathlib import Path

import pyarrow.parquet as pq


def documents(folder: Path) -> list[str]:
    def column(file: str, name: str) -> list[str]:
        return pq.read_table(folder / file).column(name).to_pylist()

    found = column("sst2/train.parquet", "sentence") + column("ljspeech_sentences/all.parquet", "normalized")
    found += column("mrpc/train.parquet", "sentence1") + column("mrpc/train.parquet", "sentence2")
    found += sorted(set(column("xquad/en.parquet", "context"))) + column("multi30k/train.parquet", "en")
    random.Random(0).shuffle(found)
    return [document.strip() for document in found]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text("\n\n".join(documents(Path(sys.argv[1]))) + "\n")
