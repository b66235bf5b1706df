"""The distillation recipe: its losses against torch's own, its two students, and its errors."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from support.recipe_runs import run_recipe
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_unitscale import unit_scale
from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.callbacks import LastCheckpoint
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tasks.distillation import distance_of_hidden_states, distance_of_logits, student_of
from lightning_unitscale.cookbook.tasks.image_classification import ImageClassification
from lightning_unitscale.cookbook.tasks.language_modeling import LanguageModeling
from lightning_unitscale.cookbook.tasks.segmentation import Segmentation
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import SequenceToSequence
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError

Student = student_of(LanguageModeling)
WIDTH = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
STUDENT = {"model_type": "llama", "vocab_size": 257, "bos_token_id": 256, "num_hidden_layers": 1, **WIDTH}
TINY = [
    *(f"student.config.{key}={value}" for key, value in STUDENT.items()),
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "task.sequence_length=16",
    "data.batch_size=2",
    "data.held_out=0.02",
    "schedule.warmup_steps=1",
]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a teacher as wide as the student."""
    folder = tmp_path_factory.mktemp("teacher")
    torch.manual_seed(1)
    layers = {"num_hidden_layers": 3, "max_position_embeddings": 32}
    LlamaForCausalLM(LlamaConfig(**{**STUDENT, **layers})).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


def results(folder: Path) -> dict[str, float]:
    numbers = json.loads((folder / "distill.json").read_text())
    return {name: value["loss"] for name, value in numbers.items() if isinstance(value, dict)}


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distance_of_logits_is_the_divergence_of_softened_predictions(temperature: float) -> None:
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(1)).unbind()
    p, q = Categorical(logits=teacher / temperature), Categorical(logits=student / temperature)
    expected = temperature**2 * kl_divergence(p, q).mean()
    torch.testing.assert_close(distance_of_logits(student, teacher, temperature), expected)


def test_distance_of_hidden_states_pairs_layers_by_depth_and_ignores_scale() -> None:
    teacher = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(1)).unbind()  # embeddings and 4 layers
    student = (torch.randn(2, 3, 8), 10 * teacher[2], 0.1 * teacher[4])
    assert distance_of_hidden_states(student, teacher) < 1e-6
    swapped = (student[0], student[2], student[1])
    assert distance_of_hidden_states(swapped, teacher) > 0.5


def test_the_loss_is_the_sum_of_its_parts(teacher: str) -> None:
    """Against torch's own: cross-entropy, the divergence of softened predictions, cosines of hidden states."""
    settings = {"temperature": 3.0, "logits": 0.3, "hidden": 0.7}
    taught = load_pretrained(teacher).model
    module = Student(STUDENT, "AutoModelForCausalLM", {}, {}, distillation=settings, teacher=taught).eval()
    module.log_dict = lambda *_, **__: None
    ids, labels = torch.randint(256, (2, 2, 8), generator=torch.Generator().manual_seed(1)).unbind()
    labels[0, :3] = -100
    with torch.no_grad():
        found = module.training_step({"input_ids": ids, "labels": labels}, 0)
        student, wanted = (model(input_ids=ids, output_hidden_states=True) for model in (module.model, taught))
    counts = labels >= 0
    p, q = (Categorical(logits=output.logits[counts] / 3) for output in (wanted, student))
    likelihood = Categorical(logits=student.logits[counts]).log_prob(labels[counts]).mean()
    cosine = torch.cosine_similarity(student.hidden_states[-1], wanted.hidden_states[-1], dim=-1).mean()
    expected = -0.7 * likelihood + 0.3 * 9 * kl_divergence(p, q).mean() + 0.7 * (2 - 2 * cosine)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


T5 = {"model_type": "t5", "vocab_size": 257, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
VIT = {"model_type": "vit", "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_labels": 3}
OTHER_TASKS = {
    "seq2seq": (
        SequenceToSequence,
        {**T5, "pad_token_id": 256, "decoder_start_token_id": 256},
        {"input_ids": torch.tensor([[1, 2, 3]]), "labels": torch.tensor([[5, 6, -100]])},
    ),
    "classes": (
        ImageClassification,
        {**VIT, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
        {"pixel_values": torch.ones(2, 1, 8, 8), "labels": torch.tensor([0, 2])},
    ),
}


@pytest.mark.parametrize("name", OTHER_TASKS)
def test_other_tasks_are_taught_where_their_loss_counts(name: str) -> None:
    """Tokens of a decoder without padding, and classes, against torch's own divergence."""
    task, config, batch = OTHER_TASKS[name]
    torch.manual_seed(1)
    taught = task(config).model
    settings = {"temperature": 2.0, "logits": 0.25, "hidden": 0.0}
    module = student_of(task)(config, optimizer={}, distillation=settings, teacher=taught).eval()
    module.log_dict = lambda *_, **__: None
    with torch.no_grad():
        found = module.training_step(batch, 0)
        own, wanted = (model(**batch).logits[batch["labels"] >= 0] for model in (module.model, taught))
    labels = batch["labels"][batch["labels"] >= 0]
    p, q = (Categorical(logits=logits / 2) for logits in (wanted, own))
    likelihood = Categorical(logits=own).log_prob(labels).mean()
    torch.testing.assert_close(found, -0.75 * likelihood + 0.25 * 4 * kl_divergence(p, q).mean(), rtol=1e-4, atol=0)


def test_hidden_states_of_a_decoder_are_compared() -> None:
    task, config, batch = OTHER_TASKS["seq2seq"]
    teacher = task(config).model
    settings = {"temperature": 2.0, "logits": 0.0, "hidden": 1.0}
    module = student_of(task)(config, optimizer={}, distillation=settings, teacher=teacher).eval()
    module.log_dict = lambda *_, **__: None
    module.model.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(module.training_step(batch, 0), module.loss(batch)[0])  # no distance to itself


def test_a_task_without_a_row_of_logits_a_label_is_not_taught() -> None:
    model = {"model_type": "segformer", "num_labels": 2, "image_size": 32}
    settings = {"temperature": 2.0, "logits": 0.5, "hidden": 0.0}
    module = student_of(Segmentation)(model, distillation=settings, teacher=Segmentation(model).model)
    with pytest.raises(InputError, match="has not one row of logits a label"):
        module.training_step({"pixel_values": torch.ones(1, 3, 32, 32), "labels": torch.zeros(1, 32, 32).long()}, 0)


def test_the_teacher_is_no_part_of_the_plan(teacher: str) -> None:
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(256, (2, 8)), "labels": torch.randint(256, (2, 8))}
    plans = []
    for model in (None, load_pretrained(teacher).model):
        torch.manual_seed(2)
        settings = {"temperature": 2.0, "logits": 0.5, "hidden": 0.5}
        module = Student(
            STUDENT, "AutoModelForCausalLM", {}, {}, distillation=settings, teacher=model, tokenizer="bytes"
        )
        module.log_dict = module.log = lambda *_, **__: None
        plans.append(unit_scale(module, lambda m: m.training_step(batch, 0), scheme="umup"))
        assert set(dict(module.named_parameters())) == set(plans[-1].parameters)
    alone, taught = plans
    # but for what the first step does, which the teacher's part of the loss changes
    rates = [{n: rate / plan.parameters[n].step_limit for n, rate in plan.lr_multipliers.items()} for plan in plans]
    assert rates[0] == pytest.approx(rates[1], rel=1e-12)
    assert {p.name: p.multiplier for p in alone.parameters.values()} == {
        p.name: p.multiplier for p in taught.parameters.values()
    }
    names = [site.name for site in alone.sites]
    extra = [site for site in taught.sites if site.name not in names]  # the teacher's calls, listed as left alone
    assert all(site.multiplier == 1.0 and not site.params for site in extra)
    assert len(taught.sites) == len(names) + len(extra)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_run_shows_both_students_beside_the_teacher(teacher: str, tmp_path: Path) -> None:
    folder, printed = run_recipe(
        "distill", tmp_path, *TINY, f"teacher.path={teacher}", "distillation.hidden=0.5", "trainer.max_steps=8"
    )
    found = results(folder)
    assert list(found) == ["teacher", "student alone", "student with teacher"]
    assert found["teacher"] == pytest.approx(math.log(257), abs=0.2)  # random weights know nothing
    assert found["student alone"] != found["student with teacher"]
    assert all(name in printed for name in found)
    for name in ("student_alone", "student_with_teacher"):
        checkpoint = torch.load(folder / name / "best.ckpt", weights_only=True)
        assert set(checkpoint["hyper_parameters"]).isdisjoint({"teacher", "weights"})
        assert not any("teacher" in key for key in checkpoint["state_dict"])
        plan = plan_in(checkpoint)
        assert plan is not None
        assert plan.scheme == "umup"
        assert load_pretrained(str(folder / name / "best.ckpt")).model.config.num_hidden_layers == 1


def test_without_the_teachers_share_both_students_are_one(teacher: str, tmp_path: Path) -> None:
    folder, _ = run_recipe("distill", tmp_path, *TINY, f"teacher.path={teacher}", "distillation.logits=0")
    found = results(folder)
    assert found["student alone"] == found["student with teacher"]


def test_distillation_moves_towards_the_teacher(teacher: str, tmp_path: Path) -> None:
    settings = ["distillation.logits=1", "distillation.temperature=1", "trainer.max_steps=12"]
    folder, _ = run_recipe("distill", tmp_path, *TINY, f"teacher.path={teacher}", *settings)
    tokens = torch.randint(256, (4, 16), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = load_pretrained(teacher).model(input_ids=tokens).logits
        distances = [
            kl_divergence(
                Categorical(logits=wanted),
                Categorical(logits=load_pretrained(str(folder / name / "best.ckpt")).model(input_ids=tokens).logits),
            ).mean()
            for name in ("student_with_teacher", "student_alone")
        ]
    assert distances[0] < distances[1]


@pytest.mark.slow
def test_other_tasks_have_their_own_scores_beside_the_loss(tmp_path: Path) -> None:
    quick = [
        *("trainer.max_steps=3", "trainer.val_check_interval=3", "trainer.limit_val_batches=1"),
        *("+trainer.limit_test_batches=1", "trainer.enable_progress_bar=false", "schedule.warmup_steps=1"),
    ]
    base = (
        "['experiment=digits','trainer.max_steps=2','trainer.val_check_interval=2','model.config.num_hidden_layers=1']"
    )
    folder, printed = run_recipe("distill", tmp_path, "experiment=distill_digits", f"teacher.base={base}", *quick)
    rows = json.loads((folder / "distill.json").read_text())
    assert all("accuracy" in row for row in rows.values())
    assert "accuracy" in printed
    with pytest.raises(SystemExit, match="and this task is for AutoModelForSeq2SeqLM"):
        settings = [f"teacher.path={folder}/teacher.ckpt", "hydra.run.dir=other"]
        run_recipe("distill", tmp_path, "experiment=distill_translation", *settings, *quick)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_as_if_it_had_not_stopped(
    teacher: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = [*TINY, f"teacher.path={teacher}", "trainer.max_steps=6", "trainer.val_check_interval=3"]
    whole, _ = run_recipe("distill", tmp_path, *settings)
    expected, weights = results(whole), {name: state(whole, name) for name in ("student_alone", "student_with_teacher")}
    whole.rename(tmp_path / "whole")

    begin = LastCheckpoint.on_train_batch_start

    def press(self: LastCheckpoint, trainer: pl.Trainer, *args: object) -> None:
        begin(self, trainer, *args)
        if self.path.parent.name == "student_with_teacher" and trainer.global_step == 2:
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="130"):
        patch.setattr(LastCheckpoint, "on_train_batch_start", press)
        run_recipe("distill", tmp_path, *settings)
    assert list(results(tmp_path / "run")) == ["teacher", "student alone"]
    interrupted = tmp_path / "run" / "student_with_teacher" / "last.ckpt"
    assert torch.load(interrupted, weights_only=True)["global_step"] == 3
    run_recipe("distill", tmp_path, *settings, f"ckpt_path={interrupted}", "hydra.run.dir=again")
    assert results(tmp_path / "run") == expected
    for name, before in weights.items():
        after = state(tmp_path / "run", name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before), name
    with pytest.raises(SystemExit, match=r"trained no teacher; give teacher\.path"):
        run_recipe("distill", tmp_path, f"ckpt_path={interrupted}", "teacher.path=null", "hydra.run.dir=again")


def state(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors at the end of training."""
    saved: dict[str, torch.Tensor] = torch.load(folder / name / "last.ckpt", weights_only=True)["state_dict"]
    return saved


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["ckpt_path=missing.ckpt"], "ckpt_path=missing.ckpt: no such file"),
        (["distillation.temperature=0"], "distillation.temperature=0 must be positive"),
        (["distillation.logits=2"], "distillation.logits=2 must lie between 0 and 1"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be a positive whole number"),
        (["data=digits"], "needs data with `documents`"),
        (["teacher.path=missing.ckpt"], "no such file or folder"),
        (["teacher.path=TEACHER", "student.config.vocab_size=300"], "the teacher has 257 tokens"),
        (["teacher.path=TEACHER", "task.sequence_length=64"], "longer than the model's context of 32 tokens"),
        (
            [
                "teacher.path=TEACHER",
                "task.sequence_length=16",
                "distillation.hidden=1",
                "student.config.hidden_size=64",
            ],
            "the student's width is 64 and the teacher's 32",
        ),
    ],
)
def test_bad_input_is_one_clear_message(settings: list[str], message: str, teacher: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        run_recipe("distill", tmp_path, *[setting.replace("TEACHER", teacher) for setting in settings])
    assert message in str(raised.value)
