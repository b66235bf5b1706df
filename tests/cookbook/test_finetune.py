"""The fine-tuning recipe: what goes in, what is trained, and what comes out, against plain transformers and peft."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import transformers
from peft import PeftModel
from sklearn.dummy import DummyClassifier
from support.by_day import by_day
from support.recipe_runs import run_recipe
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

from lightning_unitscale import unit_scale
from lightning_unitscale.checkpoint import plan_in
from lightning_unitscale.cookbook.data import IGNORED
from lightning_unitscale.cookbook.data.digits import digits
from lightning_unitscale.cookbook.data.examples import Examples, Labelled, Pair, split_by
from lightning_unitscale.cookbook.data.labelled_files import labelled_file, paired_file
from lightning_unitscale.cookbook.data.standard_library import python_sources, source_snippets, split_names
from lightning_unitscale.cookbook.data.token_text import TokenText
from lightning_unitscale.cookbook.model_path import load_pretrained
from lightning_unitscale.cookbook.tasks.classification import MajorityAccuracy
from lightning_unitscale.cookbook.tasks.image_classification import ImageBatch
from lightning_unitscale.cookbook.tasks.sequence_to_sequence import PairBatch
from lightning_unitscale.cookbook.tasks.task import freeze_parameters
from lightning_unitscale.cookbook.tasks.text_classification import TextBatch
from lightning_unitscale.cookbook.tokenizers import byte_tokenizer
from lightning_unitscale.errors import InputError

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOKENS = torch.randint(256, (2, 12), generator=torch.Generator().manual_seed(1))
QUICK = [
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.limit_val_batches=2",
    "+trainer.limit_test_batches=2",
    "trainer.enable_progress_bar=false",
    "schedule.warmup_steps=1",
    "data.batch_size=2",
    "logger=csv",
    "optimizer.lr=1e-2",
]
TEXT = [*QUICK, "task.sequence_length=16", "data.documents._target_=lightning_unitscale.cookbook.data.python_topics"]


LORA = ["lora=all_linear", "lora.r=2"]


def words(folder: Path) -> list[str]:
    """Settings of a text classification that is easy to learn, on a file in the folder."""
    rows = ["text,label"] + [f"{word} {number},{word}" for number in range(20) for word in ("sun", "rain")]
    (folder / "a.csv").write_text("\n".join(rows))
    return [
        "experiment=text_classification",
        "data=labelled_file",
        "data.path=a.csv",
        "data.held_out=0.2",
        *QUICK,
        "task.sequence_length=16",
        "trainer.max_steps=12",
        "trainer.val_check_interval=6",
    ]


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    result: Tensor = model.eval()(input_ids=TOKENS).logits
    return result


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a language model on bytes, as transformers writes it."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(1)
    LlamaForCausalLM(
        LlamaConfig(vocab_size=257, bos_token_id=256, max_position_embeddings=32, **SMALL)
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def full(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A language model fine-tuned in whole."""
    return run_recipe("finetune", tmp_path_factory.mktemp("full"), *TEXT, f"model.path={llama}")


# --- what goes in -----------------------------------------------------------------------------------------------------


def models() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    torch.manual_seed(1)
    labels = torch.tensor([0, 2])
    return {
        "causal": (LlamaForCausalLM(LlamaConfig(vocab_size=257, **SMALL)), {"input_ids": TOKENS, "labels": TOKENS}),
        "text": (
            BertForSequenceClassification(BertConfig(vocab_size=257, num_labels=3, **SMALL)),
            {"input_ids": TOKENS, "labels": labels},
        ),
        "image": (
            ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)),
            {"pixel_values": torch.randn(2, 3, 8, 8), "labels": labels},
        ),
        "seq2seq": (
            T5ForConditionalGeneration(
                T5Config(
                    vocab_size=257, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0
                )
            ),
            {"input_ids": TOKENS, "labels": TOKENS},
        ),
    }


@pytest.mark.parametrize("name", ["causal", "text", "image", "seq2seq"])
def test_preserve_leaves_logits_and_weights_bit_for_bit(name: str) -> None:
    model, batch = models()[name]
    model.eval()
    before, weights = model(**batch).logits, {key: value.clone() for key, value in model.state_dict().items()}
    plan = unit_scale(model, lambda m: m(**batch).loss, scheme="preserve")
    assert any(site.params for site in plan.sites)
    assert torch.equal(model(**batch).logits, before)
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_freezing_by_parameter_or_module() -> None:
    model, _ = models()["causal"]
    freeze_parameters(model, ["model.embed_tokens", "model.layers.0", "*.norm.weight"])
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if name.startswith(("model.layers.1", "lm_head"))}
    with pytest.raises(
        InputError, match=r"'model\.layer\.1' matches no parameter and no module\. Did you mean 'model\.layers\.1'"
    ):
        freeze_parameters(model, ["model.layer.1"])
    with pytest.raises(InputError, match="leaves nothing to train"):
        freeze_parameters(model, ["*"])


# --- a whole run ------------------------------------------------------------------------------------------------------


def test_run_trains_and_keeps_the_best(full: tuple[Path, str], llama: str) -> None:
    folder, printed = full
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["test/loss"] < metrics["test/loss, before"]
    assert "test/loss" in printed
    with (folder / "csv" / "metrics.csv").open() as stream:
        held_out = [float(row["val/loss"]) for row in csv.DictReader(stream) if row.get("val/loss")]
    assert metrics["best val/loss"] == pytest.approx(min(held_out), rel=1e-6)
    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    assert plan.scheme == "preserve"
    assert (folder / "checkpoints" / "last.ckpt").is_file()


def test_exported_folder_is_the_best_checkpoint(full: tuple[Path, str]) -> None:
    folder, _ = full
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert torch.equal(logits(plain), logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model))
    assert AutoTokenizer.from_pretrained(folder / "model")("a\n").input_ids == [256, 97, 10]


WITHOUT_THE_PACKAGE = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"  # as the package is installed here, torch itself would import it
sys.modules["lightning_unitscale"] = None  # importing it fails
import torch, pytorch_lightning as pl
from transformers import AutoConfig, AutoModelForCausalLM

class Plain(pl.LightningModule):
    def __init__(self, model, **others):
        super().__init__()
        self.model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**model))

folder, tokens = sys.argv[1], torch.load(sys.argv[2])
a = AutoModelForCausalLM.from_pretrained(folder + "/model").eval()
b = Plain.load_from_checkpoint(folder + "/checkpoints/best.ckpt", weights_only=True).model.eval()
with torch.no_grad():
    torch.save([m(input_ids=tokens).logits for m in (a, b)], sys.argv[3])
"""


def test_what_comes_out_loads_where_this_package_is_not(full: tuple[Path, str], tmp_path: Path) -> None:
    folder, _ = full
    torch.save(TOKENS, tmp_path / "tokens")
    arguments = [str(folder), str(tmp_path / "tokens"), str(tmp_path / "logits")]
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_PACKAGE, *arguments], capture_output=True, text=True, cwd=tmp_path
    )
    assert run.returncode == 0, run.stderr
    expected = logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model)
    for found in torch.load(tmp_path / "logits"):
        assert torch.equal(found, expected)


def test_early_stopping(llama: str, tmp_path: Path) -> None:
    settings = [
        "trainer.max_steps=20",
        "patience=1",
        "optimizer.lr=1e-30",
        "optimizer.weight_decay=0",
        "test_before=false",
    ]
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, f"model.path={llama}", *settings)
    assert (
        json.loads((folder / "report" / "metrics.json").read_text())["steps"] == 4
    )  # the second validation was no better


def test_frozen_layers_stay(llama: str, tmp_path: Path) -> None:
    folder, _ = run_recipe(
        "finetune", tmp_path, *TEXT, f"model.path={llama}", "model.freeze=[model.embed_tokens,model.layers.0]"
    )
    before = AutoModelForCausalLM.from_pretrained(llama).state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {name for name in before if name.startswith(("model.embed_tokens", "model.layers.0."))}


def test_lora_saves_what_peft_loads(llama: str, tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, f"model.path={llama}", "lora=all_linear", "lora.r=2")
    base = AutoModelForCausalLM.from_pretrained(llama)
    untouched = logits(base)
    adapted = PeftModel.from_pretrained(base, folder / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(folder / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(adapted), untouched, atol=1e-4)
    torch.testing.assert_close(
        logits(load_pretrained(str(folder / "adapter")).model), logits(merged), rtol=1e-4, atol=1e-5
    )
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    adapters = {name for name in plan.parameters if "lora_" in name}
    in_matmuls = {name for site in plan.sites for name in site.params if "lora_" in name}
    assert len(adapters) == 2 * 7 * 2  # layers, linear layers in each, matrices
    assert in_matmuls == adapters


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with a masked language model on bytes, whose classifier is not there yet."""
    folder = tmp_path_factory.mktemp("bert")
    torch.manual_seed(1)
    BertForMaskedLM(BertConfig(vocab_size=257, max_position_embeddings=32, **SMALL)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("base", "head"),
    [
        pytest.param("llama", ["score"], marks=pytest.mark.slow),
        ("bert", ["bert.pooler.dense", "classifier"]),
    ],
)
def test_lora_trains_and_saves_a_new_head(
    base: str, head: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = request.getfixturevalue(base)
    folder, _ = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={path}", *LORA)
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["modules_to_save"] == head
    assert settings["base_model_name_or_path"] == path

    checkpoint = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    plan = plan_in(checkpoint)
    assert plan is not None
    in_matmuls = {name for site in plan.sites for name in site.params}
    for module in head:
        trained = f"model.base_model.model.{module}.modules_to_save.default.weight"
        assert trained in in_matmuls
        assert not plan.parameters[trained].reason  # it is not left alone
        start = trained.replace("modules_to_save.default", "original_module")
        assert not torch.equal(checkpoint["state_dict"][trained], checkpoint["state_dict"][start])

    plain = AutoModelForSequenceClassification.from_pretrained(path, num_labels=2, pad_token_id=256)
    adapted = PeftModel.from_pretrained(plain, folder / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    ours = load_pretrained(str(folder / "adapter"), "AutoModelForSequenceClassification")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(ours.model), logits(merged), rtol=1e-4, atol=1e-5)
    assert ours.model.config.id2label == {0: "rain", 1: "sun"}
    assert ours.fresh == []


# --- stopping and going on --------------------------------------------------------------------------------------------

# Two validations in each half, the best of them in the first; dropout, so that random numbers have to go on too.
HALF = 4
GOING_ON = [f"schedule.decay_steps={2 * HALF}", "patience=9", "optimizer.lr=1", "monitor=none", "test_before=false"]
KINDS = {
    "full": [],
    "frozen": ["model.freeze=[model.layers.0]", "+model.changes.attention_dropout=0.1"],
    "lora": ["lora=all_linear", "lora.r=2", "lora.lora_dropout=0.1"],
}
GO_ON = """
import json, sys
from pathlib import Path
from support.recipe_runs import run_recipe
for folder, arguments in json.loads(sys.argv[1]):
    run_recipe("finetune", Path(folder), *arguments)
"""


@pytest.fixture(scope="module")
def halves(llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Kind -> checkpoints folders of one run of 2n steps, and of n steps and, in a new process, n more."""
    folders, going_on = {}, []
    for kind, settings in KINDS.items():
        common = [*TEXT, *settings, *GOING_ON]
        parts = [tmp_path_factory.mktemp(f"{kind}-{part}") for part in ("whole", "first", "second")]
        start = [f"model.path={llama}"]
        run_recipe("finetune", parts[0], *common, *start, f"trainer.max_steps={2 * HALF}")
        run_recipe("finetune", parts[1], *common, *start, f"trainer.max_steps={HALF}")
        checkpoint = parts[1] / "run" / "checkpoints" / "last.ckpt"
        going_on.append((str(parts[2]), [*common, f"trainer.max_steps={2 * HALF}", f"ckpt_path={checkpoint}"]))
        folders[kind] = (parts[0] / "run", parts[2] / "run")
    process = subprocess.run(
        [sys.executable, "-c", GO_ON, json.dumps(going_on)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent.parent,
    )
    assert process.returncode == 0, process.stderr
    return folders


def assert_equal(a: Any, b: Any, where: str) -> None:
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}/{number}")
    elif isinstance(a, Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.mark.parametrize("kind", by_day(KINDS, ["full"]))
def test_two_halves_equal_the_whole_bit_for_bit(kind: str, halves: dict[str, tuple[Path, Path]]) -> None:
    whole, second = halves[kind]
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (whole, second)]
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "unit_scaling_plan", "global_step"):
        assert_equal(ends[0][key], ends[1][key], key)
    for name in ("EarlyStopping", "RandomNumbers"):
        states = [{key: value for key, value in end["callbacks"].items() if name in key} for end in ends]
        assert len(states[0]) == 1
        assert_equal(*states, name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_best_checkpoint_counts_on(kind: str, halves: dict[str, tuple[Path, Path]]) -> None:
    metrics = [json.loads((run / "report" / "metrics.json").read_text()) for run in halves[kind]]
    for name in ("best val/loss", "test/loss", "steps", "parameters trained"):
        assert metrics[0][name] == metrics[1][name], name
    plain = [AutoModelForCausalLM.from_pretrained(run / "model").state_dict() for run in halves[kind]]
    assert_equal(dict(plain[0]), dict(plain[1]), "model")


def test_an_adapter_of_two_halves_names_the_base(halves: dict[str, tuple[Path, Path]], llama: str) -> None:
    _, second = halves["lora"]
    base = json.loads((second / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == llama
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), second / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(second / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


class Press(pl.Callback):
    """Ctrl-C in the step with this number."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("step", [3, 4], ids=["between validations", "at a validation"])
def test_interrupt_loses_nothing_and_leaves_a_report(
    step: int, halves: dict[str, tuple[Path, Path]], llama: str, tmp_path: Path
) -> None:
    common = [*TEXT, *KINDS["lora"], *GOING_ON]
    common += [f"trainer.max_steps={2 * HALF}"]
    for part in ("a", "b"):
        (tmp_path / part).mkdir()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as raised:
        make = pl.Trainer.__init__
        patch.setattr(
            pl.Trainer,
            "__init__",
            lambda self, *, callbacks, **others: make(self, callbacks=[*callbacks, Press(step)], **others),
        )
        run_recipe("finetune", tmp_path / "a", *common, f"model.path={llama}")
    assert raised.value.code == 130
    metrics = json.loads((tmp_path / "a" / "run" / "report" / "metrics.json").read_text())
    assert metrics["steps"] == step
    assert "best val/loss" in metrics
    assert (tmp_path / "a" / "run" / "report" / "index.html").is_file()
    checkpoint = tmp_path / "a" / "run" / "checkpoints" / "last.ckpt"
    run, _ = run_recipe("finetune", tmp_path / "b", *common, f"ckpt_path={checkpoint}")
    ends = [torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True) for folder in (halves["lora"][0], run)]
    for key in ("state_dict", "optimizer_states"):
        assert_equal(ends[0][key], ends[1][key], key)


def test_what_does_not_go_on(
    halves: dict[str, tuple[Path, Path]], continued: tuple[Path, str], llama: str, tmp_path: Path
) -> None:
    checkpoint = halves["lora"][0] / "checkpoints" / "last.ckpt"
    for settings, message in (
        ([f"ckpt_path={continued[0] / 'base.ckpt'}"], "not of a run of unitscale finetune"),
        ([f"ckpt_path={checkpoint}", "lora=all_linear", "lora.r=4"], "its run began with lora="),
        ([f"ckpt_path={checkpoint}", "model.freeze=[model.layers.0]"], "its run began with model.freeze=nothing"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_recipe("finetune", tmp_path, *TEXT, *settings)
    moved = torch.load(checkpoint, weights_only=True)
    (state,) = (state for key, state in moved["callbacks"].items() if "BestCheckpoint" in key)
    state["best_model_path"] = str(tmp_path / "moved.ckpt")
    torch.save(moved, tmp_path / "last.ckpt")
    with pytest.raises(SystemExit, match=r"the best checkpoint of this run so far, .*moved\.ckpt, is not there"):
        run_recipe("finetune", tmp_path, *TEXT, f"ckpt_path={tmp_path / 'last.ckpt'}", "trainer.max_steps=9")


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_hub_name_goes_to_the_hub(llama: str, tmp_path: Path) -> None:
    """The cache as huggingface_hub lays it out after a download; there is no network in a test."""
    revision = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--somebody--tiny-llama"
    shutil.copytree(llama, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)

    def finetune(name: str, folder: str) -> subprocess.CompletedProcess[str]:
        arguments = [*TEXT, *LORA, "monitor=none", "test_before=false", f"model.path={name}", f"hydra.run.dir={folder}"]
        return subprocess.run(
            [sys.executable, "-m", "lightning_unitscale.cli", "finetune", *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
        )

    run = finetune("somebody/tiny-llama", "run")
    assert run.returncode == 0, run.stderr
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == "somebody/tiny-llama"
    adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)

    run = finetune("somebody/not-there", "other")
    assert run.returncode == 1
    (message,) = (line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert "model.path=somebody/not-there: the Hugging Face hub did not deliver it" in message
    assert "and here there is no such file or folder (looked in" in message


# --- other heads ------------------------------------------------------------------------------------------------------

OF_TOKENS = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
OTHER_HEADS = {
    "AutoModelForMaskedLM": {**OF_TOKENS, "labels": TOKENS.where(TOKENS % 5 == 0, IGNORED)},
    "AutoModelForTokenClassification": {**OF_TOKENS, "labels": TOKENS % 3},
    "AutoModelForQuestionAnswering": {
        **OF_TOKENS,
        "start_positions": torch.tensor([1, 2]),
        "end_positions": torch.tensor([3, 4]),
    },
    "AutoModelForMultipleChoice": {"input_ids": torch.stack([TOKENS, TOKENS.flip(0)]), "labels": torch.tensor([0, 1])},
}


class Batches(pl.LightningDataModule):
    """What a user might have: the same batches for training, validation and test."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self.head = head

    def train_dataloader(self) -> Any:
        return DataLoader([OTHER_HEADS[self.head]] * 100, batch_size=None)

    def val_dataloader(self) -> Any:
        return DataLoader([OTHER_HEADS[self.head]] * 2, batch_size=None)

    test_dataloader = val_dataloader


@pytest.mark.parametrize("settings", [[], LORA], ids=["full", "lora"])
@pytest.mark.parametrize("head", by_day(OTHER_HEADS, [next(iter(OTHER_HEADS))]))
def test_any_other_head_is_trained_on_data_of_ones_own(
    head: str, settings: list[str], bert: str, tmp_path: Path
) -> None:
    folder, _ = run_recipe(
        "finetune",
        tmp_path,
        "task=any_head",
        f"task.head={head}",
        "data=module",
        f"data.module._target_={__name__}.Batches",
        f"+data.module.head={head}",
        *(setting for setting in QUICK if not setting.startswith("data.")),
        f"model.path={bert}",
        *(["+model.changes.num_labels=3"] if head == "AutoModelForTokenClassification" else []),
        *settings,
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert metrics["test/loss"] < metrics["test/loss, before"]
    plain = getattr(transformers, head).from_pretrained(folder / "model").eval()
    with torch.no_grad():
        assert float(plain(**OTHER_HEADS[head]).loss) == pytest.approx(metrics["test/loss"], rel=1e-4)
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    matmuls = {name for site in plan.sites for name in site.params}
    new_head = {
        "AutoModelForMaskedLM": "cls.predictions.transform.dense",
        "AutoModelForQuestionAnswering": "qa_outputs",
    }
    assert any(new_head.get(head, "classifier") in name for name in matmuls)


# --- a model of this package goes on ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def continued(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """`unitscale finetune` as it is by default, only smaller: it first pretrains a base under umup."""
    base = ["experiment=tiny", "trainer.enable_progress_bar=false"]
    return run_recipe("finetune", tmp_path_factory.mktemp("continued"), *TEXT, f"model.base={base}".replace(" ", ""))


def test_umup_checkpoint_goes_on_in_its_own_parametrization(continued: tuple[Path, str], tmp_path: Path) -> None:
    folder, printed = continued
    assert "own parametrization goes on: umup" in printed
    files = (folder / "base.ckpt", folder / "checkpoints" / "best.ckpt")
    plans = [plan_in(torch.load(file, weights_only=True)) for file in files]
    before, after = (plan for plan in plans if plan is not None)
    assert before.scheme == after.scheme == "umup"
    assert before.parameters["model.lm_head.weight"].eta_limit != after.parameters["model.lm_head.weight"].eta_limit
    for plan in (before, after):  # the largest useful rate is that of each run's own optimizer
        for parameter in plan.parameters.values():
            parameter.set_constant("eta_limit", [])
    assert before.lr_multipliers == pytest.approx(after.lr_multipliers)
    assert len(set(before.lr_multipliers.values())) > 1


def test_the_plan_can_be_left_behind(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.path={base}", "model.keep_plan=false")
    assert "goes on" not in printed
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    assert plan.scheme == "preserve"


def test_another_scheme_of_the_command_line_takes_the_place_of_the_plan(
    continued: tuple[Path, str], tmp_path: Path
) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.path={base}", "unitscale=amax")
    assert "goes on" not in printed
    plan = plan_in(torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True))
    assert plan is not None
    assert plan.scheme == "amax"
    first, second = (
        json.loads((run / "report" / "metrics.json").read_text())["test/loss, before"] for run in (continued[0], folder)
    )
    assert second == pytest.approx(first, rel=1e-5)  # the function is kept
    last = folder / "checkpoints" / "last.ckpt"
    (tmp_path / "again").mkdir()
    _, printed = run_recipe("finetune", tmp_path / "again", *TEXT, f"ckpt_path={last}", "unitscale=amax")
    assert "goes on: amax" in printed


def test_multipliers_of_a_umup_checkpoint_are_at_work(continued: tuple[Path, str], tmp_path: Path) -> None:
    """Adam's first step moves every element by its group's learning rate, whatever the gradient."""
    base = continued[0] / "base.ckpt"
    once = ["trainer.max_steps=1", "trainer.val_check_interval=1", "optimizer.weight_decay=0", "optimizer.eps=1e-30"]
    folder, _ = run_recipe("finetune", tmp_path, *TEXT, *once, f"model.path={base}", "test_before=false")
    start, end = (torch.load(f, weights_only=True) for f in (base, folder / "checkpoints" / "last.ckpt"))
    plan = plan_in(end)
    assert plan is not None
    for name, multiplier in plan.lr_multipliers.items():
        step = (end["state_dict"][name] - start["state_dict"][name]).abs()
        assert float(step[step > 0].median()) == pytest.approx(1e-2 * multiplier, rel=1e-2), name


def test_lora_on_a_umup_checkpoint_leaves_a_plain_base(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), *LORA, f"model.path={base}")
    assert "unit scaling: scheme=preserve" in printed
    settings = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(folder / "base")
    body = AutoModelForCausalLM.from_pretrained(folder / "base").model.state_dict()
    trained = torch.load(base, weights_only=True)["state_dict"]
    assert all(torch.equal(value, trained[f"model.model.{name}"]) for name, value in body.items())
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "base", pad_token_id=256)
    adapted = PeftModel.from_pretrained(plain, folder / "adapter")
    merged = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    torch.testing.assert_close(logits(adapted), logits(merged), rtol=1e-4, atol=1e-5)


def test_a_umup_checkpoint_takes_a_new_head(continued: tuple[Path, str], tmp_path: Path) -> None:
    base = continued[0] / "base.ckpt"
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={base}")
    assert "new, with random weights: score.weight" in printed
    assert "unit scaling: scheme=preserve" in printed
    plain = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert torch.equal(logits(plain), logits(load_pretrained(str(folder / "checkpoints" / "best.ckpt")).model))


def test_factors_in_the_forward_pass_keep_lora_and_new_heads_away(tmp_path: Path) -> None:
    """GPT-2: its tied readout and its packed query can't be folded."""
    base = ["model=gpt2", "experiment=tiny", "trainer.enable_progress_bar=false"]
    folder, printed = run_recipe("finetune", tmp_path, *TEXT, f"model.base={base}".replace(" ", ""))
    assert "own parametrization goes on: umup" in printed
    assert "Use unitscale export format=hf" in printed
    for settings, message in (([*TEXT, *LORA], "lora can't do without"), (words(tmp_path), "can't take another head")):
        with pytest.raises(SystemExit, match=message):
            run_recipe("finetune", tmp_path, *settings, f"model.path={folder / 'base.ckpt'}")


# --- the other tasks --------------------------------------------------------------------------------------------------


def test_text_classification_of_a_csv_file(llama: str, tmp_path: Path) -> None:
    folder, printed = run_recipe("finetune", tmp_path, *words(tmp_path), f"model.path={llama}")
    assert "new, with random weights: score.weight" in printed
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model")
    assert model.config.id2label == {0: "rain", 1: "sun"}
    assert json.loads((folder / "report" / "metrics.json").read_text())["test/accuracy"] >= 0.75


def test_a_classifier_that_knows_the_classes_keeps_their_numbers(tmp_path: Path) -> None:
    names = {0: "sun", 1: "rain"}  # sorted, they would change places
    config = BertConfig(vocab_size=257, max_position_embeddings=32, num_labels=2, id2label=names, **SMALL)
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "classifier")
    byte_tokenizer().save_pretrained(tmp_path / "classifier")
    settings = [*words(tmp_path), f"model.path={tmp_path / 'classifier'}", "trainer.max_steps=40"]
    folder, printed = run_recipe("finetune", tmp_path, *settings)
    assert "with random weights" not in printed
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    assert model.config.id2label == names
    tokens = byte_tokenizer()(["sun 1", "rain 1"], padding=True, return_tensors="pt")
    assert model(tokens.input_ids, tokens.attention_mask).logits.argmax(-1).tolist() == [0, 1]


def test_sequence_to_sequence(tmp_path: Path) -> None:
    sizes = ["d_model=32", "d_kv=16", "num_heads=2", "num_layers=1", "num_decoder_layers=1"]
    folder, _ = run_recipe(
        "finetune",
        tmp_path,
        "experiment=seq2seq",
        *QUICK,
        *(f"model.config.{size}" for size in sizes),
        "optimizer.lr=0.5",
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert 0 <= metrics["test/exact_match"] <= 1
    assert metrics["test/character_error_rate"] > 0
    assert metrics["test/loss"] < metrics["test/loss, before"]


@pytest.mark.slow
def test_digits_reach_95_percent(tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, "experiment=digits", "trainer.enable_progress_bar=false")
    assert json.loads((folder / "report" / "metrics.json").read_text())["test/accuracy"] >= 0.95


@pytest.mark.slow
def test_text_classification_learns(tmp_path: Path) -> None:
    folder, printed = run_recipe(
        "finetune", tmp_path, "experiment=text_classification", "trainer.enable_progress_bar=false"
    )
    metrics = json.loads((folder / "report" / "metrics.json").read_text())
    assert 0.4 < metrics["test/majority_class_accuracy"] < 0.55
    assert metrics["test/accuracy"] > metrics["test/majority_class_accuracy"] + 0.25
    assert "test/majority_class_accuracy" in printed


def test_digits_run(tmp_path: Path) -> None:
    folder, _ = run_recipe("finetune", tmp_path, "experiment=digits", *QUICK, "lora=none")
    assert ViTForImageClassification.from_pretrained(folder / "model").config.num_labels == 10


# --- data -------------------------------------------------------------------------------------------------------------


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


ANY_HEAD = [
    "task=any_head",
    "data=module",
    f"data.module._target_={__name__}.Batches",
    "+data.module.head=AutoModelForMaskedLM",
]


def test_sequences_are_no_longer_than_the_models_context(llama: str, tmp_path: Path) -> None:
    """Unless a length is asked for, which is an error of its own (below)."""
    shorter = [setting for setting in TEXT if not setting.startswith("task.sequence_length")]
    run, printed = run_recipe("finetune", tmp_path, *shorter, "test_before=false", f"model.path={llama}")
    assert "task.sequence_length=32, the model's context, in place of 128" in printed
    path = f"model.path={run}/checkpoints/last.ckpt"
    _, printed = run_recipe("inference", tmp_path, "mode=evaluate", path, "hydra.run.dir=evaluation")
    assert "float32" in printed  # though the run's record says 128


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["model.path=missing.ckpt"], "no such file or folder"),
        (["model.base=null"], "there is no model to start from"),
        (["task=text_classification"], "this task needs data with `labelled`, and what was chosen has documents"),
        (["trainer.max_steps=0"], "trainer.max_steps=0 must be a positive whole number"),
        (["optimizer.lr=-1"], "optimizer.lr=-1 must be a positive number"),
        (["ckpt_path=missing.ckpt"], "ckpt_path=missing.ckpt: no such file"),
        (["model.path=LLAMA", "task.sequence_length=64"], "longer than the model's context of 32 tokens"),
        (
            ["model.path=LLAMA", "task.sequence_length=16", "model.freeze=[nothing]"],
            "model.freeze: 'nothing' matches no",
        ),
        (["model.path=LLAMA", "task.sequence_length=16", "lora=all_linear", "lora.target_modules=[nothing]"], "lora: "),
        (["model.path=LLAMA", "task.sequence_length=16", "lora=all_linear", "+lora.rank=2"], "lora: "),
        (["model.path=LLAMA", "task.head=AutoModelForMaskedLM"], "task.head=AutoModelForMaskedLM does not go with"),
        (
            ["model.path=LLAMA", *ANY_HEAD, "task.head=AutoModelForImageClassification"],
            "AutoModelForImageClassification does not fit a llama model; these do: AutoModel, AutoModelForCausalLM",
        ),
        (["model.path=LLAMA", *ANY_HEAD, "task.head=AutoModel"], "AutoModel computes no loss from a batch of"),
        (["model.path=LLAMA", *ANY_HEAD, "task.head=AutoModelForTokens"], "is not an auto class of transformers"),
        (
            ["model.path=LLAMA", "task=any_head", "task.head=AutoModelForTokenClassification"],
            "needs data with `module`",
        ),
        (["model.path=LLAMA", "+model.changes.dropout_rate=1"], "has no setting dropout_rate"),
    ],
)
def test_bad_input_is_one_clear_message(settings: list[str], message: str, llama: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as raised:
        run_recipe("finetune", tmp_path, *[setting.replace("LLAMA", llama) for setting in settings])
    assert message in str(raised.value)
    assert str(raised.value).startswith("error: ")
