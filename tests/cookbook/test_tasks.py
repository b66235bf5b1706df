"""Every task of the table in recipes/README.md: a few steps, a resume, predictions, an export; its score by hand."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu
import torch
from omegaconf import OmegaConf
from PIL import Image as Pillow
from rouge_score import rouge_scorer
from support.recipe_runs import run_recipe

from lightning_unitscale.cookbook.data.catalogues import catalogues
from lightning_unitscale.cookbook.data.digits import digits
from lightning_unitscale.cookbook.data.examples import Pair, split_by
from lightning_unitscale.cookbook.data.masks import mask_folder
from lightning_unitscale.cookbook.data.music import Note, chorales, events_of, music_folder, notes_of, write_midi
from lightning_unitscale.cookbook.data.scenes import coco_file, digit_scenes
from lightning_unitscale.cookbook.data.sound import RATE, from_log_mel, log_mel, read_sound, resampled, write_wav
from lightning_unitscale.cookbook.data.speech import VOICES, Utterance, manifest, read_sentences
from lightning_unitscale.cookbook.data.standard_library import docstrings
from lightning_unitscale.cookbook.tasks.average_precision import CocoAveragePrecision
from lightning_unitscale.cookbook.tasks.detection import Detection, SceneBatch, in_pixels
from lightning_unitscale.cookbook.tasks.music import Music
from lightning_unitscale.cookbook.tasks.segmentation import Segmentation
from lightning_unitscale.cookbook.tasks.speech_recognition import SpeechRecognition
from lightning_unitscale.cookbook.tasks.summarization import Summarization
from lightning_unitscale.cookbook.tasks.translation import Translation
from lightning_unitscale.cookbook.tokenizers import letter_tokenizer
from lightning_unitscale.errors import InputError


@dataclass(frozen=True)
class Case:
    """A task made small: what is set, which scores are logged, columns of its predictions, and files to look at.

    Its experiment has its name, unless another one is said.
    """

    settings: tuple[str, ...]
    scores: tuple[str, ...]
    columns: tuple[str, ...]
    files: tuple[str, ...]
    experiment: str = ""


SMALL_T5 = ("model.config.d_model=32", "model.config.num_layers=1", "model.config.num_decoder_layers=1")
TASKS = {
    "detection": Case(
        ("model.config.channels=[8,8,16]", "data.scenes.count=60", "data.batch_size=4"),
        ("map", "map_50"),
        ("objects", "target"),
        ("objects.png",),
    ),
    "segmentation": Case(
        ("data.masks.count=60", "data.batch_size=4"),
        ("mean_iou", "pixel_accuracy"),
        ("pixels", "target"),
        ("masks.png",),
    ),
    "speech_recognition": Case(
        ("data.utterances.count=12", "data.batch_size=4", "model.config.num_hidden_layers=2"),
        ("word_error_rate", "character_error_rate"),
        ("text", "target"),
        ("utterance_1.wav",),
    ),
    "transcription": Case(
        ("model=whisper", "data.utterances.count=12", "data.batch_size=4", "model.config.d_model=32"),
        ("word_error_rate", "character_error_rate"),
        ("text", "target"),
        ("utterance_1.wav",),
        experiment="speech_recognition",
    ),
    "speech_synthesis": Case(
        ("data.utterances.count=12", "data.batch_size=4", "model.config.hidden_size=32"),
        ("mel_distance", "mean_frame_distance"),
        ("text", "seconds", "mel_distance"),
        ("spectrograms.png", "said_1.wav", "true_1.wav"),
    ),
    "audio_editing": Case(
        ("data.mixtures.count=12", "data.batch_size=4", "model.config.channels=[8,8,8]"),
        ("si_sdr", "si_sdr_improvement"),
        ("si_sdr_before", "si_sdr"),
        ("spectrograms.png", "before_1.wav", "after_1.wav", "true_1.wav"),
    ),
    "image_classification": Case(
        ("data.batch_size=4",),
        ("accuracy", "f1"),
        ("label", "score", "target"),
        ("confusion.png", "answers.png"),
    ),
    "digits": Case(
        ("data.batch_size=4", "model.config.hidden_size=16", "model.config.num_hidden_layers=1"),
        ("accuracy", "f1"),
        ("label", "score", "target"),
        ("confusion.png", "answers.png"),
    ),
    "music": Case(
        (
            "data.documents.count=9",
            "data.held_out=0.2",
            "task.sequence_length=64",
            "model.width=32",
            "model.head_width=16",
        ),
        ("pitch_accuracy", "perplexity"),
        ("notes", "target"),
        ("music.mid", "music.wav", "music.png"),
    ),
    "dialogue": Case(
        ("task.sequence_length=48", "data.batch_size=4", "model.width=32", "model.head_width=16", "model.depth=1"),
        ("perplexity",),
        ("prompt", "text", "target"),
        (),
    ),
    "translation": Case(
        (
            "data.max_length=9",
            "data.batch_size=4",
            "task.sequence_length=12",
            *SMALL_T5,
        ),
        ("loss",),
        ("source", "text", "target"),
        (),
    ),
    "summarization": Case(
        (
            "+data.pairs.max_bytes=200000",
            "data.batch_size=4",
            "task.sequence_length=16",
            *SMALL_T5,
        ),
        ("loss",),
        ("source", "text", "target"),
        (),
    ),
    "seq2seq": Case(("data.batch_size=4", *SMALL_T5), ("loss",), ("source", "text", "target"), ()),
}
QUICK = [
    "trainer.val_check_interval=4",
    "trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=1",
    "trainer.enable_progress_bar=false",
    "schedule.warmup_steps=1",
    "schedule.decay_steps=4",
    "logger=csv",
    "checkpoint_every=2",
    "+callbacks.checkpoints.save_top_k=-1",
    "monitor=none",
]


BY_DAY = ("segmentation", "music")  # the others in the nightly run


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[] if name in BY_DAY else [pytest.mark.slow]) for name in TASKS]
)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The name of a task, and the folder in which four steps of its pre-training lie under `run`."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    run_recipe("pretrain", folder, *settings_of(name))
    return name, folder


def settings_of(name: str) -> list[str]:
    """Of four steps of its pre-training."""
    case = TASKS[name]
    return [f"experiment={case.experiment or name}", "trainer.max_steps=4", *QUICK, *case.settings]


def test_a_task_is_trained_and_shown(run: tuple[str, Path]) -> None:
    name, folder = run
    metrics = json.loads((folder / "run" / "report" / "metrics.json").read_text())
    assert {f"val/{score}" for score in ("loss", *TASKS[name].scores)} <= metrics.keys()
    page = (folder / "run" / "report" / "index.html").read_text()
    for file in TASKS[name].files:
        assert (folder / "run" / "report" / "shown" / file).stat().st_size > 0
        assert f"shown/{file}" in page


def test_a_task_resumes_exactly(run: tuple[str, Path]) -> None:
    name, folder = run
    halfway = folder / "run" / "checkpoints" / "step-2.ckpt"
    run_recipe("pretrain", folder, *settings_of(name), "hydra.run.dir=resumed", f"ckpt_path={halfway}")
    whole, resumed = (
        torch.load(folder / made / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for made in ("run", "resumed")
    )
    for parameter, value in whole.items():
        assert torch.equal(value, resumed[parameter]), parameter


def test_a_task_predicts_what_was_held_out(run: tuple[str, Path]) -> None:
    name, folder = run
    settings = [f"model.path={folder}/run/checkpoints/last.ckpt", "hydra.run.dir=predicted", "progress_bar=false"]
    run_recipe("inference", folder, "mode=predict", "output=answers.jsonl", *settings)
    rows = [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]
    assert rows
    assert set(TASKS[name].columns) <= rows[0].keys()
    for file in TASKS[name].files:
        assert (folder / "answers" / "shown" / file).is_file()


def test_a_task_is_fine_tuned_from_what_it_was(run: tuple[str, Path]) -> None:
    name, folder = run
    trained_model = f"model.path={folder}/run/checkpoints/last.ckpt"
    run_recipe("export", folder, trained_model, "format=hf", "output=plain", "hydra.run.dir=exported_plain")
    of_pretraining = ("checkpoint_every", "+callbacks.checkpoints", "model.")
    settings = [one for one in settings_of(name) if not one.startswith(of_pretraining)]
    settings += [f"model.path={folder}/plain", "unitscale=preserve", "optimizer.lr=1e-4", "hydra.run.dir=tuned"]
    run_recipe("finetune", folder, *settings)
    trained, tuned = (json.loads((folder / made / "report" / "metrics.json").read_text()) for made in ("run", "tuned"))
    assert tuned["test/loss, before"] == pytest.approx(trained["test/loss"], rel=1e-5)
    assert tuned["test/loss"] != tuned["test/loss, before"]


def test_a_task_is_exported(run: tuple[str, Path]) -> None:
    _, folder = run
    settings = [f"model.path={folder}/run/checkpoints/last.ckpt", "output=model.safetensors", "format=safetensors"]
    _, printed = run_recipe("export", folder, *settings, "hydra.run.dir=exported")
    assert "read back" in printed


# --- detection and segmentation ---------------------------------------------------------------------------------------


def test_average_precision_of_one_right_and_one_wrong_box() -> None:
    metric = CocoAveragePrecision()
    true = torch.tensor([[0.0, 0, 10, 10], [30, 30, 10, 10]])
    found = torch.tensor([[0.0, 0, 10, 10], [15, 15, 10, 10]])
    metric.update(found, torch.tensor([1, 1]), torch.tensor([0.9, 0.8]), true, torch.tensor([1, 1]))
    scores = metric.compute()  # precision is 1 up to a recall of ½: at 51 of COCO's 101 points
    assert float(scores["map"]) == pytest.approx(51 / 101)
    assert float(scores["map_50"]) == pytest.approx(51 / 101)
    metric.update(true, torch.tensor([1, 1]), torch.tensor([0.95, 0.85]), true, torch.tensor([1, 1]))
    assert 51 / 101 < float(metric.compute()["map"]) < 1
    metric.reset()
    metric.update(found[:0], torch.tensor([]), torch.tensor([]), true, torch.tensor([1, 1]))
    assert float(metric.compute()["map"]) == 0


def test_mean_iou_of_four_pixels() -> None:
    model = {"model_type": "segformer", "num_labels": 2, "image_size": 32}
    module = Segmentation(model)
    logits = torch.tensor([[[[1.0, 1], [0, 0]], [[0, 0], [1, 1]]]])  # classes 0 0 / 1 1
    labels = torch.tensor([[[0, 1], [1, 255]]])
    module.score({"labels": labels}, type("Output", (), {"logits": logits}))
    assert float(module.scores()["mean_iou"]) == pytest.approx((1 / 2 + 1 / 2) / 2)
    assert float(module.scores()["pixel_accuracy"]) == pytest.approx(2 / 3)
    assert int(module.count({"labels": labels})) == 3


def test_no_digit_is_in_training_and_test_and_boxes_are_tight() -> None:
    scenes = digit_scenes(40)
    parts = split_by(lambda scene: scene.group, scenes, 0.1)
    groups = [{scene.group for scene in part} for part in parts]
    assert not (groups[0] & groups[1] or groups[0] & groups[2] or groups[1] & groups[2])
    for scene in scenes:
        assert scene.mask is not None
        for number, (left, top, width, height) in enumerate(scene.boxes.int().tolist(), start=1):
            inside = scene.mask[top : top + height, left : left + width] == number
            assert int(inside.sum()) == int((scene.mask == number).sum())
            assert all(bool(edge.any()) for edge in (inside[0], inside[-1], inside[:, 0], inside[:, -1]))
    assert torch.equal(digit_scenes(40)[7].boxes, scenes[7].boxes)


def test_boxes_of_a_batch_lead_back_to_pixels() -> None:
    scene = digit_scenes(1)[0]
    batch = SceneBatch({str(digit): digit for digit in range(10)}, 3, (32, 32))([scene])
    assert batch["pixel_values"].shape == (1, 3, 32, 32)
    torch.testing.assert_close(in_pixels(batch["boxes"][0], batch["sizes"][0]), scene.boxes)


def test_the_users_own_boxes_are_read_and_wrong_ones_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        Pillow.new("RGB", (20, 10)).save(tmp_path / f"{number}.jpg")
    (tmp_path / "2.jpg").write_bytes((tmp_path / "2.jpg").read_bytes()[:100])  # cut short
    annotations = [{"image_id": number, "category_id": 7, "bbox": [1, 2, 3, 4]} for number in range(3)]
    coco = {
        "images": [{"id": number, "file_name": f"{number}.jpg"} for number in range(3)],
        "annotations": annotations,
        "categories": [{"id": 7, "name": "cat"}],
    }
    file = tmp_path / "coco.json"
    file.write_text(json.dumps(coco))
    with pytest.raises(InputError, match=r"image 2: .*2\.jpg is no picture"):
        coco_file(str(file))
    scenes = coco_file(str(file), skip_broken=True)
    assert "left out 1 of 3 rows" in capsys.readouterr().out
    assert [(scene.labels, scene.size, scene.boxes.tolist()) for scene in scenes] == [
        (("cat",), (10, 20), [[1, 2, 3, 4]])
    ] * 2
    for wrong, message in (
        ({"bbox": [15, 2, 10, 4]}, r"annotation 2 of 1\.jpg: the box .* is not inside the picture of 20×10"),
        ({"category_id": 8}, "category 8 is not among"),
        ({"category_id": None}, "category None is not among"),
        ({"image_id": 9}, "annotation 2 is of image 9"),
    ):
        file.write_text(json.dumps({**coco, "annotations": [annotations[0], {**annotations[1], **wrong}]}))
        with pytest.raises(InputError, match=message):
            coco_file(str(file))
    capsys.readouterr()
    scenes = coco_file(str(file), skip_broken=True)  # a box of no picture, and picture 2, which is cut short
    assert [len(scene.labels) for scene in scenes] == [1, 0]
    assert capsys.readouterr().out.count("left out 1 of") == 2
    for wrong_file, message in (
        ({"annotations": []}, "no annotation of a box"),
        ({"images": coco["images"] * 2}, "several images have the id 0"),
        ({"annotations": ["cat"]}, "not COCO's JSON"),
    ):
        file.write_text(json.dumps({**coco, **wrong_file}))
        with pytest.raises(InputError, match=message):
            coco_file(str(file))


def test_the_users_own_masks_are_read_and_wrong_ones_named(tmp_path: Path) -> None:
    for folder in ("images", "masks"):
        (tmp_path / folder).mkdir()
    Pillow.new("L", (6, 4)).save(tmp_path / "images" / "a.png")
    mask = Pillow.new("P", (6, 4))
    mask.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
    mask.putpixel((5, 3), 2)
    mask.save(tmp_path / "masks" / "a.png")
    (example,) = mask_folder(str(tmp_path))
    assert example.names == ("0", "1", "2")
    with pytest.raises(InputError, match=r"a\.png: class 2 is out of range, there are 2 names"):
        mask_folder(str(tmp_path), names=["ground", "tree"])
    Pillow.new("L", (5, 4)).save(tmp_path / "masks" / "a.png")
    with pytest.raises(InputError, match="another size than"):
        mask_folder(str(tmp_path))
    (tmp_path / "images" / "a.png").unlink()
    with pytest.raises(InputError, match=r"no file in .*images"):
        mask_folder(str(tmp_path))


def test_classes_are_those_of_the_data() -> None:
    assert Detection.classes(digit_scenes(30)) == sorted({image.label for image in digits()})


# --- speech -----------------------------------------------------------------------------------------------------------


def test_letters_are_written_and_read_by_ctc() -> None:
    letters = letter_tokenizer()
    ids = letters("See it's 2 o'clock", add_special_tokens=False).input_ids
    assert letters.convert_ids_to_tokens(ids) == list("see|it's||o'clock")
    stretched = [token for token in ids for token in (token, token, 0)]  # said twice, then nothing
    assert letters.decode(stretched).replace("  ", " ") == "see it's o'clock"


def test_error_rates_of_two_sentences() -> None:
    model = {"model_type": "wav2vec2-bert", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1}
    module = SpeechRecognition({**model, "num_attention_heads": 2, "intermediate_size": 16}, tokenizer="letters")
    letters = letter_tokenizer()
    said, understood = ["set red", "lay blue"], ["set bed", "lay blue"]
    labels = torch.tensor(
        [[*letters(text, add_special_tokens=False).input_ids, *[-100] * (8 - len(text))] for text in said]
    )
    heard = torch.tensor(
        [[*letters(text, add_special_tokens=False).input_ids, *[5] * (8 - len(text))] for text in understood]
    )
    attention = torch.tensor([[1] * len(text) + [0] * (8 - len(text)) for text in understood])
    batch = {"labels": labels, "attention_mask": attention}
    module.score(batch, type("Output", (), {"logits": torch.nn.functional.one_hot(heard, 29).float()}))
    assert float(module.scores()["word_error_rate"]) == pytest.approx(1 / 4)
    assert float(module.scores()["character_error_rate"]) == pytest.approx(1 / 15)


def test_what_is_said_can_be_heard_after_the_way_through_mel() -> None:
    time = torch.arange(RATE) / RATE
    tone = 0.5 * torch.sin(2 * math.pi * 1000 * time)
    back = from_log_mel(log_mel(tone))
    pitch = float(torch.fft.rfft(back).abs().argmax()) * RATE / len(back)
    assert pitch == pytest.approx(1000, abs=20)
    assert log_mel(tone).shape == (RATE // 160 + 1, 80)
    assert len(resampled(torch.zeros(22_050), 22_050)) == RATE


def test_sentences_sound_the_same_again_and_the_test_has_its_own_voice() -> None:
    once, again = read_sentences(6), read_sentences(6)
    assert all(torch.equal(one.sound, other.sound) for one, other in zip(once, again, strict=True))
    cfg = OmegaConf.create(
        {
            "data": {"held_out": 0.2, "held_out_speaker": VOICES[-1], "batch_size": 2, "workers": 0},
            "trainer": {"max_steps": 1, "accumulate_grad_batches": 1},
            "seed": 1,
        }
    )
    found = SimpleNamespace(
        text_tokenizer=letter_tokenizer,
        model=SimpleNamespace(config=SimpleNamespace(is_encoder_decoder=False), main_input_name="input_values"),
    )
    data = SpeechRecognition.data_module(once, found, cfg)
    training, test = data.training.examples, data.test
    assert {one.speaker for one in test} == {VOICES[-1]}
    assert VOICES[-1] not in {one.speaker for one in training}
    assert not {one.text for one in training} & {one.text for one in test}


def test_the_users_own_recordings_are_resampled_and_broken_ones_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_wav(torch.zeros(800), tmp_path / "a.wav", rate=8000)
    (tmp_path / "b.wav").write_bytes(b"no sound")
    (tmp_path / "list.csv").write_text("file,text\na.wav,yes\nb.wav,no\n")
    with pytest.raises(InputError, match=r"row 2: .*b\.wav is no sound that can be read"):
        manifest(str(tmp_path / "list.csv"))
    (utterance,) = manifest(str(tmp_path / "list.csv"), skip_broken=True)
    printed = capsys.readouterr().out
    assert "recordings at 8000 samples a second are resampled to 16000" in printed
    assert "left out 1 of 2 rows" in printed
    assert len(read_sound(utterance.sound)) == 1600
    (tmp_path / "list.csv").write_text("file,text\n")
    with pytest.raises(InputError, match="the file has no rows"):
        manifest(str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_bytes("file,text\na.wav,gr\xfcn\n".encode("latin-1"))
    with pytest.raises(InputError, match="line 2 is not UTF-8"):
        manifest(str(tmp_path / "list.csv"))
    (tmp_path / "list.csv").write_text("file,text\na.wav,\na.wav,yes\n")
    (utterance,) = manifest(str(tmp_path / "list.csv"), skip_broken=True)
    assert str(utterance).endswith("list.csv, row 2: 'yes'")


@pytest.mark.parametrize(("frames", "wrong"), [(7, "too"), (7, "two"), (20, "7")])
def test_a_text_that_its_sound_has_no_time_for_is_named_or_left_out(
    frames: int, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two frames are one moment; "too" takes four, a blank between its o's, and "two" three."""
    short = torch.zeros((frames - 1) * 160)
    said = [Utterance(torch.zeros(RATE), text, "a", "row 1") for text in ("at", "by", "in", "on", "up")]
    said.append(Utterance(short, wrong, "a", "list.csv, row 6"))
    config = {"model_type": "wav2vec2-bert", "vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16}
    module = SpeechRecognition(config, tokenizer="letters")
    found = SimpleNamespace(model=module.model, text_tokenizer=letter_tokenizer)
    settings = {"held_out": 0.2, "held_out_speaker": None, "batch_size": 2, "workers": 0, "skip_broken": False}
    trainer = {"max_steps": 1, "accumulate_grad_batches": 1}
    cfg = OmegaConf.create({"data": settings, "trainer": trainer, "seed": 1})
    if wrong == "two":
        SpeechRecognition.data_module(said, found, cfg)  # three letters, three moments
        return
    with pytest.raises(InputError, match=rf"list\.csv, row 6: '{wrong}'.*; data\.skip_broken=true"):
        SpeechRecognition.data_module(said, found, cfg)
    cfg.data.skip_broken = True
    SpeechRecognition.data_module(said, found, cfg)
    assert "left out 1 of 6 rows" in capsys.readouterr().out


# --- music ------------------------------------------------------------------------------------------------------------


def test_events_are_notes_again() -> None:
    notes = [Note(0, 4, 60), Note(0, 2, 64), Note(2, 4, 64), Note(40, 44, 67)]
    assert notes_of(events_of(notes)) == sorted(notes)
    c, e, g, end, passed = 60 - 21, 64 - 21, 67 - 21, 88, 175
    expected = [
        c,
        e,
        passed + 2,
        end + e,
        e,
        passed + 2,
        end + c,
        end + e,
        passed + 32,
        passed + 4,
        g,
        passed + 4,
        end + g,
    ]
    assert list(events_of(notes)) == expected


def test_pitch_accuracy_counts_the_beginnings_of_notes_alone() -> None:
    model = {"model_type": "llama", "vocab_size": 257, "hidden_size": 16, "num_hidden_layers": 1}
    module = Music({**model, "num_attention_heads": 2, "intermediate_size": 16}, tokenizer="bytes")
    labels = torch.tensor([[40, 41, 177, 128, -100]])
    found = torch.tensor([[40, 42, 177, 1, 2]])
    logits = torch.nn.functional.one_hot(found, 257).float()
    module.score({"labels": labels}, type("Output", (), {"logits": logits}))
    assert float(module.scores()["pitch_accuracy"]) == pytest.approx(1 / 2)


def test_chorales_are_in_one_key_and_the_users_own_music_is_read(tmp_path: Path) -> None:
    (events,) = chorales(1).values()
    write_midi(notes_of(events), tmp_path / "a.mid")
    (tmp_path / "b.mid").write_bytes(b"no music")
    with pytest.raises(InputError, match=r"b\.mid is no music that can be read"):
        music_folder(str(tmp_path), one_key=False)
    (again,) = music_folder(str(tmp_path), skip_broken=True, one_key=False).values()
    assert notes_of(again) == notes_of(events)
    assert {note.pitch % 12 for note in notes_of(events)} >= {0, 2, 4, 5, 7, 9}  # of C major or A minor


# --- translation and summarization ------------------------------------------------------------------------------------

WRITTEN = ["the cat sat on the mat", "a dog"]
WANTED = ["the cat is on the mat", "a small dog"]
TINY_T5 = {"model_type": "t5", "vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}


def test_translations_are_scored_as_sacrebleu_does() -> None:
    module = Translation(TINY_T5)
    module.compare(WRITTEN[:1], WANTED[:1])
    module.compare(WRITTEN[1:], WANTED[1:])
    chrf, bleu = sacrebleu.corpus_chrf(WRITTEN, [WANTED]).score, sacrebleu.corpus_bleu(WRITTEN, [WANTED]).score
    assert float(module.compared()["chrf"]) == pytest.approx(chrf / 100, abs=1e-6)
    assert float(module.compared()["bleu"]) == pytest.approx(bleu / 100, abs=1e-6)


def test_summaries_are_scored_as_rouge_score_does() -> None:
    module = Summarization(TINY_T5)
    module.compare(WRITTEN, WANTED)
    scorer = rouge_scorer.RougeScorer(["rougeL"])
    each = [scorer.score(b, a)["rougeL"].fmeasure for a, b in zip(WRITTEN, WANTED, strict=True)]
    assert float(module.compared()["rouge_l"]) == pytest.approx(sum(each) / 2)


def test_a_message_is_on_one_side_of_the_split_in_all_languages() -> None:
    pairs = catalogues(["de", "fr"])
    assert Pair("de: First revision", "Erste Version", group="first revision") in pairs
    parts = [{pair.group for pair in part} for part in split_by(lambda pair: pair.group, pairs, 0.1)]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    assert not {pair.source for pair in pairs if pair.source[4:] == pair.target}
    with pytest.raises(InputError, match="no catalogue of xx"):
        catalogues(["xx"])
    with pytest.raises(InputError, match=r"data\.package=nowhere is not installed"):
        catalogues(["de"], package="nowhere")


def test_a_docstring_is_in_one_file_alone() -> None:
    pairs = docstrings(max_bytes=1_500_000)
    assert len({pair.source for pair in pairs}) == len(pairs) > 200
    assert all(pair.group.endswith(".py") and pair.target not in ("", pair.source) for pair in pairs)
