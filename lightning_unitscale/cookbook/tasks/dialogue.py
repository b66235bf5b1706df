"""Answering in a conversation: a language model whose loss counts the answers alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_unitscale.cookbook.chat_template import ASSISTANT, make_able_to_chat, pieces, prompt_of
from lightning_unitscale.cookbook.data.continuing_loader import loading
from lightning_unitscale.cookbook.data.conversations import Conversation, Message
from lightning_unitscale.cookbook.data.examples import IGNORED, Batch, Examples, split_by
from lightning_unitscale.cookbook.generation import generate, generation_config, number_of_new_tokens
from lightning_unitscale.cookbook.pretrained import Pretrained, context_length
from lightning_unitscale.cookbook.tasks.kept_texts import KeptTexts
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling
from lightning_unitscale.cookbook.tokenizers import make_able_to_pad
from lightning_unitscale.errors import InputError

SHOWN = 8  # conversations
Sample = tuple[Tensor, Tensor]  # tokens [length], and whether each is of an answer


class DistinctNGrams(KeptTexts):
    """How varied texts are: the share of all their n-grams of words that differ (Li et al., 2016, arXiv 1510.03055)."""

    def __init__(self) -> None:
        super().__init__("texts")

    def update(self, texts: Sequence[str]) -> None:
        """More texts."""
        self.keep("texts", texts)

    def compute(self) -> dict[str, Tensor]:
        """`distinct_1` and `distinct_2`, from 0 to 1; 0 where no text is that long."""
        words = [text.lower().split() for text in self.kept("texts")]
        scores = {}
        for n in (1, 2):
            grams = [tuple(text[i : i + n]) for text in words for i in range(len(text) - n + 1)]
            scores[f"distinct_{n}"] = torch.tensor(len(set(grams)) / max(len(grams), 1))
        return scores


class Dialogue(LanguageModeling):
    """Batches: input_ids and labels, both [batch, sequence], labels one token ahead and -100 but for answers.

    Losses are nats per token of the answers. The test also writes the last answer of each conversation, greedily.
    """

    predicts_held_out = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distinct = DistinctNGrams()
        self.complete(self.tokenizer, self.model)

    # --- data ---------------------------------------------------------------------------------------------------------

    @classmethod
    def data_module(cls, examples: Sequence[Conversation], found: Pretrained, cfg: DictConfig) -> Examples:  # type: ignore[override]  # no TokenText
        """Batches of conversations; those that begin alike stay on one side of the split.

        Raises:
            InputError: no conversation of a part has an answer within `task.sequence_length`.
        """
        tokenizer = found.text_tokenizer()
        cls.complete(tokenizer, found.model)
        make_able_to_pad(tokenizer, found.model)
        length, long, empty, parts = cfg.task.sequence_length, 0, 0, []
        for part in split_by(lambda conversation: conversation.group, examples, cfg.data.held_out):
            whole = [sample for conversation in part for sample in _samples(tokenizer, conversation, length)]
            cut = [(tokens[: length + 1], answers[: length + 1]) for tokens, answers in whole]
            samples = [(tokens, answers) for tokens, answers in cut if answers[1:].any()]
            long += sum(len(tokens) > length + 1 for tokens, _ in whole)
            empty += len(whole) - len(samples)
            parts.append(samples)
        if not all(parts):
            raise InputError(f"no answer begins within task.sequence_length={length}; give more")
        if long:
            print(
                f"{long} of {sum(map(len, parts)) + empty} conversations are longer than task.sequence_length={length} "
                f"and are cut there" + (f"; {empty} of them before an answer, and are left out" if empty else "")
            )
        return Examples(parts, ChatBatch(int(tokenizer.pad_token_id)), **loading(cfg))

    @classmethod
    def complete(cls, tokenizer: PreTrainedTokenizerBase | None, model: PreTrainedModel) -> None:
        """A chat template, and a token that ends answers."""
        if tokenizer is not None:
            make_able_to_chat(tokenizer, model)

    # --- scores -------------------------------------------------------------------------------------------------------

    def scores(self) -> dict[str, Tensor]:
        """Perplexity per token of the answers."""
        return {"perplexity": self.perplexity.compute()}

    def test_score(self, batch: Batch) -> None:
        """How varied the answers are."""
        self.distinct.update(self._answered(batch))

    def test_scores(self) -> dict[str, Tensor]:
        """The shares of distinct n-grams."""
        values: dict[str, Tensor] = self.distinct.compute()
        return values

    # --- answers ------------------------------------------------------------------------------------------------------

    def collate_texts(self, texts: Sequence[str], generation: Mapping[str, Any]) -> Callable[[list[str]], list[str]]:
        """Each text is what a user says first."""
        self.generation = generation_config(self.model, self.tokenizer, generation)
        prompts = {text: prompt_of(self.tokenizer, [Message("user", text)]) for text in texts}
        self.generation.max_new_tokens = number_of_new_tokens(
            *(self.model, self.tokenizer, list(prompts.values()), self.generation.max_new_tokens), special_tokens=False
        )
        return lambda batch: [prompts[text] for text in batch]

    def predict_step(self, batch: Batch | list[str], batch_idx: int) -> dict[str, list[str]]:
        """An answer to each; to the task's own data the last one, beside what stands before it and what was said."""
        if isinstance(batch, list):
            return {"text": generate(self.model, self.tokenizer, batch, self.generation, special_tokens=False).texts}
        prompts, targets = zip(*_last_answers(batch), strict=True)
        return {
            "prompt": self.tokenizer.batch_decode(prompts),
            "text": self._answered(batch),
            "target": self.tokenizer.batch_decode(targets, skip_special_tokens=True),
        }

    def show(self, batches: DataLoader[Any], folder: Path, settings: Mapping[str, Any]) -> list[str | Path]:
        """Some held-out conversations, and what the model answers at their end."""
        batch = {name: tensor[:SHOWN].to(self.device) for name, tensor in next(iter(batches)).items()}
        columns = self.predict_step(batch, 0)
        rows = zip(columns["prompt"], columns["target"], columns["text"], strict=True)
        return ["\n\n".join(f"{prompt}\nreference  {said}\noutput     {text}" for prompt, said, text in rows)]

    def _answered(self, batch: Batch) -> list[str]:
        """The last answer of each, greedily, up to the longest of those that were given."""
        prompts, targets = zip(*_last_answers(batch), strict=True)
        longest, context = max(map(len, prompts)), context_length(self.model)
        new_tokens = max(map(len, targets))
        if context is not None:
            new_tokens = max(1, min(new_tokens, context - longest))
        padding = self.tokenizer.pad_token_id
        ids = pad_sequence(list(prompts), batch_first=True, padding_value=padding, padding_side="left")
        counts = torch.arange(longest, device=ids.device) >= torch.tensor([[longest - len(p)] for p in prompts]).to(ids)
        config = generation_config(self.model, self.tokenizer, {"max_new_tokens": new_tokens, "do_sample": False})
        generated = self.model.generate(input_ids=ids, attention_mask=counts.long(), generation_config=config)
        texts: list[str] = self.tokenizer.batch_decode(generated[:, longest:], skip_special_tokens=True)
        return texts


class ChatBatch:
    """input_ids and labels of samples, [batch, longest]; labels are one token ahead, and -100 but for answers."""

    def __init__(self, padding: int) -> None:
        self.padding = padding

    def __call__(self, samples: Sequence[Sample]) -> Batch:
        """One batch."""
        inputs = [tokens[:-1] for tokens, _ in samples]
        labels = [tokens[1:].masked_fill(~answers[1:], IGNORED) for tokens, answers in samples]
        return {
            "input_ids": pad_sequence(inputs, batch_first=True, padding_value=self.padding),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
        }


def _samples(tokenizer: PreTrainedTokenizerBase, conversation: Conversation, length: int) -> Iterator[Sample]:
    """A conversation in parts of so many predicted tokens, of whole exchanges; a longer one is a part by itself."""
    system = [message for message in conversation.messages if message.role == "system"]
    part: list[Message] = []
    for exchange in _exchanges(conversation.messages):
        if part and len(_tokens(tokenizer, [*system, *part, *exchange])[0]) > length + 1:
            yield _tokens(tokenizer, [*system, *part])
            part = []
        part += exchange
    yield _tokens(tokenizer, [*system, *part])


def _exchanges(messages: Sequence[Message]) -> Iterator[list[Message]]:
    """What is said up to and with an answer; what the system says is left out."""
    exchange: list[Message] = []
    for message in messages:
        if message.role == "system":
            continue
        if exchange and exchange[-1].role == ASSISTANT and message.role != ASSISTANT:
            yield exchange
            exchange = []
        exchange.append(message)
    yield exchange


def _tokens(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> Sample:
    ids: list[int] = []
    answers: list[bool] = []
    for text, is_answer in pieces(tokenizer, messages):
        new = tokenizer(text, add_special_tokens=False).input_ids
        ids += new
        answers += [is_answer] * len(new)
    return torch.tensor(ids), torch.tensor(answers)


def _last_answers(batch: Batch) -> Iterator[tuple[Tensor, Tensor]]:
    """For each row the tokens before its last answer, and those of the answer."""
    for inputs, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        places = (labels != IGNORED).nonzero().flatten()
        breaks = (places.diff() > 1).nonzero().flatten()
        start = int(places[breaks[-1] + 1] if len(breaks) else places[0])
        yield inputs[: start + 1], labels[start : int(places[-1]) + 1]
