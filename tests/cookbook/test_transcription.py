"""Speech recognition with a decoder: what it hears, what it is to write, and what does not fit into it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import WhisperFeatureExtractor

from lightning_unitscale.cookbook.data.sound import RATE
from lightning_unitscale.cookbook.data.speech import Utterance
from lightning_unitscale.cookbook.tasks.speech_recognition import SpeechRecognition
from lightning_unitscale.cookbook.tasks.transcription import TranscriptBatch, Transcription
from lightning_unitscale.cookbook.tokenizers import character_tokenizer, letter_tokenizer
from lightning_unitscale.errors import InputError

TINY = {
    "model_type": "whisper",
    "vocab_size": 29,
    "num_mel_bins": 80,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "decoder_ffn_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "decoder_start_token_id": 0,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "max_source_positions": 50,
    "max_target_positions": 12,
}


@pytest.fixture(scope="module")
def module() -> SpeechRecognition:
    """With a decoder, of random weights."""
    torch.manual_seed(0)
    return SpeechRecognition(TINY, head="AutoModelForSpeechSeq2Seq", tokenizer="characters").eval()


def test_letters_that_stand_twice_are_written_twice() -> None:
    tokenizer = character_tokenizer()
    ids = tokenizer("Green  isn't 7 blue").input_ids
    assert tokenizer.decode([*ids, 0, 0], skip_special_tokens=True) == "green  isn't  blue"
    assert tokenizer("z").input_ids == [28]


def test_the_model_hears_what_whisper_hears(module: SpeechRecognition) -> None:
    sound = 0.1 * torch.randn(RATE, generator=torch.Generator().manual_seed(0))
    batch = TranscriptBatch(module.tokenizer, module.model.config)([Utterance(sound[:9000], "set red", "a")])
    known = WhisperFeatureExtractor(feature_size=80, chunk_length=1)(sound[:9000].numpy(), sampling_rate=RATE)
    torch.testing.assert_close(batch["input_features"], torch.tensor(known.input_features))
    assert batch["labels"][0, -1] == 0
    assert module.reader.said(batch) == ["set red"]


def test_error_rates_count_what_the_decoder_writes(module: SpeechRecognition, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [Utterance(torch.zeros(RATE), text, "a") for text in ("set red", "lay it")]
    batch = TranscriptBatch(module.tokenizer, module.model.config)(said)
    written = [torch.tensor([*module.tokenizer(text).input_ids, 0]) for text in ("set bed", "lay it")]
    written = torch.nn.utils.rnn.pad_sequence(written, batch_first=True)
    monkeypatch.setattr(module.model, "generate", lambda **given: written)
    module.score(batch, None)
    assert float(module.scores()["word_error_rate"]) == pytest.approx(1 / 4)
    assert float(module.scores()["character_error_rate"]) == pytest.approx(1 / 13)
    assert module.count(batch) == 8 + 7  # tokens, the end among them


def test_it_writes_no_more_than_the_longest_text(module: SpeechRecognition) -> None:
    batch = TranscriptBatch(module.tokenizer, module.model.config)([Utterance(torch.randn(RATE), "at", "a")])
    (text,) = module.predict_step(batch, 0)["text"]
    assert len(text) <= 3


@pytest.mark.parametrize(
    ("seconds", "text", "message"),
    [
        (1.5, "yes", r"row 2: 'yes' takes 1\.50 s, and the model hears 1\.00 s"),
        (0.5, "nobody says this", "row 2: .* has 17 tokens, and the model writes 12"),
    ],
)
def test_what_does_not_fit_is_named(module: SpeechRecognition, seconds: float, text: str, message: str) -> None:
    module.reader.check(Utterance(torch.zeros(RATE), "yes", "a"))
    with pytest.raises(InputError, match=message):
        module.reader.check(Utterance(torch.zeros(int(seconds * RATE)), text, "a", "row 2"))


def test_a_tokenizer_without_an_end_and_another_kind_of_model_are_refused(module: SpeechRecognition) -> None:
    with pytest.raises(InputError, match="has no eos token"):
        Transcription(module.model, letter_tokenizer()).collate()
    other = SimpleNamespace(main_input_name="input_features", config=SimpleNamespace())
    with pytest.raises(InputError, match=r"not of Whisper's kind"):
        Transcription(other, character_tokenizer()).collate()
