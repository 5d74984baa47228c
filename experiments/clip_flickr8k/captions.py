"""The captions that the text tower reads first: of the training photos, and Multi30k's English training sentences.

python captions.py <folder of flickr8k> <folder of multi30k> > captions.txt
"""

import random
import sys
from pathlib import Path

import pyarrow.parquet as pq

if __name__ == "__main__":
    photos, sentences = (Path(folder) / "train.parquet" for folder in sys.argv[1:3])
    texts = [text for of_one in pq.read_table(photos).column("captions").to_pylist() for text in of_one]
    texts += pq.read_table(sentences).column("en").to_pylist()
    random.Random(0).shuffle(texts)
    print("\n\n".join(text.strip() for text in texts))
