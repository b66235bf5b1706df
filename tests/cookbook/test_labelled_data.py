"""Labelled files, pairs, sources of the standard library: how they are read, split and batched."""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.dummy import DummyClassifier

from lightning_unitscale.cookbook.data import IGNORED
from lightning_unitscale.cookbook.data.digits import digits
from lightning_unitscale.cookbook.data.examples import Examples, Labelled, Pair, split_by
from lightning_unitscale.cookbook.data.labelled_files import labelled_file, paired_file
from lightning_unitscale.cookbook.data.standard_library import python_sources, source_snippets, split_names
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.tasks.classification import MajorityAccuracy
from lightning_unitscale.cookbook.tasks.image_classification import ImageBatch
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import PairBatch
from lightning_unitscale.cookbook.tasks.text_classification import TextBatch
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError


def test_split_keeps_groups_together_and_leaks_none() -> None:
    examples = [Labelled(f"text {number}", "a", group=str(number % 40)) for number in range(200)]
    parts = split_by(lambda example: example.group, examples, 0.2)
    groups = [{example.group for example in part} for part in parts]
    assert sum(map(len, parts)) == 200
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and not groups[1] & groups[2]
    assert split_by(lambda example: example.group, examples[::-1], 0.2)[2] == parts[2][::-1]
    for share in (0.0, 0.5):
        with pytest.raises(InputError, match="must lie between"):
            split_by(lambda example: example.group, examples, share)


def test_split_has_the_same_classes_in_every_part() -> None:
    generator = torch.Generator().manual_seed(1)
    sizes = torch.randint(1, 30, (60,), generator=generator).tolist()
    rows = [(f"{group} {row}", f"file {group}") for group, size in enumerate(sizes) for row in range(size)]
    pure = [Labelled(text, "abc"[int(group[5:]) % 3], group) for text, group in rows]  # one class a file
    mixed = [Labelled(text, "aab"[number % 3], group) for number, (text, group) in enumerate(rows)]
    for examples in (pure, mixed):
        parts = split_by(lambda e: e.group, examples, 0.2, lambda e: e.label)
        shares = [Counter(e.label for e in part) for part in parts]
        for label, count in Counter(e.label for e in examples).items():
            for part, share in zip(shares, (0.6, 0.2, 0.2), strict=True):
                assert part[label] / count == pytest.approx(share, abs=0.05), label
    rare = [Labelled(f"text {number}", "common" if number else "rare", str(number)) for number in range(30)]
    assert "rare" in {example.label for example in split_by(lambda e: e.group, rare, 0.1, lambda e: e.label)[0]}


def test_snippets_of_source_are_what_their_label_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.py").write_text(
        '"""What the module is for."""\n\n# A licence that two files have\n# in full.\n\n'
        'def function(x):\n    """Return what was given\n    to it."""\n    #: nothing is done to it\n'
        "    return x + 1\n"
    )
    (tmp_path / "b.py").write_text("# A licence that two files have\n# in full.\n")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    assert {(example.label, example.text, example.group) for example in source_snippets(30)} == {
        ("docstring", "What the module is for.", "a.py"),
        ("docstring", "Return what was given to it.", "a.py"),
        ("code", "def function(x): return x + 1", "a.py"),
        ("comment", "nothing is done to it", "a.py"),
    }


def test_snippets_of_the_standard_library_do_not_leak() -> None:
    parts = split_by(lambda e: e.group, source_snippets(95), 0.1, lambda e: e.label)
    texts, files = ([{getattr(e, name) for e in part} for part in parts] for name in ("text", "group"))
    for kinds in (texts, files):
        assert not kinds[0] & kinds[1] and not kinds[0] & kinds[2] and not kinds[1] & kinds[2]
    for part in parts:
        assert max(Counter(e.label for e in part).values()) / len(part) < 0.55


def test_majority_class_accuracy() -> None:
    metric, reference = MajorityAccuracy(3), DummyClassifier(strategy="most_frequent")
    labels = torch.tensor([2, 0, 2, 1, 2, 0])
    for part in labels.split(4):
        metric.update(torch.zeros(len(part), 3), part)
    assert float(metric.compute()) == pytest.approx(reference.fit(labels, labels).score(labels, labels))


def test_examples_come_in_epochs_and_continue_where_they_were_saved() -> None:
    def loader() -> Any:
        parts = [list(range(10)), [0], [0]]
        return Examples(parts, lambda items: items, batch_size=2, steps=10, seed=1).train_dataloader()  # type: ignore[arg-type]

    whole = list(loader())
    assert sorted(chain(*whole[:5])) == sorted(chain(*whole[5:])) == list(range(10))
    assert whole[:5] != whole[5:]
    first = loader()
    batches = iter(first)
    for _ in range(3):
        next(batches)
    second = loader()
    second.load_state_dict(first.state_dict())
    assert next(iter(second)) == whole[3]


def test_batches_are_what_the_models_take() -> None:
    tokenizer = byte_tokenizer()
    batch = TextBatch(tokenizer, {"x": 0, "y": 1}, 4)([Labelled("abcdef", "y", ""), Labelled("a", "x", "")])
    assert batch["input_ids"].tolist() == [[256, 97, 98, 99], [256, 97, 256, 256]]
    assert batch["attention_mask"].sum(1).tolist() == [4, 2]
    assert batch["labels"].tolist() == [1, 0]
    pairs = PairBatch(tokenizer, 4)([Pair("ab", "a"), Pair("a", "abcdef")])
    assert pairs["labels"].tolist() == [[97, 256, IGNORED, IGNORED], [97, 98, 99, 256]]
    images = digits()[:2]
    pixels = ImageBatch({str(number): number for number in range(10)}, 3, (16, 16))(images)["pixel_values"]
    assert pixels.shape == (2, 3, 16, 16)
    assert torch.equal(pixels[:, 0], pixels[:, 2])


def test_token_text_holds_out_documents_for_validation_and_test() -> None:
    documents = {str(number): f"{number:03d} ".encode() * 20 for number in range(40)}
    data = TokenText(documents, byte_tokenizer(), sequence_length=8, batch_size=2, steps=2, held_out=0.1, seed=1)
    streams = [part.tokens for part in (data.training, data.validation, data.test)]
    assert sum(map(len, streams)) == 40 * 81
    words = [{bytes(stream[i + 1 : i + 4].tolist()) for i in range(0, len(stream), 81)} for stream in streams]
    assert sum(map(len, words)) == len(set.union(*words)) == 40
    batch = next(iter(data.val_dataloader()))
    assert torch.equal(batch["input_ids"][0, 1:], batch["labels"][0, :-1])


def test_data_of_the_standard_library() -> None:
    sources = python_sources(["json"])
    assert set(sources) >= {"json/__init__.py", "json/decoder.py"}
    assert sum(map(len, python_sources(max_bytes=100_000).values())) <= 100_000
    pairs = split_names(12)
    assert all(pair.target.replace("_", "") == pair.source and len(pair.target) <= 12 for pair in pairs)
    assert len(pairs) > 500
    with pytest.raises(InputError, match="no package nothing_like_it"):
        python_sources(["nothing_like_it"])


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.csv", None, "no such file"),
        ("a.txt", "x", r"ends in \.csv or \.jsonl"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "words,label\na,b\n", r"row 1 has no 'text' \(data\.text\); it has words, label"),
        ("a.csv", "text,label\na,b\nc,b\n", "the same label"),
        ("a.jsonl", '{"text": "a", "label": "b"}\nnot json\n', "line 2 is not JSON"),
    ],
)
def test_bad_labelled_files(name: str, text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message):
        labelled_file(str(tmp_path / name))


def test_pairs_of_a_json_lines_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"source": "a", "target": 1}\n\n{"source": "b", "target": 2}\n')
    assert paired_file(str(tmp_path / "a.jsonl")) == [Pair("a", "1"), Pair("b", "2")]
