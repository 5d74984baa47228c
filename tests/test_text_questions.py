"""Questions about passages: windows, answers and what is said when there is something else."""

import json

import pytest
from test_text_data import characters, write

from ssl_lab.data.text_questions import Questions
from ssl_lab.data.tokenizer import Tokenizer
from ssl_lab.data.tokenizer_train import train
from ssl_lab.errors import UserError

SQUAD = {
    "context": ["Aa bb  cc dd ee ff gg hh ii jj kk ll."] * 2 + ["Un deux trois."],
    "question": ["which?", "who?", "what now?"],
    "answer": ["ff gg", "ll", ""],
    "answer_start": [16, 34, -1],
}


def test_questions_in_windows(tmp_path):
    path = write(tmp_path / "train.parquet", SQUAD)
    tokenizer = Tokenizer(train([*SQUAD["context"], *SQUAD["question"]], "wordpiece", 90))
    questions = Questions(path, tokenizer, split=None, max_length=12, stride=3, max_question=4)
    asked, texts, span = questions.read(range(len(questions))).data
    assert max(map(len, asked)) <= 4
    whole = {0: 0, 1: 0, 2: 0}
    for row in range(len(questions)):
        number = questions.question_of(row)
        given = questions.questions[number]
        joined = [tokenizer.cls, *asked[row], tokenizer.sep, *texts[row], tokenizer.sep]
        assert len(joined) <= 12
        offsets = questions.offsets(row)
        assert len(offsets) == len(joined)
        for token, (start, end) in zip(joined, offsets.tolist(), strict=True):
            if start >= 0:
                name = tokenizer.backend.id_to_token(int(token)).removeprefix("##")
                assert name == given.context[start:end].lower()
        if span[row].any():
            first, last = span[row].tolist()
            ids = [int(x) for x in joined[first : last + 1]]
            assert tokenizer.decode(ids) == given.answers[0].lower()
            whole[number] += 1
    assert whole[0] >= 1 and whole[1] >= 1 and whole[2] == 0 and questions.questions[2].answers == []
    for number in range(3):  # every token of a context counts in one window only
        rows = [row for row in range(len(questions)) if questions.question_of(row) == number]
        places = [tuple(x) for row in rows for x in questions.offsets(row).tolist() if x[0] >= 0]
        spans = tokenizer.encode_spans([questions.questions[number].context])[0][1]
        assert sorted(places) == sorted(spans)
    starts = [int(questions._windows[row, 2]) for row in range(len(questions)) if questions.question_of(row) == 0]
    assert starts == list(range(0, 3 * len(starts), 3))


def test_a_token_counts_where_it_has_most_context(tmp_path):
    path = write(tmp_path / "train.parquet", {k: v[:1] for k, v in SQUAD.items()})
    tokenizer = characters(*SQUAD["context"], *SQUAD["question"])
    questions = Questions(path, tokenizer, split=None, max_length=21, stride=4, max_question=6)
    for place in range(len(SQUAD["context"][0])):
        shown = {}
        for row, (_, _, start, end, _, _) in enumerate(questions._windows.tolist()):
            if start <= place < end:
                shown[row] = min(place - start, end - 1 - place) + 0.01 * (end - start)
        best = next(row for row, score in shown.items() if score == max(shown.values()))
        counted = [row for row in shown if [place, place + 1] in questions.offsets(row).tolist()]
        assert counted == [best]


def test_questions_of_squad_and_their_division(tmp_path):
    contexts = [f"Text {i} holds {i}." for i in range(60) for _ in range(3)]
    answers = [{"text": [str(i), f"{i}."], "answer_start": [5, 14]} for i in range(60) for _ in range(3)]
    path = write(tmp_path / "all.parquet", {"context": contexts, "question": ["which?"] * 180, "answers": answers})
    tokenizer = Tokenizer(train(contexts, "bpe", 300))
    sides = {
        s: Questions(path, tokenizer, split=s, max_length=60, stride=16, max_question=8) for s in ("train", "test")
    }
    found = {s: {x.context for x in questions.questions} for s, questions in sides.items()}
    assert found["train"] | found["test"] == set(contexts) and not found["train"] & found["test"] and found["test"]
    first = sides["train"].questions[0]
    assert first.answers == [first.context.split()[1], first.context.split()[1] + "."]
    (start, end), (asked, texts, _) = sides["train"].read([0]).data[2][0], sides["train"].read([0]).data
    joined = [*asked[0], tokenizer.eos, *texts[0]]  # no [CLS] here, and end-of-text between the two
    assert tokenizer.decode([int(x) for x in joined[start : end + 1]]).strip() == first.answers[0]


def test_answers_may_be_a_list_and_a_context_null(tmp_path):
    rows = [
        {"context": "aa bb cc.", "question": "which?", "answers": [{"text": "bb", "answer_start": 3}]},
        {"context": None, "question": "who?", "answers": None},
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {"split": None, "max_length": 30, "stride": 4, "max_question": 6}
    tokenizer = characters("aa bb cc.", "which?", "who?", special=["[CLS]", "[SEP]"])
    questions = Questions(str(file), tokenizer, **options)
    assert [x.answers for x in questions.questions] == [["bb"], []] and questions.questions[1].context == ""
    _, texts, span = questions.read([0, 1]).data
    assert len(texts[1]) == 0 and (questions.offsets(1) == -1).all()
    assert questions.offsets(0)[span[0]].tolist() == [[3, 4], [4, 5]]
    for row in (rows[0] | {"answers": ["bb"]}, rows[0] | {"answers": {"text": ["bb"]}}):
        file.write_text(json.dumps(row))
        with pytest.raises(UserError, match="answers holds"):
            Questions(str(file), tokenizer, **options)
