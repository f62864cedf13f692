"""Multiple-choice questions in MMLU's format: files, prompts with a few examples, and their tokens.

A folder has dev/SUBJECT_dev.csv, the examples, and test/SUBJECT_test.csv, the questions: rows of the question, the
choices A, B, C and D, and the letter of the right one, without a header.

Source: Hendrycks et al., Measuring Massive Multitask Language Understanding (2021, arXiv:2009.03300).
"""

import csv
import dataclasses
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LETTERS = "ABCD"
_FIELDS = 2 + len(LETTERS)


class QuestionsError(Exception):
    """Questions or a tokenizer that cannot be used; the message is one line and names the file."""


@dataclasses.dataclass(frozen=True)
class Question:
    """A question, its choices, and the letter of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: str

    def __str__(self) -> str:
        lines = [self.text, *(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=True))]
        return "\n".join([*lines, "Answer:"])


@dataclasses.dataclass(frozen=True)
class Subject:
    """A subject, the examples that its prompts begin with, and its questions."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]

    @property
    def answers(self) -> str:
        """The right letters."""
        return "".join(question.answer for question in self.questions)

    def prompt(self, question: Question, skipped: int = 0) -> str:
        """What the model reads before its answer; without the first `skipped` examples."""
        about = self.name.replace("_", " ")
        shown = "".join(f"{example} {example.answer}\n\n" for example in self.examples[skipped:])
        return f"The following are multiple choice questions (with answers) about {about}.\n\n{shown}{question}"


def read(folder: Path, *, shots: int, limit: int | None = None) -> list[Subject]:
    """The subjects of a folder, by name.

    Args:
        folder: with dev and test.
        shots: how many examples a prompt has.
        limit: at most so many questions of each subject.

    Raises:
        QuestionsError: a file is missing, or a row is not a question.
    """
    paths = sorted((folder / "test").glob("*_test.csv"))
    if not paths:
        raise QuestionsError(f"{folder}: must have questions, test/SUBJECT_test.csv, and examples, dev/SUBJECT_dev.csv")
    subjects = []
    for path in paths:
        name = path.name.removesuffix("_test.csv")
        source = folder / "dev" / f"{name}_dev.csv"
        examples = _questions(source) if shots else []
        if len(examples) < shots:
            raise QuestionsError(f"{source}: must have {shots} examples, got {len(examples)}")
        questions = _questions(path)[:limit]
        if not questions:
            raise QuestionsError(f"{path}: has no questions")
        subjects.append(Subject(name, tuple(examples[:shots]), tuple(questions)))
    return subjects


def fingerprint(subjects: Sequence[Subject]) -> str:
    """The same for the same examples and questions."""
    return hashlib.sha256(repr(subjects).encode()).hexdigest()[:16]


def open_tokenizer(path: Path) -> Any:
    """The `tokenizers.Tokenizer` of a tokenizer.json.

    Raises:
        QuestionsError: there is none, or the package is not installed.
    """
    if importlib.util.find_spec("tokenizers") is None:
        raise QuestionsError("the package tokenizers is not installed; pip install tokenizers")
    from tokenizers import Tokenizer  # noqa: PLC0415 - optional

    if not path.is_file():
        raise QuestionsError(f"{path}: no such file; the checkpoint must have its tokenizer")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises no other type
        raise QuestionsError(f"{path}: not a tokenizer: {error}") from error
    # A file may ask for both.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def letter_tokens(tokenizer: Any) -> list[int]:
    """The tokens of " A", " B", " C" and " D" after "Answer:".

    Raises:
        QuestionsError: they are not one token each.
    """
    before = tokenizer.encode("Answer:").ids
    found = [tokenizer.encode(f"Answer: {letter}").ids for letter in LETTERS]
    if any(ids[:-1] != before for ids in found) or len({ids[-1] for ids in found}) < len(LETTERS):
        raise QuestionsError(
            'the tokenizer must have one token for " A", " B", " C" and " D" each; it encodes "Answer:" as '
            f"{before}, and with them {found}"
        )
    return [ids[-1] for ids in found]


def encoded(tokenizer: Any, subject: Subject, length: int) -> tuple[list[list[int]], int]:
    """The tokens of a subject's prompts, and how many of these lost examples, the first ones, to fit into a length.

    Raises:
        QuestionsError: a question alone is longer.
    """
    whole = tokenizer.encode_batch([subject.prompt(question) for question in subject.questions])
    prompts = [found.ids for found in whole]
    too_long = [index for index, ids in enumerate(prompts) if len(ids) > length]
    for index in too_long:
        for skipped in range(1, len(subject.examples) + 1):
            prompts[index] = tokenizer.encode(subject.prompt(subject.questions[index], skipped)).ids
            if len(prompts[index]) <= length:
                break
        else:
            raise QuestionsError(
                f"{subject.name}: question {index + 1} has {len(prompts[index])} tokens without examples, and at most "
                f"{length} are allowed"
            )
    return prompts, len(too_long)


def _questions(path: Path) -> list[Question]:
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.reader(file, strict=True)
            return [_question(path, rows.line_num, row) for row in rows if row]
    except OSError as error:
        raise QuestionsError(f"{path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise QuestionsError(f"{path}: not a CSV file in UTF-8: {error}") from error


def _question(path: Path, line: int, row: Sequence[str]) -> Question:
    if len(row) != _FIELDS:
        raise QuestionsError(
            f"{path}, line {line}: must have {_FIELDS} fields, the question, {len(LETTERS)} choices and a letter; "
            f"got {len(row)}"
        )
    text, *choices, answer = row
    if answer not in tuple(LETTERS):
        raise QuestionsError(f"{path}, line {line}: the answer must be one of {', '.join(LETTERS)}, got {answer!r:.40}")
    return Question(text.strip(), tuple(choices), answer)
