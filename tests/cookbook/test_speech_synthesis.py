"""Speech synthesis: durations that fit best, a distance with known values, and data that is named when it is wrong."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lightning_unitscale.cookbook.data.examples import IGNORED
from lightning_unitscale.cookbook.data.sound import RATE, log_mel, read_sound
from lightning_unitscale.cookbook.data.speech import Utterance
from lightning_unitscale.cookbook.tasks.alignment import OFF_DIAGONAL, monotonic_alignment, warped_distance
from lightning_unitscale.cookbook.tasks.mel_distance import MelDistance
from lightning_unitscale.cookbook.tasks.speech_synthesis import SpeechSynthesis, SpokenBatch, true_mels
from lightning_unitscale.cookbook.tasks.text_to_mel import TextToMel, TextToMelConfig, letter_of_frame
from lightning_unitscale.cookbook.tokenizers import letter_tokenizer
from lightning_unitscale.errors import InputError

TINY = {"model_type": "text_to_mel", "hidden_size": 16, "num_attention_heads": 2, "id2label": {0: "a", 1: "b"}}


def best_of_all(scores: Tensor) -> list[int]:
    """Durations by trying every way to cut the frames into as many pieces as there are letters."""
    letters, frames = scores.shape
    off = torch.arange(letters)[:, None] / letters - torch.arange(frames)[None] / frames
    scores = scores - OFF_DIAGONAL * off.square()
    ways = [torch.tensor([0, *cuts, frames]).diff() for cuts in combinations(range(1, frames), letters - 1)]
    which = [torch.repeat_interleave(torch.arange(letters), way) for way in ways]
    totals = torch.stack([scores[letter, torch.arange(frames)].sum() for letter in which])
    return ways[int(totals.argmax())].tolist()


def test_durations_are_those_that_fit_best_of_all() -> None:
    scores = 5 * torch.randn(3, 4, 9, generator=torch.Generator().manual_seed(0))
    letters, frames = torch.tensor([4, 3, 2]), torch.tensor([9, 7, 3])
    durations = monotonic_alignment(scores, letters, frames)
    for row, (count, length) in enumerate(zip(letters, frames, strict=True)):
        assert durations[row, :count].tolist() == best_of_all(scores[row, :count, :length])
        assert not durations[row, count:].any()


def test_warping_finds_the_cheapest_way() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(6, 3, generator=generator), torch.randn(9, 3, generator=generator)
    costs = (one[:, None] - other[None]).abs().mean(-1)
    best = torch.full((7, 10), torch.inf)
    best[0, 0] = 0
    for row in range(6):
        for column in range(9):
            cost = costs[row, column]
            ways = best[row, column] + 2 * cost, best[row, column + 1] + cost, best[row + 1, column] + cost
            best[row + 1, column + 1] = min(ways)
    assert warped_distance(one, other) == pytest.approx(float(best[-1, -1]) / 15, rel=1e-5)
    assert warped_distance(one, one.repeat_interleave(2, 0)) == 0  # the same, said slowly


def test_frames_belong_to_the_letters_that_durations_say() -> None:
    assert letter_of_frame(torch.tensor([[2, 1, 0], [1, 0, 3]])).tolist() == [[0, 0, 1, 0], [0, 2, 2, 2]]


def test_ten_times_the_power_is_ten_decibels() -> None:
    metric = MelDistance()
    for true in (torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 4.0]])):
        metric.update(true + torch.tensor(10.0).log(), true)
    scores = metric.compute()
    assert float(scores["mel_distance"]) == pytest.approx(10, rel=1e-5)
    assert float(scores["mean_frame_distance"]) == pytest.approx(10 / torch.tensor(10.0).log().item(), rel=1e-5)


def test_padding_changes_nothing_of_what_is_said() -> None:
    torch.manual_seed(0)
    model = TextToMel(TextToMelConfig(**{name: value for name, value in TINY.items() if name != "model_type"})).eval()
    alone = model(torch.tensor([[3, 4, 5]]), durations=torch.tensor([[2, 1, 3]])).spectrogram
    padded = model(
        torch.tensor([[3, 4, 5, 0], [6, 7, 8, 9]]),
        attention_mask=torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]),
        durations=torch.tensor([[2, 1, 3, 0], [3, 3, 3, 3]]),
    )
    assert padded.lengths.tolist() == [6, 12]
    torch.testing.assert_close(padded.spectrogram[:1, :6], alone)


def test_a_batch_leads_back_to_the_frames() -> None:
    said = [Utterance(0.1 * torch.randn(1600 * n), text, who) for n, text, who in ((1, "a b", "b"), (2, "it", "a"))]
    batch = SpokenBatch(letter_tokenizer(), {"a": 0, "b": 1}, 80)(said)
    assert batch["speaker_ids"].tolist() == [1, 0]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert (batch["labels"][0, 11:] == IGNORED).all()
    for one, mel in zip(said, true_mels(batch), strict=True):
        torch.testing.assert_close(mel, log_mel(one.sound))


@pytest.mark.parametrize(
    ("text", "seconds", "message"),
    [("123", 1.0, "^row 2: '123': 0 letters"), ("see it", 0.03, "6 letters .* in 4 frames")],
)
def test_a_text_that_its_sound_can_not_say_is_named(text: str, seconds: float, message: str) -> None:
    module = SpeechSynthesis(TINY, tokenizer="letters")
    found = SimpleNamespace(model=module.model, text_tokenizer=letter_tokenizer)
    wrong = Utterance(torch.zeros(int(seconds * RATE)), text, "b", "row 2")
    said = [Utterance(torch.zeros(RATE), "yes", "a"), wrong]
    with pytest.raises(InputError, match=message):
        SpeechSynthesis.data_module(said, found, OmegaConf.create({"data": {"held_out": 0.2}}))


def test_a_held_out_voice_is_refused() -> None:
    with pytest.raises(InputError, match="can't speak with a voice it never heard"):
        SpeechSynthesis.check(OmegaConf.create({"data": {"held_out_speaker": "en-us"}}))


def test_any_text_becomes_a_sound_as_long_as_its_durations(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = SpeechSynthesis(TINY, tokenizer="letters").eval()
    files = module.files_of(["see it", "no"], tmp_path / "said")
    seconds = module.predict_step(module.collate_texts(["see it"], {})(["see it"]), 0)["seconds"]
    assert [file.name for file in files] == ["row_0.wav", "row_1.wav"]
    assert len(read_sound(files[0])) / RATE == pytest.approx(seconds[0], abs=0.011)
    with pytest.raises(InputError, match="row 1 says '7', of which the tokenizer knows no letter"):
        module.collate_texts(["7"], {})
