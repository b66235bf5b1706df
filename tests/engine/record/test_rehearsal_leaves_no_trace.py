"""What a rehearsal leaves as it is beside the numbers: modes, the graph, what can't be copied; and refusals."""

import gc
import warnings
import weakref

import pytest
import torch
import torch.nn.functional as F
from support.rehearsed import WIDTH, Base, CountSteps, check, fit, same
from torch import nn

from lightning_unitscale.engine.record.rehearsal import rehearsal


def test_mixed_precision_is_the_trainers():
    class Seen(Base):
        def loss(self, batch):
            assert self.net(batch).dtype == torch.bfloat16
            return super().loss(batch)

    check(Seen, precision="bf16-mixed")


def test_evaluation_mode_of_parts_is_kept():
    class Frozen(Base):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Sequential(nn.BatchNorm1d(WIDTH), nn.Dropout(0.5))

        def on_train_start(self):
            self.backbone.eval()

        def loss(self, batch):
            assert self.training
            assert not self.backbone[0].training
            return super().loss(self.backbone(batch))

    check(Frozen)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_hugging_face_model_with_dropout(family):
    import transformers

    class Language(Base):
        def __init__(self):
            super().__init__()
            if family == "gpt2":
                config = transformers.GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=32, n_positions=16)
                self.net = transformers.GPT2LMHeadModel(config)
            else:
                sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
                config = transformers.LlamaConfig(**sizes, vocab_size=32, attention_dropout=0.5)
                self.net = transformers.LlamaForCausalLM(config)
            self.net.train()
            self.net.gradient_checkpointing_enable()
            self.cache = None

        def loss(self, batch):
            tokens = (batch.abs() * 10).long() % 32
            self.cache = self.net(tokens, use_cache=False).logits
            return self.net(tokens, labels=tokens).loss

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Can't be copied")
        check(Language)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.norm, self.cache, self.count = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), [], 0

    def forward(self, x):
        self.count += 1
        self.net.weight.data.mul_(0.5)
        self.cache.append(F.dropout(self.norm(self.net(x))))
        return self.cache[-1].square().mean()


def plain_facts(module):
    gradients = [parameter.grad for parameter in module.parameters()]
    state = {key: value.clone() for key, value in module.state_dict().items()}
    return [state, gradients, module.count, list(module.cache), torch.get_rng_state()]


@pytest.mark.parametrize("error", [False, True])
def test_plain_module_and_exceptions(error):
    module, batch = Plain(), torch.randn(3, WIDTH)
    module.net.weight.grad = gradient = torch.ones(WIDTH, WIDTH)
    before, attributes = plain_facts(module), module.__dict__
    with pytest.raises(KeyError) if error else warnings.catch_warnings(), rehearsal(module) as run:
        module(batch).backward()
        assert module.count == 1
        assert module.net.weight.grad is not gradient
        if error:
            raise KeyError
    same(before, plain_facts(module))
    assert module.net.weight.grad is gradient
    assert module.__dict__ is attributes
    assert len(run.losses) == 1
    module(batch).backward()
    assert gradient.ne(1).any(), "the real backward adds to the same gradient"


def test_the_graph_is_let_go():
    module = Plain()
    with rehearsal(module) as run:
        loss = module(torch.randn(3, WIDTH))
        loss.backward()
        activation = weakref.ref(module.cache[0])
        del loss
        assert activation() is not None
    gc.collect()
    assert activation() is None
    assert run.losses[0].grad_fn is None


def test_recorded_gradients_stay_out_of_the_callers_recording():
    class Seen(torch.overrides.TorchFunctionMode):
        names: list[str] = []  # noqa: RUF012

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    module = nn.Linear(WIDTH, 1)
    with rehearsal(module), Seen() as seen:
        module(torch.ones(1, WIDTH)).sum().backward()
        assert seen.names[-2:] == ["linear", "sum"]
        assert module.weight.grad.eq(0).all()


def test_hidden_modules_and_callbacks_stay_themselves():
    module = nn.Module()
    module.watcher = watcher = CountSteps()
    module.inner = nn.Linear(WIDTH, WIDTH)
    module.hidden = {"a": [module.inner, nn.Dropout()]}
    module.hidden["a"][1].count = 0
    dropout = module.hidden["a"][1]
    with rehearsal(module):
        assert module.hidden["a"][0] is module.inner
        assert module.hidden["a"][1] is dropout
        assert module.watcher is watcher
        dropout.count += 1
        watcher.steps += 1
        module.hidden.clear()
    assert dropout.count == 0
    assert watcher.steps == 0
    assert module.hidden["a"][0] is module.inner


def test_what_cannot_be_copied_is_named_and_shared():
    module = nn.Sequential(nn.Linear(1, 1))
    module[0].stream = {"rest": [1], "endless": (number for number in range(9))}
    with pytest.warns(UserWarning, match=r"0\.stream"), rehearsal(module):
        assert next(module[0].stream["endless"]) == 0
        module[0].stream["rest"].append(2)
    assert module[0].stream["rest"] == [1], "only the part that can't be copied is shared"


def test_a_step_on_the_loader_is_refused():
    class Iterates(Base):
        def training_step(self, dataloader_iter):
            batch, *_ = next(dataloader_iter)
            return self.loss(batch)

    with pytest.raises(NotImplementedError, match="dataloader_iter"):
        fit(Iterates, rehearse=True)


def test_misuse_is_named():
    module = nn.Linear(1, 1)
    with rehearsal(module) as run, pytest.raises(RuntimeError, match="LightningModule"):
        run.training_step(None, 0)
    with pytest.raises(RuntimeError, match="over"):
        run.training_step(None, 0)
    with pytest.raises(ValueError, match="weight"), rehearsal(nn.LazyLinear(1)):
        pass
