"""The task `dialogue`: conversations and their template, the loss on answers alone, their variety, and talking."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from omegaconf import OmegaConf
from support.recipe_runs import run_recipe
from transformers import AutoTokenizer, TextStreamer

from lightning_unitscale.cookbook.chat_template import pieces, prompt_of
from lightning_unitscale.cookbook.data.conversations import (
    Conversation,
    Message,
    chatterbot_corpus,
    conversation_file,
    conversation_of,
)
from lightning_unitscale.cookbook.data.examples import split_by
from lightning_unitscale.cookbook.tasks.dialogue import Dialogue, DistinctNGrams
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError

LLAMA = {"model_type": "llama", "vocab_size": 257, "bos_token_id": 256, "eos_token_id": 256, "hidden_size": 16}
TINY = {**LLAMA, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
END = "<|document|>"
TALK = (Message("user", "hi"), Message("assistant", "yes"), Message("user", "so?"), Message("assistant", "no"))


def module(context: int = 64) -> Dialogue:
    torch.manual_seed(1)
    return Dialogue({**TINY, "max_position_embeddings": context}, "AutoModelForCausalLM", tokenizer="bytes").eval()


def batches(conversations: list[Conversation], length: int) -> Any:
    """Those of `Dialogue`, with bytes as tokens."""
    cfg = OmegaConf.create(
        {
            "data": {"held_out": 0.3, "batch_size": 8, "workers": 0},
            "task": {"sequence_length": length},
            "trainer": {"max_steps": 1, "accumulate_grad_batches": 1},
            "seed": 1,
        }
    )
    owner: Any = module(context=512)
    found: Any = SimpleNamespace(text_tokenizer=lambda: owner.tokenizer, model=owner.model)
    return Dialogue.data_module(conversations, found, cfg)


def copies(*messages: Message, count: int = 9) -> list[Conversation]:
    """Conversations that differ in their first word alone."""
    (role, content), *rest = messages
    return [conversation_of((Message(role, f"{number} {content}"), *rest)) for number in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint of a few steps on conversations of one's own."""
    folder = tmp_path_factory.mktemp("dialogue")
    rows = [{"messages": [f"what is {number} + 1?", f"{number + 1}"]} for number in range(40)]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = [
        *("experiment=dialogue", "data=conversation_file", f"data.path={folder}/talk.jsonl"),
        *("model.width=32", "model.head_width=16", "model.depth=1", "task.sequence_length=64", "logger=csv"),
        *("trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.enable_progress_bar=false"),
        *("monitor=none", "schedule.warmup_steps=1"),
    ]
    run_recipe("pretrain", folder, *settings)
    return str(folder / "run" / "checkpoints" / "last.ckpt")


# --- data -------------------------------------------------------------------------------------------------------------


def test_the_corpus_has_each_conversation_once_and_no_beginning_on_two_sides() -> None:
    corpus = chatterbot_corpus()
    assert 800 < len(corpus) == len(set(corpus)) < 1000
    assert all(conversation.messages[-1].role == "assistant" for conversation in corpus)
    parts = split_by(lambda conversation: conversation.group, corpus, 0.1)
    questions = [{one.messages[0].content.lower().rstrip("?!. ") for one in part} for part in parts]
    assert not (questions[0] & questions[1] or questions[0] & questions[2] or questions[1] & questions[2])
    with pytest.raises(InputError, match=r"has no 'klingon'; it has .*english"):
        chatterbot_corpus(["klingon"])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file has no rows"),
        (b'{"talk": ["a", "b"]}\n', r"row 1 has no 'messages' \(data\.messages\); it has talk"),
        (b'{"messages": "a"}\n', "row 1: the messages are str, and not a list"),
        (
            b'{"messages": ["a", "b"]}\n{"messages": [{"role": "bot", "content": "b"}]}\n',
            "row 2: message 1 needs a role",
        ),
        (b'{"messages": ["a"]}\n', "row 1: no message of a user with an answer"),
        ('{"messages": ["gr\xfcn", "b"]}\n'.encode("latin-1"), "line 1 is not UTF-8"),
        (b'["a"]\n', "row 1 is no object with names, but list"),
    ],
)
def test_bad_conversations_are_named_by_file_and_row(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=message):
        conversation_file(str(tmp_path / "a.jsonl"))


def test_one_broken_conversation_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [b'{"messages": ["hi", "ho"]}', "{'messages': gr\xfcn}".encode("latin-1"), b'{"messages": ["a", "b", "c"]}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(rows))
    first, second = conversation_file(str(tmp_path / "a.jsonl"), skip_broken=True)
    assert first.messages == (Message("user", "hi"), Message("assistant", "ho"))
    assert second.messages[-1] == Message("assistant", "b")  # nobody answers to the last
    assert "left out 1 of 3 rows" in capsys.readouterr().out


def test_a_table_of_parquet_is_read(tmp_path: Path) -> None:
    table = pyarrow.table({"messages": [[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert conversation_file(str(tmp_path / "a.parquet"))[0].messages == (
        Message("user", "hi"),
        Message("assistant", "ho"),
    )


# --- the template -----------------------------------------------------------------------------------------------------


def test_pieces_are_what_transformers_writes_and_end_where_an_answer_ends() -> None:
    tokenizer = module().tokenizer
    found = pieces(tokenizer, TALK)
    assert found == [
        (f"{END}user\nhi{END}assistant\n", False),
        (f"yes{END}", True),
        (f"user\nso?{END}assistant\n", False),
        (f"no{END}", True),
    ]
    plain = [message._asdict() for message in TALK]
    assert "".join(text for text, _ in found) == tokenizer.apply_chat_template(plain, tokenize=False)
    assert prompt_of(tokenizer, TALK[:1]) == found[0][0]


def test_a_template_that_writes_history_anew_or_refuses_is_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(InputError, match="writes earlier messages anew"):
        pieces(tokenizer, TALK)
    tokenizer.chat_template = "{{ raise_exception('no system') }}"
    with pytest.raises(InputError, match=r"refuses messages of user \(no system\)"):
        prompt_of(tokenizer, TALK[:1])


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_the_loss_is_of_the_answers_alone() -> None:
    """Against the mean of -log p over the bytes of the answers, each after all that stands before it."""
    data, owner = batches(copies(*TALK), 64), module()
    (batch,) = data.test_dataloader()
    batch = {name: tensor[:1] for name, tensor in batch.items()}
    text = f"{END}user\n".encode() + b"? hi"
    tokens = batch["input_ids"][0]
    answered = [int(token) for token in batch["labels"][0] if token >= 0]
    assert answered == [*b"yes", 256, *b"no", 256]
    assert len(tokens) == len(text) - len(END) + 1 + len("\x00assistant\nyes\x00user\nso?\x00assistant\nno")
    with torch.no_grad():
        logits = owner.model(input_ids=tokens[None]).logits[0].log_softmax(-1)
        places = (batch["labels"][0] >= 0).nonzero().flatten()
        expected = -logits[places, torch.tensor(answered)].mean()
        torch.testing.assert_close(owner.loss(batch)[0], expected)
    assert int(owner.count(batch)) == len(answered)


def test_padding_changes_no_loss() -> None:
    data, owner = batches([*copies(*TALK), *copies(*TALK[:2], count=20)], 64), module()
    (batch, *_) = data.val_dataloader()
    lengths = (batch["input_ids"] != 256).sum(1)
    assert len(set(lengths.tolist())) > 1
    with torch.no_grad():
        whole = owner.loss(batch)[0] * owner.count(batch)
        rows = [{name: tensor[row : row + 1] for name, tensor in batch.items()} for row in range(len(lengths))]
        apart = sum(owner.loss(row)[0] * owner.count(row) for row in rows)
    torch.testing.assert_close(whole, apart)


def test_a_long_conversation_is_cut_where_a_user_speaks() -> None:
    data = batches(copies(*TALK, *TALK, *TALK), 64)
    texts = [
        "".join(chr(token) if token < 256 else "|" for token in tokens.tolist())
        for part in (data.training.examples, data.validation, data.test)
        for tokens, _ in part
    ]
    assert all(text.startswith("|user\n") and text.endswith("|") and len(text) <= 65 for text in texts)
    answers = [text.count("yes|") + text.count("no|") for text in texts]
    assert sum(answers) == 6 * 9  # none is lost
    assert max(answers) > 1
    with pytest.raises(InputError, match=r"no answer begins within task\.sequence_length=4"):
        batches(copies(*TALK), 4)


def test_what_is_cut_or_left_out_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    question, answer = Message("user", "hi"), Message("assistant", 40 * "a")
    long = [
        conversation_of((Message("user", f"{number} {40 * 'q'}"), Message("assistant", "no"))) for number in range(9)
    ]
    batches([*copies(*TALK[:2]), *copies(question, answer), *long], 40)
    assert (
        "18 of 27 conversations are longer than task.sequence_length=40 and are cut there; 9 of them before"
        in capsys.readouterr().out
    )


def test_distinct_n_grams_of_a_hand_made_case() -> None:
    metric = DistinctNGrams()
    metric.update(["a b a", "A b"])  # 5 words of 2 kinds; pairs ab, ba, ab
    assert float(metric.compute()["distinct_1"]) == pytest.approx(2 / 5)
    assert float(metric.compute()["distinct_2"]) == pytest.approx(2 / 3)
    metric.reset()
    assert float(metric.compute()["distinct_2"]) == 0


def test_perplexity_is_that_of_the_answers() -> None:
    owner = module()
    labels = torch.tensor([[-100, 5, 6]])
    logits = torch.full((1, 3, 257), 0.0)
    logits[0, 1, 5] = logits[0, 2, 6] = torch.tensor(256.0).log()  # each right with 256/512
    owner.score({"labels": labels}, SimpleNamespace(logits=logits))
    assert float(owner.scores()["perplexity"]) == pytest.approx(2, rel=1e-5)


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_of_a_batch_are_those_of_each_conversation_alone() -> None:
    data, owner = batches([*copies(*TALK), *copies(*TALK[:2], count=20)], 64), module()
    batch = next(iter(data.test_dataloader()))
    together = owner.predict_step(batch, 0)
    longest = max(len(text) for text in together["target"])
    assert set(together["target"]) == {"yes", "no"}
    for row, prompt in enumerate(together["prompt"]):
        ids = owner.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        alone = owner.model.generate(input_ids=ids, max_new_tokens=longest + 1, do_sample=False, pad_token_id=256)
        text = owner.tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)
        assert together["text"][row] == text


def talk(monkeypatch: pytest.MonkeyPatch, folder: Path, text: str, *settings: str) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    _, printed = run_recipe("inference", folder, "mode=chat", "hydra.run.dir=chat", *settings)
    return printed


def test_what_is_piped_in_is_answered_message_by_message(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [f"model.path={trained}", "generation.max_new_tokens=6", "generation.do_sample=false"]
    printed = talk(monkeypatch, tmp_path, "what is 3 + 1?\n\n/new\nwhat is 3 + 1?\n", *settings)
    first, second = [line.partition("model> ")[2] for line in printed.splitlines() if "model> " in line]
    assert first == second  # nothing was said before, and nothing is drawn
    printed = talk(monkeypatch, tmp_path, "what is 3 + 1?\nand what is 4 + 1?\n" + 70 * "x" + "\n", *settings)
    assert printed.count("model> ") == 2
    assert "no room for what was said first: 2 messages are left out" in printed
    assert "shorten it" in printed


def test_talking_streams_token_by_token(trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    came: list[int] = []
    put = TextStreamer.put
    monkeypatch.setattr(TextStreamer, "put", lambda self, value: (came.append(value.numel()), put(self, value))[1])
    settings = [f"model.path={trained}", "generation.max_new_tokens=9", "+generation.min_new_tokens=9"]
    printed = talk(monkeypatch, tmp_path, "what is 3 + 1?\n", *settings)
    assert came == [len("|user\nwhat is 3 + 1?|assistant\n"), *[1] * 9]
    assert printed.count("what is 3 + 1?") == 0  # the prompt is not written again


@pytest.mark.slow
def test_a_model_of_text_is_not_talked_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = ["trainer.limit_val_batches=1", "trainer.enable_progress_bar=false", "logger=csv", "monitor=none"]
    run, _ = run_recipe("pretrain", tmp_path, "experiment=tiny", *quick)
    with pytest.raises(SystemExit, match=r"was not trained on conversations .* task=dialogue"):
        talk(monkeypatch, tmp_path, "hi\n", f"model.path={run}/checkpoints/last.ckpt")


@pytest.mark.slow
def test_a_folder_for_transformers_has_the_template_and_its_own_checkpoint_goes_on(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk_file = Path(trained).parents[2] / "talk.jsonl"
    settings = [
        *("experiment=dialogue", "data=conversation_file", f"data.path={talk_file}", f"model.path={trained}"),
        *("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.enable_progress_bar=false", "logger=csv"),
        *("monitor=none", "task.sequence_length=64", "schedule.warmup_steps=1", "optimizer.lr=0.1"),
    ]
    run, printed = run_recipe("finetune", tmp_path, *settings)
    assert "The checkpoint's own parametrization goes on" in printed
    assert "test/distinct_1" in printed
    run_recipe("export", tmp_path, f"model.path={trained}", "output=plain", "format=hf", "hydra.run.dir=exported")
    (tmp_path / "rows.txt").write_text("what is 3 + 1?\nhello")
    predict = ["mode=predict", "rows=rows.txt", "output=a.jsonl", "progress_bar=false", "hydra.run.dir=p"]
    run_recipe(
        "inference", tmp_path, *predict, f"model.path={run}/checkpoints/last.ckpt", "generation.max_new_tokens=4"
    )
    assert len((tmp_path / "a.jsonl").read_text().splitlines()) == 2
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    found = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert found == f"{END}user\nhi{END}"
    assert "model> " in talk(monkeypatch, tmp_path, "hi\n", "model.path=plain", "generation.max_new_tokens=4")
