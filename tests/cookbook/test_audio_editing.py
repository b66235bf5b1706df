"""Audio editing: noise as loud as is said, ratios with known values, and the user's own recordings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy
import pytest
import soundfile
import torch

from lightning_unitscale.cookbook.data.mixtures import Mixture, Noise, sound_folder
from lightning_unitscale.cookbook.data.sound import RATE, check_sound, write_wav
from lightning_unitscale.cookbook.tasks.audio_editing import NEGLIGIBLE, AudioEditing, WindowBatch, windows_of
from lightning_unitscale.cookbook.tasks.sound_unet import SoundUNet, SoundUNetConfig
from lightning_unitscale.errors import InputError

TIME = torch.arange(RATE) / RATE
TONE = torch.sin(2 * math.pi * 100 * TIME)
OTHER = torch.sin(2 * math.pi * 250 * TIME)  # at right angles to it
TINY = {"model_type": "sound_unet", "channels": [4, 4]}


def test_noise_is_as_loud_as_is_said() -> None:
    for decibels in (-5.0, 10.0):
        noise = Noise(decibels, seed=3).added_to(TONE) - TONE
        found = 10 * math.log10(float(TONE.square().mean() / noise.square().mean()))
        assert found == pytest.approx(decibels, abs=1e-3)
    assert torch.equal(Noise(0.0, 1).added_to(TONE), Noise(0.0, 1).added_to(TONE))
    assert not torch.equal(Noise(0.0, 1).added_to(TONE), Noise(0.0, 2).added_to(TONE))


def test_a_tenth_of_the_disturbance_is_twenty_decibels_better() -> None:
    module = AudioEditing(TINY)
    batch = {"input_values": torch.stack([TONE + OTHER, OTHER]), "labels": torch.stack([TONE, torch.zeros(RATE)])}
    output = type("Output", (), {"sound": torch.stack([3 * (TONE + OTHER / 10), OTHER])})  # any loudness is the same
    module.score(batch, output)
    assert float(module.scores()["si_sdr"]) == pytest.approx(20, abs=1e-3)  # the silent one has no ratio
    assert float(module.scores()["si_sdr_improvement"]) == pytest.approx(20, abs=1e-3)


def test_the_loss_is_the_error_beside_the_target_in_decibels() -> None:
    module = AudioEditing(TINY)
    module.model.forward = lambda input_values: type("Output", (), {"sound": 0.9 * input_values})
    loss, _ = module.loss({"input_values": TONE[None], "labels": TONE[None]})
    assert float(loss) == pytest.approx(10 * math.log10((0.005 + NEGLIGIBLE) / (0.5 + NEGLIGIBLE)), abs=1e-3)


@pytest.mark.parametrize("length", [16, 1000, 4097])
def test_sound_of_any_length_goes_in_and_out(length: int) -> None:
    assert SoundUNet(SoundUNetConfig(channels=[4, 4]))(torch.randn(2, length)).sound.shape == (2, length)


def test_windows_cover_a_sound_and_have_a_power_of_one() -> None:
    mixture = Mixture(torch.cat([TONE, TONE, TONE[:8000]]), Noise(5.0, 1), 2.5, "a")
    windows = windows_of(mixture, 1.0)
    assert [window.begin for window in windows] == [0, 1, 2]
    batch = WindowBatch(1.0)(windows)
    assert batch["input_values"].shape == batch["labels"].shape == (3, RATE)
    torch.testing.assert_close(batch["input_values"][:2].square().mean(1), torch.ones(2))
    assert not batch["labels"][2, 8000:].any()
    assert len(windows_of(Mixture(TONE, TONE, 0.1, "b"), 1.0)) == 1


def test_the_users_own_pairs_are_read_and_wrong_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("clean", "mixed"):
        (tmp_path / folder).mkdir()
    write_wav(TONE[::2], tmp_path / "clean" / "a.wav", rate=8000)
    write_wav(TONE, tmp_path / "mixed" / "a.wav")
    (mixture,) = sound_folder(str(tmp_path))
    assert "recordings at 8000 samples a second are resampled to 16000" in capsys.readouterr().out
    mixed, clean = mixture.sounds()
    assert len(mixed) == len(clean) == RATE
    write_wav(TONE, tmp_path / "clean" / "b.wav")
    with pytest.raises(InputError, match=r"the partner of b\.wav: there is no file"):
        sound_folder(str(tmp_path))
    assert len(sound_folder(str(tmp_path), skip_broken=True)) == 1
    assert "left out 1 of 2 rows" in capsys.readouterr().out
    write_wav(TONE[:8000], tmp_path / "mixed" / "b.wav")
    with pytest.raises(InputError, match=r"0\.50 seconds long, .* they must be equal"):
        sound_folder(str(tmp_path))


def test_noise_is_added_to_a_folder_of_recordings_alone(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no file in"):
        sound_folder(str(tmp_path))
    write_wav(0.5 * TONE, tmp_path / "a.wav")
    (mixture,) = sound_folder(str(tmp_path), quietest=0.0, loudest=0.0)
    mixed, clean = mixture.sounds()
    assert float((mixed - clean).square().mean()) == pytest.approx(float(clean.square().mean()), rel=1e-3)
    (tmp_path / "clean").mkdir()
    with pytest.raises(InputError, match="it has the folder clean, but not mixed"):
        sound_folder(str(tmp_path))


def test_a_recording_that_is_cut_short_or_no_number_is_named(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", torch.randn(RATE).clamp(-1, 1).numpy(), RATE)
    whole = (tmp_path / "a.flac").read_bytes()
    (tmp_path / "a.flac").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"here: .*a\.flac"):
        check_sound(tmp_path / "a.flac", "here")
    samples = numpy.zeros(100, dtype=numpy.float32)
    samples[7] = numpy.nan
    soundfile.write(tmp_path / "b.wav", samples, RATE, subtype="FLOAT")
    with pytest.raises(InputError, match="samples that are no numbers"):
        check_sound(tmp_path / "b.wav", "here")
